"""The routed experts on a mesh: the one `shard_map` of the project.

Every device starts with tokens of its own: the batch is split over (slice, data, fsdp, expert), each sequence over
(context, tensor). The devices along `expert` own different experts, those along `tensor` a share of each expert's hidden
width, so tokens travel between the devices of a group, expert x tensor:

    all_gather   every device gets all tokens of the group, runs its experts on the selections that are theirs, and the partial
                 sums are reduce-scattered; moves less than all_to_all while the group is smaller than top_k
    ring         the same, but tokens go from device to device, half of them each way, and the sums after them: no more than
                 one device's tokens are there at once, and each hop runs beside the matmuls on those that came before
    all_to_all   each selection goes to the device of its expert (`ragged_all_to_all`; exchange.py has the offsets), is
                 gathered over `tensor` there, and comes back

A device has room for `Experts.buffer_factor` times the mean of rows. Where loads are more uneven, what does not fit goes in
further rounds (all_to_all), or the same is done once more with room for everything: exact for any imbalance.
The first and the last may be cut into `Experts.overlap_degree` chunks (another number in the backward pass:
`Experts.backward_degree`), so that one chunk's transfers can run beside another's matmuls. `hooks.py` names the points that a
chunk passes.
An expert weighs its hidden rows with the gate, before its second matrix, where the gate's gradient is at hand: so neither that
product nor the way back is done again when a layer is rematerialised.
Weights are gathered over (fsdp, context) once, inside: so their gradients leave by reduce-scatter, not by all-reduce.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe import config
from moe import exchange
from moe import hooks
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
  """The sorted order of the selections of one chunk; made once and used by any number of layers.

  The T tokens are those a device sees: all of its group for `all_gather`, its own for `all_to_all`, for `ring` as many of two
  others (a chunk for each turn). R rows: no more than T x K, nor than the slots that capacity leaves. With a mesh the arrays of
  all devices stand one after the other.
  """

  order: jax.Array  # [R] int32, selections (token x K + choice) by expert
  inverse: jax.Array  # [T x K] int32, row of each selection; R or more where this device does not carry it out
  sizes: jax.Array  # [E] int32, rows of each expert: of those owned, or for `all_to_all` of all
  counts: jax.Array | None = None  # [devices of the group, E] int32, `all_to_all`: the sizes of every device


class Plans(NamedTuple):
  """The plans of all chunks."""

  forward: tuple[Plan, ...]
  backward: tuple[Plan, ...] = ()  # where the backward pass is cut in another way


class _Layout(NamedTuple):
  """How the tokens of a device reach the experts of its group; static."""

  dispatch: str  # all_gather | ring | all_to_all
  tokens: PartitionSpec  # of [B, S, ...]
  group: tuple[str, ...]  # axes over which tokens travel
  summed: tuple[str, ...]  # axes over which partial results are summed at once, where tokens could not be split
  members: int  # devices along expert
  chunks: int
  mean: int  # rows of a device and chunk where loads are even
  bound: int  # rows that there is room for


def layout(mesh, rows: int, length: int, top_k: int, experts: config.Experts) -> _Layout:
  """The layout for [rows, length] tokens in all.

  `auto` takes all_to_all, whose buffers are bounded, on accelerators, and all_gather on CPU, which has no such operation.
  """
  if mesh.empty:
    return _Layout("all_gather", PartitionSpec(), (), (), 1, 1, rows * length * top_k, rows * length * top_k)
  split = length % sharding.parts("part", mesh) == 0  # not when decoding a token at a time
  tensor = sharding.axes_of("hidden", mesh)
  group = sharding.axes_of("experts", mesh) + (tensor if split else ())
  members = mesh.shape["expert"]
  dispatch = experts.dispatch
  if dispatch == "auto":
    dispatch = "all_gather" if mesh.abstract_mesh.abstract_device.platform == "cpu" else "all_to_all"
  if not split or members == 1:
    dispatch = "all_gather"
  tokens = rows * length // (sharding.parts("batch", mesh) * (sharding.parts("part", mesh) if split else 1))
  chunks = math.gcd(experts.overlap_degree, tokens) if group else 1
  mean = tokens // chunks * top_k
  if dispatch == "all_gather":
    mean *= math.prod(mesh.shape[a] for a in group) // members
  elif dispatch == "ring":
    mean = -(-mean // members)
  bound = min(-(-int(experts.buffer_factor * mean) // 8) * 8, members * mean)
  spec = sharding.spec("batch", "part") if split else sharding.spec("batch")
  return _Layout(dispatch, spec, group, () if split else tensor, members, chunks, mean, bound)


_DEVICES = PartitionSpec(sharding.AXES)

# Logical axes of (gate, up) and of down. Both are split over fsdp along the middle: the compiler turns a reduce-scatter along
# the last axis, where the lanes are, into an all-reduce of the whole gradient.
EXPERT_AXES = ("experts", "expert_embed", "hidden"), ("experts", "inner", None)


def _of_backward(experts: config.Experts) -> config.Experts:
  return dataclasses.replace(experts, overlap_degree=experts.backward_degree or experts.overlap_degree)


def make_plan(chosen, experts: config.Experts, slots_in_row: int = 0, slots_in_batch: int = 0) -> Plans:
  """Sorts the selections by expert, for every chunk.

  Args:
    chosen: [B, S, K] int32, split over the batch axes of the mesh that is set (or no mesh); `num_experts` where a
      selection is not carried out (dropped, or padding).
    experts: num_experts and how they are shared.
    slots_in_row: bound on an expert's selections in one row of B; 0: none.
    slots_in_batch: the same for all rows together.
  """
  mesh, num_experts = jax.sharding.get_abstract_mesh(), experts.num_experts
  lay, lay_backward = (layout(mesh, *chosen.shape, e) for e in (experts, _of_backward(experts)))

  def local(chosen):
    forward = split(lay, chosen)
    return Plans(forward, () if lay_backward == lay else split(lay_backward, chosen))

  def split(lay, chosen):
    rows = chosen.shape[0]
    if lay.dispatch != "all_to_all":  # of the group; of `ring`, halves of two devices' rows
      rows = rows * lay.members if lay.dispatch == "all_gather" else rows + rows % 2
    most = slots_in_row * rows or slots_in_batch
    chosen = chosen.reshape(-1, chosen.shape[-1])
    if lay.dispatch == "all_to_all":
      return tuple(everywhere(lay, most, part) for part in jnp.split(chosen, lay.chunks))
    if lay.dispatch == "ring":
      return tuple(here(lay, most, part) for part in _around(chosen, lay.group))
    return tuple(here(lay, most, jax.lax.all_gather(part, lay.group, tiled=True) if lay.group else part)
                 for part in jnp.split(chosen, lay.chunks))

  def everywhere(lay, most, chosen):
    order, inverse, sizes = _sort(chosen.reshape(-1), num_experts, most)
    return Plan(order, inverse, sizes, jax.lax.all_gather(sizes, lay.group))

  def here(lay, most, chosen):
    owned = num_experts // lay.members
    if owned < num_experts:
      mine = chosen - jax.lax.axis_index("expert") * owned
      chosen = jnp.where((mine >= 0) & (mine < owned), mine, owned)
    return Plan(*_sort(chosen.reshape(-1), owned, most))

  if mesh.empty:
    return local(chosen)
  return jax.shard_map(local, in_specs=lay.tokens, out_specs=_DEVICES, check_vma=False)(chosen)


def _sort(keys, num_experts: int, most: int):
  """(order, inverse, sizes) of expert numbers, `num_experts` standing for none, at most `most` of an expert (0: any)."""
  order = jnp.argsort(keys, stable=True)
  sizes = jnp.sum(jax.nn.one_hot(keys, num_experts, dtype=jnp.int32), 0)
  return order[:min(keys.size, num_experts * (most or keys.size))], jnp.argsort(order), sizes


def apply_experts(x, plans: Plans, gates, weights: Weights, *, activation: str,
                  experts: config.Experts) -> jax.Array:
  """Sum over a token's experts of gate x expert(token).

  Args:
    x: [B, S, D] in the compute dtype, split over the batch axes of the mesh that is set (or no mesh).
    plans: from `make_plan`.
    gates: [B, S, K] float32.
    weights: expert matrices in the compute dtype, as `EXPERT_AXES` are split.
    activation: swiglu | gelu.
    experts: `backend` is resolved by kernels/plan.py for the devices of the mesh; `forward_weights` rounds the matrices, with a
      gradient that passes straight through.

  Returns:
    [B, S, D] in x's dtype; 0 where a token has no selection.
  """
  mesh, width, top_k = jax.sharding.get_abstract_mesh(), x.shape[-1], gates.shape[-1]
  lay, lay_backward = (layout(mesh, *gates.shape, e) for e in (experts, _of_backward(experts)))
  quantized = None
  if experts.forward_weights:
    quantized = jax.tree.map(lambda w: quantize.quantize(w, experts.forward_weights), weights)
    weights = jax.tree.map(lambda w: quantize.rounded(w, experts.forward_weights), weights)

  def split(lay, plans, x, gates, matrices):
    compute = functools.partial(_experts, matrices=matrices, activation=activation, backend=experts.backend)
    rows, gates = x.reshape(-1, width), gates.reshape(-1, top_k)
    if lay.dispatch == "ring":
      return _ring(rows, gates, plans, lay, compute).reshape(x.shape)
    chunk = {"all_gather": _all_gather, "all_to_all": _all_to_all}[lay.dispatch]
    parts = zip(jnp.split(rows, lay.chunks), jnp.split(gates, lay.chunks), plans)
    return jnp.concatenate([chunk(x, gates, plan, lay, compute) for x, gates, plan in parts]).reshape(x.shape)

  @jax.custom_vjp
  def two_ways(plans, x, gates, matrices):
    return split(lay, plans.forward, x, gates, matrices)

  def backward(saved, grad):
    plans, *inputs = saved
    return None, *jax.vjp(functools.partial(split, lay_backward, plans.backward), *inputs)[1](grad)

  two_ways.defvjp(lambda *inputs: (two_ways(*inputs), inputs), backward)

  def local(x, gates, plans, matrices):
    return two_ways(plans, x, gates, matrices) if plans.backward else split(lay, plans.forward, x, gates, matrices)

  out = _on_mesh(local, lay.tokens, hooks.at("before_layer", x), gates, plans, _Matrices(weights, quantized))
  return hooks.at("after_layer", out)


def apply_soft_experts(x, choice: SoftChoice, weights: Weights, *, activation: str) -> jax.Array:
  """SoftMoE (arXiv 2308.00951): experts on mixtures of the tokens of a row; arguments as in `apply_experts`."""
  mesh = jax.sharding.get_abstract_mesh()

  def local(x, choice, _, matrices):
    weights, count = matrices.weights, matrices.weights.gate.shape[0]
    if not mesh.empty and mesh.shape["expert"] > 1:
      x, choice = jax.tree.map(lambda a: jax.lax.all_gather(a, "expert", tiled=True), (x, choice))
      first = jax.lax.axis_index("expert") * count
      choice = SoftChoice(*(jax.lax.dynamic_slice_in_dim(a, first, count, axis=2) for a in choice))
    rows = jnp.einsum("bsep,bsd->ebpd", choice.dispatch.astype(x.dtype), x)
    gate = jnp.einsum("ebpd,edf->ebpf", rows, weights.gate)
    up = None if weights.up is None else jnp.einsum("ebpd,edf->ebpf", rows, weights.up)
    out = jnp.einsum("ebpf,efd->ebpd", activate(gate, up, activation), weights.down)
    out = jnp.einsum("bsep,ebpd->bsd", choice.combine.astype(x.dtype), out)
    if not mesh.empty and mesh.shape["tensor"] > 1:
      out = jax.lax.psum(out, "tensor")
    if not mesh.empty and mesh.shape["expert"] > 1:
      out = jax.lax.psum_scatter(out, "expert", tiled=True)
    return out

  tokens = PartitionSpec() if mesh.empty else sharding.spec("batch")  # whole rows
  return _on_mesh(local, tokens, x, choice, None, _Matrices(weights, None))


def _on_mesh(local, tokens: PartitionSpec, x, gates, plans, matrices: _Matrices):
  """Runs `local(x, gates, plans, matrices)` on every device, with the matrices gathered over fsdp and context."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return local(x, gates, plans, matrices)
  into, out = EXPERT_AXES
  split = sharding.axes_of("expert_embed", mesh)

  def spec(axes, matrix):
    """The specification of a matrix; of a quantized one's scales, whose axis 1 is 1 long, too."""
    if isinstance(matrix, Quantized):
      return Quantized(sharding.spec(*axes), sharding.spec(axes[0], None, axes[2]))
    return None if matrix is None else sharding.spec(*axes)

  specs = _Matrices(*(None if group is None else Weights(*map(spec, (into, into, out), group)) for group in matrices))

  def whole(spec, matrix):
    """Gathered along its axis that fsdp and context split, if it has one."""
    at = [i for i, axes in enumerate(spec) if axes and "fsdp" in axes]
    return jax.lax.all_gather(matrix, split, axis=at[0], tiled=True) if at else matrix

  def device(x, gates, plans, matrices):
    return local(x, gates, plans, jax.tree.map(whole, specs, matrices) if split else matrices)

  return jax.shard_map(device, in_specs=(tokens, tokens, _DEVICES, specs), out_specs=tokens,
                       check_vma=False)(x, gates, plans, matrices)


