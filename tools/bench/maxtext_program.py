"""MaxText's train step compiled for a TPU topology and read by the same model as ours (tools/hlo.py): one JSON line.

    PYTHON_OF_MAXTEXT -m tools.bench.maxtext_program --topology=v6e-64 -- model_name=mixtral-8x7b per_device_batch_size=4 ...

Runs in MaxText's own environment (`pip install maxtext[tpu]`, Python >= 3.12); what follows `--` are its settings. Nothing runs
on a TPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from moe import hardware
from tools import hlo

# What every comparison fixes, so that both programs do the same work.
_FIXED = ("run_name=compared", "base_output_directory=/tmp/maxtext_compared", "dataset_type=synthetic",
          "enable_checkpointing=false", "max_target_length=4096", "opt_type=adamw", "dtype=bfloat16", "weight_dtype=float32",
          "attention=flash", "skip_jax_distributed_system=true", "allow_split_physical_axes=true", "use_iota_embed=true",
          "remat_policy=full")


def compiled_step(topology: str, settings: list[str]):
  """(compiled step, seconds) of MaxText's own ahead-of-time path."""
  os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu", DECOUPLE_GCLOUD="TRUE")
  from maxtext.trainers.pre_train import train_compile
  kept, original = [], train_compile.jit_and_compile

  def keep(*args, **kwargs):
    kept.append(original(*args, **kwargs))
    return kept[-1]

  train_compile.jit_and_compile = keep
  base = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(train_compile.__file__))), "configs", "base.yml")
  given = {s.split("=")[0] for s in settings}
  fixed = [s for s in _FIXED if s.split("=")[0] not in given]
  begin = time.perf_counter()
  train_compile.main(["", base, f"compile_topology={topology}", "compile_topology_num_slices=1", *fixed, *settings])
  return kept[0], time.perf_counter() - begin


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", required=True, help="MaxText's name, such as v6e-64")
  parser.add_argument("--hlo", help="keep the compiled program in this file")
  parser.add_argument("--filled", type=float, default=1.0, help="share of the rows of its grouped matmuls that hold something")
  arguments, settings = parser.parse_known_args()
  compiled, seconds = compiled_step(arguments.topology, [s for s in settings if s != "--"])
  text = compiled.as_text()
  if arguments.hlo:
    with open(arguments.hlo, "w") as file:
      file.write(text)
  mesh = next((s.mesh for s in _shardings(compiled) if hasattr(s, "mesh")), None)
  sizes = dict(mesh.shape) if mesh is not None else {}
  memory, program = compiled.memory_analysis(), hlo.parse(text)
  walk = hlo.walk(program, hardware.CHIPS[arguments.topology.split("-")[0]], mesh or {}, arguments.filled)
  print("RESULT " + json.dumps({
      "peak_bytes": memory.peak_memory_in_bytes, "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes, "mesh": {a: n for a, n in sizes.items() if n > 1},
      "collectives": hlo.summary(walk.collectives), "overlapped_share": hlo.overlapped_share(walk.collectives),
      "step_seconds": {"predicted": walk.seconds, "compute": walk.compute, "memory": walk.memory, "network": walk.network,
                       "network_exposed": walk.exposed}, "unknown_trips": walk.unknown_trips, "compile_seconds": seconds}))


def _shardings(compiled):
  import jax
  return jax.tree.leaves(compiled.input_shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))


if __name__ == "__main__":
  sys.exit(main())
