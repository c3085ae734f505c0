"""Rows sorted by expert, cut into tiles of one expert each: what the Pallas kernels of the experts walk over.

Each expert's rows start on a tile of their own and fill `tile_rows` rows a tile but the last. A grid step *visits* one tile;
inside, only the rows that exist are computed, rounded up to `GRANULE`. So a large tile costs memory, never arithmetic,
and an expert's matrices are read once a tile, or once in all where the grid keeps them.

The index maps of a kernel ask a visit for its expert. `Prefetched` answers from scalars that the grid prefetches; `Even`
answers by arithmetic, for experts of equal size: the static twin of the same kernel, which the compiler's profiler can
follow (it reads 0 from scalar memory).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

GRANULE = 32  # rows; two bfloat16 tiles of 16, and at most 12.5% more than the useful rows at 128 rows an expert


class Tiles(NamedTuple):
  """Where every row of every tile comes from. V tiles of `tile_rows` rows, for T tokens with K choices each."""

  group: jax.Array  # [V] int32, expert of the tile; ascending, each expert at least once
  source: jax.Array  # [V] int32, the tile whose blocks a visit needs: itself, or where it is empty the last one that is not
  rows: jax.Array  # [V] int32, rows that exist
  token: jax.Array  # [V, 1, tile_rows] int32; T where there is no row
  selection: jax.Array  # [V, 1, tile_rows] int32, token x K + choice; T x K where there is no row
  place: jax.Array  # [T x K] int32, row (over all tiles) of each selection; V x tile_rows where it is not carried out


def count(rows: int, num_groups: int, tile_rows: int) -> int:
  """Tiles that suffice for any division of `rows` rows among the groups."""
  return rows // tile_rows + num_groups


def make(order: jax.Array, inverse: jax.Array, sizes: jax.Array, top_k: int, tile_rows: int) -> Tiles:
  """Tiles for sorted selections.

  Args:
    order: [R] int32, selections (token x K + choice) sorted by expert; those past sum(sizes) belong to nobody.
    inverse: [T x K] int32, place of each selection in `order`, R or more where it has none.
    sizes: [E] int32, rows of each expert.
    top_k: K.
    tile_rows: rows of a tile, a multiple of `GRANULE`.
  """
  num_tiles = count(order.shape[0], sizes.shape[0], tile_rows)
  first_tile, group, source, rows, within = _table(sizes, num_tiles, tile_rows)
  end = jnp.cumsum(sizes)
  first_row = end - sizes

  lane = jnp.arange(tile_rows, dtype=jnp.int32)
  exists = lane < rows[:, None]
  place = jnp.where(exists, (first_row[group] + within)[:, None] + lane, 0)
  selection = jnp.where(exists, jnp.append(order, 0)[place], inverse.shape[0]).astype(jnp.int32)
  token = selection // top_k

  expert = jnp.minimum(jnp.searchsorted(end, inverse, side="right"), sizes.shape[0] - 1)
  place = first_tile[expert] * tile_rows + inverse - first_row[expert]
  place = jnp.where(inverse < end[-1], place, num_tiles * tile_rows).astype(jnp.int32)
  return Tiles(group, source, rows, token[:, None], selection[:, None], place)


def _table(sizes, num_tiles: int, tile_rows: int, xp=jnp):
  """(first tile of each group; for each tile: group, source, rows, and the rows of its group before it)."""
  tiles = xp.maximum(-(-sizes // tile_rows), 1)
  tile_end = xp.cumsum(tiles)
  visit = xp.arange(num_tiles, dtype=xp.int32)
  group = xp.minimum(xp.searchsorted(tile_end, visit, side="right"), sizes.shape[0] - 1).astype(xp.int32)
  within = (visit - (tile_end - tiles)[group]) * tile_rows
  rows = xp.clip(sizes[group] - within, 0, tile_rows).astype(xp.int32)
  source = xp.maximum(xp.maximum.accumulate(xp.where(rows > 0, visit, -1)), 0)
  return tile_end - tiles, group, source, rows, within


def where(condition, a, b):
  """jnp.where, on the host for arrays of the host."""
  return (np if isinstance(condition, np.ndarray) else jnp).where(condition, a, b)


class _Visits:
  """What index maps and bodies ask of a visit; `_group`, `_source` and `_rows` are indexed by it."""

  def group(self, visit):
    return self._group[visit]

  def rows(self, visit):
    return self._rows[visit]

  def tile(self, visit):
    """The tile whose rows to have at hand; an empty visit keeps those of the one before, so that nothing moves."""
    return self._source[visit]

  def expert(self, visit):
    """The expert whose matrices to have at hand."""
    return self._group[self._source[visit]]

  def column(self, visit, step, steps: int):
    """The block of columns in a step of a visit; an empty visit stays at the last one, so that nothing moves."""
    return where(self._rows[visit] > 0, step, steps - 1)


class Prefetched(_Visits):
  """A visit's expert from prefetched scalars: the references that index maps and bodies receive."""

  num_scalars = 3

  def __init__(self, group, source, rows):
    self._group, self._source, self._rows = group, source, rows

  def is_first(self, visit):
    return (visit == 0) | (self._group[visit] != self._group[jnp.maximum(visit - 1, 0)])

  def is_last(self, visit):
    last = self._group.shape[0] - 1
    return (visit == last) | (self._group[visit] != self._group[jnp.minimum(visit + 1, last)])


class Even:
  """A visit's expert by arithmetic: `per_group` tiles each, with `rows` rows."""

  num_scalars = 0

  def __init__(self, per_group: int, rows: int):
    self._per_group, self._rows = per_group, rows

  def group(self, visit):
    return visit // self._per_group

  expert = group

  def tile(self, visit):
    return visit

  def column(self, visit, step, steps: int):
    del visit, steps
    return step

  def rows(self, visit):
    del visit
    return self._rows

  def is_first(self, visit):
    return jax.lax.rem(visit, self._per_group) == 0

  def is_last(self, visit):
    return jax.lax.rem(visit, self._per_group) == self._per_group - 1


