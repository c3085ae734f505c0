"""Gates, capacity and the balance loss against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import Router
from moe.routing import balance
from moe.routing import capacity
from moe.routing import gates


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def logits(shape=(2, 12, 8), seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_top_k(renormalize):
  x = logits()
  choice = gates.token_choice(jnp.array(x), Router(top_k=3, renormalize=renormalize, weight_scale=2.0))
  p = softmax(x.astype(np.float64))
  best = np.argsort(-p, -1)[..., :3]
  np.testing.assert_array_equal(choice.experts, best)
  weights = np.take_along_axis(p, best, -1)
  if renormalize:
    weights = softmax(np.take_along_axis(x.astype(np.float64), best, -1))  # Mixtral's form: softmax after the choice
  np.testing.assert_allclose(choice.weights, 2 * weights, rtol=1e-5)


def test_group_limited_choice():
  x = logits((1, 50, 8), 3)
  choice = gates.token_choice(jnp.array(x), Router(top_k=2, num_groups=4, top_groups=2, renormalize=False))
  p = softmax(x.astype(np.float64))[0]
  for token in range(50):
    groups = np.argsort(-p[token].reshape(4, 2).max(-1))[:2]
    allowed = [e for e in range(8) if e // 2 in groups]
    want = sorted(allowed, key=lambda e: -p[token, e])[:2]
    assert choice.experts[0, token].tolist() == want


def test_gradient_of_weights_reaches_logits():
  """Directional derivative against a central difference, for distinct weights c of the two chosen experts."""
  x, direction, c = jnp.array(logits((1, 4, 8))), jnp.array(logits((1, 4, 8), 9)), jnp.array([1.0, -2.0])
  value = lambda x: jnp.sum(c * gates.token_choice(x, Router(top_k=2)).weights)
  eps = 1e-2  # truncation error of order eps^2, rounding of order 1e-7 / eps
  slope = (value(x + eps * direction) - value(x - eps * direction)) / (2 * eps)
  assert abs(slope) > 0.1
  np.testing.assert_allclose(jnp.vdot(jax.grad(value)(x), direction), slope, rtol=1e-3)


def chosen_by_experts(x, mask, slots, group):
  """[B, S, E] bool: each expert's best tokens, ties by position, one expert after the other."""
  p = softmax(x.astype(np.float64)).astype(np.float32)  # equal logits give equal scores
  taken = np.zeros(x.shape, bool)
  rows = [list(range(len(x)))] if group == "microbatch" else [[b] for b in range(len(x))]
  for members in rows:
    for e in range(x.shape[-1]):
      tokens = sorted(((b, s) for b in members for s in range(x.shape[1]) if mask[b, s]), key=lambda t: -p[t][e])
      for b, s in tokens[:slots]:
        taken[b, s, e] = True
  return taken


@pytest.mark.parametrize("group", ["sequence", "microbatch"])
@pytest.mark.parametrize("slots", [1, 3, 7, 12, 100])
def test_expert_choice_takes_the_best_tokens(group, slots):
  """Also where most scores are equal, and where there are more slots than tokens."""
  x = logits((3, 12, 4))
  x[:, ::2] = x[0, 0]  # half of all tokens have the same scores
  mask = np.random.default_rng(1).random((3, 12)) < 0.8
  choice = gates.expert_choice(jnp.array(x), Router(top_k=2, weight_scale=2.0), jnp.array(mask), slots, group)
  want = chosen_by_experts(x, mask, slots, group)
  np.testing.assert_array_equal(choice.experts, np.where(want, np.arange(4), 4))
  np.testing.assert_allclose(choice.weights, np.where(want, 2 * softmax(x.astype(np.float64)), 0), rtol=1e-5)


def largest_array(jaxpr) -> int:
  """Elements of the largest array in a traced function, and in the functions within it."""
  inner = [part.jaxpr for equation in jaxpr.eqns for part in equation.params.values() if hasattr(part, "jaxpr")]
  sizes = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars]
  return max(sizes + [largest_array(part) for part in inner], default=0)


