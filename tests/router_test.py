"""The family of routers: every gate against float64, the recurrent router and the pre-gate, noise, loss-free balance."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import config
from moe import model as model_lib
from moe import sharding
from moe import sizes
from moe import step as step_lib
from moe.routing import balance
from moe.routing import capacity
from moe.routing import gates
from moe.routing import recurrent
from tests import small
from tests.small import assert_same, difference, objective_and_gradients
from tools.experiments import gate_errors

GRU = {"recurrent": {"cell": "gru", "width": 6}}
PRE_GATE = {"pre_gate": {"d_model": 8, "num_heads": 2, "d_ff": 12}}


def init(model, seed=0):
  transformer = model_lib.build(model)
  abstract = jax.eval_shape(lambda key: model_lib.unbox(model_lib.init(transformer, key))[0], jax.random.key(0))
  return transformer, small.params(abstract, seed)


# ------------------------------------------------------------------------------------------------------------- gates


# Dropless is the easier half; where the same gate has a test with drops, it is left to the slow tests.
CASES = [pytest.param(*case, marks=pytest.mark.slow) if case[1] == "dropless" and case[0] != "soft" else case
         for case in gate_errors.cases()]


@pytest.mark.parametrize("gate, dispatch", CASES, ids=lambda v: v.replace(" ", "_"))
def test_gate_equals_the_float64_reference(gate, dispatch):
  """With expert parallelism, which is the harder half of the table of `tools.experiments.gate_errors`."""
  forward, gradient, dropped = gate_errors.errors(gate, dispatch, gate_errors.MESHES["8 devices, expert 4"])
  assert forward < 2e-6 and gradient < 5e-6  # float32 sums of tens of terms: some ten units in the last place
  assert (dropped > 0) == (dispatch != "dropless")


def test_a_wrong_weight_would_show():
  """Negative control of the table: weights that are not renormalised are far outside its tolerance."""
  case, changed = gate_errors.GATES["softmax"], gate_errors.GATES["softmax, not renormalised"]
  model = gate_errors.make_model("softmax", "dropless")
  x, segments, params, noise, priority, _ = gate_errors._inputs(model, 0)
  with jax.enable_x64(True):
    a, b = (gate_errors.reference(jnp.asarray(x), jax.tree.map(jnp.asarray, params), dataclasses.replace(
        model, router=config.Router(top_k=2, **options)), segments > 0, noise, priority) for options in (case, changed))
  assert np.abs(a - b).max() > 0.1


def test_renormalised_sigmoid_survives_very_negative_logits():
  choice = gates.token_choice(jnp.full((1, 2, 8), -200.0), config.Router(gate="sigmoid"))
  np.testing.assert_allclose(choice.weights, 0.5)
  np.testing.assert_allclose(choice.probabilities, 1 / 8)


def test_bias_changes_the_choice_and_not_the_weights():
  logits, bias = jnp.zeros((1, 1, 4)).at[0, 0, :2].set([2.0, 1.0]), jnp.array([0.0, 0.0, 0.0, 5.0])
  choice = gates.token_choice(logits, config.Router(gate="sigmoid", renormalize=False), bias)
  assert choice.experts.tolist() == [[[3, 0]]]
  np.testing.assert_allclose(choice.weights[0, 0], jax.nn.sigmoid(jnp.array([0.0, 2.0])))


def test_cosine_scale_is_clamped_and_lengths_do_not_matter():
  rng = np.random.default_rng(0)
  x, e = jnp.array(rng.normal(size=(3, 5)), jnp.float32), jnp.array(rng.normal(size=(5, 4)), jnp.float32)
  base = gates.cosine_logits(x, e, jnp.zeros(1))
  np.testing.assert_allclose(gates.cosine_logits(7 * x, 3 * e, jnp.zeros(1)), base, rtol=1e-5)
  np.testing.assert_allclose(gates.cosine_logits(x, e, jnp.full(1, 50.0)), 100 * base, rtol=1e-5)


def test_expert_choice_fills_every_expert_and_skips_padding():
  logits = jnp.array(np.random.default_rng(0).normal(size=(2, 12, 8)), jnp.float32)
  mask = jnp.arange(12)[None] < jnp.array([[12], [2]])
  choice = gates.expert_choice(logits, config.Router(top_k=2), mask, 3, "sequence")
  taken = np.asarray(choice.experts < 8)
  assert not taken[~np.asarray(mask)].any()
  np.testing.assert_array_equal(taken.sum(1), [[3] * 8, [2] * 8])


def test_noise_goes_by_the_row_in_the_step():
  draw = lambda rows: gates.row_noise(jax.random.normal, jax.random.key(3), jnp.array(rows), (4, 2))
  np.testing.assert_array_equal(draw([5, 1])[0], draw([0, 5])[1])
  assert not np.array_equal(draw([5, 1])[0], draw([5, 1])[1])


NOISY = {"gate": "noisy", "balance_scope": "step", "balance_coef": 1.0, "z_loss_coef": 0.1}


@pytest.mark.parametrize("mesh, micro", [
    pytest.param({"data": 8}, 1, marks=pytest.mark.slow), pytest.param({}, 4, marks=pytest.mark.slow),
    pytest.param({"data": 2, "expert": 2}, 2, marks=pytest.mark.slow)], ids=str)
def test_noisy_gate_does_not_depend_on_mesh_or_micro_batches(mesh, micro):
  batch = small.batch()
  want = objective_and_gradients(small.run(model={"router": NOISY}), batch)
  got = objective_and_gradients(small.run(model={"router": NOISY}, mesh=mesh, train={"micro_batches": micro}), batch)
  assert_same(want[2], got[2])
  silent = objective_and_gradients(small.run(model={"router": {**NOISY, "gate": "softmax"}}), batch)
  assert "noise" not in silent[2]["layers"]["experts"]["moe"]["router"]
  np.testing.assert_array_less(1e-3, abs(silent[1] / want[1] - 1))  # the noise does something


@pytest.mark.slow
def test_random_drops_do_not_depend_on_the_mesh():
  drops = {"capacity_factor": 0.5, "drop_policy": "random"}
  results = [objective_and_gradients(small.run(model={"experts": drops}, mesh=mesh), small.batch())
             for mesh in ({}, {"data": 4, "expert": 2})]
  assert_same(results[0][2], results[1][2])
  other_key = objective_and_gradients(small.run(model={"experts": drops}), small.batch(), seed=1)
  assert difference(results[0][2], other_key[2]) > 1e-3


# --------------------------------------------------------------------------------------------------- recurrent router


def cell_arrays(kind, width, seed=0):
  rng, blocks = np.random.default_rng(seed), config.Recurrent(cell=kind).blocks
  return recurrent.Cell(*(rng.normal(size=s) * 0.5 for s in ((width, blocks * width),) * 2 + ((blocks * width,),) * 2), None)


def by_hand(kind, cell, x, h, c):
  """One step in float64 NumPy, gate by gate; returns (h, c)."""
  sig, p = (lambda v: 1 / (1 + np.exp(-v))), h.shape[-1]
  block = lambda i, from_x, from_h: (
      (x @ cell.w_in + cell.b_in)[..., i * p : (i + 1) * p] * from_x
      + (h @ cell.w_state + cell.b_state)[..., i * p : (i + 1) * p] * from_h)
  if kind == "gru":
    r, z = sig(block(0, 1, 1)), sig(block(1, 1, 1))
    n = np.tanh(block(2, 1, 0) + r * block(2, 0, 1))
    return (1 - z) * n + z * h, None
  if kind == "rnn":
    return np.tanh(block(0, 1, 1)), None
  i, f, g, o = sig(block(0, 1, 1)), sig(block(1, 1, 1)), np.tanh(block(2, 1, 1)), sig(block(3, 1, 1))
  c = f * c + i * g
  return o * np.tanh(c), c


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
def test_cell_equals_float64_over_several_layers(kind):
  rng, cell = np.random.default_rng(1), cell_arrays(kind, 5)
  state = recurrent.start(kind, (2, 3), 5, 8, False)
  h, c = np.zeros((2, 3, 5)), np.zeros((2, 3, 5))
  single = recurrent.Cell(*(jnp.asarray(a, jnp.float32) for a in cell[:4]), None)
  for _ in range(4):
    x = rng.normal(size=(2, 3, 5))
    state = recurrent.advance(kind, single, jnp.asarray(x, jnp.float32), state)
    h, c = by_hand(kind, cell, x, h, c)
  np.testing.assert_allclose(state.hidden, h, atol=1e-6)


def test_gru_equals_flax_where_the_form_agrees():
  """flax.linen.GRUCell has no recurrent bias in its r and z gates."""
  p, rng = 5, np.random.default_rng(2)
  cell = cell_arrays("gru", p)
  cell.b_state[: 2 * p] = 0
  x, h = rng.normal(size=(3, p)).astype(np.float32), rng.normal(size=(3, p)).astype(np.float32)
  cut = lambda a, i: jnp.asarray(a[..., i * p : (i + 1) * p], jnp.float32)
  params = {f"i{g}": {"kernel": cut(cell.w_in, i), "bias": cut(cell.b_in, i)} for i, g in enumerate("rzn")}
  params |= {f"h{g}": {"kernel": cut(cell.w_state, i)} for i, g in enumerate("rzn")}
  params["hn"]["bias"] = cut(cell.b_state, 2)
  want, _ = nn.GRUCell(p).apply({"params": params}, h, x)
  state = recurrent.State(jnp.asarray(h)[None], None, None)
  single = recurrent.Cell(*(jnp.asarray(a, jnp.float32) for a in cell[:4]), None)
  np.testing.assert_allclose(recurrent.advance("gru", single, jnp.asarray(x)[None], state).hidden[0], want, atol=1e-6)


def test_recurrent_router_equals_a_float64_walk_through_the_layers():
  """Probabilities of every layer, recomputed from the tokens that entered its router."""
  model = small.model(num_layers=3, router={**GRU, "renormalize": False})
  transformer, params = init(model)
  batch = small.batch(rows=2, padding=False)
  seen = []

  def spy(next_function, args, kwargs, context):
    if isinstance(context.module, model_lib.TokenRouter) and context.method_name == "__call__":
      jax.debug.callback(lambda x: seen.append(np.asarray(x, np.float64)), args[0], ordered=True)
    return next_function(*args, **kwargs)

  with nn.intercept_methods(spy):
    out = transformer.apply({"params": params}, batch.inputs, batch.segment_ids, batch.positions)
    jax.effects_barrier()
  cell = params["router_cell"]
  cell = recurrent.Cell(*(np.asarray(cell[n], np.float64) for n in ("input", "state", "input_bias", "state_bias")), None)
  router, h = params["layers"]["experts"]["moe"]["router"], np.zeros((2, 16, 6))
  assert len(seen) == 3
  for layer, x in enumerate(seen):
    h, _ = by_hand("gru", cell, x @ np.asarray(router["projector"][layer], np.float64), h, None)
    logits = h @ np.asarray(router["weight"][layer], np.float64)
    want = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(out.probabilities[layer], want, atol=1e-5)


def router_gradient(**changes):
  """Gradient of the last layer's probability of one expert with respect to the projectors: [L, D, p]."""
  model = small.model(num_layers=3, router={"recurrent": {"cell": "gru", "width": 6, **changes}})
  transformer, params = init(model)
  batch = small.batch(rows=2, padding=False)

  def value(projector):
    # the experts' weights are zero, so the only way from an earlier projector to a later router is the state
    moe = params["layers"]["experts"]["moe"]
    moe = {**moe, "down": jnp.zeros_like(moe["down"]), "router": {**moe["router"], "projector": projector}}
    changed = {**params, "layers": {"experts": {**params["layers"]["experts"], "moe": moe}}}
    out = transformer.apply({"params": changed}, batch.inputs, batch.segment_ids, batch.positions)
    return out.probabilities[-1, ..., 0].sum()

  return np.asarray(jax.grad(value)(params["layers"]["experts"]["moe"]["router"]["projector"]))


