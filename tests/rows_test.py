"""The order of rows: independent draws of the mixture, exact shares, few rows of one document; the same wherever one begins."""

import contextlib
import json

import numpy as np
import pytest

from moe import config
from moe.data import mixture
from moe.data import pipeline
from moe.data import records
from moe.data import rows as rows_lib
from tools.bench import row_draws

# Batch, virtual shards, weights; more shards than rows, and numbers that do not divide the batch, too.
CASES = [(16, 1, (1, 1)), (16, 16, (3, 1)), (64, 4, (97, 3)), (64, 64, (97, 3)), (64, 24, (50, 30, 15, 5)), (24, 64, (2, 1))]
BATCHES = 400


def most_by_chance(groups: int) -> float:
  """The variance ratio that independent draws exceed once in a million times: chi-square with `groups` degrees, which the
  Wilson-Hilferty cube approximates to a percent."""
  deviation = np.sqrt(2 / (9 * groups))
  return (1 - 2 / (9 * groups) + 4.75 * deviation) ** 3


@pytest.mark.parametrize("batch, shards, weights", CASES)
def test_rows_are_independent_draws(batch, shards, weights):
  """By batch, by micro-batch and by shard of the mesh, for every domain; and places of a batch are uncorrelated."""
  domains = row_draws.independent_order(batch, shards, list(weights), 5, BATCHES)[..., 0]
  for groups in (domains, row_draws.micro_batches(domains, 4), row_draws.mesh_shards(domains, 4)):
    for domain in range(len(weights)):
      assert row_draws.variance_ratio(groups, list(weights), domain) < most_by_chance(len(groups))
  for domain in range(len(weights)):
    mean, score = row_draws.correlation_score(domains, domain)
    assert abs(mean) < 0.02 and score < 6, domain


@pytest.mark.parametrize("batch, shards, weights", [(16, 16, (3, 1)), (64, 4, (97, 3))])
def test_a_periodic_mixture_is_noticed(batch, shards, weights):
  """The negative control: one schedule for all shards."""
  domains = row_draws.periodic_order(batch, shards, list(weights), 5, 100)[..., 0]
  assert row_draws.variance_ratio(row_draws.micro_batches(domains, 4), list(weights), 1) > 2 * most_by_chance(400)
  assert row_draws.correlation_score(domains, 1)[1] > 100


@pytest.mark.parametrize("weights", [(1, 1), (97, 3), (2, 1), (0.2, 0.5, 0.123, 0.003), tuple(range(1, 41))])
@pytest.mark.parametrize("shards", [1, 7, 64])
def test_shares_are_exact_in_the_long_run(shards, weights):
  """A block of one shard is within one row of each share, a block of all shards too, and a thousand blocks of one shard are
  within five: offsets by the golden ratio leave a logarithm of the number of blocks."""
  share = np.array(weights) / np.sum(weights)

  def counts(shard, number):
    return np.bincount(mixture.block(weights, 3, shard, shards, number), minlength=len(weights))

  for number in (0, 1, 17):
    of_shards = np.array([counts(shard, number) for shard in range(shards)])
    assert (np.abs(of_shards - mixture.BLOCK_ROWS * share) < 1 + 1e-9).all()
    assert (np.abs(of_shards.sum(0) - of_shards.sum() * share) < 1 + 1e-9).all()
  many = sum(counts(shards // 2, number) for number in range(1000))
  assert (np.abs(many - many.sum() * share) < 5).all()


def test_permutations_are_uniform_and_fixed():
  places = np.array([mixture.permutation(8, seed, 2) for seed in range(8000)])
  table = np.array([np.bincount(places[:, i], minlength=8) for i in range(8)])
  assert np.square(table - 1000).sum() / 1000 < 49 + 6 * np.sqrt(2 * 49)  # chi-square, 7 x 7 degrees of freedom
  # A position outlives the installed NumPy: these numbers may never change.
  assert mixture.permutation(8, 3, 1, 4).tolist() == [1, 0, 4, 3, 2, 7, 5, 6]
  assert mixture.permutation(3, -1).tolist() == mixture.permutation(3, 2**64 - 1).tolist()


@pytest.mark.parametrize("batch, shards", [(64, 64), (64, 4), (16, 1)])
def test_few_rows_of_a_document_meet_in_a_batch(batch, shards):
  """Documents of 16 rows, as many as there are batches in a window: one on average, where the order of the packer has up to
  all 16 in one batch."""
  rows = row_draws.independent_order(batch, shards, [1], 0, 100)
  most, mean = row_draws.most_rows_of_a_document(rows, 16)
  assert most <= (1 if shards == batch else 8) and mean < 4.5
  if shards < batch:
    assert row_draws.most_rows_of_a_document(row_draws.periodic_order(batch, shards, [1], 0, 20), 16)[0] == 16


def shard(number=3, state=None, seed=1):
  domains = tuple(config.Domain(name=name, path="", weight=weight) for name, weight in (("a", 5.0), ("b", 2.0)))
  data = config.Data(domains=domains, batch_sequences=8, sequence_tokens=2, virtual_shards=8)
  return rows_lib.VirtualShard(number, rows_lib.Order(8, 6), data, seed, row_draws._NumberedRows, state)


def test_a_shard_goes_on_from_any_row():
  """From the state before each row, also where rows between are passed over, the rows are those of an undisturbed shard."""
  straight = shard()
  whole = [straight.row(i).tolist() for i in range(60)]
  assert sorted(map(str, whole)) != list(map(str, whole)) and len(set(map(str, whole))) == 60
  for index in (0, 1, 5, 6, 13, 37):
    opened = shard()
    for i in range(index):
      opened.row(i)
    state = json.loads(json.dumps(opened.state_before(index)))
    again = shard(state=state)
    assert [again.row(i).tolist() for i in range(index, 60, 3)] == whole[index:60:3]
  with pytest.raises(IndexError, match="row 3 of virtual shard 3 was passed: the next one is 60"):
    straight.row(3)


def test_what_is_forgotten_is_not_needed():
  opened = shard()
  for i in range(100):
    opened.row(i)
    opened.forget_before(max(i - 7, 0))  # a consumer some rows behind
    assert opened.state_before(max(i - 7, 0))["window"] == max(i - 7, 0) // 6
    assert len(opened._starts) <= 5


def test_rows_before_a_position():
  order = rows_lib.Order(5, 16)
  for position in range(23):
    for number in range(5):
      assert order.rows_before(number, position) == len([g for g in range(position) if g % 5 == number])


@pytest.mark.parametrize("shards", [3, 8])
def test_domain_tokens_are_those_of_the_batches(tmp_path, shards):
  """The letters of a row say of which domain it is."""
  domains = []
  for name, letter, weight in (("a", "a", 3.0), ("b", "b", 1.0)):
    documents = [records.Document(letter * 100, name, str(i)) for i in range(20)]
    records.write_domain(tmp_path / name, {"train": documents})
    domains.append(config.Domain(name=name, path=str(tmp_path / name), weight=weight))
  data = config.Data(domains=tuple(domains), batch_sequences=8, sequence_tokens=32, virtual_shards=shards)
  with contextlib.closing(pipeline.Loader(data, 5)) as loader:
    next(loader)
    for _ in range(20):
      seen = int((next(loader)[0] == ord("a") + 3).any(1).sum())
      assert loader.domain_tokens() == {"a": 32 * seen, "b": 32 * (8 - seen)}
