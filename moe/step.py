"""One optimizer step: loss, micro-batches, balance scopes, guard. Everything here is traced or abstract.

All sums of a step (loss, z-losses, probabilities, counts) are divided by the real tokens of the whole step, so a step
of M micro-batches with uneven padding equals one big batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from moe import config
from moe import hardware
from moe import model as model_lib
from moe import optimizer as optimizer_lib
from moe import schedules
from moe import sharding
from moe.kernels import cross_entropy
from moe.model import Batch
from moe.routing import analysis
from moe.routing import balance

GUARD_STEPS = 128  # window of the spike guard
_ROUTING = 1 << 20  # what sets the key of routing noise apart from those of dropout
_GUARD_MINIMUM = 32  # steps before it judges spikes
_LASTING_STEPS = 16  # refused in a row at one level, which is then taken for the new one; fewer than train.py gives up after
_LASTING_FACTOR = 2.0  # of their median, that the next value may have: a level, not a divergence
_CARRY_BITS = 24  # of the low half of an integer sum over batches; what is above goes into the high half
_EVAL_TOKENS = 4096  # of an evaluation batch on one device, or one row: matmuls of fewer rows wait for the weights
_SHOWN_TOKENS = 1 << 14  # of an evaluation batch, from whose rows the examples of what the experts read are taken


@functools.partial(jax.tree_util.register_dataclass, data_fields=["losses", "norms", "seen", "skipped"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Guard:
  """Recent losses and gradient norms; what a spike is measured against."""

  losses: jax.Array  # [GUARD_STEPS] float32, ring buffer
  norms: jax.Array  # [GUARD_STEPS] float32; minus the norm where the step was refused
  seen: jax.Array  # [] int32, finite steps pushed so far
  skipped: jax.Array  # [] int32, steps skipped in the whole run


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "guard"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a step reads and writes."""

  step: jax.Array  # [] int32, batches consumed, skipped ones included
  params: Any
  opt_state: Any
  guard: Guard


# ---------------------------------------------------------------------------------------------------------- state


def _initial(run: config.Run, key: jax.Array) -> TrainState:
  params = model_lib.init(model_lib.build(run.model), key)
  zero = jnp.zeros((), jnp.int32)
  window = jnp.zeros((GUARD_STEPS,), jnp.float32)
  return TrainState(zero, params, optimizer_lib.make(run).init(params), Guard(window, window, zero, zero))


@functools.lru_cache(maxsize=4)
def abstract_state(run: config.Run, mesh) -> TrainState:
  """The state as ShapeDtypeStructs with their shardings; touches no device memory."""
  # The key is made inside: outside it would be computed on the mesh's devices, which may be a topology's.
  boxed = jax.eval_shape(lambda: _initial(run, jax.random.key(0)))
  shapes, specs = model_lib.unbox(boxed)
  hosted = optimizer_lib.on_host(run.optimizer.offload, shapes.params)

  def leaf(path, x, spec):
    sharded = NamedSharding(mesh, spec)
    if path[0].name == "opt_state":
      if run.optimizer.zero1:
        sharded = NamedSharding(mesh, sharding.over_replicas(spec, x.shape, mesh))
      if optimizer_lib.name_of(path) in hosted:
        sharded = sharded.with_memory_kind("pinned_host")
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded)

  return jax.tree_util.tree_map_with_path(leaf, shapes, specs)


def init_state(run: config.Run, mesh) -> TrainState:
  """The state of step 0 from the run's seed, created where its shardings say."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(run, mesh))

  def initial(key):
    return model_lib.unbox(_initial(run, key))[0]

  return jax.jit(initial, out_shardings=shardings)(jax.random.key(run.train.seed))


# ----------------------------------------------------------------------------------------------------------- loss


def _forward(run: config.Run, params, batch: Batch, rows, key, routing_key):
  """(sum of losses, sum of logit z-losses, Stats) of one micro-batch, which has these rows of the step's batch."""
  transformer = model_lib.build(run.model, deterministic=not run.model.dropout)
  rngs = {"dropout": key} if run.model.dropout else {}
  if run.model.draws_routing_noise:
    rngs["routing"] = routing_key
  out = transformer.apply({"params": params}, batch.inputs, batch.segment_ids, batch.positions, rows=rows, rngs=rngs)
  head = transformer.apply({"params": params}, method="head_matrix")
  loss = cross_entropy.token_loss(out.hidden, head, batch.targets)
  real = (batch.segment_ids > 0).astype(jnp.float32)
  return jnp.sum(loss.nll * real), jnp.sum(jnp.square(loss.log_z) * real), out.stats


