"""Seconds to compile the whole train step for TPU, with our kernels and without, one after the other in fresh processes.

    python -m tools.bench.compile_time         # Mixtral 8x7B, two of its layers, on v5p:2x2x1, fsdp 4, 4096 tokens a device
    python -m tools.bench.compile_time --layers=32 --topology=v5p:4x4x4

The layers are scanned, so their number is one of memory, not of the program's length. Needs libtpu, no TPU.
`auto` is what the chooser takes, `ragged_dot` the same step with XLA's kernel instead of ours.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time


def _child(size: str, layers: int, topology: str, backend: str) -> None:
  from moe import gin_config
  from moe import sharding
  from moe import step
  from tools import compile_check

  devices = compile_check.devices_of(topology)
  flags = {"Experts.backend": f'"{backend}"', "Mesh.data": 1, "Mesh.fsdp": len(devices), "Data.batch_sequences": len(devices),
           "Data.sequence_tokens": 4096, "Train.micro_batches": 1, "Model.compute_dtype": '"bfloat16"', "Model.remat": '"full"',
           "Model.num_layers": layers}
  files = [gin_config.CONFIGS / "run/quickstart.gin", gin_config.CONFIGS / f"size/{size}.gin"]
  run = gin_config.resolve(files, [f"{name}={value}" for name, value in flags.items()], allow_unused=True).run
  mesh = sharding.make_mesh(run.mesh, devices)
  begin = time.perf_counter()
  text = step.compile_step(run, mesh).as_text()
  print(f"RESULT {time.perf_counter() - begin:.1f} {'fused kernels' if 'experts_hidden' in text else 'ragged dot'}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="mixtral_8x7b")
  parser.add_argument("--topology", default="v5p:2x2x1")
  parser.add_argument("--layers", type=int, default=2)
  parser.add_argument("--rounds", type=int, default=1)
  parser.add_argument("--child", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    _child(arguments.size, arguments.layers, arguments.topology, arguments.child)
    return
  environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
  for _ in range(arguments.rounds):
    seconds = {}
    for backend in ("ragged_dot", "auto"):
      command = [sys.executable, "-m", "tools.bench.compile_time", f"--size={arguments.size}",
                 f"--layers={arguments.layers}", f"--topology={arguments.topology}", f"--child={backend}"]
      done = subprocess.run(command, capture_output=True, text=True, env=environment)
      found = re.search(r"RESULT ([\d.]+) (.*)", done.stdout)
      if not found:
        sys.exit(f"{backend} did not compile: {done.stderr.strip().splitlines()[-1][:500]}")
      seconds[backend] = float(found[1])
      print(f"{arguments.size}, {arguments.topology}, {backend} ({found[2]}): {found[1]} s", flush=True)
    print(f"with our kernels {seconds['auto'] / seconds['ragged_dot']:.2f} times the seconds without")


if __name__ == "__main__":
  main()