@pytest.mark.slow
def test_the_gradient_travels_through_the_state():
  """Section 2.5 of the formulas: the first projector gets a gradient through h; detach and NP cut it."""
  recurrent_gradient = np.abs(router_gradient()).max((1, 2))
  assert (recurrent_gradient > 1e-4).all()
  for carry in ("detach", "none"):
    cut = np.abs(router_gradient(carry=carry)).max((1, 2))
    assert cut[2] > 1e-4 and not cut[:2].any()


def test_detach_changes_no_value_and_np_starts_every_layer_from_zeros():
  outs = {}
  for carry in ("gradient", "detach", "none"):
    model = small.model(num_layers=3, router={"recurrent": {"cell": "gru", "width": 6, "carry": carry}})
    transformer, params = init(model)
    batch = small.batch(rows=2, padding=False)
    outs[carry] = transformer.apply({"params": params}, batch.inputs, batch.segment_ids, batch.positions).probabilities
  np.testing.assert_array_equal(outs["gradient"], outs["detach"])
  np.testing.assert_array_equal(outs["gradient"][0], outs["none"][0])
  assert np.abs(outs["gradient"][1] - outs["none"][1]).max() > 1e-3


def test_router_parameter_counts_are_the_papers():
  """RMoE Table 1: 0.47 M router parameters for 8 layers; "about 3.5 M" more than linear for the large one."""
  def router(layers, width, experts, **options):
    return sizes.sizes(small.model(num_layers=layers, d_model=width, experts={"num_experts": experts},
                                   router={"recurrent": {"cell": "gru", "width": 128, **options}})).router

  small_model = router(8, 352, 16)
  assert small_model == 8 * 352 * 128 + 6 * 128**2 + 6 * 128 + 8 * 128 * 16 and round(small_model / 1e6, 2) in (0.47, 0.48)
  linear = sizes.sizes(small.model(num_layers=24, d_model=1280, experts={"num_experts": 16})).router
  assert abs(router(24, 1280, 16) - linear - 3.59e6) < 0.01e6
  assert router(8, 352, 16, shared_projector=True) == small_model - 7 * 352 * 128


