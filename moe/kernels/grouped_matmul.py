"""Grouped matrix multiplication: consecutive groups of rows, each with its own matrix.

    out[i] = lhs[i] @ rhs[g(i)]      g(i) = group of row i; rows past sum(group_sizes) give 0

Backends, chosen by name:
  dense       every row times every matrix, then the right one is kept; the reference, E times the work
  ragged_dot  `jax.lax.ragged_dot`, a native kernel on TPU, with the tiling computed here; on CPU XLA makes one masked
              copy for each group
  tokamax     tokamax's Mosaic kernel, version 2; TPU only, needs `pip install tokamax` (Python >= 3.12)
  loop        for CPU: chunks of rows of one group at a time, with a custom gradient. Only rows that exist are
              multiplied, so the work is that of one matmul whatever the imbalance
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from moe import sharding

BACKENDS = ("loop", "ragged_dot", "dense", "tokamax")
# Rows of one matmul of the loop. Only 512 or more occupy a second thread; the small ones end a group.
_CHUNK_ROWS = (512, 128, 64, 32)


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, backend: str) -> jax.Array:
  """Multiplies each group of rows by its matrix.

  Args:
    lhs: [M, K], rows sorted by group.
    rhs: [G, K, N], one matrix a group, of lhs's dtype.
    group_sizes: [G] int32, rows of each group; their sum is at most M.
    backend: one of `BACKENDS`.

  Returns:
    [M, N] of lhs's dtype, accumulated in float32.

  Raises:
    ValueError: shapes that do not fit, or an unknown backend.
  """
  if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
    raise ValueError(f"grouped_matmul wants lhs [M, K], rhs [G, K, N] and group_sizes [G]; got lhs {lhs.shape}, "
                     f"rhs {rhs.shape}, group_sizes {group_sizes.shape}")
  if backend == "loop":
    return _loop(lhs, rhs, group_sizes)
  if backend == "ragged_dot":
    return _ragged(lhs, rhs, group_sizes)
  if backend == "tokamax":
    return _tokamax(lhs, rhs, group_sizes)
  if backend == "dense":
    return _dense(lhs, rhs, group_sizes)
  raise ValueError(f"grouped_matmul has no backend {backend!r}; it has {', '.join(BACKENDS)}")


def _dense(lhs, rhs, group_sizes):
  ends = jnp.cumsum(group_sizes)
  rows = jnp.arange(lhs.shape[0])
  member = (rows[:, None] >= ends - group_sizes) & (rows[:, None] < ends)  # [M, G]
  everything = jnp.einsum("mk,gkn->mgn", lhs, rhs, preferred_element_type=jnp.float32)
  return jnp.einsum("mgn,mg->mn", everything, member.astype(jnp.float32)).astype(lhs.dtype)


# Vector memory that XLA lets its ragged dot use, bytes of the default scoped limit.
SCOPED = {"TPU v4": 16 << 20, "TPU v5 lite": 16 << 20, "TPU v5": 16 << 20, "TPU v6 lite": 32 << 20, "TPU7x": 32 << 20}


def tile_rows(rows: int, num_groups: int) -> int:
  """Rows of a tile of XLA's ragged dot: 128, or 256 where a group has so many that the halves of tiles it shares with its
  neighbours do not count."""
  return 256 if rows >= 2048 * num_groups else 128


def tiling(rows: int, contract: int, columns: int, num_groups: int, scoped_bytes: int) -> tuple[int, int, int]:
  """(m, k, n) tile of XLA's ragged dot for bfloat16, of those that fit doubly buffered with a float32 result: by the least
  traffic, then the largest k.

  All of k lets an expert's block stay while its rows pass; at least 1024 of it, for short products wait for the sum in memory.
  """
  m = tile_rows(rows, num_groups)
  visits = rows // m + num_groups

  def size(k, n):
    return 4 * (m * k + k * n + m * n) + 4 * m * n

  def moved(k, n):
    return columns // n * visits * m * contract + (num_groups if k == contract else visits) * contract * columns

  def parts(total, least):
    return [n for n in range(least, total + 1, 128) if total % n == 0] or [total]

  options = [(k, n) for k in parts(contract, min(1024, contract)) for n in parts(columns, 128)
             if size(k, n) <= scoped_bytes * 7 // 8]
  k, n = min(options, key=lambda tile: (moved(*tile), -tile[0]), default=(128, 128))
  return m, k, n


def _result(dtype):
  """What to ask of a ragged dot. The TPU's kernel accumulates in float32 whatever its result, and a float32 result would be
  written out and converted in a pass of its own; elsewhere the result's type is also that of the sum."""
  return dtype if sharding.current_device().device_kind in SCOPED else jnp.float32


def _tiled(rows: int, contract: int, columns: int, num_groups: int):
  """A context in which a ragged dot carries its tiling; off TPU, or for odd widths, an empty one."""
  kind = sharding.current_device().device_kind
  if kind not in SCOPED or contract % 128 or columns % 128:
    return contextlib.nullcontext()
  return set_xla_metadata(ragged_dot_tiling=",".join(map(str, tiling(rows, contract, columns, num_groups, SCOPED[kind]))))


