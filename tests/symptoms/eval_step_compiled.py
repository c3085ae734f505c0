"""Compiles the evaluation step of a run config for its pod: memory a device, and the forecast (needs jax[tpu]).

PYTHONPATH=CHECKOUT python tests/symptoms/eval_step_compiled.py deepseek_v3_v5p_1024
"""

import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")

from moe import experts, gin_config, hardware, sharding, step
from moe.model import Batch
from tools import compile_check, hlo


def lowered(run, mesh):
  """The evaluation step before it had a function that lowers it."""
  rows = (run.data.batch_sequences // run.train.micro_batches, run.data.sequence_tokens)
  placed = sharding.batch_sharding(mesh)
  ids, scored = (jax.ShapeDtypeStruct(rows, dtype, sharding=placed) for dtype in (jnp.int32, jnp.bool_))
  with jax.set_mesh(mesh):
    return step.jit_eval_step(run, mesh).lower(step.abstract_state(run, mesh).params, Batch(*[ids] * 4), scored)


path = gin_config.CONFIGS / "run" / f"{sys.argv[1]}.gin"
run = gin_config.resolve([path]).run
topology, slices = compile_check.topology_in(path)
chip = hardware.topology(topology).chip
mesh = sharding.make_mesh(run.mesh, compile_check.devices_of(topology, slices))

new = hasattr(step, "compile_eval_step")
compiled = step.compile_eval_step(run, mesh) if new else lowered(run, mesh).compile()

memory = compiled.memory_analysis()
program = hlo.parse(compiled.as_text())
walked = hlo.walk(program, chip, mesh, experts.filled_rows(run, mesh))
print(f"{sys.argv[1]}: peak {memory.peak_memory_in_bytes / 1e9:.2f} of {chip.hbm_bytes / 1e9:.2f} GB, "
      f"temporaries {memory.temp_size_in_bytes / 1e9:.2f} GB; forecast {walked.seconds:.3f} s: compute {walked.compute:.3f}, "
      f"memory {walked.memory:.3f}, network {walked.network:.3f}, of it exposed {walked.exposed:.3f}")
for row in hlo.summary(walked.collectives):
  print(f"  {row['kind']} over {' x '.join(row['axes'])}: {row['bytes'] / 1e9:.3f} GB in {row['count']}, "
        f"{row['seconds'] * 1e3:.1f} ms, exposed {row['exposed_seconds'] * 1e3:.1f} ms")
