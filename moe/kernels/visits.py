"""Rows sorted by expert, cut into tiles of one expert each: what the Pallas kernels of the experts walk over.

Each expert's rows start on a tile of their own and fill `tile_rows` rows a tile but the last. A grid step *visits* one tile;
inside, only the rows that exist are computed, rounded up to `GRANULE`. So a large tile costs memory, never arithmetic,
and an expert's matrices are read once a tile, or once in all where the grid keeps them.

The index maps of a kernel ask a visit for its expert. `Prefetched` answers from scalars that the grid prefetches; `Even`
answers by arithmetic, for experts of equal size: the static twin of the same kernel, which the compiler's profiler can
follow (it reads 0 from scalar memory).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

GRANULE = 32  # rows; two bfloat16 tiles of 16, and at most 12.5% more than the useful rows at 128 rows an expert


class Tiles(NamedTuple):
  """Where every row of every tile comes from. V tiles of `tile_rows` rows, for T tokens with K choices each."""

  group: jax.Array  # [V] int32, expert of the tile; ascending, each expert at least once
  fetch: jax.Array  # [V] int32, expert whose matrices the visit needs: as `group`, but an empty tile repeats the last one
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
  tiles = jnp.maximum(-(-sizes // tile_rows), 1)
  tile_end, end = jnp.cumsum(tiles), jnp.cumsum(sizes)
  first_tile, first_row = tile_end - tiles, end - sizes
  visit = jnp.arange(count(order.shape[0], sizes.shape[0], tile_rows), dtype=jnp.int32)
  group = jnp.minimum(jnp.searchsorted(tile_end, visit, side="right"), sizes.shape[0] - 1).astype(jnp.int32)
  within = (visit - first_tile[group]) * tile_rows
  rows = jnp.clip(sizes[group] - within, 0, tile_rows).astype(jnp.int32)
  fetch = jnp.maximum(jax.lax.cummax(jnp.where(rows > 0, group, -1)), 0)

  lane = jnp.arange(tile_rows, dtype=jnp.int32)
  exists = lane < rows[:, None]
  source = jnp.where(exists, (first_row[group] + within)[:, None] + lane, 0)
  selection = jnp.where(exists, order[source], inverse.shape[0]).astype(jnp.int32)
  token = selection // top_k

  expert = jnp.minimum(jnp.searchsorted(end, inverse, side="right"), sizes.shape[0] - 1)
  place = first_tile[expert] * tile_rows + inverse - first_row[expert]
  place = jnp.where(inverse < end[-1], place, visit.size * tile_rows).astype(jnp.int32)
  return Tiles(group, fetch, rows, token[:, None], selection[:, None], place)


class Prefetched:
  """A visit's expert from prefetched scalars: the references that index maps and bodies receive."""

  num_scalars = 3

  def __init__(self, group, fetch, rows):
    self._group, self._fetch, self._rows = group, fetch, rows

  def fetch(self, visit):
    return self._fetch[visit]

  def group(self, visit):
    return self._group[visit]

  def rows(self, visit):
    return self._rows[visit]

  def is_first(self, visit):
    return (visit == 0) | (self._group[visit] != self._group[jnp.maximum(visit - 1, 0)])

  def is_last(self, visit):
    last = self._group.shape[0] - 1
    return (visit == last) | (self._group[visit] != self._group[jnp.minimum(visit + 1, last)])


class Even:
  """A visit's expert by arithmetic: `per_group` full tiles each."""

  num_scalars = 0

  def __init__(self, per_group: int, tile_rows: int):
    self._per_group, self._tile_rows = per_group, tile_rows

  def fetch(self, visit):
    return visit // self._per_group

  group = fetch

  def rows(self, visit):
    del visit
    return self._tile_rows

  def is_first(self, visit):
    return jax.lax.rem(visit, self._per_group) == 0

  def is_last(self, visit):
    return jax.lax.rem(visit, self._per_group) == self._per_group - 1


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


_GATHER = 64  # rows of one trip through the staging buffer


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

  def trips(i, carry):
    base = i * trip

    def copy(r, carry):
      for k in range(8):
        row = r * 8 + k
        staging[pl.ds(pl.multiple_of(row * blocks, blocks), blocks), :] = x[token[0, 0, base + row]]
      return carry

    jax.lax.fori_loop(0, trip // 8, copy, 0)

    # Sixteen rows make eight sublanes of bfloat16 pairs: even rows in the low halves, odd rows in the high ones.
    def weave(q, carry):
      place = pl.ds(pl.multiple_of(base // 2 + q * 8, 8), 8)
      for c in range(blocks):
        even = staging[pl.ds(q * 16 * blocks + c, 8, stride=2 * blocks), :]
        odd = staging[pl.ds(q * 16 * blocks + blocks + c, 8, stride=2 * blocks), :]
        gathered[place, pl.ds(c * 128, 128)] = (even & low) | (odd << 16)
        gathered[place, pl.ds(width // 2 + c * 128, 128)] = (even >> 16) | (odd & high)
      return carry

    return jax.lax.fori_loop(0, trip // 16, weave, carry)

  jax.lax.fori_loop(0, (rows + trip - 1) // trip, trips, 0)


def read_rows(gathered, offset, size: int) -> jax.Array:
  """[size, D] bfloat16 of what `gather` gathered."""
  return pltpu.bitcast(gathered[pl.ds(pl.multiple_of(offset // 2, GRANULE // 2), size // 2), :], jnp.bfloat16)