@jax.custom_vjp
def _ragged(lhs, rhs, group_sizes):
  with _tiled(lhs.shape[0], *rhs.shape[1:], rhs.shape[0]):
    return jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=_result(lhs.dtype)).astype(lhs.dtype)


def _ragged_backward(saved, grad):
  lhs, rhs, sizes = saved
  groups, width, columns = rhs.shape
  by_matrix = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
  by_rows = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
  with _tiled(grad.shape[0], columns, width, groups):
    grad_lhs = jax.lax.ragged_dot_general(grad, rhs, sizes, by_matrix, preferred_element_type=_result(lhs.dtype))
  grad_rhs = jax.lax.ragged_dot_general(lhs, grad, sizes, by_rows, preferred_element_type=_result(rhs.dtype))
  return grad_lhs.astype(lhs.dtype), grad_rhs.astype(rhs.dtype), None


_ragged.defvjp(lambda *operands: (_ragged(*operands), operands), _ragged_backward)


def _tokamax(lhs, rhs, group_sizes):
  import tokamax  # not in requirements.txt; kernels/plan.py asks for it beforehand

  return tokamax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=lhs.dtype, implementation="mosaic_tpu_v2")


@jax.custom_vjp
def _loop(lhs, rhs, group_sizes):
  return _loop_rows(lhs, rhs, group_sizes, contract=0)


def _loop_forward(lhs, rhs, group_sizes):
  return _loop(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _loop_backward(saved, grad_out):
  lhs, rhs, group_sizes = saved
  grad_lhs = _loop_rows(grad_out, rhs, group_sizes, contract=1)
  return grad_lhs, _loop_matrices(lhs, grad_out, group_sizes).astype(rhs.dtype), None


_loop.defvjp(_loop_forward, _loop_backward)


def _for_chunks(begin, size, num_rows: int, body, carry):
  """Folds body(start, first, rows, carry) over chunks of the rows [begin, begin + size) of an array.

  As many chunks of 512 rows as there are, then of 128, 64 and 32, so that no more than 31 rows are computed in vain. `rows` is
  static; `first` is the first row that belongs to the chunk, `start` where its slice begins: earlier at the end of the array,
  where a slice must not stick out. Loops of one trip, because XLA:CPU copies what a conditional carries.
  """
  total = (size + _CHUNK_ROWS[-1] - 1) // _CHUNK_ROWS[-1] * _CHUNK_ROWS[-1]
  done = 0
  for rows in _CHUNK_ROWS:
    trips = (total - done) // rows

    def chunk(i, carry, done=done, rows=rows):
      first, fit = begin + done + i * rows, min(rows, num_rows)
      return body(jnp.minimum(first, num_rows - fit), first, fit, carry)

    carry = jax.lax.fori_loop(0, trips, chunk, carry)
    done = done + trips * rows
  return carry


def _loop_rows(lhs, rhs, group_sizes, contract: int):
  """Row i times matrix g(i), contracting axis `contract` of the matrix."""
  ends = jnp.cumsum(group_sizes)

  def group(g, out):
    matrix = jax.lax.dynamic_index_in_dim(rhs, g, keepdims=False)
    begin, end = ends[g] - group_sizes[g], ends[g]

    def chunk(start, first, rows, out):
      del first
      part = jax.lax.dynamic_slice_in_dim(lhs, start, rows)
      product = jax.lax.dot_general(part, matrix, (((1,), (contract,)), ((), ())),
                                    preferred_element_type=jnp.float32).astype(out.dtype)
      before = jax.lax.dynamic_slice_in_dim(out, start, rows)  # what other groups wrote stays
      row = start + jnp.arange(rows)[:, None]
      return jax.lax.dynamic_update_slice_in_dim(
          out, jnp.where((row >= begin) & (row < end), product, before), start, 0)

    return _for_chunks(begin, group_sizes[g], lhs.shape[0], chunk, out)

  out = jnp.zeros((lhs.shape[0], rhs.shape[2 - contract]), lhs.dtype)
  return jax.lax.fori_loop(0, rhs.shape[0], group, out) if lhs.shape[0] else out


def _loop_matrices(lhs, grad_out, group_sizes):
  """For each group lhs_g^T @ grad_out_g: [G, K, N] float32."""
  ends = jnp.cumsum(group_sizes)

  def group(g, out):
    begin, end = ends[g] - group_sizes[g], ends[g]

    def chunk(start, first, rows, total):
      part = jax.lax.dynamic_slice_in_dim(lhs, start, rows)
      grad = jax.lax.dynamic_slice_in_dim(grad_out, start, rows)
      row = start + jnp.arange(rows)[:, None]
      grad = jnp.where((row >= first) & (row < end), grad, 0)
      return total + jax.lax.dot_general(part, grad, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    zero = jnp.zeros((lhs.shape[1], grad_out.shape[1]), jnp.float32)
    return out.at[g].set(_for_chunks(begin, group_sizes[g], lhs.shape[0], chunk, zero))

  out = jnp.zeros((group_sizes.shape[0], lhs.shape[1], grad_out.shape[1]), jnp.float32)
  return jax.lax.fori_loop(0, group_sizes.shape[0], group, out) if lhs.shape[0] else out
