"""Compiles the evaluation step of a run config for its pod and prints HBM and the forecast. PYTHONPATH decides whose."""
# ruff: noqa: E501, UP031


import pathlib
import sys
import time
import jax

jax.config.update("jax_platforms", "cpu")
from moe import experts, gin_config, hardware, sharding, step as step_lib
from tools import compile_check, hlo
import jax.numpy as jnp
from moe.model import Batch

name = sys.argv[1]
path = gin_config.CONFIGS / "run" / f"{name}.gin"
run = gin_config.resolve([path]).run
topology, slices = compile_check.topology_in(path)
chip = hardware.topology(topology).chip
mesh = sharding.make_mesh(run.mesh, compile_check.devices_of(topology, slices))
begin = time.perf_counter()
try:
  if hasattr(step_lib, "compile_eval_step"):
    compiled = step_lib.compile_eval_step(run, mesh)
  else:
    rows = (run.data.batch_sequences // run.train.micro_batches, run.data.sequence_tokens)
    field = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=sharding.batch_sharding(mesh))
    scored = jax.ShapeDtypeStruct(rows, jnp.bool_, sharding=sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
      compiled = (
        step_lib.jit_eval_step(run, mesh)
        .lower(step_lib.abstract_state(run, mesh).params, Batch(*[field] * 4), scored)
        .compile()
      )
except jax.errors.JaxRuntimeError as error:
  print(name, "DOES NOT COMPILE:", " ".join(str(error).split())[:1500])
  sys.exit()
seconds = time.perf_counter() - begin
text = compiled.as_text()
if len(sys.argv) > 2:
  pathlib.Path(sys.argv[2]).write_text(text)
memory, program = compiled.memory_analysis(), hlo.parse(text)
walked = hlo.walk(program, chip, mesh, experts.filled_rows(run, mesh))
print(
  f"{name}: compiled in {seconds:.0f} s; peak {memory.peak_memory_in_bytes / 1e9:.2f} GB (arguments "
  f"{memory.argument_size_in_bytes / 1e9:.2f}, outputs {memory.output_size_in_bytes / 1e9:.2f}, temporaries {memory.temp_size_in_bytes / 1e9:.2f}) "
  f"of {chip.hbm_bytes / 1e9:.2f}; forecast {walked.seconds:.3f} s: compute {walked.compute:.3f} memory {walked.memory:.3f} "
  f"network {walked.network:.3f} exposed {walked.exposed:.3f}; unknown trips {walked.unknown_trips}"
)
for b, s, n in hlo.largest(program):
  print(f"   {b / 1e9:8.2f} GB {s} {n[-90:]}")
for row in hlo.summary(walked.collectives):
  print(
    "  ",
    row["kind"],
    "x".join(row["axes"]),
    f"{row['bytes'] / 1e9:.3f} GB in {row['count']}, {row['seconds'] * 1e3:.1f} ms, exposed {row['exposed_seconds'] * 1e3:.1f}",
  )
