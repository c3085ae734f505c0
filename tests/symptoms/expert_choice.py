"""Peak memory of expert choice over a micro-batch on CPU: the gate alone, value and gradient."""
# ruff: noqa: E501, UP031


import resource
import sys
import time
import jax
import jax.numpy as jnp
import numpy as np
from moe.config import Router
from moe.routing import gates

B, S, E, K = (int(a) for a in (sys.argv[1:] or (32, 512, 8, 2)))
T = B * S
x = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, E)), jnp.float32)
mask = jnp.ones((B, S), bool)


def f(x):
  return jnp.sum(
    jnp.sin(
      gates.expert_choice(
        x, Router(gate="expert_choice", allow_lookahead=True, balance_coef=0.0), mask, K * T // E, "microbatch"
      ).weights
    )
  )


g = jax.jit(jax.value_and_grad(f)).lower(x).compile()
m = g.memory_analysis()
print(f"{T} tokens, {E} experts: temporaries {m.temp_size_in_bytes / 1e6:.1f} MB")
b = time.perf_counter()
v = g(x)
jax.block_until_ready(v)
print(
  "value %.6f, gradient norm %.6f, %.2f s, peak RSS %.2f GB"
  % (v[0], jnp.linalg.norm(v[1]), time.perf_counter() - b, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
)
