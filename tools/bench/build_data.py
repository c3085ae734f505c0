"""MB/s of jsonl that tools.build_data turns into a domain, beside `json.loads` of the same lines alone.

    python -m tools.bench.build_data --mb=200 --repeats=5

The machine may be shared: each repeat measures all of them one after another, and ratios are taken within a repeat. MB a CPU
second, of one process that does everything, is what a shared machine can say of an idle one.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np

from moe.data import building
from moe.data import text_files
from tools import terminal

DOCUMENT_WORDS = (50, 300, 1000)  # as web pages: 0.3 to 6 kB


def write_lines(path: pathlib.Path, size: float) -> None:
  """jsonl of made-up words, about `size` bytes; a web crawl's fields beside the text."""
  rng = np.random.default_rng(0)
  letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
  words = np.array(["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(5000)])
  written = 0
  with open(path, "w") as file:
    while written < size:
      text = " ".join(words[rng.integers(0, len(words), rng.choice(DOCUMENT_WORDS))])
      row = {"text": text.replace("a ", "a\n"), "url": f"https://example.org/{written}", "meta": {"language": "en"}}
      written += file.write(json.dumps(row) + "\n")


def parse(path: pathlib.Path) -> None:
  with open(path, "rb") as file:
    for line in file:
      json.loads(line)


def build(path: pathlib.Path, workers: int) -> None:
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    building.build(text_files.Reader([str(path)]), pathlib.Path(folder) / "out", building.Options("d", workers=workers))


def timed(work, *arguments) -> tuple[float, float]:
  """Seconds, and seconds of this process's CPU."""
  began, cpu = time.perf_counter(), time.process_time()
  work(*arguments)
  return time.perf_counter() - began, time.process_time() - cpu


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--mb", type=float, default=200.0)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--workers", type=int, default=2)
  arguments = parser.parse_args()
  kinds = {"json.loads": (parse,), "build_data, one process": (build, 1),
           f"build_data, {arguments.workers} workers": (build, arguments.workers)}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "lines.jsonl"
    write_lines(path, arguments.mb * 1e6)
    mb = path.stat().st_size / 1e6
    found = {name: [] for name in kinds}
    for _ in range(arguments.repeats):
      for name, (work, *options) in kinds.items():
        found[name].append(timed(work, path, *options))
  rows = []
  for name, times in found.items():
    seconds, cpu = zip(*times)
    ratio = statistics.median(b / a for (a, _), (b, _) in zip(found["json.loads"], times))
    of_cpu = mb / statistics.median(cpu) if "workers" not in name else None
    rows.append((name, f"{mb / statistics.median(seconds):.1f}", f"{mb / min(seconds):.1f}",
                 f"{of_cpu:.1f}" if of_cpu else "", f"{ratio:.2f}"))
  title = f"{mb:.0f} MB of jsonl, {arguments.repeats} repeats, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
  terminal.table(("name", "MB/s", "best", "MB a CPU second", "seconds / json.loads"), rows, title)
  return 0


if __name__ == "__main__":
  terminal.run(main)
