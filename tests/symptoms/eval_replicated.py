"""What every device holds in the evaluation step on 8 devices (fsdp 4 x expert 2), by the compiled program's shapes."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
import jax
import jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")
from tests import small
from moe import sharding, step as step_lib
from moe.model import Batch

run = small.run(batch=16, length=256, mesh={"fsdp": 4, "expert": 2}, model={"experts": {"num_experts": 16}, "num_layers": 3})
mesh = sharding.make_mesh(run.mesh, jax.devices())
if hasattr(step_lib, "compile_eval_step"):
  text = step_lib.compile_eval_step(run, mesh).as_text()
else:
  f, s = (jax.ShapeDtypeStruct((16, 256), d, sharding=sharding.batch_sharding(mesh)) for d in (jnp.int32, jnp.bool_))
  with jax.set_mesh(mesh):
    text = (
      step_lib.jit_eval_step(run, mesh).lower(step_lib.abstract_state(run, mesh).params, Batch(*[f] * 4), s).compile().as_text()
    )
for what, shape in (
  ("joint counts [L,L,E,E] whole", "[3,3,16,16]"),
  ("experts chosen [L,B,S,K] of all rows", "[3,16,256,2]"),
  ("experts chosen of a device's rows", "[3,2,256,2]"),
  ("bins of all 16 rows", "[16,3,128,16]"),
  ("labels of a row of 128 tokens", "[3,128,16,16]"),
):
  print(f"{what:45s} {shape in text}")
