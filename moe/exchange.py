"""Rows to the devices of their experts and back: offsets and sizes of `ragged_all_to_all`, and its emulator.

Each device of an expert axis holds rows sorted by expert. Those for device d form d's queue: from the first source, then from
the second, and so on, each source's by expert. d receives a window of its queue, `bound` rows long; the window that starts
at 0 is all of it unless loads are very uneven. All devices know all counts, so all agree on every offset.

Where the backend lacks the operation (CPU), and for one number a row, `_emulated` does what it is specified to do, from the
same offsets.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe import sharding


class Way(NamedTuple):
  """Arguments of `jax.lax.ragged_all_to_all`, each [devices] int32."""

  input_offsets: jax.Array
  send_sizes: jax.Array
  output_offsets: jax.Array  # on the receiving device
  recv_sizes: jax.Array


class Ways:
  """Who sends what to whom, for the devices along `axis`; to be used inside a `shard_map`."""

  def __init__(self, counts, bound: int, axis: str, tensor: tuple[str, ...] = ()):
    """
    Args:
      counts: [A, N, E] int32, rows of each expert on each of the N devices of the axis, for each of A such groups whose
        received rows are put together (expert shards); E / N experts a device, in order.
      bound: rows of a receive buffer.
      axis: the mesh axis of N devices.
      tensor: () or the mesh axis of the A groups.
    """
    groups, members, experts = counts.shape
    self.axis, self.bound, self._tensor = axis, bound, tensor
    self._counts = counts.reshape(groups, members, members, experts // members)  # [A, source, destination, E owned]
    self.longest = jnp.max(self._counts.sum((1, 3)))  # queue of any device

  def between(self, first) -> tuple[Way, Way]:
    """(there, back) of this device, for the window of every queue that starts at `first`."""
    me = jax.lax.axis_index(self.axis)
    group = self._counts[jax.lax.axis_index(self._tensor[0]) if self._tensor else 0].sum(-1)  # [source, destination]
    start, end = _window(group, 0, first, self.bound)
    sizes = end - start
    here = _before(group, 1) + jnp.clip(first - _before(group, 0), 0, group)  # where source s has its first row for d
    there = Way(here[me], sizes[me], start[me], sizes[:, me])
    return there, Way(start[:, me], sizes[:, me], here[:, me], sizes[me])

  def received(self, first):
    """(order, inverse, sizes) of the rows this device has after the window, by expert, as in `experts.Plan`; the buffers of
    the A groups one after the other."""
    mine = self._counts[:, :, jax.lax.axis_index(self.axis)]  # [A, source, E owned]
    groups, members, owned = mine.shape
    base = (jnp.arange(groups) * self.bound)[:, None]
    start, end = (base + edge for edge in _window(mine.reshape(groups, -1), 1, first, self.bound))
    by_expert = lambda x: x.reshape(groups * members, owned).T.reshape(-1)
    count = by_expert(end - start)
    end_out = jnp.cumsum(count)
    start_out = end_out - count

    row = jnp.arange(groups * self.bound)
    segment = jnp.minimum(jnp.searchsorted(end_out, row, side="right", method="compare_all"), count.size - 1)
    order = jnp.where(row < end_out[-1], by_expert(start)[segment] + row - start_out[segment], 0)
    place = start_out.reshape(owned, groups * members).T.reshape(-1)
    start, end = start.reshape(-1), end.reshape(-1)
    segment = jnp.minimum(jnp.searchsorted(end, row, side="right", method="compare_all"), count.size - 1)
    inside = (start[segment] <= row) & (row < end[segment])
    inverse = jnp.where(inside, place[segment] + row - start[segment], row.size - 1)
    return order, inverse, count.reshape(owned, -1).sum(1)


def _before(sizes, axis: int):
  """Exclusive running sum."""
  return jnp.cumsum(sizes, axis) - sizes


def _window(sizes, axis: int, first, bound: int):
  """(start, end) of each segment within the window first .. first + bound of the queue that the segments form."""
  start = _before(sizes, axis)
  return jnp.clip(start - first, 0, bound), jnp.clip(start + sizes - first, 0, bound)


def send(rows: jax.Array, ways: Ways, first) -> jax.Array:
  """[R, D] sorted by expert -> [bound, D], the window of this device's queue; 0 where it is not full."""
  there, back = ways.between(first)
  return _travel(ways.axis, ways.bound, rows, there, back)


def send_back(rows: jax.Array, ways: Ways, first, length: int) -> jax.Array:
  """[bound, D] -> [length, D]: the way back; 0 for the rows that were not in the window."""
  there, back = ways.between(first)
  return _travel(ways.axis, length, rows, back, there)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _travel(axis: str, length: int, rows, there: Way, back: Way):
  # One number a row is gathered from everyone, too: the operation would send it as 128 lanes.
  if sharding.current_device().platform == "cpu" or rows.shape[1] == 1:
    out = _emulated(rows, length, there, axis)
  else:
    # Into memory as it is: the compiler would spend more on zeros in the layout that the operation wants than on the transfer.
    # Without the barrier it allocates once for all layers of a scan, and copies that for each.
    out, rows = jax.lax.optimization_barrier((jax.lax.empty((length, rows.shape[1]), rows.dtype), rows))
    out = jax.lax.ragged_all_to_all(rows, out, *there, axis_name=axis)
  row = jnp.arange(length)[:, None] - back.input_offsets
  arrived = ((row >= 0) & (row < back.send_sizes)).any(1)
  return jnp.where(arrived[:, None], out, 0)


def _forward(axis, length, rows, there, back):
  return _travel(axis, length, rows, there, back), (there, back, jnp.zeros((rows.shape[0], 0)))


def _backward(axis, length, saved, grad):
  there, back, shape = saved
  return _travel(axis, shape.shape[0], grad, back, there), None, None


_travel.defvjp(_forward, _backward)


def _emulated(rows, length: int, way: Way, axis: str):
  """`jax.lax.ragged_all_to_all` into memory that nobody cleared (NaN), by gathering everything: output row r comes from the
  source that says so."""
  me = jax.lax.axis_index(axis)
  everything = jax.lax.all_gather(rows, axis)  # [N, R, D]
  begin, size, put = (jax.lax.all_gather(a, axis)[:, me] for a in way[:3])
  within = jnp.arange(length) - put[:, None]  # [N, length]
  from_it = (within >= 0) & (within < size[:, None])
  source = jnp.argmax(from_it, 0)
  place = begin[source] + jnp.take_along_axis(within, source[None], 0)[0]
  return jnp.where(from_it.any(0)[:, None], everything[source, jnp.clip(place, 0, rows.shape[0] - 1)], jnp.nan)
