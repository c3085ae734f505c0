"""The largest gradient norm that the guard accepts, before and after spikes of 1,000; and when a lasting change is accepted.

PYTHONPATH=CHECKOUT python tests/symptoms/guard.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe import step

judge = jax.jit(functools.partial(step._judge, 8.0))


def calm():
  guard, rng = step.Guard(jnp.zeros(128), jnp.zeros(128), jnp.int32(0), jnp.int32(0)), np.random.default_rng(0)
  for _ in range(200):
    guard, _ = judge(guard, jnp.float32(3 + 0.1 * rng.normal()), jnp.float32(1 + 0.05 * rng.normal()))
  return guard


def limit(guard) -> float:
  low, high = 0.0, 1e6
  while high - low > 1e-4 * high:
    middle = (low + high) / 2
    low, high = (middle, high) if judge(guard, jnp.float32(3.0), jnp.float32(middle))[1] else (low, middle)
  return high


guard = calm()
print(f"limit of the norm (calm: 1 +- 0.05) before spikes {limit(guard):.3g}", end="")
for spike in range(1, 11):
  guard, _ = judge(guard, jnp.float32(3.0), jnp.float32(1000.0))
  if spike in (1, 2, 10):
    print(f", after {spike} of 1,000: {limit(guard):.4g}", end="")
print()
for factor in (3, 10, 100):
  guard, refused, rng = calm(), 0, np.random.default_rng(1)
  for _ in range(40):
    guard, accepted = judge(guard, jnp.float32(3.0), jnp.float32(factor * (1 + 0.05 * rng.normal())))
    refused += not accepted
  print(f"a lasting change of the norm by {factor}: {refused} steps refused; training stops after 20 in a row")