def kernel_shape(run: config.Run, mesh) -> kernel_plan.Shape:
  """The routed experts of a run as the kernels of one device of a mesh see them."""
  m, e = run.model, run.model.experts
  rows, length = run.data.batch_sequences // run.train.micro_batches, run.data.sequence_tokens
  lay = layout(mesh, rows, length, m.router.top_k, e)
  owned, hidden = e.num_experts // lay.members, e.d_expert // mesh.shape["tensor"]
  if lay.dispatch == "all_to_all":
    tokens, top_k, total = lay.bound * mesh.shape["tensor"], 1, owned
  else:
    group = math.prod(mesh.shape[a] for a in lay.group) if lay.dispatch == "all_gather" else 1
    split = sharding.parts("batch", mesh) * sharding.parts("part", mesh)
    tokens, top_k, total = rows * length * group // (split * lay.chunks), m.router.top_k, e.num_experts
  return kernel_plan.Shape(tokens, top_k, owned, total, m.d_model, hidden, m.activation == "swiglu", m.compute_dtype)


def filled_rows(run: config.Run, mesh) -> float:
  """Share of the rows of a device's matmuls that hold a selection when loads are even."""
  rows, length = run.data.batch_sequences // run.train.micro_batches, run.data.sequence_tokens
  lay = layout(mesh, rows, length, run.model.router.top_k, run.model.experts)
  return lay.mean / lay.bound


