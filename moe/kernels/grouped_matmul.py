"""Grouped matrix multiplication: consecutive groups of rows, each with its own matrix.

    out[i] = lhs[i] @ rhs[g(i)]      g(i) = group of row i; rows past sum(group_sizes) give 0

Backends, chosen by name:
  dense       every row times every matrix, then the right one is kept; the reference, E times the work
  ragged_dot  `jax.lax.ragged_dot`, a native kernel on TPU; on CPU XLA makes one masked copy for each group
  loop        for CPU: chunks of rows of one group at a time, with a custom gradient. Only rows that exist are
              multiplied, so the work is that of one matmul whatever the imbalance
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BACKENDS = ("loop", "ragged_dot", "dense")
_CHUNK_ROWS = 128  # rows of one matmul of the loop; measured by tools/bench/grouped_matmul.py


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
    return jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32).astype(lhs.dtype)
  if backend == "dense":
    return _dense(lhs, rhs, group_sizes)
  raise ValueError(f"grouped_matmul has no backend {backend!r}; it has {', '.join(BACKENDS)}")


def _dense(lhs, rhs, group_sizes):
  ends = jnp.cumsum(group_sizes)
  rows = jnp.arange(lhs.shape[0])
  member = (rows[:, None] >= ends - group_sizes) & (rows[:, None] < ends)  # [M, G]
  everything = jnp.einsum("mk,gkn->mgn", lhs, rhs, preferred_element_type=jnp.float32)
  return jnp.einsum("mgn,mg->mn", everything, member.astype(jnp.float32)).astype(lhs.dtype)


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


def _loop_rows(lhs, rhs, group_sizes, contract: int):
  """Row i times matrix g(i), contracting axis `contract` of the matrix."""
  rows = min(_CHUNK_ROWS, lhs.shape[0])
  ends = jnp.cumsum(group_sizes)

  def group(g, out):
    matrix = jax.lax.dynamic_index_in_dim(rhs, g, keepdims=False)
    begin, end = ends[g] - group_sizes[g], ends[g]

    def chunk(i, out):
      # A slice at the end of the array is shifted back; the mask keeps what other groups wrote there.
      start = jnp.minimum(begin + i * rows, lhs.shape[0] - rows)
      part = jax.lax.dynamic_slice_in_dim(lhs, start, rows)
      product = jax.lax.dot_general(part, matrix, (((1,), (contract,)), ((), ())),
                                    preferred_element_type=jnp.float32).astype(out.dtype)
      before = jax.lax.dynamic_slice_in_dim(out, start, rows)
      row = start + jnp.arange(rows)[:, None]
      return jax.lax.dynamic_update_slice_in_dim(
          out, jnp.where((row >= begin) & (row < end), product, before), start, 0)

    return jax.lax.fori_loop(0, (group_sizes[g] + rows - 1) // rows, chunk, out)

  out = jnp.zeros((lhs.shape[0], rhs.shape[2 - contract]), lhs.dtype)
  return jax.lax.fori_loop(0, rhs.shape[0], group, out)


def _loop_matrices(lhs, grad_out, group_sizes):
  """For each group lhs_g^T @ grad_out_g: [G, K, N] float32."""
  rows = min(_CHUNK_ROWS, lhs.shape[0])
  ends = jnp.cumsum(group_sizes)

  def group(g, out):
    begin, end = ends[g] - group_sizes[g], ends[g]

    def chunk(i, total):
      first = begin + i * rows
      start = jnp.minimum(first, lhs.shape[0] - rows)
      part = jax.lax.dynamic_slice_in_dim(lhs, start, rows)
      grad = jax.lax.dynamic_slice_in_dim(grad_out, start, rows)
      row = start + jnp.arange(rows)[:, None]
      grad = jnp.where((row >= first) & (row < end), grad, 0)
      return total + jax.lax.dot_general(part, grad, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    zero = jnp.zeros((lhs.shape[1], grad_out.shape[1]), jnp.float32)
    return out.at[g].set(jax.lax.fori_loop(0, (group_sizes[g] + rows - 1) // rows, chunk, zero))

  out = jnp.zeros((group_sizes.shape[0], lhs.shape[1], grad_out.shape[1]), jnp.float32)
  return jax.lax.fori_loop(0, group_sizes.shape[0], group, out)
