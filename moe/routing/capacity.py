"""Capacity: how many tokens of a group one expert may take, and which of them are dropped."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moe.routing.gates import Choice


def slots(factor: float, top_k: int, group_tokens: int, num_experts: int) -> int:
  """C = ceil(factor x K x T / E), the token slots of one expert in one group of T tokens."""
  return math.ceil(factor * top_k * group_tokens / num_experts)


def keep(choice: Choice, mask: jax.Array, num_slots: int, policy: str, group: str = "sequence",
         priority: jax.Array | None = None) -> jax.Array:
  """Which selections keep a slot. Only selections compete: a token that fits is never dropped.

  `position`: earlier tokens first, so within its sequence a token's fate does not depend on later ones. `probability`:
  higher router probability first, ties by position. `random`: higher `priority` first, the same for all choices of a
  token; without priorities (evaluation) by position. The last two look at later tokens.

  Args:
    choice: gate output, arrays [B, S, ...].
    mask: [B, S] bool, tokens that exist.
    num_slots: C.
    policy: position | probability | random.
    group: sequence (each row of B by itself) | microbatch (all rows together).
    priority: [B, S] float32.

  Returns:
    [B, S, K] bool; False where the token is padding.

  Raises:
    ValueError: unknown policy.
  """
  num_experts = choice.probabilities.shape[-1]
  one_hot = jax.nn.one_hot(choice.experts, num_experts, dtype=jnp.int32) * mask[..., None, None]  # [B, S, K, E]
  selected = one_hot.sum(-2)  # [B, S, E], 0 or 1

  def grouped(x):
    return x.reshape(1, -1, x.shape[-1]) if group == "microbatch" else x

  if policy == "position" or (policy == "random" and priority is None):
    rank = jnp.cumsum(grouped(selected), axis=1) - 1
  elif policy in ("probability", "random"):
    score = choice.probabilities if policy == "probability" else priority[..., None]
    order = jnp.argsort(grouped(jnp.where(selected > 0, -score, jnp.inf)), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
  else:
    raise ValueError(f"drop policy {policy!r} is not 'position', 'probability' or 'random'")
  fits = (rank < num_slots).astype(jnp.int32).reshape(selected.shape)
  return jnp.sum(one_hot * fits[..., None, :], -1) > 0
