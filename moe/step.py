"""One optimizer step: loss, micro-batches, balance scopes, guard. Everything here is traced or abstract.

All sums of a step (loss, z-losses, probabilities, counts) are divided by the real tokens of the whole step, so a step
of M micro-batches with uneven padding equals one big batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["losses", "norms", "seen", "skipped"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Guard:
  """Recent losses and gradient norms; what a spike is measured against."""

  losses: jax.Array  # [GUARD_STEPS] float32, ring buffer
  norms: jax.Array  # [GUARD_STEPS] float32
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
  params, opt_state = optimizer_lib.update(run, grads, state.opt_state, state.params, accept)
  if run.model.router.bias_update_rate:
    rate = jnp.where(accept, run.model.router.bias_update_rate, 0.0)
    params = balance.moved_biases(params, sums["stats"].counts, rate)
  rate = schedules.learning_rate(run.optimizer, run.tokens_per_step, run.train.steps)(state.step)
  metrics = {**_metrics(run.model, sums, tokens), "gradient_norm": norm, "learning_rate": rate,
             "accepted": accept, "skipped_steps": guard.skipped}
  return TrainState(state.step + 1, params, opt_state, guard), metrics


def _judge(sigmas: float, guard: Guard, loss, norm) -> tuple[Guard, jax.Array]:
  """Whether to accept a step, and the guard after it. Finite values enter the window even when they are refused, so
  that a lasting change of level is accepted in the end."""
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)

  def calm(window, value):
    valid = jnp.arange(GUARD_STEPS) < guard.seen
    n = jnp.maximum(jnp.sum(valid), 1)
    mean = jnp.sum(jnp.where(valid, window, 0)) / n
    deviation = jnp.sqrt(jnp.sum(jnp.where(valid, jnp.square(window - mean), 0)) / n)
    return value <= mean + sigmas * jnp.maximum(deviation, 1e-3 * jnp.abs(mean))

  accept = finite
  if sigmas:
    accept &= (guard.seen < _GUARD_MINIMUM) | (calm(guard.losses, loss) & calm(guard.norms, norm))
  slot = guard.seen % GUARD_STEPS

  def push(window, value):
    return window.at[slot].set(jnp.where(finite, value, window[slot]))

  return Guard(push(guard.losses, loss), push(guard.norms, norm), guard.seen + finite, guard.skipped + ~accept), accept


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


def eval_step(run: config.Run, params, batch: Batch, scored) -> dict:
  """One evaluation batch; `scored` [B, S] bool says which targets count (windows overlap).

  Returns:
    (sums over the batch, for the score and of the routing; [L, B, S, K] the experts chosen).
  """
  transformer = model_lib.build(run.model)
  out = transformer.apply({"params": params}, batch.inputs, batch.segment_ids, batch.positions)
  head = transformer.apply({"params": params}, method="head_matrix")
  nll, _, hit = cross_entropy.token_loss(out.hidden, head, batch.targets)
  hit &= scored
  mask = batch.segment_ids > 0
  between, sampled = analysis.probability_information(out.probabilities, mask)
  sums = {"nll": jnp.sum(jnp.where(scored, nll, 0.0)), "scored": scored.sum(dtype=jnp.int32),
          "hits": hit.sum(dtype=jnp.int32), "stats": out.stats, "information": between, "sampled": sampled,
          "joint": analysis.joint_counts(out.experts, mask, run.model.experts.num_experts)}
  return sums, out.experts


# ------------------------------------------------------------------------------------------------------- programs


def jit_train_step(run: config.Run, mesh):
  """The jitted step (state is donated), for calls under `jax.set_mesh(mesh)`."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(run, mesh))
  batch = Batch(*[sharding.batch_sharding(mesh)] * 4)
  options = hardware.compiler_options(mesh.devices.flat[0].device_kind) if run.train.offload_collectives else {}
  return jax.jit(functools.partial(train_step, run), donate_argnums=0, in_shardings=(shardings, batch),
                 out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())), compiler_options=options or None)


def jit_eval_step(run: config.Run, mesh):
  params = jax.tree.map(lambda x: x.sharding, abstract_state(run, mesh).params)
  rows = sharding.batch_sharding(mesh)
  return jax.jit(functools.partial(eval_step, run), in_shardings=(params, Batch(*[rows] * 4), rows),
                 out_shardings=NamedSharding(mesh, PartitionSpec()))


def abstract_batch(run: config.Run, mesh) -> Batch:
  shape = (run.data.batch_sequences, run.data.sequence_tokens)
  return Batch(*[jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))] * 4)


def compile_step(run: config.Run, mesh):
  """The compiled train step for a mesh of real or topology devices; runs nothing."""
  with jax.set_mesh(mesh):
    return jit_train_step(run, mesh).lower(abstract_state(run, mesh), abstract_batch(run, mesh)).compile()