# ---------------------------------------------------------------------------------------------------------- pre-gate


@pytest.mark.slow
def test_pre_gate_decides_once_for_all_layers():
  model = small.model(num_layers=3, router=PRE_GATE)
  transformer, params = init(model)
  batch = small.batch()
  out = transformer.apply({"params": params}, batch.inputs, batch.segment_ids, batch.positions)
  assert out.experts.shape == (1, 8, 16, 2) and out.stats.counts.shape == (1, 8)
  assert "router" not in params["layers"]["experts"]["moe"]

  def sorts(**changes):
    transformer, params = init(small.model(num_layers=3, scan_unroll=0, **changes))
    run = jax.jit(lambda p: transformer.apply({"params": p}, batch.inputs, batch.segment_ids, batch.positions).hidden)
    return run.lower(params).compile().as_text().count(" sort(")

  assert 0 < 3 * sorts(router=PRE_GATE) == sorts()  # one plan, whatever the number of layers


@pytest.mark.slow
def test_pre_gate_depends_on_the_tokens_of_its_document_alone():
  model = small.model(router=PRE_GATE)
  transformer, params = init(model)
  batch = small.batch(rows=1, padding=False)
  cut = int((batch.segment_ids[0] == 1).sum())
  run = lambda inputs: transformer.apply({"params": params}, inputs, batch.segment_ids, batch.positions).probabilities[0, 0]
  base, changed = run(batch.inputs), batch.inputs.copy()
  changed[0, :cut] = (changed[0, :cut] + 7) % 64
  np.testing.assert_allclose(run(changed)[cut:], base[cut:], atol=1e-6)
  assert np.abs(run(changed)[:cut] - base[:cut]).max() > 1e-3
  deeper = {**params, "layers": jax.tree.map(lambda a: a + 1.0, params["layers"])}  # the layers have no say
  np.testing.assert_array_equal(
      transformer.apply({"params": deeper}, batch.inputs, batch.segment_ids, batch.positions).probabilities[0, 0], base)