def test_expert_choice_holds_no_square_of_the_tokens():
  tokens, experts = 512, 8
  def choose(x):
    return gates.expert_choice(x, Router(), jnp.ones((8, 64), bool), 2 * tokens // experts, "microbatch")

  def by_places(x):  # the control: one-hot of each slot's token
    _, places = jax.lax.top_k(x.reshape(1, tokens, experts).swapaxes(1, 2), 2 * tokens // experts)
    return jax.nn.one_hot(places, tokens).sum(2)

  x = jnp.zeros((8, 64, experts))
  assert largest_array(jax.make_jaxpr(choose)(x).jaxpr) <= tokens * experts
  assert largest_array(jax.make_jaxpr(by_places)(x).jaxpr) == 2 * tokens**2


def kept_by_hand(choice, mask, slots, policy):
  experts, p = np.asarray(choice.experts), np.asarray(choice.probabilities)
  kept = np.zeros(experts.shape, bool)
  for b in range(experts.shape[0]):
    for e in range(p.shape[-1]):
      takers = [(s, k) for s in range(experts.shape[1]) for k in range(experts.shape[2])
                if experts[b, s, k] == e and mask[b, s]]
      if policy == "probability":
        takers.sort(key=lambda place: -p[b, place[0], e])
      for place in takers[:slots]:
        kept[b][place] = True
  return kept


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("slots", [1, 2, 3, 100])
def test_capacity(policy, slots):
  # Very negative logits with equal shifts: the ranking must be over selections, not over zeros (a known bug elsewhere).
  choice = gates.token_choice(jnp.array(logits() - 50.0), Router(top_k=2))
  mask = np.random.default_rng(1).random((2, 12)) < 0.8
  kept = capacity.keep(choice, jnp.array(mask), slots, policy)
  np.testing.assert_array_equal(kept, kept_by_hand(choice, mask, slots, policy))
  if slots == 100:
    np.testing.assert_array_equal(kept.all(-1), mask)  # what fits is never dropped


def test_position_policy_is_causal_and_probability_is_not():
  x = logits((1, 12, 8), 5)
  changed = x.copy()
  changed[0, 6:] = logits((1, 6, 8), 6)[0] * 3
  leaks = {}
  for policy in ("position", "probability"):
    a, b = (capacity.keep(gates.token_choice(jnp.array(v), Router(top_k=2)), jnp.ones((1, 12), bool), 1, policy)
            for v in (x, changed))
    leaks[policy] = not np.array_equal(a[0, :6], b[0, :6])
  assert leaks == {"position": False, "probability": True}


def test_slots_round_up():
  assert capacity.slots(1.25, 2, 256, 8) == 80
  assert capacity.slots(1.0, 1, 10, 4) == 3


def collect(x, scope, shards=1, mask=None, segments=None, priority=None):
  choice = gates.token_choice(x, Router(top_k=2))
  mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
  segments = mask.astype(jnp.int32) if segments is None else segments
  kept = jnp.broadcast_to(mask[..., None], choice.experts.shape)
  return balance.collect(x, choice, kept, mask, segments, Router(balance_scope=scope), shards, priority)


def lbl(x):
  """Balance loss of tokens [T, E] by hand, top-2."""
  p = softmax(np.asarray(x, np.float64))
  counts = np.bincount(np.argsort(-p, -1)[:, :2].ravel(), minlength=p.shape[1])
  return p.shape[1] * np.sum(counts / (2 * len(p)) * p.mean(0))


def test_zero_router_scores_one_for_any_tie_break():
  stats = collect(jnp.zeros((2, 12, 8)), "global")
  value = balance.balance_sum(balance.fractions(stats.counts, stats.tokens, 2), stats.probability_sums) / stats.tokens
  np.testing.assert_allclose(value, 1.0, rtol=1e-6)
  assert int(stats.counts.sum()) == 2 * 24


def test_global_balance_and_no_gradient_through_counts():
  x = jnp.array(logits())
  def value(x):
    stats = collect(x, "global")
    return balance.balance_sum(balance.fractions(stats.counts, stats.tokens, 2), stats.probability_sums) / stats.tokens
  np.testing.assert_allclose(value(x), lbl(x.reshape(-1, 8)), rtol=1e-5)
  stats = collect(x, "global")
  f = stats.counts / (2 * 24)
  want = jax.grad(lambda x: 8 * jnp.sum(f * jax.nn.softmax(x).mean((0, 1))))(x)
  np.testing.assert_allclose(jax.grad(value)(x), want, atol=1e-7)


def test_microbatch_scope_is_the_mean_over_shards():
  x = logits((4, 12, 8))
  stats = collect(jnp.array(x), "microbatch", shards=2)
  want = np.mean([lbl(x[:2].reshape(-1, 8)), lbl(x[2:].reshape(-1, 8))])
  np.testing.assert_allclose(stats.local_balance_sum / stats.tokens, want, rtol=1e-5)


def test_sequence_scope_means_one_document():
  x = logits((2, 12, 8))
  segments = np.array([[1] * 5 + [2] * 7, [1] * 4 + [2] * 4 + [0] * 4])
  stats = collect(jnp.array(x), "sequence", mask=jnp.array(segments > 0), segments=jnp.array(segments))
  parts = [(7 if (b, s) == (0, 2) else int((segments[b] == s).sum()), lbl(x[b][segments[b] == s]))
           for b in range(2) for s in (1, 2)]
  want = sum(n * value for n, value in parts) / sum(n for n, _ in parts)
  np.testing.assert_allclose(stats.local_balance_sum / stats.tokens, want, rtol=1e-5)


def test_padding_enters_no_statistic():
  x, mask = logits((2, 12, 8)), np.arange(12)[None] < np.array([[12], [5]])
  other = np.where(mask[..., None], x, 100 * logits((2, 12, 8), 4))
  for scope in ("global", "microbatch", "sequence"):
    a, b = (collect(jnp.array(v), scope, mask=jnp.array(mask)) for v in (x, other))
    for name, left, right in zip(a._fields, a, b):
      np.testing.assert_allclose(left, right, rtol=1e-6, err_msg=name)
  assert int(a.tokens) == 17 and int(a.counts.sum()) == 34
