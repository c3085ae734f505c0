"""Capacity: how many tokens of a sequence one expert may take, and which of them are dropped."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moe.routing.gates import Choice


def slots(factor: float, top_k: int, sequence_tokens: int, num_experts: int) -> int:
  """C = ceil(factor x K x S / E), the token slots of one expert in one sequence."""
  return math.ceil(factor * top_k * sequence_tokens / num_experts)


def keep(choice: Choice, mask: jax.Array, num_slots: int, policy: str) -> jax.Array:
  """Which selections keep a slot. Only selections compete: a token that fits is never dropped.

  `position`: earlier tokens first, so a token's fate does not depend on later ones. `probability`: higher router
  probability first, ties by position; this looks at later tokens of the sequence.

  Args:
    choice: gate output, arrays [B, S, ...]; each row of B is one drop group.
    mask: [B, S] bool, tokens that exist.
    num_slots: C.
    policy: position | probability.

  Returns:
    [B, S, K] bool; False where the token is padding.

  Raises:
    ValueError: unknown policy.
  """
  num_experts = choice.probabilities.shape[-1]
  one_hot = jax.nn.one_hot(choice.experts, num_experts, dtype=jnp.int32) * mask[..., None, None]  # [B, S, K, E]
  selected = one_hot.sum(-2)  # [B, S, E], 0 or 1
  if policy == "position":
    rank = jnp.cumsum(selected, axis=1) - 1
  elif policy == "probability":
    score = jnp.where(selected > 0, choice.probabilities, -jnp.inf)
    order = jnp.argsort(-score, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
  else:
    raise ValueError(f"drop policy {policy!r} is not 'position' or 'probability'")
  fits = (rank < num_slots).astype(jnp.int32)
  return jnp.sum(one_hot * fits[..., None, :], -1) > 0