def test_pre_gate_must_fit_the_mesh():
  run = small.run(model={"router": PRE_GATE}, mesh={"tensor": 4, "data": 2})
  run = small.change(run, model={"attention": {"num_kv_heads": 4}})
  with pytest.raises(config.ConfigError, match="PreGate.num_heads = 2 is not divisible by the mesh's tensor = 4"):
    sharding.check_run(run, sharding.make_mesh(run.mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "expert": 2}], ids=str)
def test_shared_plan_on_a_mesh(mesh):
  results = [objective_and_gradients(small.run(model={"router": {**PRE_GATE, "balance_coef": 1.0}}, mesh=m), small.batch())
             for m in ({}, mesh)]
  assert_same(results[0][2], results[1][2])


# ----------------------------------------------------------------------------------------------------------- balance


@pytest.mark.slow
def test_micro_mix_adds_the_microbatch_loss():
  options = {"balance_coef": 1.0, "z_loss_coef": 0.0}
  def grads(**router):
    return objective_and_gradients(small.run(model={"router": {**options, **router}}, mesh={"data": 8}), small.batch())[2]
  none, both = grads(balance_coef=0.0), grads(micro_mix=0.25)
  wide, narrow = grads(), grads(balance_scope="microbatch")
  want = jax.tree.map(lambda n, g, m: n + (g - n) + 0.25 * (m - n), none, wide, narrow)
  assert_same(want, both, rtol=5e-5)  # differences of gradients lose a digit


