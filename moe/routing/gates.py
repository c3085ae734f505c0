"""Gates: router logits in, (token, expert, weight) out. All arithmetic in float32; parameters live in model.py.

| `Router.gate`   | logits l of a token x             | scores                   | chosen by     | source (arXiv)         |
|-----------------|-----------------------------------|--------------------------|---------------|------------------------|
| `softmax`       | x W                               | softmax(l)               | token: top K  | 1701.06538             |
| `noisy`         | x W + N(0, 1) softplus(x W_noise) | softmax(l)               | token: top K  | 1701.06538 Eq. 4       |
| `sigmoid`       | x W                               | sigmoid(l)               | token: top K  | 2103.16716, 2412.19437 |
| `cosine`        | cos(x W_1, e) x learned scale     | softmax(l)               | token: top K  | 2204.09179             |
| `expert_choice` | x W                               | softmax(l)               | expert: top C | 2202.09368             |
| `soft`          | x W, one for each slot            | softmax over tokens, and over slots      | 2308.00951             |

A weight is the score of the chosen expert, made to sum to 1 over the chosen ones where `Router.renormalize` is set, times
`Router.weight_scale`. Under `renormalize` the softmax before the choice and the one after it are the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.config import Router

COSINE_SCALE_START = math.log(1 / 0.5)  # log of 1 / temperature at the start
_COSINE_SCALE_LIMIT = math.log(100.0)


class Choice(NamedTuple):
  """What was chosen, before any capacity limit."""

  probabilities: jax.Array  # [B, S, E] float32, scores normalised over the experts; the P of the balance loss
  experts: jax.Array  # [B, S, K] int32, distinct; E where there is none (expert choice, where K is E)
  weights: jax.Array  # [B, S, K] float32, what each expert's output is multiplied by


class SoftChoice(NamedTuple):
  """SoftMoE: every slot reads a mixture of the tokens of its row, and every token a mixture of the slots."""

  dispatch: jax.Array  # [B, S, E, p] float32, sums to 1 over the tokens of a row
  combine: jax.Array  # [B, S, E, p] float32, sums to 1 over the slots


def cosine_logits(features, experts, log_scale) -> jax.Array:
  """exp(log_scale) x cos(feature, expert): [..., C], [C, E], [1] -> [..., E]; the scale is at most 100."""
  def unit(x, axis):
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis, keepdims=True) + 1e-12)

  cosine = jnp.matmul(unit(features, -1), unit(experts, 0), precision=jax.lax.Precision.HIGHEST)
  return cosine * jnp.exp(jnp.minimum(log_scale, _COSINE_SCALE_LIMIT))


def row_noise(draw, key, rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B, *shape] random numbers that depend on a token's place in the whole batch, not on shards or micro-batches.

  Args:
    draw: jax.random.normal, jax.random.uniform, ...
    key: of this layer and step.
    rows: [B] int32, number of each row in the batch of the optimizer step.
    shape: of one row, [S, ...].
  """
  return jax.vmap(lambda row: draw(jax.random.fold_in(key, row), shape))(rows)


def token_choice(logits, router: Router, bias=None) -> Choice:
  """Each token takes its best K experts, optionally among those of its best groups only.

  Groups are ranked by their best expert (DeepSeek-V2, arXiv 2405.04434 section 2.2.2), with the sigmoid gate by the
  sum of their two best (DeepSeek-V3).

  Args:
    logits: [B, S, E] float32.
    router: the gate's options.
    bias: [E] float32, added to the scores for the choice alone; the weights do not see it (DeepSeek-V3 Eq. 16).
  """
  # sigmoid(l) / sum sigmoid(l) is the softmax of log sigmoid(l), which does not divide 0 by 0.
  log_scores = jax.nn.log_sigmoid(logits) if router.gate == "sigmoid" else logits
  probabilities = jax.nn.softmax(log_scores)
  scores = jax.nn.sigmoid(logits) if router.gate == "sigmoid" else probabilities
  candidates = jax.lax.stop_gradient(scores if bias is None else scores + bias)
  if router.num_groups > 1:
    candidates = jnp.where(_in_best_groups(candidates, router), candidates, -jnp.inf)
  # top_k's own gradient is a scatter; the chosen scores are read again by one-hot sums, which XLA fuses.
  experts = _best(candidates, router.top_k)
  chosen = jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.float32)  # [B, S, K, E]
  if router.renormalize:
    weights = jax.nn.softmax(jnp.sum(chosen * log_scores[..., None, :], -1))
  else:
    weights = jnp.sum(chosen * scores[..., None, :], -1)
  return Choice(probabilities, experts, weights * router.weight_scale)


