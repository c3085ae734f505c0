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

from moe import config
from moe import sharding
from moe.kernels import fused_experts
from moe.kernels import plan as kernel_plan
from moe.kernels import quantize
from moe.kernels import visits
from moe.kernels.activation import activate
from moe.kernels.grouped_matmul import grouped_matmul
from moe.kernels.quantize import Quantized
from moe.routing.gates import SoftChoice


class Weights(NamedTuple):
  """The matrices of the routed experts."""

  gate: jax.Array  # [E, D, F]
  up: jax.Array | None  # [E, D, F]; None for GELU
  down: jax.Array  # [E, F, D]


class _Matrices(NamedTuple):
  """What a device's experts multiply with."""

  weights: Weights
  quantized: Weights | None  # of `Quantized`: what the forward reads, where it reads 8 bits


class Plan(NamedTuple):
  """The sorted order of the selections, for the experts of each device; made once and used by any number of layers.

  R rows: no more than T x K, nor than the slots that capacity leaves to a device's experts. With a mesh the arrays of
  all devices stand one after the other.
  """

  order: jax.Array  # [R] int32, selections (token x K + choice) by expert
  inverse: jax.Array  # [T x K] int32, row of each selection; R or more where this device does not carry it out
  sizes: jax.Array  # [E owned] int32, rows of each expert; rows past their sum belong to nobody


def make_plan(chosen, num_experts: int, slots_in_row: int = 0, slots_in_batch: int = 0) -> Plan:
  """Sorts the selections by expert, for the experts each device owns.

  Args:
    chosen: [B, S, K] int32, split over the batch axes of the mesh that is set (or no mesh); `num_experts` where a
      selection is not carried out (dropped, or padding).
    num_experts: E.
    slots_in_row: bound on an expert's selections in one row of B; 0: none.
    slots_in_batch: the same for all rows together.
  """
  mesh = jax.sharding.get_abstract_mesh()

  def local(chosen):
    owned = num_experts // (1 if mesh.empty else mesh.shape["expert"])
    if owned < num_experts:
      mine = jax.lax.all_gather(chosen, "expert", tiled=True) - jax.lax.axis_index("expert") * owned
      chosen = jnp.where((mine >= 0) & (mine < owned), mine, owned)
    keys = chosen.reshape(-1)
    rows = min(keys.size, owned * (slots_in_row * chosen.shape[0] or slots_in_batch or keys.size))
    order = jnp.argsort(keys, stable=True)
    sizes = jnp.sum(jax.nn.one_hot(keys, owned, dtype=jnp.int32), 0)
    return Plan(order[:rows], jnp.argsort(order), sizes)

  if mesh.empty:
    return local(chosen)
  tokens = sharding.spec("batch")
  return jax.shard_map(local, in_specs=tokens, out_specs=tokens, check_vma=False)(chosen)


def apply_experts(x, plan: Plan, gates, weights: Weights, *, activation: str, backend: str,
                  forward_weights: str = "") -> jax.Array:
  """Sum over a token's experts of gate x expert(token).

  Args:
    x: [B, S, D] in the compute dtype, split over the batch axes of the mesh that is set (or no mesh).
    plan: from `make_plan`.
    gates: [B, S, K] float32.
    weights: expert matrices in the compute dtype, [E over expert, D over fsdp, F over tensor].
    activation: swiglu | gelu.
    backend: a name of `config.Experts.backend`; resolved by kernels/plan.py for the devices of the mesh.
    forward_weights: int8 | float8_e4m3fn rounds the matrices so, with a gradient that passes straight through; "" does not.

  Returns:
    [B, S, D] in x's dtype; 0 where a token has no selection.
  """
  def local(x, gates, plan, matrices):
    return _local_experts(x, gates, plan, matrices, activation, backend)

  quantized = None
  if forward_weights:
    quantized = jax.tree.map(lambda w: quantize.quantize(w, forward_weights), weights)
    weights = jax.tree.map(lambda w: quantize.rounded(w, forward_weights), weights)
  return _on_mesh(local, x, gates, plan, _Matrices(weights, quantized))


def apply_soft_experts(x, choice: SoftChoice, weights: Weights, *, activation: str) -> jax.Array:
  """SoftMoE (arXiv 2308.00951): experts on mixtures of the tokens of a row; arguments as in `apply_experts`."""
  def local(x, choice, _, matrices):
    weights = matrices.weights
    rows = jnp.einsum("bsep,bsd->ebpd", choice.dispatch.astype(x.dtype), x)
    gate = jnp.einsum("ebpd,edf->ebpf", rows, weights.gate)
    up = None if weights.up is None else jnp.einsum("ebpd,edf->ebpf", rows, weights.up)
    out = jnp.einsum("ebpf,efd->ebpd", activate(gate, up, activation), weights.down)
    return jnp.einsum("bsep,ebpd->bsd", choice.combine.astype(x.dtype), out)

  def owned(choice, first, count):
    return SoftChoice(*(jax.lax.dynamic_slice_in_dim(a, first, count, axis=2) for a in choice))

  return _on_mesh(local, x, choice, None, _Matrices(weights, None), owned)


