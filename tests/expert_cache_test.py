"""The expert cache and the batch former: optimality, bounds, and a table that can be worked out."""

import functools

import numpy as np
import pytest

from tools import expert_cache


def optimal_hits(trace, capacity):
  """By trying every eviction."""
  @functools.cache
  def best(i, cache):
    if i == len(trace):
      return 0
    if trace[i] in cache:
      return 1 + best(i + 1, cache)
    if len(cache) < capacity:
      return best(i + 1, cache | {trace[i]})
    return max(best(i + 1, (cache - {victim}) | {trace[i]}) for victim in cache)

  return best(0, frozenset())


@pytest.mark.parametrize("seed", range(20))
def test_belady_is_optimal(seed):
  rng = np.random.default_rng(seed)
  trace = rng.integers(0, 5, rng.integers(1, 13)).tolist()
  for capacity in (1, 2, 3):
    assert expert_cache.hits(trace, capacity, "belady") == optimal_hits(tuple(trace), capacity)


@pytest.mark.parametrize("seed", range(5))
def test_no_policy_beats_belady(seed):
  trace = np.random.default_rng(seed).choice(8, 500, p=np.arange(1, 9) / 36).tolist()
  for capacity in (2, 4, 6):
    best = expert_cache.hits(trace, capacity, "belady")
    assert all(expert_cache.hits(trace, capacity, policy) <= best for policy in ("random", "lru"))
    assert expert_cache.hits(trace, 8, "lru") == 500 - 8  # only the first request of each misses


def test_lru_by_hand():
  assert expert_cache.hits([0, 1, 0, 2, 0, 1], 2, "lru") == 2  # 2 evicts 1, which is missed at the end


def test_independent_choices():
  """Random and LRU hit with probability capacity / 7; Belady's rates are those of the notes, measured elsewhere."""
  trace = np.random.default_rng(0).integers(0, 7, 20_000).tolist()
  for capacity, belady in ((2, 44.8), (3, 63.1), (4, 76.2), (5, 86.1)):
    for policy in ("random", "lru"):
      assert abs(expert_cache.hits(trace, capacity, policy) / 200 - 100 * capacity / 7) < 1.5
    assert abs(expert_cache.hits(trace, capacity, "belady") / 200 - belady) < 0.7


def test_refusals():
  with pytest.raises(ValueError, match="must be random, lru or belady"):
    expert_cache.hits([0], 1, "fifo")
  with pytest.raises(ValueError, match="window 3 at least the budget"):
    expert_cache.form_batches([(0, 0)], 4, 3)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("patience", [None, 0, 3])
def test_batches_keep_every_request_and_the_budget(seed, patience):
  rng = np.random.default_rng(seed)
  requests = list(enumerate(rng.integers(0, 8, 203).tolist()))
  batches = expert_cache.form_batches(requests, 7, 30, patience)
  assert sorted(r for batch in batches for r in batch) == requests
  assert all(1 <= len(batch) <= 7 for batch in batches)
  if patience is not None:  # no starvation: those that waited too long leave in order of arrival
    left = {identity: number for number, batch in enumerate(batches) for identity, _ in batch}
    arrived = {identity: max((identity - 30) // 7 + 1, 0) for identity, _ in requests}
    assert max(left[i] - arrived[i] for i in left) <= patience + -(-30 // 7)


@pytest.mark.parametrize("seed", range(10))
def test_one_batch_never_touches_more_experts_than_in_order_of_arrival(seed):
  requests = list(enumerate(np.random.default_rng(seed).integers(0, 8, 40).tolist()))
  aware, plain = (expert_cache.form_batches(requests, 12, 40, expert_aware=aware)[0] for aware in (True, False))
  assert len({e for _, e in aware}) <= len({e for _, e in plain})


def test_without_patience_a_rare_expert_starves():
  """The paper's algorithm has no ageing; the negative control of the bound above."""
  requests = [(0, 7)] + [(i, i % 2) for i in range(1, 200)]
  def batch_of_first(patience):
    return next(n for n, b in enumerate(expert_cache.form_batches(requests, 4, 16, patience)) if (0, 7) in b)
  assert batch_of_first(None) > 40 and batch_of_first(3) <= 3
