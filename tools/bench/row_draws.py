"""Are the rows of a batch independent draws of the mixture? Counts by batch, micro-batch and mesh shard, and correlations.

    python -m tools.bench.row_draws                        # a table over virtual shards, batches, micro-batches and weights
    python -m tools.bench.row_draws --order=periodic       # the same for a periodic mixture, equal in every shard

Only the order is looked at: each domain is a stream of numbered rows, `--document_rows` of which are one document.
"""

from __future__ import annotations

import argparse
import itertools

import grain
import numpy as np

from moe import config
from moe.data import rows as rows_lib


class _NumberedRows:
  """A stream in the place of a packer: row i of a domain in a shard is [domain, shard, i, 0]."""

  def __init__(self, domain: int, shard: int):
    self._domain, self._shard, self._next = domain, shard, 0

  def __next__(self) -> dict[str, np.ndarray]:
    values = (self._domain, self._shard, self._next, 0)
    self._next += 1
    return {field: np.array([value]) for field, value in zip(rows_lib.FIELDS, values)}

  def get_state(self) -> dict:
    return {"next": self._next}

  def set_state(self, state: dict) -> None:
    self._next = state["next"]


def independent_order(batch: int, shards: int, weights: list[float], seed: int, batches: int) -> np.ndarray:
  """The rows of the first batches as the loader orders them: [batches, B, 3] of domain, shard and number in the stream."""
  domains = tuple(config.Domain(name=str(i), path="", weight=weight) for i, weight in enumerate(weights))
  data = config.Data(domains=domains, batch_sequences=batch, sequence_tokens=2, virtual_shards=shards)
  order = rows_lib.Order.of(data)
  opened = [rows_lib.VirtualShard(shard, order, data, seed, _NumberedRows) for shard in range(order.virtual_shards)]
  rows = [opened[g % len(opened)].row(g // len(opened)) for g in range(batch * batches)]
  return np.stack(rows)[:, :3, 0].reshape(batches, batch, 3)


def periodic_order(batch: int, shards: int, weights: list[float], seed: int, batches: int) -> np.ndarray:
  """The same for a mixture by grain's fixed schedule, equal in every shard, and rows in the order of the packer.

  Each shard fills batch / shards rows of a batch that follow each other.
  """
  del seed  # the schedule does not know it
  each = batch // shards
  count = each * batches
  numbered = [grain.MapDataset.range(count).map(lambda i, d=d: (d, i)).to_iter_dataset() for d in range(len(weights))]
  mixed = grain.IterDataset.mix(numbered, weights)
  one = np.array(list(itertools.islice(iter(mixed), count))).reshape(batches, each, 2)
  rows = [np.stack([one[..., 0], np.full_like(one[..., 0], shard), one[..., 1]], -1) for shard in range(shards)]
  return np.concatenate(rows, 1)


ORDERS = {"independent": independent_order, "periodic": periodic_order}


def variance_ratio(domains: np.ndarray, weights: list[float], domain: int) -> float:
  """Variance of a domain's count in groups of rows, over that of independent draws.

  Args:
    domains: [groups, rows] index of the domain of each row.
    weights: of the domains.
    domain: which one is counted.
  """
  share = weights[domain] / sum(weights)
  counts = (domains == domain).sum(1)
  expected = domains.shape[1] * share
  return float(np.mean(np.square(counts - expected)) / (expected * (1 - share)))


def correlation_score(domains: np.ndarray, domain: int) -> tuple[float, float]:
  """(mean correlation, standard score of the sum of squared correlations) between the places of a batch, over batches.

  Args:
    domains: [batches, B].
    domain: whose indicator is correlated.
  """
  chosen = (domains == domain).astype(float)
  varying = chosen[:, chosen.std(0) > 0]
  places = varying.shape[1]
  if places < 2:
    return 0.0, 0.0
  pairs = np.corrcoef(varying.T)[np.triu_indices(places, 1)]
  squares = len(domains) * np.square(pairs)  # each has mean 1 and variance 2 for independent places
  return float(pairs.mean()), float((squares.sum() - len(pairs)) / np.sqrt(2 * len(pairs)))


def most_rows_of_a_document(order: np.ndarray, document_rows: int) -> tuple[int, float]:
  """(largest, mean over batches of the largest) number of rows of one document in a batch [batches, B, 3]."""
  largest = []
  for batch in order:
    documents = np.concatenate([batch[:, :2], batch[:, 2:] // document_rows], 1)
    largest.append(np.unique(documents, axis=0, return_counts=True)[1].max())
  return int(max(largest)), float(np.mean(largest))


def micro_batches(domains: np.ndarray, count: int) -> np.ndarray:
  """[batches, B] -> [batches x M, B / M] with rows i::M together, as step.split_micro_batches has them."""
  batches, rows = domains.shape
  return domains.reshape(batches, rows // count, count).swapaxes(1, 2).reshape(batches * count, rows // count)


def mesh_shards(domains: np.ndarray, count: int) -> np.ndarray:
  """[batches, B] -> [batches x shards, B / shards] with rows that follow each other together."""
  return domains.reshape(-1, domains.shape[1] // count)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--order", choices=list(ORDERS), default="independent")
  parser.add_argument("--batches", type=int, default=400)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--document_rows", type=int, default=16)
  arguments = parser.parse_args()
  print("variance of the rarest domain's count over that of independent draws (1: as independent, 0: always the same), by\n"
        "batch, micro-batch and mesh shard (a quarter of the rows each); mean correlation between places of a batch and the\n"
        "standard score of its squares; largest number of rows of one document in a batch, and its mean")
  print(f"{'weights':>12s} {'B':>4s} {'V':>4s} {'batch':>7s} {'micro':>7s} {'shard':>7s} {'corr.':>8s} {'score':>9s} "
        f"{'document':>12s} {'off share':>10s}")
  for weights, batch, shards in itertools.product(([1, 1], [3, 1], [97, 3], [50, 30, 15, 5]), (16, 64), (1, 4, 16, 64)):
    if shards > batch:
      continue
    rows = ORDERS[arguments.order](batch, shards, weights, arguments.seed, arguments.batches)
    domains, rarest = rows[..., 0], int(np.argmin(weights))
    ratios = [variance_ratio(groups, weights, rarest)
              for groups in (domains, micro_batches(domains, 4), mesh_shards(domains, 4))]
    correlation, score = correlation_score(domains, rarest)
    most, mean = most_rows_of_a_document(rows, arguments.document_rows)
    off = (domains == rarest).sum() - domains.size * weights[rarest] / sum(weights)
    print(f"{':'.join(map(str, weights)):>12s} {batch:4d} {shards:4d} " + " ".join(f"{ratio:7.3f}" for ratio in ratios)
          + f" {correlation:8.4f} {score:9.1f} {most:5d} {mean:6.2f} {off:10.1f}")
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
