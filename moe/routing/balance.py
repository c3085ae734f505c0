"""Routing statistics and the balance loss, in one convention.

    f_i = selections of i / (K x tokens)    P_i = mean probability of i    LBL = E x sum_i f_i P_i

A balanced router scores 1. f carries no gradient. Sums and counts are returned, never means, so that shards,
micro-batches and hosts add up exactly (Demons in the Detail, arXiv 2501.11873, section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.config import Router
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


def collect(logits, choice: Choice, kept, mask, segment_ids, router: Router, data_shards: int, priority=None) -> Stats:
  """Statistics of one layer.

  Args:
    logits: [B, S, ...] float32; the axes after the first two are what a token's scores run over.
    choice: the gate's output.
    kept: [B, S, K] bool, selections that are carried out.
    mask: [B, S] bool, tokens that are not padding.
    segment_ids: [B, S] int32, the document of each token within its row.
    router: the balance scope and K.
    data_shards: shards of the batch axis; the groups of scopes `microbatch` and `shuffle`.
    priority: [B, S] float32 random numbers, scope `shuffle`; None in evaluation, which then has no local sum.
  """
  num_experts, top_k, scope = choice.probabilities.shape[-1], router.top_k, router.balance_scope
  real = mask.astype(jnp.float32)
  selected = jax.nn.one_hot(choice.experts, num_experts, dtype=jnp.int32).sum(-2) * mask[..., None]  # [B, S, E]
  probabilities = choice.probabilities * real[..., None]
  log_probabilities = jnp.log(jnp.maximum(choice.probabilities, 1e-30))
  tokens = mask.sum(dtype=jnp.int32)
  if router.gate == "expert_choice":  # the experts drop nothing, but may leave a token without any
    dropped = (tokens - jnp.any(kept, -1).sum(dtype=jnp.int32)) * top_k
  else:
    dropped = tokens * top_k - kept.sum(dtype=jnp.int32)
  local = jnp.zeros((), jnp.float32)
  if scope == "sequence":
    local = _by_segment(selected, probabilities, mask, segment_ids, top_k)
  elif scope == "microbatch" or router.micro_mix:
    local = _by_shard(selected, probabilities, mask, data_shards, top_k)
  elif scope == "shuffle" and priority is not None:
    local = _by_random_subset(selected, probabilities, mask, data_shards, top_k, priority)
  return Stats(
      tokens=tokens,
      counts=selected.sum((0, 1), dtype=jnp.int32),
      probability_sums=probabilities.sum((0, 1)),
      dropped=dropped,
      z_sum=jnp.sum(jnp.square(jax.nn.logsumexp(logits.reshape(*mask.shape, -1), -1)) * real),
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


def _by_random_subset(selected, probabilities, mask, data_shards: int, top_k: int, priority):
  """As `_by_shard`, but f from as many tokens as a shard has, drawn without replacement from the whole micro-batch
  (the shuffle ablation of Demons in the Detail, Table 2): real tokens in random order are dealt to the shards."""
  order = jnp.argsort(jnp.where(mask, priority, jnp.inf).reshape(-1))  # padding last
  dealt = (jnp.arange(order.size) % data_shards)[jnp.argsort(order)].reshape(mask.shape)  # shard of each token
  member = jax.nn.one_hot(dealt, data_shards, dtype=jnp.float32) * mask[..., None]
  counts = jnp.einsum("bsg,bse->ge", member, selected.astype(jnp.float32))
  f = fractions(counts, member.sum((0, 1)), top_k)
  local = probabilities.reshape(data_shards, -1, probabilities.shape[-1]).sum(1)
  return balance_sum(f, local).sum()


def _by_segment(selected, probabilities, mask, segment_ids, top_k: int):
  """Sum over documents of tokens x LBL, f taken within the document."""
  longest = mask.shape[1] + 1  # segment ids of a row are at most S

  def row(selected, probabilities, mask, ids):
    def add(x):
      return jax.ops.segment_sum(x, ids, num_segments=longest)

    f = fractions(add(selected), add(mask.astype(jnp.int32)), top_k)
    return balance_sum(f, add(probabilities)).sum()

  return jax.vmap(row)(selected, probabilities, mask, segment_ids).sum()


def moved_biases(params, counts: jax.Array, rate: float | jax.Array):
  """The parameters after one step of loss-free balancing (arXiv 2408.15664, Algorithm 1; DeepSeek-V3 section 2.1.2).

  b_i += rate x sign(mean count - count of i), with the counts of the whole optimizer step over all shards. The leaves
  named `selection_bias` ([E], or [L, E] stacked) are part of the parameters, so that they are saved and read like them,
  but their gradient is zero and the optimizer leaves them alone.

  Args:
    params: the parameters.
    counts: [L, E] selections of the step.
    rate: Router.bias_update_rate.
  """
  counts = counts.astype(jnp.float32)
  move = rate * jnp.sign(counts.mean(-1, keepdims=True) - counts)

  def leaf(path, x):
    return x + move.reshape(x.shape) if path[-1].key == "selection_bias" else x

  return jax.tree_util.tree_map_with_path(leaf, params)


def converted_coefficient(coefficient: float, source: str, *, top_k: int, num_layers: int) -> float:
  """`Router.balance_coef` with the same gradient as a balance coefficient of another codebase, at the same f and P.

  Ours: mean over layers of E sum_i f_i P_i with f = counts / (K T); balanced scores 1.

  | source              | their loss                                                          | balanced | ours  |
  |---------------------|---------------------------------------------------------------------|----------|-------|
  | `huggingface`       | E sum (counts / T) P over the tokens of all layers together, once   | K        | c x K |
  | `deepspeed_top_k`   | per layer as ours (topkgating), added for every layer               | 1        | c x L |
  | `deepspeed_top_1_2` | per layer, f from the first choice only (top1gating, top2gating)    | 1        | c x L |
  | `tutel`             | per layer, f from the first choice only                             | 1        | c x L |
  | `megatron`          | per layer as ours, added for every layer                            | 1        | c x L |

  Exact for `deepspeed_top_k` and `megatron`, and for `huggingface` with one layer: with more, its layers share one f
  and one P, and may cancel each other. Exact for the first-choice losses where K = 1; else only the scale agrees.

  Raises:
    ValueError: unknown source.
  """
  factors = {"huggingface": top_k, "deepspeed_top_k": num_layers, "deepspeed_top_1_2": num_layers, "tutel": num_layers,
             "megatron": num_layers}
  if source not in factors:
    raise ValueError(f"source {source!r} is not one of {', '.join(factors)}")
  return coefficient * factors[source]
