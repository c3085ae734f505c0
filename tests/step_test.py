"""The optimizer step: identities over micro-batches, meshes and balance scopes; the guard; the schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import config
from moe import optimizer
from moe import schedules
from moe import sharding
from moe import step as step_lib
from tests import small
from tests.small import assert_same, difference, objective_and_gradients

STRONG = {"balance_coef": 1.0, "z_loss_coef": 0.1}  # so that the balance terms dominate what is compared


MESHES = [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 8}, {"expert": 8}, {"fsdp": 4, "tensor": 2}]  # more: mesh_test.py


def mesh_name(mesh):
  return "x".join(f"{k}{v}" for k, v in mesh.items())


# --------------------------------------------------------------------------------------------------------- meshes


@functools.cache
def single_device(scope="global", micro=1):
  run = small.run(model={"router": {**STRONG, "balance_scope": scope}}, train={"micro_batches": micro})
  return objective_and_gradients(run, small.batch())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
def test_every_mesh_gives_the_single_device_loss_and_gradients(mesh):
  run = small.run(model={"router": STRONG}, mesh=mesh)
  balance, nll, grads, _ = objective_and_gradients(run, small.batch())
  want_balance, want_nll, want_grads, _ = single_device()
  np.testing.assert_allclose(nll, want_nll, rtol=1e-5)
  np.testing.assert_allclose(balance, want_balance, rtol=1e-5)
  assert_same(want_grads, grads)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [
    {"attention": {"kind": "mla", "num_kv_heads": 0, "kv_lora_rank": 8, "rope_head_dim": 4, "v_head_dim": 6}},
    {"experts": {"capacity_factor": 0.5, "d_shared": 16, "shared_gate": True}}], ids=["mla", "capacity_shared"])
def test_a_mixed_mesh_for_other_models(variant):
  results = [objective_and_gradients(small.run(model={"router": STRONG, **variant}, mesh=mesh), small.batch())
             for mesh in ({}, {"fsdp": 2, "expert": 2, "tensor": 2})]
  assert_same(results[0][2], results[1][2])


def test_mesh_refusals():
  with pytest.raises(config.ConfigError, match="does not cover the 8 devices"):
    sharding.make_mesh(config.Mesh(data=3))
  assert dict(sharding.make_mesh(config.Mesh(data=-1, tensor=2)).shape)["data"] == 4
  for changes, message in [({"mesh": {"data": 8}, "data": {"batch_sequences": 12}}, "= 12 is not divisible by the mesh's data"),
                           ({"mesh": {"expert": 8}, "model": {"experts": {"num_experts": 12}}}, "num_experts = 12"),
                           ({"mesh": {"tensor": 8}}, "num_heads = 4")]:
    run = small.run(**changes)
    with pytest.raises(config.ConfigError, match=message):
      sharding.check_run(run, sharding.make_mesh(run.mesh))


# ------------------------------------------------------------------------------------------- micro-batches and scopes


@pytest.mark.parametrize("micro", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_micro_batches_with_uneven_padding_equal_one_big_batch(micro):
  """Loss, z-losses and P are weighted by real tokens; with scope `step` f is exact too, so everything is equal."""
  _, nll, grads, sums = single_device("step", micro)
  _, want_nll, want_grads, want_sums = single_device("step", 1)
  np.testing.assert_allclose(nll, want_nll, rtol=1e-6)
  np.testing.assert_allclose(sums["stats"].probability_sums, want_sums["stats"].probability_sums, rtol=1e-5)
  np.testing.assert_array_equal(sums["stats"].counts, want_sums["stats"].counts)
  np.testing.assert_allclose(sums["balance"], want_sums["balance"], rtol=1e-5)
  assert_same(want_grads, grads)


@pytest.mark.parametrize("mesh, micro", [
    ({"data": 2, "expert": 2}, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ({"data": 4}, 2), ({"fsdp": 2, "tensor": 2}, 4), ({"data": 8}, 1)))])
def test_step_scope_is_the_same_for_every_factorisation(mesh, micro):
  run = small.run(model={"router": {**STRONG, "balance_scope": "step"}}, mesh=mesh, train={"micro_batches": micro})
  balance, _, grads, _ = objective_and_gradients(run, small.batch())
  want_balance, _, want_grads, _ = single_device("step")
  np.testing.assert_allclose(balance, want_balance, rtol=1e-5)
  assert_same(want_grads, grads)


@pytest.mark.parametrize("scope, changes", [
    ("microbatch", {"mesh": {"data": 4}}), ("microbatch", {"train": {"micro_batches": 4}}),
    ("global", {"train": {"micro_batches": 4}}), ("step_buffer", {"train": {"micro_batches": 4}})])
def test_other_scopes_are_not(scope, changes):
  """Negative controls: these scopes see less than the step, and their value and gradient depend on the split."""
  run = small.run(model={"router": {**STRONG, "balance_scope": scope}}, **changes)
  balance, _, grads, _ = objective_and_gradients(run, small.batch())
  want_balance, _, want_grads, _ = single_device("step")
  assert np.abs(balance / want_balance - 1).max() > 1e-3
  assert difference(want_grads, grads) > 1e-3


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "expert": 4}], ids=mesh_name)
@pytest.mark.slow
def test_global_scope_ignores_the_mesh_within_a_micro_batch(mesh):
  run = small.run(model={"router": STRONG}, mesh=mesh, train={"micro_batches": 1})
  np.testing.assert_allclose(objective_and_gradients(run, small.batch())[0], single_device("global")[0], rtol=1e-5)


def test_step_buffer_is_algorithm_1():
  """f after micro-batch m is that of the first m micro-batches; by hand from the statistics of each."""
  run = small.run(model={"router": {"balance_scope": "step_buffer"}}, train={"micro_batches": 4})
  _, _, _, sums = single_device("step_buffer", 4)
  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = small.params(step_lib.abstract_state(run, mesh).params)
    forward = jax.jit(functools.partial(step_lib._forward, run))
    parts = step_lib.split_micro_batches(jax.tree.map(jnp.array, small.batch()), 4)
    counts, tokens, want = 0, 0, 0
    for i in range(4):
      stats = forward(params, jax.tree.map(lambda x, i=i: x[i], parts), None, None, None)[2]
      counts, tokens = counts + np.asarray(stats.counts, float), tokens + np.asarray(stats.tokens, float)
      f = counts / (2 * tokens[:, None])
      want = want + 8 * np.sum(f * np.asarray(stats.probability_sums), -1)
  np.testing.assert_allclose(sums["balance"], want, rtol=1e-5)


def test_micro_batches_are_strided_rows():
  batch = small.batch()
  parts = step_lib.split_micro_batches(jax.tree.map(jnp.array, batch), 4)
  np.testing.assert_array_equal(parts.inputs[1], batch.inputs[1::4])


def test_dropout_is_the_same_in_the_counting_pass():
  """Exact f with dropout: the pre-pass must draw the same masks, or its counts are those of other activations."""
  run = small.run(model={"dropout": 0.5, "router": {**STRONG, "balance_scope": "step"}}, train={"micro_batches": 2})
  balance, _, _, sums = objective_and_gradients(run, small.batch())
  stats = jax.device_get(sums["stats"])
  f = stats.counts / (2.0 * stats.tokens[:, None])
  np.testing.assert_allclose(balance, 8 * np.sum(f * stats.probability_sums, -1), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ guard


def steps(run, batches):
  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    state, step, out = step_lib.init_state(run, mesh), step_lib.jit_train_step(run, mesh), []
    for batch, poison in batches:
      if poison is not None:
        params = dict(state.params)
        params["embedding"] = params["embedding"] + poison
        state = step_lib.TrainState(state.step, params, state.opt_state, state.guard)
      before = jax.device_get(state)
      state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
      out.append((before, jax.device_get(state), jax.device_get(metrics)))
  return out


def test_a_step_that_is_not_finite_is_skipped():
  run = small.run(optimizer={"learning_rate": 1e-2})
  first, bad = steps(run, [(small.batch(), None), (small.batch(seed=1), np.nan)])
  assert first[2]["accepted"] and not np.array_equal(first[0].params["embedding"], first[1].params["embedding"])
  assert not bad[2]["accepted"] and bad[2]["skipped_steps"] == 1
  for a, b in zip(jax.tree.leaves((bad[0].params, bad[0].opt_state)), jax.tree.leaves((bad[1].params, bad[1].opt_state))):
    np.testing.assert_array_equal(a, b)
  assert bad[1].step == 2 and bad[1].guard.seen == 1


@functools.cache
def judge(sigmas=8.0):
  return jax.jit(functools.partial(step_lib._judge, sigmas))


def calm_guard(steps_before=200, level=1.0):
  """A guard after steps of loss 3 +- 0.1 and norm 1 +- 0.05, all accepted."""
  guard = step_lib.Guard(jnp.zeros(128), jnp.zeros(128), jnp.int32(0), jnp.int32(0))
  rng = np.random.default_rng(0)
  for _ in range(steps_before):
    guard, accept = judge()(guard, jnp.float32(3 + 0.1 * rng.normal()), jnp.float32(level + 0.05 * rng.normal()))
    assert accept
  return guard


def limit(guard) -> float:
  """The largest norm that is accepted, by bisection."""
  low, high = 0.0, 1e7
  while high - low > 1e-4 * high:
    middle = (low + high) / 2
    low, high = (middle, high) if judge()(guard, jnp.float32(3.0), jnp.float32(middle))[1] else (low, middle)
  return high


def refuse(guard, loss, norm, times=1):
  for _ in range(times):
    guard, accept = judge()(guard, jnp.float32(loss), jnp.float32(norm))
    assert not accept
  return guard


@pytest.mark.parametrize("loss, norm", [(3.0, 1000.0), (3.0, 2.0), (50.0, 1.0), (50.0, 0.0)])
def test_refused_steps_do_not_blind_the_guard(loss, norm):
  """The limit after one, two and ten spikes is the limit before them."""
  guard = calm_guard()
  before = limit(guard)
  assert 1.3 < before < 1.5
  for spikes in (1, 2, 7):
    guard = refuse(guard, loss, norm, spikes)
    # Only the calm steps that the ring buffer has dropped can move it.
    np.testing.assert_allclose(limit(guard), before, rtol=0.02)
  assert int(guard.skipped) == 10 and int(guard.seen) == 210


@pytest.mark.parametrize("steps_before", [40, 200])
@pytest.mark.parametrize("factor", [3, 10, 100, 10_000])
def test_a_lasting_change_is_accepted_before_training_stops(factor, steps_before):
  """And then the guard judges by the new level: what is far above it is refused, what was usual before is not."""
  guard, rng = calm_guard(steps_before), np.random.default_rng(1)
  refused = 0
  for _ in range(60):
    norm = factor * (1 + 0.05 * rng.normal())
    guard, accept = judge()(guard, jnp.float32(3 + 0.1 * rng.normal()), jnp.float32(norm))
    refused += not accept
  assert refused == 16
  assert 1.2 * factor < limit(guard) < 1.6 * factor


def test_a_divergence_is_not_taken_for_a_new_level():
  """Each loss twice the one before: refused until training stops."""
  guard = calm_guard()
  for step in range(20):
    guard = refuse(guard, 50.0 * 2.0**step, 1.0)


def test_nothing_is_judged_in_the_first_steps_and_without_a_limit():
  guard = calm_guard(31)
  assert judge()(guard, jnp.float32(1e6), jnp.float32(1e6))[1]
  for loss, norm in ((np.nan, 1.0), (3.0, np.inf)):
    after, accept = judge()(guard, jnp.float32(loss), jnp.float32(norm))
    assert not accept and int(after.seen) == 31 and int(after.skipped) == 1
  assert jax.jit(functools.partial(step_lib._judge, 0.0))(calm_guard(), jnp.float32(1e6), jnp.float32(1e6))[1]


def test_the_applied_rate_is_the_logged_one():
  """Skipped steps included: under a constant gradient Adam moves every entry by the rate. The last step of a decay to zero is
  the smallest one, however many were skipped before it."""
  o = {"learning_rate": 0.5, "schedule": "wsd", "warmup_tokens": 600, "decay_tokens": 640, "final_fraction": 0.0,
       "weight_decay": 0.0, "clip_norm": 0.0}
  run = small.run(optimizer=o, train={"steps": 20})
  params = {"w": jnp.zeros((2, 2))}
  grads = {"w": jnp.ones((2, 2))}
  state = optimizer.make(run).init(params)
  rate = schedules.learning_rate(run.optimizer, run.tokens_per_step, run.train.steps)
  update = jax.jit(functools.partial(optimizer.update, run))
  for step in range(20):
    accept = step % 3 != 1
    before = params["w"]
    params, state = update(grads, state, params, accept, step)
    np.testing.assert_allclose(before - params["w"], float(rate(step)) if accept else 0.0, rtol=1e-4, atol=1e-7)
  assert 0 < float(rate(19)) < 0.06


# --------------------------------------------------------------------------------------------- optimizer and schedule


@pytest.mark.slow
def test_decay_spares_norms_and_biases_also_where_they_are_stacked():
  run = small.run(model={"attention": {"qkv_bias": True, "qk_norm": "head"}})
  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
  params = step_lib.abstract_state(run, mesh).params
  mask = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
  decays = {jax.tree_util.keystr(path): leaf for path, leaf in mask}
  exempt = [name for name, decay in decays.items() if not decay]
  assert all("scale" in name or "bias" in name for name in exempt) and len(exempt) == 8
  assert all(decay for name, decay in decays.items() if "scale" not in name and "bias" not in name)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
  ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
  updates, _ = optimizer.make(run).update(zero, optimizer.make(run).init(ones), ones)
  moved = {jax.tree_util.keystr(p): bool((u != 0).any()) for p, u in jax.tree_util.tree_leaves_with_path(updates)}
  assert moved == decays


def test_clip_and_adam_equal_optax():
  run = small.run(optimizer={"clip_norm": 0.5, "weight_decay": 0.0, "learning_rate": 0.1})
  params = {"a": jnp.ones((3, 2)), "b_scale": jnp.ones(3)}
  grads = {"a": jnp.full((3, 2), 4.0), "b_scale": jnp.arange(3.0)}
  schedule = schedules.learning_rate(run.optimizer, run.tokens_per_step, run.train.steps)
  want = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(schedule, 0.9, 0.95))
  got, _ = optimizer.make(run).update(grads, optimizer.make(run).init(params), params)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want.update(grads, want.init(params), params)[0])):
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("accept", [True, False])
def test_moments_in_the_host_s_memory(accept):
  """A layer at a time from there and back gives what the chain gives; half of them in memory, half there; a refused step
  leaves all bits as they were."""
  run = small.run(optimizer={"offload": 0.4, "clip_norm": 0.5, "weight_decay": 1.0, "learning_rate": 0.1})
  rng = np.random.default_rng(0)
  draw = lambda: {"layers": {"big": jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32), "norm_scale": jnp.ones((3, 4)),
                             "small": jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32)}, "head": jnp.ones((5, 9))}
  params, grads = draw(), draw()
  assert optimizer.on_host(0.4, params) == ("layers/big",)
  assert optimizer.on_host(0.0, params) == () and optimizer.on_host(1.0, params) == (
      "layers/big", "layers/small", "layers/norm_scale")  # never what has no layers
  chain = optimizer.make(run)
  clip, adam, *others = chain.update(grads, chain.init(params), params)[1]  # moments that are not zero
  state = (clip, adam, *others)
  host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
  place = lambda path, x: jax.device_put(x, host) if optimizer.name_of(path) == "layers/big" else x
  hosted = (clip, adam._replace(mu=jax.tree_util.tree_map_with_path(place, adam.mu),
                                nu=jax.tree_util.tree_map_with_path(place, adam.nu)), *others)
  got, after = jax.jit(functools.partial(optimizer.update, run, accept=accept, step=0))(grads, hosted, params)
  assert [x.sharding.memory_kind for x in (after[1].mu["layers"]["big"], after[1].nu["layers"]["big"])] == ["pinned_host"] * 2
  assert after[1].mu["layers"]["small"].sharding.memory_kind == "device"
  updates, want_after = chain.update(grads, state, params)
  want = (optax.apply_updates(params, updates), want_after) if accept else (params, state)
  for a, b in zip(jax.tree.leaves((got, after)), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-6 if accept else 0)


def test_zero1_splits_what_the_copies_hold():
  mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, expert=2))
  split = functools.partial(sharding.over_replicas, mesh=mesh)
  spec = sharding.spec
  assert split(spec("layer", "experts", "expert_embed", "hidden"), (3, 8, 16, 16)) == jax.P(
      None, ("expert", "data"), ("fsdp", "context"), "tensor")
  assert split(spec("vocab", "embed"), (64, 16)) == jax.P(("tensor", "data"), ("fsdp", "expert", "context"))
  assert split(spec("vocab", "embed"), (63, 12)) == jax.P(("tensor",), ("fsdp", "expert", "context"))  # neither has a half left
  assert split(jax.P(), ()) == jax.P()
  bytes_ = []
  for zero1 in (False, True):
    run = small.run(mesh={"data": 2, "fsdp": 2, "expert": 2}, optimizer={"zero1": zero1})
    state = step_lib.abstract_state(run, mesh)
    bytes_.append(sum(np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.opt_state)))
  assert bytes_[1] < 0.51 * bytes_[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"zero1": True}, {"offload": 1.0}, {"zero1": True, "offload": 0.5}], ids=str)
def test_where_moments_live_changes_no_step(options):
  mesh = {"data": 2, "fsdp": 2, "expert": 2}
  want, got = (small.whole_step(small.run(mesh=mesh, optimizer=o), small.batch())[-1] for o in ({}, options))
  assert_same(want, got, rtol=5e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_points(schedule):
  o = config.Optimizer(learning_rate=2.0, schedule=schedule, warmup_tokens=1000, decay_tokens=2000, final_fraction=0.25)
  rate = schedules.learning_rate(o, 100, 100)
  at = lambda tokens: float(rate(tokens / 100 - 0.5))  # a step's rate is that of the middle of its tokens
  np.testing.assert_allclose([at(500), at(1000)], [1.0, 2.0], rtol=1e-5)
  np.testing.assert_allclose(at(10_000), 0.5, rtol=1e-5)
  middle = {"cosine": at(5500) / 1.25, "wsd": at(9000) / 1.25}[schedule]  # half-way down is the mean of 2 and 0.5
  np.testing.assert_allclose(middle, 1.0, rtol=1e-5)


def test_schedule_survives_two_to_the_31_tokens():
  rate = schedules.learning_rate(config.Optimizer(learning_rate=1.0, warmup_tokens=10**9), 4_000_000, 10**6)
  values = [float(rate(jnp.int32(step))) for step in (500, 537, 600, 10_000, 10**6 - 1)]
  assert np.isfinite(values).all() and values == sorted(values, reverse=True)
  np.testing.assert_allclose(values[-1], 0.1, atol=1e-4)


def test_compile_step_runs_nothing():
  run = small.run(mesh={"data": 2, "expert": 4})
  compiled = step_lib.compile_step(run, sharding.make_mesh(run.mesh))
  assert compiled.memory_analysis().temp_size_in_bytes > 0