def kernel_choice(run: config.Run, mesh) -> kernel_plan.Choice:
  """The kernels that they get.

  Raises:
    config.ConfigError: a backend is asked for by name that cannot be had there.
  """
  try:
    return kernel_plan.choose(run.model.experts.backend, kernel_shape(run, mesh), mesh.devices.flat[0].device_kind)
  except ValueError as error:
    raise config.ConfigError(str(error)) from error


# ----------------------------------------------------------------------------------------------------------- dispatch


def _all_gather(x, gates, plan: Plan, lay: _Layout, compute):
  """One chunk: the group's tokens to every device of it. x [T, D] -> [T, D]."""
  x = hooks.at("before_dispatch", x)
  if lay.group:
    x, gates = (jax.lax.all_gather(a, lay.group, tiled=True) for a in (x, gates))
  compute = functools.partial(compute, total=plan.sizes.size * lay.members)
  out = hooks.at("before_combine", _within(compute, lay.bound)(hooks.at("after_dispatch", x), gates, plan))
  if lay.summed:
    out = jax.lax.psum(out, lay.summed)
  return hooks.at("after_combine", jax.lax.psum_scatter(out, lay.group, tiled=True) if lay.group else out)


def _ring(x, gates, plans, lay: _Layout, compute):
  """The group's tokens by turns: first those of the neighbours, this device's own last. x [T, D] -> [T, D]."""
  compute = _within(functools.partial(compute, total=plans[0].sizes.size * lay.members), lay.bound)
  compute = jax.checkpoint(compute)  # one turn's rows at a time

  def turn(x, gates, plan):
    return hooks.at("before_combine", compute(hooks.at("after_dispatch", x), gates, plan))

  out, here = None, (hooks.at("before_dispatch", x), gates)
  for there, plan in zip(_around(here, lay.group), plans):
    own = turn(*there, plan)
    out = own if out is None else _onward(out, lay.group) + own
  return hooks.at("after_combine", out)


