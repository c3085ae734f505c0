"""The routed experts on a mesh: the one `shard_map` of the project.

Tokens arrive split over (data, fsdp, expert). Within a group of devices that share an `expert` axis every device
gathers the group's tokens, runs the experts it owns on the selections that are theirs, and the partial sums are
reduce-scattered back to the tokens' owners. This all-gather dispatch is exact for any imbalance. Weights are gathered
over `fsdp` inside, so that their gradients leave by reduce-scatter, not by all-reduce.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe import layers
from moe import sharding
from moe.kernels.grouped_matmul import grouped_matmul


class Weights(NamedTuple):
  """The matrices of the routed experts."""

  gate: jax.Array  # [E, D, F]
  up: jax.Array | None  # [E, D, F]; None for GELU
  down: jax.Array  # [E, F, D]


def apply_experts(x, chosen, gates, weights: Weights, *, activation: str, backend: str) -> jax.Array:
  """Sum over a token's experts of gate x expert(token).

  Args:
    x: [B, S, D] in the compute dtype, split over the batch axes of the mesh that is set (or no mesh).
    chosen: [B, S, K] int32; E where a selection is not carried out (dropped, or padding).
    gates: [B, S, K] float32.
    weights: expert matrices in the compute dtype, [E over expert, D over fsdp, F over tensor].
    activation: swiglu | gelu.
    backend: grouped matmul backend.

  Returns:
    [B, S, D] in x's dtype; 0 where a token has no selection.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _local_experts(x, chosen, gates, weights, activation, backend)

  def local(x, chosen, gates, weights):
    first = jax.lax.axis_index("expert") * weights.gate.shape[0]
    if mesh.shape["fsdp"] > 1:
      weights = Weights(*(None if w is None else jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True)
                          for w, axis in zip(weights, (1, 1, 2))))
    if mesh.shape["expert"] > 1:
      x, chosen, gates = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, chosen, gates))
    mine = chosen - first
    owned = weights.gate.shape[0]
    mine = jnp.where((mine >= 0) & (mine < owned), mine, owned)
    out = _local_experts(x, mine, gates, weights, activation, backend)
    if mesh.shape["tensor"] > 1:
      out = jax.lax.psum(out, "tensor")
    if mesh.shape["expert"] > 1:
      out = jax.lax.psum_scatter(out, "expert", tiled=True)
    return out

  tokens = sharding.spec("batch", None, None)
  into = sharding.spec("experts", "embed", "hidden")
  specs = Weights(into, None if weights.up is None else into, sharding.spec("experts", "hidden", "embed"))
  return jax.shard_map(local, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens,
                       check_vma=False)(x, chosen, gates, weights)


def _local_experts(x, chosen, gates, weights: Weights, activation: str, backend: str) -> jax.Array:
  """The experts of one device on the tokens it sees; `chosen` counts from its first expert, others are `owned`."""
  batch, length, width = x.shape
  top_k, owned = chosen.shape[-1], weights.gate.shape[0]
  keys = chosen.reshape(-1)  # [T x K]
  order = jnp.argsort(keys, stable=True)
  inverse = jnp.argsort(order)
  sizes = jnp.sum(jax.nn.one_hot(keys, owned, dtype=jnp.int32), 0)  # rows past their sum belong to nobody here

  rows = _to_experts(x.reshape(-1, width), order, inverse, top_k)
  gate = grouped_matmul(rows, weights.gate, sizes, backend=backend)
  up = None if weights.up is None else grouped_matmul(rows, weights.up, sizes, backend=backend)
  out = grouped_matmul(layers.activate(gate, up, activation), weights.down, sizes, backend=backend)
  parts = _from_experts(out, order, inverse, top_k)  # [T, K, D]
  own = (keys < owned).reshape(-1, top_k)
  scale = jnp.where(own, gates.reshape(-1, top_k), 0.0)
  total = jnp.sum(parts.astype(jnp.float32) * scale[..., None], 1)
  return total.astype(x.dtype).reshape(batch, length, width)


# Sorting by expert is a permutation of T x K rows; both directions are gathers, whereas the automatic gradient of a
# gather is a scatter-add, which is slow on every backend.


def _to_experts(x, order, inverse, top_k: int):
  """[T, D] -> [T x K, D], each token once for each of its experts, sorted by expert."""

  @jax.custom_vjp
  def send(x, order, inverse):
    return x[order // top_k]

  def backward(saved, grad):
    order, inverse = saved
    return grad[inverse].reshape(-1, top_k, grad.shape[-1]).sum(1), None, None

  send.defvjp(lambda x, order, inverse: (send(x, order, inverse), (order, inverse)), backward)
  return send(x, order, inverse)


def _from_experts(rows, order, inverse, top_k: int):
  """[T x K, D] sorted by expert -> [T, K, D]."""

  @jax.custom_vjp
  def fetch(rows, order, inverse):
    return rows[inverse].reshape(-1, top_k, rows.shape[-1])

  def backward(order, grad):
    return grad.reshape(-1, grad.shape[-1])[order], None, None

  fetch.defvjp(lambda rows, order, inverse: (fetch(rows, order, inverse), order), backward)
  return fetch(rows, order, inverse)
