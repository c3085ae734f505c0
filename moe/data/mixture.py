"""Which domain each row of a virtual shard is of: a pure function of the seed, the shard and the row's number.

Rows of a batch come from different shards, so their domains must be independent between shards, and yet every domain must
get its share exactly in the long run. Stratified sampling gives both: each block of `BLOCK_ROWS` rows of a shard draws one
point from each of `BLOCK_ROWS` equal strata of [0, 1), in random order, and a point is of the domain into whose part of
[0, 1) it falls. The points of a block are shifted together by an offset that differs between shards and moves from block
to block by the golden ratio, so that shares which are no multiple of 1 / BLOCK_ROWS are met as well.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

BLOCK_ROWS = 64
_GOLDEN = (5**0.5 - 1) / 2  # the most even sequence of offsets that needs no number of blocks in advance (Weyl)


def permutation(count: int, *key: int) -> np.ndarray:
  """A random order of range(count), [count] int64, fixed by the key for all versions of NumPy.

  NumPy keeps the output of SeedSequence stable, but not that of Generator.permutation.
  """
  words = np.random.SeedSequence([part % 2**64 for part in key]).generate_state(count, np.uint64)
  return np.argsort(words, kind="stable")


@functools.lru_cache(maxsize=8)
def _phases(seed: int, shards: int) -> np.ndarray:
  """[shards] offsets in [0, 1), evenly spread over the shards: one block of all shards together is within one row of every
  domain's share."""
  common = np.random.SeedSequence([seed % 2**64, shards]).generate_state(1)[0] / 2**32
  return (permutation(shards, seed, shards, 1) + common) / shards


def block(weights: Sequence[float], seed: int, shard: int, shards: int, number: int) -> np.ndarray:
  """The domains of the rows of one block of a shard.

  Args:
    weights: of the domains, positive; only their ratios count.
    seed: of the run.
    shard: whose rows, in range(shards).
    shards: of the run.
    number: of the block, from 0.

  Returns:
    [BLOCK_ROWS] int64 indices into `weights`. A domain of share w has floor(64 w) or ceil(64 w) of them.
  """
  bounds = np.cumsum(weights) / np.sum(weights)
  offset = (_phases(seed, shards)[shard] + number * _GOLDEN) % 1.0
  points = (permutation(BLOCK_ROWS, seed, shard, number, 2) + offset) / BLOCK_ROWS
  return np.searchsorted(bounds[:-1], points, side="right")
