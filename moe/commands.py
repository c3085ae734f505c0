"""The installed commands: `moe-build-data` runs tools/build_data.py.

An installation keeps the tools within its own folder (moe/shipped/tools), so that no package called `tools` lies among
everybody's.
"""

from __future__ import annotations

import importlib
import pathlib
import sys


def main() -> None:
  """Named by the program: moe-X-Y is tools.x_y."""
  here = pathlib.Path(__file__).resolve().parent
  shipped = here / "shipped"
  sys.path.insert(0, str(shipped if shipped.is_dir() else here.parent))
  name = pathlib.Path(sys.argv[0]).stem.removeprefix("moe-").replace("-", "_")
  importlib.import_module("tools.terminal").run(importlib.import_module(f"tools.{name}").main)
