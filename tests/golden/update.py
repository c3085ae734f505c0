"""Rewrites the golden resolved text of every run config: `python tests/golden/update.py`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from moe import gin_config

for path in sorted((gin_config.CONFIGS / "run").glob("*.gin")):
  (pathlib.Path(__file__).parent / f"{path.stem}.txt").write_text(gin_config.resolve([path]).operative)
