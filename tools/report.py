"""Draws a run: one HTML file and PNGs in RUN_DIR/report. `python -m tools.report RUN_DIR`"""

from __future__ import annotations

import argparse

from moe import report
from tools import terminal


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__.splitlines()[0])
  parser.add_argument("run_dir")
  print(report.write(parser.parse_args(argv).run_dir))
  return 0


if __name__ == "__main__":
  terminal.run(main)
