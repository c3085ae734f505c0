"""Routing made visible: who is used, by which domain, and what one layer's choice says about another's.

The functions on jax arrays run inside the evaluation step; those on NumPy arrays work on its sums.
"""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np

_SAMPLED_TOKENS = 128  # of each row, for the information between probabilities, which costs L^2 E^2 a token


def joint_counts(experts: jax.Array, mask: jax.Array, num_experts: int) -> jax.Array:
  """[L, L, E, E] float32: tokens whose first choice is a in layer i and b in layer j.

  Args:
    experts: [L, B, S, K] int32.
    mask: [B, S] bool.
    num_experts: E.
  """
  first = jax.nn.one_hot(experts[..., 0], num_experts) * mask[..., None]  # [L, B, S, E]
  return jnp.einsum("ibse,jbsf->ijef", first, first)


def probability_information(probabilities: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mutual information between the gate probabilities of two layers, as in RMoE's appendix A.4.2 (arXiv 2408.06793).

  For one token the E probabilities of a layer, put into bins with 100 edges on [0, 1], label the E experts; the
  information between the labellings of two layers is averaged over tokens. Not an information between choices.

  Args:
    probabilities: [L, B, S, E] float32.
    mask: [B, S] bool.

  Returns:
    ([L, L] sum over the sampled tokens, nats; [] number of sampled tokens).
  """
  stride = -(-mask.shape[1] // _SAMPLED_TOKENS)
  bins = jnp.floor(probabilities[:, :, ::stride] * 99).astype(jnp.int32)
  real = mask[:, ::stride].astype(jnp.float32)
  num_experts = bins.shape[-1]

  def row(args):
    bins, real = args  # [L, S, E], [S]
    same = (bins[..., :, None] == bins[..., None, :]).astype(jnp.float32)  # [L, S, E, E]
    alone = same.sum(-1)  # [L, S, E], how many experts share the label of expert e
    both = jnp.einsum("isef,jsef->ijse", same, same)
    information = jnp.mean(jnp.log(num_experts * both / (alone[:, None] * alone[None])), -1)
    return jnp.sum(information * real, -1)

  return jax.lax.map(row, (bins.swapaxes(0, 1), real)).sum(0), real.sum()


def mutual_information(joint: np.ndarray) -> np.ndarray:
  """Nats, of tables of counts [..., A, B] -> [...]; 0 for an empty table."""
  p = joint / np.maximum(joint.sum((-2, -1), keepdims=True), 1)
  independent = p.sum(-1, keepdims=True) * p.sum(-2, keepdims=True)
  return np.sum(p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, independent, 1)), (-2, -1))


def effective_experts(counts: np.ndarray) -> np.ndarray:
  """exp(entropy of the load): E when all are used alike, 1 when one takes all; [..., E] -> [...]."""
  share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
  return np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1)), -1))


def collapsed_layers(counts: np.ndarray, top_k: int) -> list[int]:
  """Layers whose load has fallen three quarters of the way from all E experts to the K that every token must take."""
  limit = top_k + 0.25 * (counts.shape[-1] - top_k)
  return np.flatnonzero(effective_experts(counts) < limit).tolist()


class CollapseWatch:
  """Looks at the load of the last steps and names layers when their routing collapses, once each time."""

  def __init__(self, top_k: int, steps: int = 10):
    """`steps`: how many are looked at together; single batches may be uneven by chance."""
    self._top_k, self._recent, self._collapsed = top_k, collections.deque(maxlen=steps), set()

  def push(self, counts: np.ndarray) -> list[int]:
    """Takes the counts [L, E] of one more step; returns the layers that have collapsed since the last one."""
    self._recent.append(np.asarray(counts))
    if len(self._recent) < self._recent.maxlen:
      return []
    before, self._collapsed = self._collapsed, set(collapsed_layers(sum(self._recent), self._top_k))
    return sorted(self._collapsed - before)


def specialisation(counts: np.ndarray) -> np.ndarray:
  """How much an expert tells about the domain: I(domain; expert) / H(domain), domains weighted alike.

  0: every domain uses the experts alike; 1: no expert serves two domains.

  Args:
    counts: [domains, L, E] selections.

  Returns:
    [L].
  """
  shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
  if len(counts) < 2:
    return np.zeros(counts.shape[1])
  return mutual_information(shares.swapaxes(0, 1)) / np.log(len(counts))


def examples(experts: np.ndarray, ids: np.ndarray, mask: np.ndarray, num_experts: int, decode, *, tokens: int = 6,
             snippets: int = 2, context: int = 14) -> list[list[dict]]:
  """What the experts read, for each layer and expert: its most telling tokens and a few places in the text.

  Tokens are ranked by n log(n T / (n_token n_expert)), so that a frequent token that everyone reads comes last.

  Args:
    experts: [L, B, S, K] int32, first choices count.
    ids: [B, S] token ids; mask: [B, S] bool.
    num_experts: E.
    decode: ids -> text.

  Returns:
    [L][E] of {"tokens": [[text, share of the expert's tokens], ...], "snippets": [[before, token, after], ...]}.
  """
  rows, columns = np.nonzero(mask)
  kinds, kind = np.unique(ids[rows, columns], return_inverse=True)
  overall = np.bincount(kind, minlength=len(kinds))
  result = []
  for first in experts[:, rows, columns, 0]:
    layer = []
    for expert in range(num_experts):
      mine = np.flatnonzero(first == expert)
      n = np.bincount(kind[mine], minlength=len(kinds))
      score = n * np.log(np.maximum(n, 1) * len(kind) / np.maximum(overall * max(len(mine), 1), 1))
      best = [i for i in np.argsort(-score, kind="stable")[:tokens] if n[i]]
      places = mine[np.isin(kind[mine], best)][:: max(len(mine) // snippets, 1)][:snippets]
      layer.append({
          "tokens": [[decode([kinds[i]]), round(float(n[i] / len(mine)), 3)] for i in best],
          "snippets": [_snippet(ids[rows[p]], mask[rows[p]], columns[p], decode, context) for p in places]})
    result.append(layer)
  return result


def _snippet(ids, mask, at: int, decode, context: int) -> list[str]:
  begin = max(at - context, 0)
  return [decode(part[real]) for part, real in (
      (ids[begin:at], mask[begin:at]), (ids[at : at + 1], mask[at : at + 1]),
      (ids[at + 1 : at + 1 + context], mask[at + 1 : at + 1 + context]))]
