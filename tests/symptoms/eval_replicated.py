"""What every device holds in the evaluation step on 8 devices (fsdp 4 x expert 2), by the compiled program's shapes.

PYTHONPATH=CHECKOUT python tests/symptoms/eval_replicated.py
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")

from moe import sharding, step
from moe.model import Batch
from tests import small

ROWS, LENGTH = 16, 256


def lowered(run, mesh):
  """The evaluation step before it had a function that lowers it."""
  placed = sharding.batch_sharding(mesh)
  ids, scored = (jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=placed) for dtype in (jnp.int32, jnp.bool_))
  with jax.set_mesh(mesh):
    return step.jit_eval_step(run, mesh).lower(step.abstract_state(run, mesh).params, Batch(*[ids] * 4), scored)


run = small.run(batch=ROWS, length=LENGTH, mesh={"fsdp": 4, "expert": 2},
                model={"experts": {"num_experts": 16}, "num_layers": 3})
mesh = sharding.make_mesh(run.mesh, jax.devices())
compiled = step.compile_eval_step(run, mesh) if hasattr(step, "compile_eval_step") else lowered(run, mesh).compile()

program = compiled.as_text()
for what, shape in {
  "joint counts [L,L,E,E], whole": "[3,3,16,16]",
  "experts chosen [L,B,S,K], of all rows": "[3,16,256,2]",
  "experts chosen, of the device's own rows": "[3,2,256,2]",
  "probability bins of all 16 rows": "[16,3,128,16]",
}.items():
  print(f"{what:42s} {'held' if shape in program else 'not held'}")