def _within(compute, bound: int):
  """`compute(x, gates, plan)` with room for `bound` rows of the experts; for all rows there can be where they are more."""

  def bounded(x, gates, plan):
    if plan.order.size <= bound:
      return compute(x, gates, plan)
    fits = jnp.sum(plan.sizes) <= bound
    return jax.lax.cond(fits, compute, jax.checkpoint(lambda x, gates, _: compute(x, gates, plan)),
                        x, gates, plan._replace(order=plan.order[:bound]))

  return bounded


def _around(x, group: tuple[str, ...]):
  """What each turn of the ring brings, of a tree of arrays [T, ...]: the first half of one neighbour's tokens and the second of
  the other's, then of the next ones on both sides, and in the end this device's own."""
  turns, at = jax.lax.axis_size(group), x
  for _ in range(1, turns):
    at = jax.tree.map(functools.partial(_onward, group=group), at)
    yield at
  yield x


def _onward(x, group: tuple[str, ...]):
  """[T, ...]: the first half to the next device of the group, the second to the one before, as links work both ways at once."""
  turns, half = jax.lax.axis_size(group), x.shape[0] // 2
  ways = [(i, (i + 1) % turns) for i in range(turns)], [(i, (i - 1) % turns) for i in range(turns)]
  return jnp.concatenate([jax.lax.ppermute(part, group, way) for part, way in zip((x[:half], x[half:]), ways)])