def test_shuffle_is_global_in_expectation_and_not_micro():
  """f of a random subset has the mean of the global f; f of a shard of one kind of token has not."""
  rng = np.random.default_rng(0)
  kinds = rng.normal(size=(4, 1, 8)) * 2  # each row is a domain of its own
  x = jnp.array(kinds + 0.3 * rng.normal(size=(4, 64, 8)), jnp.float32)
  mask = jnp.ones((4, 64), bool)
  def value(scope, key=0):
    choice = gates.token_choice(x, config.Router(top_k=2))
    kept = jnp.broadcast_to(mask[..., None], choice.experts.shape)
    priority = jax.random.uniform(jax.random.key(key), mask.shape)
    stats = balance.collect(x, choice, kept, mask, mask.astype(jnp.int32), config.Router(balance_scope=scope), 4, priority)
    if scope == "global":
      return float(balance.balance_sum(balance.fractions(stats.counts, stats.tokens, 2), stats.probability_sums)) / 256
    return float(stats.local_balance_sum) / 256
  shuffled = np.mean([value("shuffle", key) for key in range(30)])
  assert abs(shuffled - value("global")) < 0.03 < value("microbatch") - value("global")


@pytest.mark.parametrize("mesh, micro", [
    pytest.param({}, 1, marks=pytest.mark.slow), ({"data": 4}, 2), pytest.param({"expert": 8}, 1, marks=pytest.mark.slow)],
                         ids=str)
def test_selection_bias_moves_by_the_counts_of_the_whole_step(mesh, micro):
  router = {"gate": "sigmoid", "bias_update_rate": 0.01, "balance_coef": 0.0}
  run = small.run(model={"router": router}, mesh=mesh, train={"micro_batches": micro})
  devices = jax.devices()[: max(np.prod(list(mesh.values()), dtype=int), 1)]
  mesh = sharding.make_mesh(run.mesh, devices)
  with jax.set_mesh(mesh):
    params = small.params(step_lib.abstract_state(run, mesh).params)
    state = step_lib.init_state(run, mesh)
    state = step_lib.TrainState(state.step, params, state.opt_state, state.guard)
    before = jax.device_get(params)["layers"]["experts"]["moe"]["router"]["selection_bias"]
    batch = jax.device_put(small.batch(), sharding.batch_sharding(mesh))
    new, metrics = step_lib.jit_train_step(run, mesh)(state, batch)
    after = jax.device_get(new.params)["layers"]["experts"]["moe"]["router"]["selection_bias"]
  counts = np.asarray(metrics["expert_counts"], float)
  assert counts.sum() == 2 * 2 * int(metrics["tokens"])
  np.testing.assert_allclose(after - before, 0.01 * np.sign(counts.mean(-1, keepdims=True) - counts), atol=1e-6)


def test_loss_free_bias_balances_a_skewed_router():
  rng = np.random.default_rng(0)
  logits = jnp.array(rng.normal(size=(1, 512, 8)) + np.linspace(-2, 2, 8), jnp.float32)
  router = config.Router(gate="sigmoid", bias_update_rate=0.02)
  params = {"selection_bias": jnp.zeros(8)}
  spread = []
  for _ in range(150):
    choice = gates.token_choice(logits, router, params["selection_bias"])
    counts = jnp.bincount(choice.experts.reshape(-1), length=8)
    spread.append(float(counts.max() / counts.mean()))
    params = balance.moved_biases(params, counts[None], router.bias_update_rate)
  assert spread[0] > 2 and spread[-1] < 1.2