def _on_mesh(local, x, gates, plan: Plan | None, matrices: _Matrices, owned=None):
  """Runs `local(x, gates, plan, matrices)` for each device's experts, with the collectives around it.

  `gates` is any tree of [B, S, ...] arrays; `owned(gates, first, count)` cuts out the part of a device's experts.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return local(x, gates, plan, matrices)

  into, out = ("experts", "embed", "hidden"), ("experts", "hidden", "embed")
  axes = Weights(into, into, out)

  def spec(axes, matrix):
    """The specification of a matrix; of a quantized one's scales, whose axis 1 is 1 long, too."""
    if isinstance(matrix, Quantized):
      return Quantized(sharding.spec(*axes), sharding.spec(axes[0], None, axes[2]))
    return None if matrix is None else sharding.spec(*axes)

  specs = _Matrices(*(None if group is None else Weights(*map(spec, axes, group)) for group in matrices))

  def whole(spec, matrix):
    return jax.lax.all_gather(matrix, "fsdp", axis=spec.index("fsdp"), tiled=True) if "fsdp" in spec else matrix

  def device(x, gates, plan, matrices):
    if mesh.shape["fsdp"] > 1:
      matrices = jax.tree.map(whole, specs, matrices)
    if mesh.shape["expert"] > 1:
      x, gates = jax.tree.map(lambda a: jax.lax.all_gather(a, "expert", tiled=True), (x, gates))
    if owned is not None:
      count = matrices.weights.gate.shape[0]
      gates = owned(gates, jax.lax.axis_index("expert") * count, count)
    out = local(x, gates, plan, matrices)
    if mesh.shape["tensor"] > 1:
      out = jax.lax.psum(out, "tensor")
    if mesh.shape["expert"] > 1:
      out = jax.lax.psum_scatter(out, "expert", tiled=True)
    return out

  tokens = sharding.spec("batch")
  return jax.shard_map(device, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens,
                       check_vma=False)(x, gates, plan, matrices)


def kernel_shape(run: config.Run, mesh) -> kernel_plan.Shape:
  """The routed experts of a run as one device of a mesh sees them."""
  m, e, axes = run.model, run.model.experts, mesh.shape
  tokens = run.data.batch_sequences // run.train.micro_batches * run.data.sequence_tokens // (axes["data"] * axes["fsdp"])
  return kernel_plan.Shape(tokens, m.router.top_k, e.num_experts // axes["expert"], e.num_experts, m.d_model,
                           e.d_expert // axes["tensor"], m.activation == "swiglu", m.compute_dtype)


def kernel_choice(run: config.Run, mesh) -> kernel_plan.Choice:
  """The kernels that they get.

  Raises:
    config.ConfigError: a backend is asked for by name that cannot be had there.
  """
  try:
    return kernel_plan.choose(run.model.experts.backend, kernel_shape(run, mesh), mesh.devices.flat[0].device_kind)
  except ValueError as error:
    raise config.ConfigError(str(error)) from error


def _local_experts(x, gates, plan: Plan, matrices: _Matrices, activation: str, backend: str) -> jax.Array:
  """The experts of one device on the tokens it sees."""
  weights, quantized = matrices
  batch, length, width = x.shape
  top_k, (owned, _, hidden) = gates.shape[-1], weights.gate.shape
  device, mesh = sharding.current_device().device_kind, jax.sharding.get_abstract_mesh()
  choice = kernel_plan.choose(backend, kernel_plan.Shape(
      batch * length, top_k, owned, owned * (1 if mesh.empty else mesh.shape["expert"]), width, hidden,
      weights.up is not None, x.dtype.name), device)
  if choice.backend == "fused":
    tiles = visits.make(plan.order, plan.inverse, plan.sizes, top_k, choice.blocks.tile_rows)
    out = fused_experts.fused_experts(x.reshape(-1, width), gates.reshape(-1, top_k), tiles, weights, activation=activation,
                                      blocks=choice.blocks, forward_weights=quantized, interpret=device == "cpu")
    return out.reshape(x.shape)
  rows = _to_experts(x.reshape(-1, width), plan, top_k)
  gate = grouped_matmul(rows, weights.gate, plan.sizes, backend=choice.backend)
  up = None if weights.up is None else grouped_matmul(rows, weights.up, plan.sizes, backend=choice.backend)
  out = grouped_matmul(activate(gate, up, activation), weights.down, plan.sizes, backend=choice.backend)
  parts = _from_experts(out, plan, top_k)  # [T, K, D]
  own = (plan.inverse < jnp.sum(plan.sizes)).reshape(-1, top_k)
  scale = jnp.where(own, gates.reshape(-1, top_k), 0.0)
  total = jnp.sum(parts.astype(jnp.float32) * scale[..., None], 1)
  return total.astype(x.dtype).reshape(batch, length, width)


# Sorting by expert is a permutation of T x K rows, cut off after R; both directions are gathers, whereas the automatic
# gradient of a gather is a scatter-add, which is slow on every backend.


def _rows_at(rows, plan: Plan):
  """[R, D] -> [T x K, D]: each selection's row, some row where it has none."""
  return rows[plan.inverse] if plan.order.size == plan.inverse.size else rows[jnp.minimum(plan.inverse, rows.shape[0] - 1)]


def _to_experts(x, plan: Plan, top_k: int):
  """[T, D] -> [R, D], each token once for each of its experts, sorted by expert."""

  @jax.custom_vjp
  def send(x, plan):
    return x[plan.order // top_k]

  def backward(plan, grad):
    back = _rows_at(grad, plan)
    if plan.order.size < plan.inverse.size:
      back = jnp.where((plan.inverse < plan.order.size)[:, None], back, 0)
    return back.reshape(-1, top_k, grad.shape[-1]).sum(1), None

  send.defvjp(lambda x, plan: (send(x, plan), plan), backward)
  return send(x, plan)


def _from_experts(rows, plan: Plan, top_k: int):
  """[R, D] sorted by expert -> [T, K, D]."""

  @jax.custom_vjp
  def fetch(rows, plan):
    return _rows_at(rows, plan).reshape(-1, top_k, rows.shape[-1])

  def backward(plan, grad):
    return grad.reshape(-1, grad.shape[-1])[plan.order], None

  fetch.defvjp(lambda rows, plan: (fetch(rows, plan), plan), backward)
  return fetch(rows, plan)
