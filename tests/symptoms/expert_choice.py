"""Memory of expert choice over a micro-batch on CPU: the gate alone, value and gradient.

PYTHONPATH=CHECKOUT python tests/symptoms/expert_choice.py [ROWS LENGTH EXPERTS TOP_K]
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import Router
from moe.routing import gates

rows, length, experts, top_k = (int(argument) for argument in (sys.argv[1:] or (32, 512, 8, 2)))
tokens = rows * length
capacity = top_k * tokens // experts
router = Router(gate="expert_choice", allow_lookahead=True, balance_coef=0.0)
scores = jnp.asarray(np.random.default_rng(0).normal(size=(rows, length, experts)), jnp.float32)
mask = jnp.ones((rows, length), bool)


def loss(scores):
  gated = gates.expert_choice(scores, router, mask, capacity, "microbatch")
  return jnp.sum(jnp.sin(gated.weights))


compiled = jax.jit(jax.value_and_grad(loss)).lower(scores).compile()
value, gradient = compiled(scores)
print(f"{tokens} tokens, {experts} experts: {compiled.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB of temporaries; "
      f"value {value:.6f}, gradient norm {jnp.linalg.norm(gradient):.6f}")