class Counted(_Visits):
  """Stands in for the visits of a kernel on the host: nothing runs, the blocks that would move are counted.

  A block is moved when its index differs from the grid step before, as in the pipelines of Pallas.
  """

  def __init__(self, sizes, tile_rows: int):
    sizes = np.asarray(sizes, np.int32)
    self.num_tiles = count(int(sizes.sum()), len(sizes), tile_rows)
    table = _table(sizes, self.num_tiles, tile_rows, np)
    self._group, self._source, self._rows = table[1:4]
    self.computed_rows = int((-(-self._rows // GRANULE) * GRANULE).sum())
    self.visits = int((self._rows > 0).sum())
    self.bytes: dict[str, int] = {}  # kernel -> bytes between HBM and the core
    self.vmem: dict[str, int] = {}  # kernel -> bytes of blocks and scratch in vector memory

  def count(self, name: str, grid, blocks, dtypes, scratch) -> None:
    """Adds the traffic of one kernel; `blocks` and `dtypes` of its operands and results."""
    steps = np.indices(grid).reshape(len(grid), -1)
    moved, held = 0, sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in scratch)
    for block, dtype in zip(blocks, dtypes):
      index = np.stack([np.broadcast_to(np.asarray(i), steps.shape[1:]) for i in block.index(self, *steps)])
      size = math.prod(block.shape) * np.dtype(dtype).itemsize
      moved += (1 + int((np.diff(index, axis=1) != 0).any(0).sum())) * size
      if block.memory == pltpu.VMEM:
        held += size * block.buffers
    self.bytes[name] = self.bytes.get(name, 0) + moved
    self.vmem[name] = max(self.vmem.get(name, 0), held)


def for_row_chunks(rows, most: int, body) -> None:
  """Calls body(offset, size) for chunks that cover `rows` rows, rounded up to the granule; sizes are static.

  Whole chunks of `most` rows in a loop, then halves of it down to the granule, each at most once: matmuls stay large and
  the code short.
  """
  total = (rows + GRANULE - 1) // GRANULE * GRANULE

  def whole(i, carry):
    body(pl.multiple_of(i * most, most), most)
    return carry

  jax.lax.fori_loop(0, total // most, whole, 0)
  rest = total % most
  size = most // 2
  while size >= GRANULE:
    if isinstance(rows, int):
      if rest & size:
        body(total // most * most + rest // (2 * size) * (2 * size), size)
    else:
      offset = pl.multiple_of(total // most * most + rest // (2 * size) * (2 * size), size)
      pl.when((rest & size) != 0)(lambda offset=offset, size=size: body(offset, size))
    size //= 2


# Tokens in vector memory, each a block of whole registers: [T + 1, D / 256, 128] uint32. A word holds the bfloat16 of two
# columns, D / 2 apart, so that a row is gathered by a register move; token T is zero and stands for rows that do not exist.


def pack(x: jax.Array) -> jax.Array:
  """[T, D] bfloat16 -> [T + 1, D / 256, 128] uint32."""
  tokens, width = x.shape
  low, high = (jax.lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32) for half in jnp.split(x, 2, axis=1))
  words = (low | (high << 16)).reshape(tokens, width // 256, 128)
  return jnp.pad(words, ((0, 1), (0, 0), (0, 0)))


_GATHER = 32  # rows of one trip through the staging buffer


def gather_scratch(tile_rows: int, width: int):
  """(staging buffer, gathered rows) for `gather`."""
  return [pltpu.VMEM((_GATHER * width // 256, 128), jnp.uint32), pltpu.VMEM((tile_rows // 2, width), jnp.uint32)]


def gather(x, token, rows, staging, gathered) -> None:
  """Gathers the rows of a visit from resident tokens.

  Args:
    x: ref [T + 1, D / 256, 128] uint32, from `pack`.
    token: ref [1, 1, tile_rows] int32 in scalar memory.
    rows: how many exist.
    staging, gathered: refs of `gather_scratch`; read the result with `read_rows`.
  """
  blocks, width = x.shape[1], gathered.shape[1]
  low, high = jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000)
  trip = min(_GATHER, 2 * gathered.shape[0])

  def some(i, carry):  # unrolled: a row is one register move, and the compiler's profiler misreads nested loops
    base = pl.multiple_of(i * trip, trip)
    for row in range(trip):
      staging[row * blocks:(row + 1) * blocks, :] = x[token[0, 0, base + row]]
    # Sixteen rows make eight sublanes of bfloat16 pairs: even rows in the low halves, odd rows in the high ones.
    for first in range(0, trip, 16):
      place = pl.ds(pl.multiple_of((base + first) // 2, 8), 8)
      for c in range(blocks):
        even = staging[pl.ds(first * blocks + c, 8, stride=2 * blocks), :]
        odd = staging[pl.ds((first + 1) * blocks + c, 8, stride=2 * blocks), :]
        gathered[place, c * 128:(c + 1) * 128] = (even & low) | (odd << 16)
        gathered[place, width // 2 + c * 128:width // 2 + (c + 1) * 128] = (even >> 16) | (odd & high)
    return carry

  jax.lax.fori_loop(0, (rows + trip - 1) // trip, some, 0)


def read_rows(gathered, offset, size: int) -> jax.Array:
  """[size, D] bfloat16 of what `gather` gathered."""
  return pltpu.bitcast(gathered[pl.ds(pl.multiple_of(offset // 2, GRANULE // 2), size // 2), :], jnp.bfloat16)
