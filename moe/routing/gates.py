"""Gates: router logits in, the chosen experts and their weights out. All arithmetic in float32."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.config import Router


class Choice(NamedTuple):
  """What each token chose, before any capacity limit."""

  probabilities: jax.Array  # [..., E] float32, softmax over all experts; the P of the balance loss
  experts: jax.Array  # [..., K] int32, distinct, best first
  weights: jax.Array  # [..., K] float32, what each expert's output is multiplied by


def softmax_top_k(logits: jax.Array, router: Router) -> Choice:
  """Softmax top-k gate, optionally limited to the best groups of experts.

  `softmax = "before"` takes the weights from the softmax over all experts (Demons in the Detail, Eq. 1), and makes
  them sum to 1 where `renormalize` is set (Qwen3, OLMoE's option); `"after"` takes the softmax over the chosen logits
  (Mixtral), which equals the renormalised form. With groups, the groups are ranked by their best expert and only the
  best `top_groups` take part (DeepSeek-V2, arXiv 2405.04434 section 2.2.2).

  Args:
    logits: [..., E] float32.
    router: the gate's options.
  """
  probabilities = jax.nn.softmax(logits.astype(jnp.float32))
  candidates = probabilities
  if router.num_groups > 1:
    candidates = jnp.where(_in_best_groups(probabilities, router), probabilities, -1.0)
  # top_k's own gradient is a scatter; the chosen probabilities are read again by one-hot sums, which XLA fuses.
  _, experts = jax.lax.top_k(jax.lax.stop_gradient(candidates), router.top_k)
  chosen = jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.float32)  # [..., K, E]
  if router.softmax == "after":
    weights = jax.nn.softmax(jnp.sum(chosen * logits[..., None, :].astype(jnp.float32), -1))
  else:
    weights = jnp.sum(chosen * probabilities[..., None, :], -1)
    if router.renormalize:
      weights = weights / jnp.sum(weights, -1, keepdims=True)
  return Choice(probabilities, experts.astype(jnp.int32), weights * router.weight_scale)


def _in_best_groups(probabilities, router: Router):
  """[..., E] bool: the expert's group is among the token's best groups."""
  grouped = probabilities.reshape(*probabilities.shape[:-1], router.num_groups, -1)
  _, best = jax.lax.top_k(jax.lax.stop_gradient(grouped.max(-1)), router.top_groups)
  kept = jax.nn.one_hot(best, router.num_groups, dtype=jnp.int32).sum(-2) > 0
  return jnp.repeat(kept, grouped.shape[-1], axis=-1)
