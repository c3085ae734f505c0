"""Draws runs: `python -m tools.report RUN_DIR [RUN_DIR ...] [--out=DIR] [--watch]`

One run: index.html and PNGs in RUN_DIR/report. Several: their curves over each other, and what differs in their configs.
`--watch` serves it on this machine and draws it again while the run goes on.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import sys
import tempfile
import threading
import time

from etils import epath

from moe import jsonl
from moe import report
from moe.errors import UserError, storage_errors
from tools import terminal


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("run_dir", nargs="+")
  parser.add_argument("--out", metavar="DIR", help="where to (default: RUN_DIR/report, for several report-of-runs)")
  parser.add_argument("--watch", action="store_true", help="serve it on 127.0.0.1 until Control-C")
  parser.add_argument("--port", type=int, default=8321)
  parser.add_argument("--seconds", type=int, default=15, help="with --watch: between two drawings")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args(argv)
  if arguments.watch:
    return watch(arguments)
  with terminal.progress(f"drawing {', '.join(arguments.run_dir)}"):
    page = draw(arguments)
  terminal.as_json({"page": str(page)}) if arguments.json else print(page)
  return terminal.FINE


def draw(arguments, refresh_seconds: int = 0) -> epath.Path:
  if len(arguments.run_dir) == 1:
    return report.write(arguments.run_dir[0], arguments.out, refresh_seconds)
  return report.compare(arguments.run_dir, arguments.out or "report-of-runs", refresh_seconds)


class _Quiet(http.server.SimpleHTTPRequestHandler):

  def log_message(self, *_):
    pass


def watch(arguments) -> int:
  """Serves the page on loopback, and draws it again when there are new records."""
  if "://" in (arguments.out or (arguments.run_dir[0] if len(arguments.run_dir) == 1 else "")):
    arguments.out = tempfile.mkdtemp(prefix="moe-report-")  # pages are served from a local folder
  files = [epath.Path(path) / "metrics.jsonl" for path in arguments.run_dir]
  seen = [jsonl.version(path) for path in files]
  page = draw(arguments, arguments.seconds)
  handler = functools.partial(_Quiet, directory=str(page.parent))
  try:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", arguments.port), handler)
  except OSError as error:
    raise UserError(f"--port={arguments.port}: {error.strerror}; choose another") from error
  threading.Thread(target=server.serve_forever, daemon=True).start()
  print(f"http://127.0.0.1:{server.server_address[1]}/ (Control-C ends it)", flush=True)
  while True:
    time.sleep(arguments.seconds)
    try:
      now = [jsonl.version(path) for path in files]
      if now != seen:
        draw(arguments, arguments.seconds)
      seen = now
    except (report.ReportError, ValueError, *storage_errors()) as error:  # a line being written, a store that is away
      print(error, file=sys.stderr)


if __name__ == "__main__":
  terminal.run(main)