def _balance_sums(run: config.Run, stats: balance.Stats, before: balance.Stats, fraction):
  """[L] tokens x LBL of one micro-batch in the run's scope.

  Args:
    stats: of this micro-batch.
    before: sums over the step's earlier micro-batches (scope step_buffer).
    fraction: [L, E] f of the whole step (scope step), else None.
  """
  router = run.model.router
  if router.balance_scope in ("sequence", "microbatch", "shuffle"):
    return stats.local_balance_sum
  if router.balance_scope == "step_buffer":  # Demons in the Detail, Algorithm 1
    fraction = balance.fractions(before.counts + stats.counts, before.tokens + stats.tokens, router.top_k)
  elif fraction is None:
    fraction = balance.fractions(stats.counts, stats.tokens, router.top_k)
  return balance.balance_sum(fraction, stats.probability_sums)


def _zero_stats(model: config.Model) -> balance.Stats:
  layers, experts = model.num_routers, model.experts.num_experts
  i, f = jnp.zeros(layers, jnp.int32), jnp.zeros(layers, jnp.float32)
  return balance.Stats(i, jnp.zeros((layers, experts), jnp.int32), jnp.zeros((layers, experts), jnp.float32), i, f, f, f, f)


def split_micro_batches(batch: Batch, count: int) -> Batch:
  """[B, S] -> [M, B / M, S]; micro-batch i is rows i::M, so that no row leaves its shard."""
  def split(x):
    x = x.reshape(x.shape[0] // count, count, x.shape[1]).swapaxes(0, 1)
    return sharding.constrain(x, None, "batch", "sequence")

  return jax.tree.map(split, batch)


def loss_and_gradients(run: config.Run, params, batch: Batch, key):
  """Objective and gradient of one optimizer step.

  Returns:
    (gradients like params, dict of sums over the step: nll, logit_z, balance [L] and stats).
  """
  count, router = run.train.micro_batches, run.model.router
  micro = split_micro_batches(batch, count)
  tokens = jnp.maximum(jnp.sum(batch.segment_ids > 0), 1).astype(jnp.float32)
  parts = (micro, jnp.arange(batch.inputs.shape[0]).reshape(-1, count).T, jax.random.split(key, count))
  routing_key = jax.random.fold_in(key, _ROUTING)  # one for all micro-batches: the noise goes by the row

  fraction = None
  if router.balance_scope == "step" and count > 1:
    # The exact f needs the counts of all micro-batches before the first backward pass: a router's input depends on
    # the layers below, so this is a whole forward pass, with the same keys.
    def counts_of(total, part):
      stats = _forward(run, params, *part, routing_key)[2]
      return jax.tree.map(jnp.add, total, (stats.counts, stats.tokens)), None

    zero = _zero_stats(run.model)
    (counts, routed), _ = jax.lax.scan(counts_of, (zero.counts, zero.tokens), parts)
    fraction = balance.fractions(counts, routed, router.top_k)

  def objective(params, part, before):
    nll, logit_z, stats = _forward(run, params, *part, routing_key)
    balance_sums = _balance_sums(run, stats, before, fraction)
    value = (nll + run.train.logit_z_loss_coef * logit_z
             + router.balance_coef * (balance_sums + router.micro_mix * stats.local_balance_sum).mean()
             + router.z_loss_coef * stats.z_sum.mean()) / tokens
    return value, {"nll": nll, "logit_z": logit_z, "balance": balance_sums, "stats": stats}

  gradient = jax.grad(objective, has_aux=True)

  def accumulate(carry, part):
    grads, sums = carry
    new_grads, new_sums = gradient(params, part, sums["stats"])
    return jax.tree.map(jnp.add, (grads, sums), (new_grads, new_sums)), None

  zero = {"nll": jnp.zeros(()), "logit_z": jnp.zeros(()), "balance": jnp.zeros(run.model.num_routers),
          "stats": _zero_stats(run.model)}
  if count == 1:
    return gradient(params, jax.tree.map(lambda x: x[0], parts), zero["stats"])
  (grads, sums), _ = jax.lax.scan(accumulate, (jax.tree.map(jnp.zeros_like, params), zero), parts)
  return grads, sums


# ----------------------------------------------------------------------------------------------------------- step


def train_step(run: config.Run, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
  """Consumes one batch [B, S]; returns the next state and the step's metrics (see `_metrics`).

  A step whose loss or gradient is not finite, or far above its recent mean, leaves parameters and optimizer as they
  were; the batch counts as consumed and `guard.skipped` as one more.
  """
  key = jax.random.fold_in(jax.random.key(run.train.seed), state.step)
  grads, sums = loss_and_gradients(run, state.params, batch, key)
  norm = optax.global_norm(grads)
  tokens = jnp.sum(batch.segment_ids > 0)
  loss = sums["nll"] / jnp.maximum(tokens, 1)
  guard, accept = _judge(run.optimizer.skip_spike_sigmas, state.guard, loss, norm)
  params, opt_state = optimizer_lib.update(run, grads, state.opt_state, state.params, accept, state.step)
  if run.model.router.bias_update_rate:
    bias_rate = jnp.where(accept, run.model.router.bias_update_rate, 0.0)
    params = balance.moved_biases(params, sums["stats"].counts, bias_rate)
  rate = schedules.learning_rate(run.optimizer, run.tokens_per_step, run.train.steps)(state.step)
  metrics = {**_metrics(run.model, sums, tokens), "gradient_norm": norm, "learning_rate": rate,
             "accepted": accept, "skipped_steps": guard.skipped}
  return TrainState(state.step + 1, params, opt_state, guard), metrics


def _judge(sigmas: float, guard: Guard, loss, norm) -> tuple[Guard, jax.Array]:
  """Whether to accept a step, and the guard after it.

  A step is refused when its loss or gradient norm is more than `sigmas` deviations above the mean of the accepted steps in
  the window. What was refused is remembered but does not count, so that one spike does not hide the next. A change that
  lasts, `_LASTING_STEPS` refused steps in a row at one level, is accepted, and those steps then are the window.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  norms = jnp.abs(guard.norms)
  filled = jnp.arange(GUARD_STEPS) < guard.seen
  usual = filled & (guard.norms >= 0)
  newest = (guard.seen - 1 - jnp.arange(_LASTING_STEPS)) % GUARD_STEPS  # places of the last steps
  recent = jnp.zeros_like(filled).at[newest].set(True)

  def calm(window, value):
    n = jnp.maximum(jnp.sum(usual), 1)
    mean = jnp.sum(jnp.where(usual, window, 0)) / n
    deviation = jnp.sqrt(jnp.sum(jnp.where(usual, jnp.square(window - mean), 0)) / n)
    return value <= mean + sigmas * jnp.maximum(deviation, 1e-3 * jnp.abs(mean))

  def steady(window, value):
    return value <= _LASTING_FACTOR * jnp.median(window[newest])

  judging = (guard.seen >= _GUARD_MINIMUM) & (sigmas > 0)
  spike = judging & ~(calm(guard.losses, loss) & calm(norms, norm))
  lasting = spike & finite & ~jnp.any(usual & recent) & steady(guard.losses, loss) & steady(norms, norm)
  accept = finite & (~spike | lasting)

  # The new level is measured by the steps that were refused at it, and by nothing before them.
  signed = jnp.where(lasting, jnp.where(recent, norms, -norms), guard.norms)
  slot = guard.seen % GUARD_STEPS
  tiny = jnp.finfo(jnp.float32).tiny  # a norm of zero has no sign
  signed_norm = jnp.where(accept, norm, -jnp.maximum(norm, tiny))
  losses = guard.losses.at[slot].set(jnp.where(finite, loss, guard.losses[slot]))
  signed = signed.at[slot].set(jnp.where(finite, signed_norm, signed[slot]))
  return Guard(losses, signed, guard.seen + finite, guard.skipped + ~accept), accept


def _metrics(model: config.Model, sums: dict, tokens) -> dict:
  """Means over the step's real tokens (and layers, where not said otherwise)."""
  stats, n = sums["stats"], jnp.maximum(tokens, 1).astype(jnp.float32)
  load = stats.counts / jnp.maximum(stats.counts.mean(-1, keepdims=True), 1e-9)
  return {
      "tokens": tokens,
      "loss": sums["nll"] / n,  # nats a token
      "logit_z": sums["logit_z"] / n,
      "balance": sums["balance"].mean() / n,  # 1 is balanced
      "router_z": stats.z_sum.mean() / n,
      "router_entropy": stats.entropy_sum.mean() / n,  # nats
      "top_k_weight": stats.weight_sum.mean() / n,  # probability mass on the chosen experts
      "load_max": load.max(),  # largest share of any expert of any layer, over the mean share
      "dead_experts": jnp.sum(stats.counts == 0),
      "dropped": stats.dropped.sum() / (n * model.router.top_k * model.num_routers),  # share of the selections
      "expert_counts": stats.counts,  # [L, E]
  }


# ----------------------------------------------------------------------------------------------------- evaluation


def packs_evaluation(model: config.Model) -> bool:
  """Whether evaluation may put several windows into a row: what becomes of a token must not depend on its neighbours in the
  row, as it does with a capacity, whose slots they share, and with gates that look over the row."""
  return not model.experts.capacity_factor and model.router.gate not in config.LOOKAHEAD_GATES


def eval_rows(run: config.Run, mesh) -> int:
  """Rows of an evaluation batch: those of a micro-batch at most, which fit, and no more than keep a device busy, since the last
  batch of a split is filled up with padding. A micro-batch's where rows share a capacity."""
  whole = run.data.batch_sequences // run.train.micro_batches
  if not packs_evaluation(run.model):
    return whole
  on_device = max(_EVAL_TOKENS // run.data.sequence_tokens, 1)
  return min(whole, on_device * sharding.parts("batch", mesh))


class Total(NamedTuple):
  """A sum over any number of batches that stays on the devices and loses nothing: as two arrays, see `_added`.

  Integers are exact up to 2^55, sums in float32 as good as those in float64 (each batch's own is rounded to float32).
  """

  high: jax.Array
  low: jax.Array

  def on_host(self) -> np.ndarray:
    """The sum, int64 or float64."""
    high, low = jax.device_get((self.high, self.low))
    if np.issubdtype(high.dtype, np.integer):
      return high.astype(np.int64) * (1 << _CARRY_BITS) + low
    return high.astype(np.float64) + low


def _added(total: Total, batch: jax.Array) -> Total:
  """The sum with one batch's more: integers below 2^30 with a carry, floats with what rounding leaves (Knuth's two-sum)."""
  if jnp.issubdtype(batch.dtype, jnp.integer):
    low = total.low + batch
    return Total(total.high + (low >> _CARRY_BITS), low & ((1 << _CARRY_BITS) - 1))
  high = total.high + batch
  of_batch = high - total.high
  lost = (total.high - (high - of_batch)) + (batch - of_batch)
  return Total(high, total.low + lost)


def eval_step(run: config.Run, params, sums: dict[str, Total], batch: Batch, scored) -> tuple[dict[str, Total], jax.Array]:
  """Adds one evaluation batch to the sums; under `jax.set_mesh`.

  Args:
    run: the model's.
    params: the model's parameters.
    sums: of the batches before, from `zero_eval_sums`.
    batch: windows of documents, see data/evaluation.py.
    scored: [B, S] bool, which tokens count. Windows overlap, and what one has counted is context in the next: neither
      its loss nor its routing counts again.

  Returns:
    (sums; [L, R, S] int32, the expert that each token of the first R rows chose first).
  """
  transformer = model_lib.build(run.model)
  out = transformer.apply({"params": params}, batch.inputs, batch.segment_ids, batch.positions, counted=scored)
  head = transformer.apply({"params": params}, method="head_matrix")
  nll, _, hit = cross_entropy.token_loss(out.hidden, head, batch.targets)
  joint, information, sampled = _between_layers(run.model, out, scored)
  new = {"nll": jnp.sum(jnp.where(scored, nll, 0.0)), "scored": scored.sum(dtype=jnp.int32),
         "hits": (hit & scored).sum(dtype=jnp.int32), "expert_counts": out.stats.counts, "entropy": out.stats.entropy_sum,
         "weight": out.stats.weight_sum, "z": out.stats.z_sum, "joint": joint, "information": information, "sampled": sampled}
  rows = min(max(_SHOWN_TOKENS // scored.shape[1], 1), scored.shape[0])
  return {name: _added(sums[name], value) for name, value in new.items()}, _first_rows(out.experts[..., 0], rows)


def _first_rows(x: jax.Array, count: int) -> jax.Array:
  """[L, B, S] int32 -> [L, count, S], whole on every device. A sum over the rows: for a slice of a split axis, the partitioner
  would bring all of the axis together first."""
  wanted_RB = jnp.arange(count)[:, None] == jnp.arange(x.shape[1])
  return jnp.sum(jnp.where(wanted_RB[:, :, None], x[:, None], 0), 2)


def _between_layers(model: config.Model, out: model_lib.Output, scored) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What the layers' routings say about each other: every device looks at its own tokens.

  Returns:
    ([L, L, E, E] int32 joint counts, split as `_joint_split` says; [L, L] float32 information between the probabilities, summed
    over the sampled tokens; [] float32 their number).
  """
  mesh, length = jax.sharding.get_abstract_mesh(), scored.shape[1]
  split = _joint_split(model, mesh)
  token_axes = _token_axes(mesh)
  unsplit = tuple(axis for axis in token_axes if axis not in split)

  def total(block):  # [L, E, E] of this device's tokens -> this device's part of the sum
    for axis, dimension in split.items():
      block = jax.lax.psum_scatter(block, axis, scatter_dimension=dimension - 1, tiled=True)
    return jax.lax.psum(block, unsplit)

  def device(experts, probabilities, scored):
    joint = analysis.joint_counts(experts, scored, model.experts.num_experts, total)
    offset = jax.lax.axis_index("context") * scored.shape[1]
    sampled = analysis.probability_information(probabilities, scored, length, offset)
    return joint, *jax.lax.psum(sampled, token_axes)

  tokens, whole = sharding.spec(None, "batch", "sequence", None), PartitionSpec()
  return jax.shard_map(device, in_specs=(tokens, tokens, sharding.spec("batch", "sequence")),
                       out_specs=(_joint_spec(model, mesh), whole, whole), check_vma=False)(
                           out.experts, out.probabilities, scored)


def _token_axes(mesh) -> tuple[str, ...]:
  """The mesh axes along which devices hold different tokens."""
  return (*sharding.axes_of("batch", mesh), *sharding.axes_of("sequence", mesh))


def _joint_split(model: config.Model, mesh) -> dict[str, int]:
  """Which mesh axis splits which dimension of the joint counts [L, L, E, E]: where it divides, and not between slices.

  The last dimension is taken last: along it a reduce-scatter compiles to an all-reduce on TPU.
  """
  split, left = {}, {1: model.num_routers, 2: model.experts.num_experts, 3: model.experts.num_experts}
  for axis in _token_axes(mesh):
    fitting = [dimension for dimension in (2, 1, 3) if left[dimension] % mesh.shape[axis] == 0]
    if axis != "slice" and fitting:
      split[axis] = fitting[0]
      left[fitting[0]] //= mesh.shape[axis]
  return split


def _joint_spec(model: config.Model, mesh) -> PartitionSpec:
  split = _joint_split(model, mesh)
  return PartitionSpec(*(tuple(axis for axis, of in split.items() if of == dimension) or None for dimension in range(4)))


def abstract_eval_sums(run: config.Run, mesh) -> dict[str, Total]:
  """The sums of an evaluation as ShapeDtypeStructs with their shardings."""
  layers, experts = run.model.num_routers, run.model.experts.num_experts

  def total(shape, dtype, *split):
    one = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*split)))
    return Total(one, one)

  integers, floats = jnp.int32, jnp.float32
  return {"nll": total((), floats), "scored": total((), integers), "hits": total((), integers),
          "expert_counts": total((layers, experts), integers), "entropy": total((layers,), floats),
          "weight": total((layers,), floats), "z": total((layers,), floats),
          "joint": total((layers, layers, experts, experts), integers, *_joint_spec(run.model, mesh)),
          "information": total((layers, layers), floats), "sampled": total((), floats)}


def zero_eval_sums(run: config.Run, mesh) -> dict[str, Total]:
  """The sums before the first batch."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract_eval_sums(run, mesh))


@jax.jit
def _choices_information(joint: Total) -> jax.Array:
  """[L, L] nats between the layers' first choices, worked out where the counts are."""
  counts = joint.high.astype(jnp.float32) * (1 << _CARRY_BITS) + joint.low.astype(jnp.float32)
  return sharding.constrain(analysis.mutual_information(counts), None, None)


def eval_totals(sums: dict[str, Total]) -> dict[str, np.ndarray]:
  """The sums on the host, in int64 and float64. Collective; under `jax.set_mesh`.

  The joint counts, which are large and split over the devices, leave as the information (nats) between the layers' choices,
  `information_choices` [L, L].
  """
  choices = _choices_information(sums["joint"])
  totals = {name: total.on_host() for name, total in sums.items() if name != "joint"}
  return {**totals, "information_choices": np.asarray(choices, np.float64)}


# ------------------------------------------------------------------------------------------------------- programs


def jit_train_step(run: config.Run, mesh):
  """The jitted step (state is donated), for calls under `jax.set_mesh(mesh)`."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(run, mesh))
  batch = Batch(*[sharding.batch_sharding(mesh)] * 4)
  return jax.jit(functools.partial(train_step, run), donate_argnums=0, in_shardings=(shardings, batch),
                 out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())), compiler_options=_compiler_options(run, mesh))


def jit_eval_step(run: config.Run, mesh):
  """The jitted `eval_step` (the sums are donated), for calls under `jax.set_mesh(mesh)`."""
  shardings = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  rows, sums = sharding.batch_sharding(mesh), shardings(abstract_eval_sums(run, mesh))
  return jax.jit(functools.partial(eval_step, run), donate_argnums=1,
                 in_shardings=(shardings(abstract_state(run, mesh).params), sums, Batch(*[rows] * 4), rows),
                 out_shardings=(sums, NamedSharding(mesh, PartitionSpec())), compiler_options=_compiler_options(run, mesh))


def _compiler_options(run: config.Run, mesh) -> dict | None:
  return (hardware.compiler_options(mesh.devices.flat[0].device_kind) or None) if run.train.offload_collectives else None


def abstract_batch(run: config.Run, mesh) -> Batch:
  shape = (run.data.batch_sequences, run.data.sequence_tokens)
  return Batch(*[jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))] * 4)


def lower_train_step(run: config.Run, mesh) -> jax.stages.Lowered:
  """The train step for a mesh of real or topology devices, not yet compiled."""
  with jax.set_mesh(mesh):
    return jit_train_step(run, mesh).lower(abstract_state(run, mesh), abstract_batch(run, mesh))


def compile_step(run: config.Run, mesh):
  """The compiled train step for a mesh of real or topology devices; runs nothing."""
  return lower_train_step(run, mesh).compile()


def abstract_eval_batch(run: config.Run, mesh) -> tuple[Batch, jax.ShapeDtypeStruct]:
  """An evaluation batch, and which of its tokens are scored."""
  shape = (eval_rows(run, mesh), run.data.sequence_tokens)
  field = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
  scored = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding.batch_sharding(mesh))
  return Batch(*[field] * 4), scored


def lower_eval_step(run: config.Run, mesh) -> jax.stages.Lowered:
  """The evaluation step for a mesh of real or topology devices, not yet compiled."""
  with jax.set_mesh(mesh):
    return jit_eval_step(run, mesh).lower(abstract_state(run, mesh).params, abstract_eval_sums(run, mesh),
                                          *abstract_eval_batch(run, mesh))


def compile_eval_step(run: config.Run, mesh):
  """The compiled evaluation step for a mesh of real or topology devices; runs nothing."""
  return lower_eval_step(run, mesh).compile()