def _all_to_all(x, gates, plan: Plan, lay: _Layout, compute):
  """One chunk: each selection to the device of its expert, and back. x [T, D] -> [T, D]."""
  tensor, top_k = tuple(a for a in lay.group if a == "tensor"), gates.shape[1]
  rows, gates = _to_experts(x, plan, top_k), _to_experts(gates.reshape(-1, 1), plan, 1)
  counts = plan.counts.reshape(lay.members, -1, plan.counts.shape[-1]).swapaxes(0, 1)  # [tensor, expert, E]
  ways = exchange.Ways(counts, lay.bound, "expert", tensor)

  def window(rows, gates, first):
    """What the rows that arrive at places first .. first + bound - 1 of each device's queue come back as."""
    received = exchange.send(hooks.at("before_dispatch", rows), ways, first), exchange.send(gates, ways, first)
    if tensor:
      received = (jax.lax.all_gather(a, "tensor", tiled=True) for a in received)
    received, gates = received
    arrived = Plan(*ways.received(first))
    out = compute(hooks.at("after_dispatch", received), gates, arrived, total=arrived.sizes.size)
    out = hooks.at("before_combine", out)
    if tensor:
      out = jax.lax.psum_scatter(out, "tensor", tiled=True)
    return hooks.at("after_combine", exchange.send_back(out, ways, first, rows.shape[0]))

  out = window(rows, gates, 0)
  rounds = -(-lay.members * rows.shape[0] // lay.bound)
  if rounds > 1:  # in the worst case; where loads are bearable none of this runs
    again = jax.checkpoint(window, prevent_cse=False)

    def overflow(rows, gates):
      def one(total, first):
        more = jax.lax.cond(first < ways.longest, again, lambda rows, *_: jnp.zeros_like(rows), rows, gates, first)
        return total + more, None

      return jax.lax.scan(one, jnp.zeros_like(rows), jnp.arange(1, rounds) * lay.bound)[0]

    out = jax.lax.cond(ways.longest > lay.bound, lambda out, *a: out + overflow(*a), lambda out, *_: out, out, rows, gates)
  return _sum(out, plan, top_k)


# ------------------------------------------------------------------------------------------------------------ experts


def _experts(x, gates, plan: Plan, *, total: int, matrices: _Matrices, activation: str, backend: str) -> jax.Array:
  """The experts of one device on the tokens it has.

  Args:
    x: [T, D].
    gates: [T, K].
    plan: of its own experts.
    total: experts that the T x K selections are spread over.
  """
  weights, quantized = matrices
  (tokens, width), top_k, (owned, _, hidden) = x.shape, gates.shape[-1], weights.gate.shape
  device = sharding.current_device().device_kind
  choice = kernel_plan.choose(backend, kernel_plan.Shape(
      tokens, top_k, owned, total, width, hidden, weights.up is not None, x.dtype.name), device)
  if choice.backend == "fused":
    tiles = visits.make(plan.order, plan.inverse, plan.sizes, top_k, choice.blocks.tile_rows)
    return fused_experts.fused_experts(x, gates, tiles, weights, activation=activation, blocks=choice.blocks,
                                       forward_weights=quantized, interpret=device == "cpu")
  rows = _to_experts(x, plan, top_k)
  gate = grouped_matmul(rows, weights.gate, plan.sizes, backend=choice.backend)
  up = None if weights.up is None else grouped_matmul(rows, weights.up, plan.sizes, backend=choice.backend)
  hidden = _weighted(gate, up, _to_experts(gates.reshape(-1, 1), plan, 1), activation)
  return _sum(grouped_matmul(hidden, weights.down, plan.sizes, backend=choice.backend), plan, top_k)


def _weighted(gate, up, weights, activation: str):
  """Activation x gate of the router, [R, F] and [R, 1] float32 -> [R, F]; in float32, rounded once. Its gradient keeps only its
  arguments."""

  def formula(gate, up, weights):
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (gate, up))
    return (activate(*wide, activation) * weights).astype(gate.dtype)

  return jax.checkpoint(formula, prevent_cse=False)(gate, up, weights)


def _sum(rows, plan: Plan, top_k: int):
  """[R, D] sorted by expert -> [T, D], each token's rows summed in float32."""
  parts = _from_experts(rows, plan, top_k)  # [T, K, D]
  own = (plan.inverse < jnp.sum(plan.sizes)).reshape(-1, top_k)[..., None]
  # Rows of nobody may hold anything, NaN too: a kernel need not write them.
  return jnp.sum(jnp.where(own, parts, 0).astype(jnp.float32), 1).astype(rows.dtype)


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
    back = jnp.where((plan.inverse < jnp.sum(plan.sizes))[:, None], _rows_at(grad, plan), 0)  # of nobody's rows: nothing
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