def _best(scores, count: int) -> jax.Array:
  """Indices of the `count` largest entries, best first, ties by index: [..., E] -> [..., count] int32."""
  if count > 4:
    return jax.lax.top_k(scores, count)[1]
  found = []  # a few passes of argmax; XLA:CPU's top_k sorts, and took 2-5% of the quickstart's step
  for _ in range(count):
    found.append(jnp.argmax(scores, -1).astype(jnp.int32))
    scores = jnp.where(jnp.arange(scores.shape[-1]) == found[-1][..., None], -jnp.inf, scores)
  return jnp.stack(found, -1)


def _in_best_groups(scores, router: Router):
  """[..., E] bool: the expert's group is among the token's best groups."""
  grouped = scores.reshape(*scores.shape[:-1], router.num_groups, -1)
  rank = jax.lax.top_k(grouped, 2)[0].sum(-1) if router.gate == "sigmoid" else grouped.max(-1)
  _, best = jax.lax.top_k(rank, router.top_groups)
  kept = jax.nn.one_hot(best, router.num_groups, dtype=jnp.int32).sum(-2) > 0
  return jnp.repeat(kept, grouped.shape[-1], axis=-1)


def expert_choice(logits, router: Router, mask, num_slots: int, group: str) -> Choice:
  """Each expert takes its best C tokens of a group; a token may end with any number of experts.

  Args:
    logits: [B, S, E] float32.
    router: the gate's options; renormalize does not apply.
    mask: [B, S] bool, tokens that exist.
    num_slots: C.
    group: sequence | microbatch.
  """
  num_experts = logits.shape[-1]
  probabilities = jax.nn.softmax(logits)
  grouped = jnp.where(mask[..., None], jax.lax.stop_gradient(probabilities), -1.0)
  if group == "microbatch":
    grouped = grouped.reshape(1, -1, num_experts)
  # Behind a barrier, because scores that are compared below must be to the bit those that top_k read: a compiler that computes
  # the softmax twice, once in each fusion, may round it in two ways.
  grouped = jax.lax.optimization_barrier(grouped.swapaxes(1, 2))  # [G, E, T]
  best, _ = jax.lax.top_k(grouped, min(num_slots, grouped.shape[-1]))  # [G, E, C], best first
  # The C best as a mask: all that score more than the last of them and, of those that score the same, the first in the order of
  # tokens. The places of top_k would say the same, but one-hot they are C x T numbers for each expert.
  last = best[..., -1:]
  above, equal = grouped > last, grouped == last
  room = best.shape[-1] - above.sum(-1, keepdims=True)
  taken = (above | (equal & (jnp.cumsum(equal, -1) <= room))) & (grouped >= 0)  # below 0: a slot that is left empty
  taken = taken.swapaxes(1, 2).reshape(logits.shape)
  experts = jnp.where(taken, jnp.arange(num_experts, dtype=jnp.int32), num_experts)
  return Choice(probabilities, experts, jnp.where(taken, probabilities, 0.0) * router.weight_scale)


def soft_choice(logits, mask) -> SoftChoice:
  """[B, S, E, p] float32 logits, [B, S] bool; padding enters no slot and reads none."""
  real = mask[..., None, None]
  dispatch = jnp.where(real, jax.nn.softmax(jnp.where(real, logits, -1e30), axis=1), 0.0)
  combine = jax.nn.softmax(logits.reshape(*logits.shape[:2], -1)).reshape(logits.shape)
  return SoftChoice(dispatch, jnp.where(real, combine, 0.0))
