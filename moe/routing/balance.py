"""Routing statistics and the balance loss, in one convention.

    f_i = selections of i / (K x tokens)    P_i = mean probability of i    LBL = E x sum_i f_i P_i

A balanced router scores 1. f carries no gradient. Sums and counts are returned, never means, so that shards,
micro-batches and hosts add up exactly (Demons in the Detail, arXiv 2501.11873, section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.routing.gates import Choice


class Stats(NamedTuple):
  """Sums over the real tokens of one micro-batch, for one layer (a leading axis L where layers are stacked)."""

  tokens: jax.Array  # [] int32
  counts: jax.Array  # [E] int32, selections before any dropping
  probability_sums: jax.Array  # [E] float32
  dropped: jax.Array  # [] int32, selections that found no slot
  z_sum: jax.Array  # [] float32, sum of logsumexp(logits)^2
  entropy_sum: jax.Array  # [] float32, of the probabilities, nats
  weight_sum: jax.Array  # [] float32, sum of the chosen probabilities (the top-k score sum)
  local_balance_sum: jax.Array  # [] float32, tokens x LBL summed over balance groups smaller than the micro-batch


def collect(logits, choice: Choice, kept, mask, segment_ids, scope: str, data_shards: int) -> Stats:
  """Statistics of one layer.

  Args:
    logits: [B, S, E] float32.
    choice: the gate's output.
    kept: [B, S, K] bool, selections that are carried out.
    mask: [B, S] bool, tokens that are not padding.
    segment_ids: [B, S] int32, the document of each token within its row.
    scope: balance scope of the run.
    data_shards: shards of the batch axis; the groups of scope `microbatch`.
  """
  num_experts = logits.shape[-1]
  real = mask.astype(jnp.float32)
  selected = jax.nn.one_hot(choice.experts, num_experts, dtype=jnp.int32).sum(-2) * mask[..., None]  # [B, S, E]
  probabilities = choice.probabilities * real[..., None]
  log_probabilities = jnp.log(jnp.maximum(choice.probabilities, 1e-30))
  top_k = choice.experts.shape[-1]
  local = jnp.zeros((), jnp.float32)
  if scope == "sequence":
    local = _by_segment(selected, probabilities, mask, segment_ids, top_k)
  elif scope == "microbatch":
    local = _by_shard(selected, probabilities, mask, data_shards, top_k)
  return Stats(
      tokens=mask.sum(dtype=jnp.int32),
      counts=selected.sum((0, 1), dtype=jnp.int32),
      probability_sums=probabilities.sum((0, 1)),
      dropped=mask.sum(dtype=jnp.int32) * top_k - kept.sum(dtype=jnp.int32),
      z_sum=jnp.sum(jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), -1)) * real),
      entropy_sum=-jnp.sum(probabilities * log_probabilities),
      weight_sum=jnp.sum(probabilities * selected),
      local_balance_sum=local,
  )


def fractions(counts: jax.Array, tokens: jax.Array, top_k: int) -> jax.Array:
  """f of the balance loss: counts [..., E] over K x tokens [...], float32, without gradient."""
  total = jnp.maximum(tokens, 1).astype(jnp.float32) * top_k
  return jax.lax.stop_gradient(counts.astype(jnp.float32) / total[..., None])


def balance_sum(fraction: jax.Array, probability_sums: jax.Array) -> jax.Array:
  """tokens x LBL = E x sum_i f_i (sum of the probabilities of i); arrays [..., E] -> [...]."""
  return fraction.shape[-1] * jnp.sum(fraction * probability_sums, -1)


def _by_shard(selected, probabilities, mask, data_shards: int, top_k: int):
  """Sum over data shards of tokens x LBL, f taken within the shard."""
  def grouped(x):
    return x.reshape(data_shards, -1, *x.shape[2:]).sum(1)

  f = fractions(grouped(selected), grouped(mask.astype(jnp.int32)), top_k)
  return balance_sum(f, grouped(probabilities)).sum()


def _by_segment(selected, probabilities, mask, segment_ids, top_k: int):
  """Sum over documents of tokens x LBL, f taken within the document."""
  longest = mask.shape[1] + 1  # segment ids of a row are at most S

  def row(selected, probabilities, mask, ids):
    def add(x):
      return jax.ops.segment_sum(x, ids, num_segments=longest)

    f = fractions(add(selected), add(mask.astype(jnp.int32)), top_k)
    return balance_sum(f, add(probabilities)).sum()

  return jax.vmap(row)(selected, probabilities, mask, segment_ids).sum()
