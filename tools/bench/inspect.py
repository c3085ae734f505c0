"""Time and memory of every verb of tools.inspect_checkpoint on a large checkpoint: `python -m tools.bench.inspect [--gb=10]`

Writes a synthetic run (random parameters and second moments of a MoE model, as the trainer lays them out), then runs each verb
as a process of its own and reads the kernel's account of it; beside that, Orbax restoring all of it as NumPy arrays.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from moe import checkpoint
from moe import config
from moe import gin_config
from moe import hugging_face
from moe import stored

_ORBAX = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp
folder = sys.argv[1] + "/state"
with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
  tree = saver.metadata(folder).item_metadata.tree
  arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  saver.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))
"""
_VERBS = (("ls",), ("summary",), ("tree",), ("config",), ("cat", "params.layers.experts.moe.gate[0,5,:4,:4]"), ("stats",),
          ("stats", "--experts"), ("experts",), ("verify",), ("diff", None))


class Random:
  """Normal numbers made when they are read; the same for the same block."""

  kind = "orbax"

  def __init__(self, model: config.Model):
    sizes, found = hugging_face.axis_sizes(model), {}
    for place in hugging_face.places(model, hugging_face.FAMILIES["olmoe"]):
      lead = (len(place.layers),) if place.layers is not None else ()
      found[place.leaf] = lead + tuple(sizes[axis] for axis in place.part.shape.split())
    found |= {f"opt_state.1.{moment}.{name.removeprefix('params.')}": shape for name, shape in dict(found).items()
              for moment in ("mu", "nu")}
    self.leaves = {name: stored.Leaf(name, shape, "float32", tuple(1 if i < len(shape) - 2 else n for i, n in enumerate(shape)))
                   for name, shape in sorted(found.items())}

  def read(self, name, begin, end):
    rng = np.random.default_rng(abs(hash((name, begin))) % (1 << 32))
    x = rng.standard_normal([e - b for b, e in zip(begin, end)], np.float32)
    return np.square(x) if ".nu." in name else x


def write(folder: pathlib.Path, run: config.Run) -> None:
  checkpoint.write(folder / "checkpoints" / "1", Random(run.model), run)
  usage = resource.getrusage(resource.RUSAGE_SELF)
  anonymous = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
  print(f"writing: peak resident {usage.ru_maxrss * 1024 / 1e9:.1f} GB, files in memory counted; at its end {anonymous}",
        flush=True)


def measured(command: list[str]) -> tuple[float, float, int]:
  """(seconds, peak resident GB, exit code) of a process."""
  begin = time.perf_counter()
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=pathlib.Path(__file__).parents[2])
  _, status, usage = os.wait4(process.pid, 0)
  return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e9, os.waitstatus_to_exitcode(status)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.bench.inspect", description=__doc__.splitlines()[0])
  parser.add_argument("--gb", type=float, default=10.0)
  parser.add_argument("--folder", help="where to write it (default: a temporary one)")
  parser.add_argument("--json", type=pathlib.Path)
  arguments = parser.parse_args(argv)
  run = gin_config.resolve([gin_config.CONFIGS / "run" / "olmoe_1b_7b_v5e_16.gin"], allow_unused=True).run
  per_layer = 12 * sum(np.prod(leaf.shape[1:]) for leaf in Random(run.model).leaves.values()
                       if leaf.name.startswith("params.layers")) / 1e9
  layers = max(round((arguments.gb - 2.5) / per_layer), 1)
  run = gin_config.resolve([gin_config.CONFIGS / "run" / "olmoe_1b_7b_v5e_16.gin"], [f"--gin.Model.num_layers={layers}"],
                           allow_unused=True).run
  source, rows = Random(run.model), []
  folder = pathlib.Path(arguments.folder or tempfile.mkdtemp(prefix="moe-inspect-"))
  try:
    begin = time.perf_counter()
    # In a process of its own: what a process had resident is counted for its children too.
    written = multiprocessing.get_context("spawn").Process(target=write, args=(folder, run))
    written.start()
    written.join()
    if written.exitcode:
      return 1
    size = sum(leaf.bytes for leaf in source.leaves.values()) / 1e9
    print(f"{size:.1f} GB in {len(source.leaves)} leaves, {layers} layers, written in {time.perf_counter() - begin:.0f} s",
          flush=True)
    step = str(folder / "checkpoints" / "1")
    for verb in _VERBS:
      extra = [step if part is None else part for part in verb[1:]]
      seconds, peak, code = measured([sys.executable, "-m", "tools.inspect_checkpoint", verb[0], step, *extra])
      rows.append({"verb": " ".join(p or "itself" for p in verb), "seconds": seconds, "peak_gb": peak, "code": code})
      print(f"{rows[-1]['verb']:50} {seconds:8.1f} s  peak {peak:5.2f} GB  {size / seconds:7.2f} GB/s  exit code {code}",
            flush=True)
    seconds, peak, code = measured([sys.executable, "-c", _ORBAX, step])
    rows.append({"verb": "Orbax restore", "seconds": seconds, "peak_gb": peak, "code": code})
    print(f"{'Orbax: restore as NumPy arrays':50} {seconds:8.1f} s  peak {peak:5.2f} GB  {size / seconds:7.2f} GB/s  "
          f"exit code {code}")
  finally:
    if not arguments.folder:
      shutil.rmtree(folder, ignore_errors=True)
  if arguments.json:
    arguments.json.write_text(json.dumps({"gb": size, "rows": rows}, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
