"""Routing made visible: who is used, by which domain, and what one layer's choice says about another's.

The functions on jax arrays run inside the evaluation step; those on NumPy arrays work on its sums.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_SAMPLED_TOKENS = 128  # of each row, for the information between probabilities, which costs L^2 E^2 a token
_LABELS_BYTES = 64 << 20  # of the tables of equal labels, [L, E, E] a token, that are worked on at a time
_ROUNDING = 1e-6  # of a number of experts; counts are whole, so what tells a collapse from chance is far larger


def joint_counts(experts: jax.Array, mask: jax.Array, num_experts: int,
                 total: Callable[[jax.Array], jax.Array] = lambda block: block) -> jax.Array:
  """[L, L, E, E] int32: tokens whose first choice is a in layer i and b in layer j.

  Args:
    experts: [L, B, S, K] int32.
    mask: [B, S] bool. Fewer than 2^24 tokens, of which sums in float32 are exact.
    num_experts: E.
    total: sums one layer's block [L, E, E] int32 over the devices, each of which may keep a part of the sum. All blocks
      together are large (0.9 GB for 58 layers of 256 experts), so no device should hold them whole.
  """
  first_LT = jnp.where(mask, experts[..., 0], num_experts).reshape(experts.shape[0], -1)  # num_experts: a row of zeros below

  def chosen(first):
    return jax.nn.one_hot(first, num_experts, dtype=jnp.bfloat16)

  def block(first_T):
    both = jnp.einsum("te,jtf->jef", chosen(first_T), chosen(first_LT), preferred_element_type=jnp.float32)
    return total(both.astype(jnp.int32))

  return jax.lax.map(block, first_LT)


def probability_information(probabilities: jax.Array, mask: jax.Array, length: int | None = None,
                            offset: int | jax.Array = 0) -> tuple[jax.Array, jax.Array]:
  """Mutual information between the gate probabilities of two layers, as in RMoE's appendix A.4.2 (arXiv 2408.06793).

  For one token the E probabilities of a layer, put into bins with 100 edges on [0, 1], label the E experts; the
  information between the labellings of two layers is averaged over tokens. Not an information between choices.

  Args:
    probabilities: [L, B, S, E] float32.
    mask: [B, S] bool.
    length: of whole rows, where the arrays hold S tokens of each; None: S. At most 128 places of a whole row are sampled.
    offset: place of the arrays' first token in its row.

  Returns:
    ([L, L] sum over the sampled tokens, nats; [] float32 number of sampled tokens).
  """
  tokens, num_experts = mask.shape[1], probabilities.shape[-1]
  # Every stride-th token of a whole row, however the row is cut.
  stride = -(-(length or tokens) // _SAMPLED_TOKENS)
  places = -offset % stride + stride * jnp.arange(-(-tokens // stride))
  real = jnp.take(mask, places, axis=1, mode="clip") & (places < tokens)
  sampled = jnp.take(probabilities, places, axis=2, mode="clip")
  bins = jnp.floor(sampled * 99).astype(jnp.int32)

  def token(of):
    bins_LE, real = of
    same = (bins_LE[:, :, None] == bins_LE[:, None, :]).astype(jnp.bfloat16)  # [L, E, E]
    alone = jnp.sum(same, -1, dtype=jnp.float32)  # [L, E], how many experts share the label of expert e
    both = jnp.einsum("ief,jef->ije", same, same, preferred_element_type=jnp.float32)
    information = jnp.mean(jnp.log(num_experts * both / (alone[:, None] * alone[None])), -1)
    return jnp.where(real, information, 0.0)

  layers = bins.shape[0]
  together = max(_LABELS_BYTES // (2 * layers * num_experts**2), 1)
  each = (bins.transpose(1, 2, 0, 3).reshape(-1, layers, num_experts), real.reshape(-1))
  return jax.lax.map(token, each, batch_size=min(together, real.size)).sum(0), real.sum(dtype=jnp.float32)


def mutual_information(joint: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
  """Nats, of tables of counts [..., A, B] -> [...]; 0 for an empty table. NumPy's arrays or jax's, in their precision."""
  xp = joint.__array_namespace__()
  p = joint / xp.maximum(joint.sum((-2, -1), keepdims=True), 1)
  independent = p.sum(-1, keepdims=True) * p.sum(-2, keepdims=True)
  return xp.sum(p * xp.log(xp.where(p > 0, p, 1) / xp.where(p > 0, independent, 1)), (-2, -1))


def effective_experts(counts: np.ndarray) -> np.ndarray:
  """exp(entropy of the load): E when all are used alike, 1 when one takes all; [..., E] -> [...]."""
  share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
  return np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1)), -1))


def collapsed_layers(counts: np.ndarray, top_k: int) -> list[int]:
  """Layers whose load has fallen three quarters of the way from all E experts to the K that every token must take; none
  where every token takes all (K = E)."""
  num_experts = counts.shape[-1]
  if top_k >= num_experts:
    return []
  limit = top_k + 0.25 * (num_experts - top_k)
  return np.flatnonzero(effective_experts(counts) < limit - _ROUNDING * num_experts).tolist()


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


def examples(experts: np.ndarray, ids: np.ndarray, mask: np.ndarray, num_experts: int, decode, *,
             segment_ids: np.ndarray | None = None, tokens: int = 6, snippets: int = 2, context: int = 14) -> list[list[dict]]:
  """What the experts read, for each layer and expert: its most telling tokens and a few places in the text.

  Tokens are ranked by n log(n T / (n_token n_expert)), so that a frequent token that everyone reads comes last.

  Args:
    experts: [L, B, S, K] int32, first choices count.
    ids: [B, S] token ids.
    mask: [B, S] bool, the tokens that count.
    num_experts: E.
    decode: ids -> text.
    segment_ids: [B, S], the document of each token, 0 for padding: a snippet stays within its document; None: all of a
      row's tokens in `mask`.
    tokens, snippets: of an expert, at most.
    context: tokens before and after the one that is shown.

  Returns:
    [L][E] of {"tokens": [[text, share of the expert's tokens], ...], "snippets": [[before, token, after], ...]}.
  """
  segments = mask.astype(np.int32) if segment_ids is None else segment_ids
  rows, columns = np.nonzero(mask)
  kinds, kind = np.unique(ids[rows, columns], return_inverse=True)

  # Every layer and expert shows tokens and places out of the same few, so each is decoded once.
  @functools.cache
  def text_of(kind: int) -> str:
    return decode([kinds[kind]])

  @functools.cache
  def snippet_at(place: int) -> list[str]:
    row, column = rows[place], columns[place]
    return _snippet(ids[row], segments[row] == segments[row, column], column, decode, context)

  result = []
  for first in experts[:, rows, columns, 0]:
    telling = _telling_tokens(first, kind, num_experts, tokens)
    places = _telling_places(first, kind, telling, num_experts, snippets)
    result.append([{"tokens": [[text_of(int(kind)), round(share, 3)] for kind, share in telling[expert]],
                    "snippets": [snippet_at(int(place)) for place in places[expert]]} for expert in range(num_experts)])
  return result


def _telling_tokens(first: np.ndarray, kind: np.ndarray, num_experts: int, most: int) -> list[list[tuple[int, float]]]:
  """For each expert of a layer its (kind of token, share of the expert's tokens), the most telling first.

  Args:
    first: [T] the expert of each token; E: none.
    kind: [T] the number of its id among those that occur.
    num_experts: E.
    most: for one expert.
  """
  chosen = first < num_experts
  num_kinds = int(kind.max(initial=0)) + 1
  # Of the E x kinds pairs only those that occur: at most T.
  pairs, count = np.unique(first[chosen].astype(np.int64) * num_kinds + kind[chosen], return_counts=True)
  expert, token = np.divmod(pairs, num_kinds)
  overall = np.bincount(kind, minlength=num_kinds)[token]
  load = np.bincount(first[chosen], minlength=num_experts)[expert]
  score = count * np.log(count * len(kind) / (overall * load))
  order = np.lexsort((token, -score, expert))  # by expert, then the highest score, then the lowest id
  bounds = np.searchsorted(expert[order], np.arange(num_experts + 1))
  # Kinds that the expert never reads score 0: they rank above those that it reads less than others do, and are not shown.
  unread = num_kinds - np.diff(bounds)
  rank = np.arange(len(order)) - bounds[expert[order]]
  rank += np.where(score[order] < 0, unread[expert[order]], 0)
  result = [[] for _ in range(num_experts)]
  for i in order[rank < most]:
    result[expert[i]].append((token[i], float(count[i] / load[i])))
  return result


def _telling_places(first: np.ndarray, kind: np.ndarray, telling: list[list[tuple[int, float]]], num_experts: int,
                    most: int) -> list[np.ndarray]:
  """For each expert a few tokens [<= most], spread over those that it reads, whose kind is one of its telling ones."""
  num_kinds = int(kind.max(initial=0)) + 1
  wanted = [expert * num_kinds + kind for expert, tokens in enumerate(telling) for kind, _ in tokens]
  found = np.flatnonzero(np.isin(first.astype(np.int64) * num_kinds + kind, wanted))
  found = found[np.argsort(first[found], kind="stable")]
  bounds = np.searchsorted(first[found], np.arange(num_experts + 1))
  load = np.bincount(first, minlength=num_experts)
  return [found[begin:end][:: max(load[expert] // most, 1)][:most]
          for expert, (begin, end) in enumerate(zip(bounds, bounds[1:]))]


def _snippet(ids, mask, at: int, decode, context: int) -> list[str]:
  """The text before, at and after a token of a row [S], of the tokens of `mask` [S]."""
  begin = max(at - context, 0)
  return [decode(part[real]) for part, real in (
      (ids[begin:at], mask[begin:at]), (ids[at : at + 1], mask[at : at + 1]),
      (ids[at + 1 : at + 1 + context], mask[at + 1 : at + 1 + context]))]