def their_losses(p, chosen):
  """Balance losses as other codebases compute them, float64; p [L, T, E], chosen [L, T, K] best first."""
  layers, _, experts = p.shape
  hot = np.eye(experts)[chosen]  # [L, T, K, E]
  flat_hot, flat_p = hot.reshape(-1, *hot.shape[2:]), p.reshape(-1, experts)
  every = lambda f: sum(experts * np.sum(f(hot[i]) * p[i].mean(0)) for i in range(layers))
  all_choices = every(lambda h: h.sum(1).mean(0) / h.shape[1])
  return {
      "huggingface": experts * np.sum(flat_hot.mean(0) * flat_p.mean(0)[None]),
      "deepspeed_top_k": all_choices, "megatron": all_choices,
      "deepspeed_top_1_2": every(lambda h: h[:, 0].mean(0)), "tutel": every(lambda h: h[:, 0].mean(0)),
  }


@pytest.mark.parametrize("source", ["huggingface", "deepspeed_top_k", "deepspeed_top_1_2", "tutel", "megatron"])
def test_converted_coefficients(source):
  """coefficient x their loss == converted coefficient x our loss, where the table says that it is exact; and for a balanced
  router always."""
  rng = np.random.default_rng(0)
  exact = {"huggingface": (1, 2), "deepspeed_top_k": (3, 2), "megatron": (3, 2), "deepspeed_top_1_2": (3, 1), "tutel": (3, 1)}
  for (layers, k), balanced in ((exact[source], False), ((3, 2), True)):
    p = np.full((layers, 24, 8), 1 / 8) if balanced else rng.dirichlet(np.ones(8), (layers, 24))
    order = np.array([[(t + i) % 8 for i in range(k)] for t in range(24)])
    chosen = np.stack([order] * layers) if balanced else np.argsort(-p, -1)[..., :k]
    counts = np.eye(8)[chosen].sum((1, 2))
    ours = np.mean([8 * np.sum(counts[i] / (k * 24) * p[i].mean(0)) for i in range(layers)])
    converted = balance.converted_coefficient(0.01, source, top_k=k, num_layers=layers)
    np.testing.assert_allclose(converted * ours, 0.01 * their_losses(p, chosen)[source], rtol=1e-12)


def test_huggingface_layers_can_cancel_each_other():
  """Why the conversion is exact for one layer only: two layers that collapse onto different halves look balanced."""
  p = np.zeros((2, 8, 4))
  p[0, :, :2] = p[1, :, 2:] = 0.5
  chosen = np.stack([np.tile([0, 1], (8, 1)), np.tile([2, 3], (8, 1))])
  losses = their_losses(p, chosen)
  assert losses["huggingface"] / 2 == 1.0 and losses["megatron"] / 2 == 2.0


def test_unknown_source():
  with pytest.raises(ValueError, match="not one of huggingface"):
    balance.converted_coefficient(0.01, "gshard", top_k=2, num_layers=4)


def deepspeed_kept(logits, capacity):
  """Negative control: DeepSpeed's drop by probability ranks a zero-filled matrix of logits, so that experts' slots go to
  tokens that did not choose them (0 beats a negative logit). Returns the selections kept, [T, E]."""
  chosen = np.argsort(-logits, -1)[:, :1]
  mask = np.zeros(logits.shape, bool)
  np.put_along_axis(mask, chosen, True, -1)
  filled = np.where(mask, logits, 0.0)
  kept = np.zeros_like(mask)
  for expert in range(logits.shape[1]):
    kept[np.argsort(-filled[:, expert], kind="stable")[:capacity], expert] = True
  return mask & kept


def test_no_policy_drops_a_token_that_fits():
  logits = np.random.default_rng(0).normal(-3, 1, (64, 8)).astype(np.float32)
  counts = np.bincount(logits.argmax(-1), minlength=8)
  slots = int(counts.max())  # every selection fits
  choice = gates.token_choice(jnp.array(logits)[None], config.Router(top_k=1))
  for policy in ("position", "probability", "random"):
    for group in ("sequence", "microbatch"):
      priority = jax.random.uniform(jax.random.key(0), (1, 64))
      assert capacity.keep(choice, jnp.ones((1, 64), bool), slots, policy, group, priority).all()
  assert deepspeed_kept(logits, slots).sum() < 32
