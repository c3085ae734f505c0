"""The model: counts, dense references, invariances, and what it must not see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import config
from moe import experts
from moe import generate
from moe import gin_config
from moe import model as model_lib
from moe import sharding
from moe import sizes
from tests import small

MLA = {"attention": {"kind": "mla", "num_kv_heads": 0, "kv_lora_rank": 8, "rope_head_dim": 4, "v_head_dim": 6}}
VARIANTS = {
    "gqa": {}, "mla": MLA, "mla_q_lora": {"attention": {**MLA["attention"], "q_lora_rank": 8}},
    "qk_norm_head": {"attention": {"qk_norm": "head"}}, "qk_norm_whole": {"attention": {"qk_norm": "whole"}},
    "qkv_bias": {"attention": {"qkv_bias": True}},
    "window_softcap": {"attention": {"window_tokens": 4, "logit_softcap": 5.0}},
    "shared_gate": {"experts": {"d_shared": 24, "shared_gate": True}},
    "gelu_tied": {"activation": "gelu", "tie_embeddings": True},
    "dense_first_every_2": {"num_layers": 5, "num_dense_layers": 1, "moe_every": 2, "d_ff": 32},
    "capacity": {"experts": {"capacity_factor": 1.0}}, "groups": {"router": {"num_groups": 4, "top_groups": 2}},
    "interleaved": {"attention": {"rope": {"interleaved": True}}},
    "noisy": {"router": {"gate": "noisy"}}, "cosine": {"router": {"gate": "cosine", "cosine_width": 6}},
    "sigmoid": {"router": {"gate": "sigmoid", "num_groups": 2, "top_groups": 1, "bias_update_rate": 0.01}},
    "expert_choice": {"router": {"gate": "expert_choice", "allow_lookahead": True, "balance_coef": 0.0}},
    "soft": {"router": {"gate": "soft", "soft_slots": 2, "allow_lookahead": True, "balance_coef": 0.0}},
    "gru": {"router": {"recurrent": {"cell": "gru", "width": 6}}, "num_layers": 5, "num_dense_layers": 1, "moe_every": 2,
            "d_ff": 32},
    "lstm_shared_cosine": {"router": {"gate": "cosine", "cosine_width": 5, "recurrent": {
        "cell": "lstm", "width": 6, "shared_projector": True, "previous_scores": 0.5}}},
    "rnn_np": {"router": {"recurrent": {"cell": "rnn", "width": 6, "carry": "none"}}},
    "pre_gate": {"router": {"pre_gate": {"d_model": 8, "num_heads": 2, "d_ff": 12}}},
}
LOOKAHEAD = ("expert_choice", "soft")


def init(model, seed=0):
  transformer = model_lib.build(model)
  abstract = jax.eval_shape(lambda key: model_lib.unbox(model_lib.init(transformer, key))[0], jax.random.key(0))
  return transformer, small.params(abstract, seed)


@functools.partial(jax.jit, static_argnums=0)
def decode(transformer, params, tokens, positions, cache, index):
  return transformer.apply({"params": params}, tokens, jnp.ones_like(tokens), positions, cache, index)


@functools.partial(jax.jit, static_argnums=0)
def forward(transformer, params, batch):
  """(logits, Output)"""
  out = transformer.apply({"params": params}, batch.inputs, batch.segment_ids, batch.positions)
  return transformer.apply({"params": params}, out.hidden, method="logits"), out


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_equal_the_parameter_tree(name):
  model = small.model(**VARIANTS[name])
  transformer = model_lib.build(model)
  boxed = jax.eval_shape(lambda key: model_lib.init(transformer, key), jax.random.key(0))
  params, specs = model_lib.unbox(boxed)
  assert sum(x.size for x in jax.tree.leaves(params)) == sizes.sizes(model).total
  for x, spec in zip(jax.tree.leaves(params), jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, jax.P))):
    assert len(spec) == x.ndim


# Exact totals of the released checkpoints; active billions as published (arXiv 2401.04088, 2409.02060, 2405.04434, model
# cards of Qwen), which count both embedding tables, but DeepSeek's only the output head.
PUBLISHED = {
    "mixtral_8x7b": (46_702_792_704, 12.9), "olmoe_1b_7b": (6_919_161_856, 1.3), "qwen3_30b_a3b": (30_532_122_624, 3.3),
    "deepseek_v2_lite": (15_706_484_224, 2.4), "qwen1_5_moe_a2_7b": (14_315_784_192, 2.7),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
  flags = ["--gin.Data.batch_sequences=8", "--gin.Data.sequence_tokens=64", "--gin.Train.steps=1"]
  files = [gin_config.CONFIGS / file for file in ("base.gin", "data/embedded.gin", f"size/{name}.gin")]
  model = gin_config.resolve(files, flags).run.model
  total, active = PUBLISHED[name]
  s = sizes.sizes(model)
  assert s.total == total
  counted = s.active - (model.vocab_size * model.d_model if name == "deepseek_v2_lite" else 0)
  assert abs(counted / 1e9 - active) < 0.06  # published with one decimal, some of them cut off and not rounded
  transformer = model_lib.build(model)
  params = model_lib.unbox(jax.eval_shape(lambda key: model_lib.init(transformer, key), jax.random.key(0)))[0]
  assert sum(x.size for x in jax.tree.leaves(params)) == total


# ------------------------------------------------------------------------------------------------- dense reference


def dense_moe(x, params, model, mask):
  """The MoE block in float64 NumPy, token by token: router, choice, drops by position or probability, experts."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  logits = x.astype(np.float64) @ p["router"]["weight"]
  probabilities = np.exp(logits - logits.max(-1, keepdims=True))
  probabilities /= probabilities.sum(-1, keepdims=True)
  k, e = model.router.top_k, model.experts
  chosen = np.argsort(-probabilities, -1, kind="stable")[..., :k]
  slots = int(np.ceil(e.capacity_factor * k * x.shape[1] / e.num_experts)) if e.capacity_factor else 10**9
  out = np.zeros(x.shape)
  for b in range(x.shape[0]):
    for expert in range(e.num_experts):
      takers = [s for s in range(x.shape[1]) if mask[b, s] and expert in chosen[b, s]]
      if e.drop_policy == "probability":
        takers.sort(key=lambda s: -probabilities[b, s, expert])
      for s in takers[:slots]:
        gate, up = x[b, s] @ p["gate"][expert], x[b, s] @ p["up"][expert]
        weight = probabilities[b, s, expert] / probabilities[b, s, chosen[b, s]].sum()
        out[b, s] += weight * ((gate / (1 + np.exp(-gate)) * up) @ p["down"][expert])
  return out


@pytest.mark.parametrize("backend", ["loop", "ragged_dot", "dense"])
@pytest.mark.parametrize("factor, policy", [(0.0, "position"), (0.5, "position"), (0.6, "probability")])
def test_moe_block_equals_dense_reference(backend, factor, policy):
  model = small.model(experts={"capacity_factor": factor, "drop_policy": policy, "backend": backend})
  block = model_lib.MoEBlock(model)
  x = jnp.array(np.random.default_rng(0).normal(size=(3, 16, 16)), jnp.float32)
  context = model_lib.block_context(jnp.array(small.batch(3).segment_ids))
  params = jax.tree.map(jnp.asarray, model_lib.unbox(block.init(jax.random.key(1), x, context))[0])["params"]
  out, decision, _ = block.apply({"params": params}, x, context)
  want = dense_moe(np.asarray(x), params, model, np.asarray(context.segment_ids) > 0)
  np.testing.assert_allclose(out, want, atol=2e-6)
  if factor:
    assert int(decision.stats.dropped) > 0


def test_expert_gradient_equals_that_of_the_dense_form():
  """Differentiates dispatch, grouped matmul and combine together, against all experts on all tokens."""
  rng = np.random.default_rng(0)
  x, gates = jnp.array(rng.normal(size=(2, 8, 6)), jnp.float32), jnp.array(rng.random((2, 8, 2)), jnp.float32)
  chosen = jnp.array(np.stack([rng.permutation(5)[:2] for _ in range(16)]).reshape(2, 8, 2), jnp.int32)  # 4 is "dropped"
  weights = experts.Weights(*(jnp.array(rng.normal(size=s), jnp.float32) for s in ((4, 6, 10), (4, 6, 10), (4, 10, 6))))

  def sparse(x, gates, weights):
    e = config.Experts(num_experts=4, d_expert=10, backend="loop")
    plans = experts.make_plan(chosen, e)
    return jnp.sum(jnp.sin(experts.apply_experts(x, plans, gates, weights, activation="swiglu", experts=e)))

  def dense(x, gates, weights):
    gate, up = jnp.einsum("bsd,edf->bsef", x, weights.gate), jnp.einsum("bsd,edf->bsef", x, weights.up)
    every = jnp.einsum("bsef,efd->bsed", jax.nn.silu(gate) * up, weights.down)
    mix = jnp.sum(jax.nn.one_hot(chosen, 4) * gates[..., None], 2)
    return jnp.sum(jnp.sin(jnp.einsum("bse,bsed->bsd", mix, every)))

  # The sines' arguments reach 26, so float32 knows their cosines to 26 x 2^-23 = 3e-6, in either form; by float64 each is
  # within 2.4e-6 of a leaf's largest entry.
  for a, b in zip(*(jax.tree.leaves(jax.grad(f, (0, 1, 2))(x, gates, weights)) for f in (sparse, dense))):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


# ------------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("name, unroll", [
    ("gqa", 0), ("mla", 0), ("dense_first_every_2", 0), ("gru", 0), ("lstm_shared_cosine", 0), ("pre_gate", 0),
    ("gqa", 2), ("noisy", 2)])  # three layers, so that one is left over
def test_scanned_equals_unrolled(name, unroll):
  model, batch = small.model(**VARIANTS[name], **({"num_layers": 3} if unroll else {})), small.batch()
  transformer, params = init(model)
  unrolled = model_lib.build(dataclasses.replace(model, scan_unroll=unroll))
  logits = [forward(t, params, batch)[0] for t in (transformer, unrolled)]
  np.testing.assert_allclose(*logits, atol=4e-6)  # of up to 7, in float32


@pytest.mark.parametrize("remat", ["full", "offload", "dots", "attention"])
@pytest.mark.slow
def test_remat_changes_no_gradient(remat):
  model, batch = small.model(), small.batch()
  transformer, params = init(model)
  def grad(transformer):
    return jax.grad(lambda p: jnp.mean(jnp.sin(forward(transformer, p, batch)[0])))(params)
  other = model_lib.build(dataclasses.replace(model, remat=remat))
  for a, b in zip(jax.tree.leaves(grad(transformer)), jax.tree.leaves(grad(other))):
    np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("capacity", *LOOKAHEAD)])
def test_token_by_token_equals_the_whole_sequence(name):
  model, length = small.model(**VARIANTS[name]), 10
  transformer, params = init(model)
  tokens = np.random.default_rng(0).integers(0, 64, (1, length)).astype(np.int32)
  positions = np.arange(length)[None].astype(np.int32)
  whole = forward(transformer, params, model_lib.Batch(tokens, tokens, np.ones_like(tokens), positions))[1].hidden
  parts, cache = [], model_lib.empty_cache(model, 1, length)
  for begin, end in [(0, 4)] + [(i, i + 1) for i in range(4, length)]:
    out = decode(transformer, params, tokens[:, begin:end], positions[:, begin:end], cache, jnp.int32(begin))
    parts, cache = [*parts, out.hidden], out.cache
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=3e-5)


def test_greedy_sample_follows_the_model():
  model = small.model()
  transformer, params = init(model)
  made = generate.sample(model, params, np.array([1, 5, 9]), 6, vocab_size=60, temperature=0)
  text = np.concatenate([[1, 5, 9], made.ids])
  ones, positions = np.ones((1, 9), np.int32), np.arange(9)[None]
  logits = forward(transformer, params, model_lib.Batch(text[None], text[None], ones, positions))[0][0, :, :60]
  np.testing.assert_array_equal(jnp.argmax(logits[2:-1], -1), made.ids)
  assert made.experts.shape == (2, 8, 2) and made.ids.max() < 60


@pytest.mark.parametrize("name", ["gqa", "mla", "window_softcap", "capacity", "noisy", "sigmoid", "cosine", "gru", "pre_gate"])
def test_sees_neither_the_future_nor_other_documents(name):
  """Also with capacity, dropped by position: a token's slot depends on earlier tokens only."""
  model, batch = small.model(**VARIANTS[name]), small.batch(rows=1)
  transformer, params = init(model)
  cut = int((batch.segment_ids[0] == 1).sum())
  base = np.asarray(forward(transformer, params, batch)[0][0])

  later = batch.inputs.copy()
  later[0, cut:] = (later[0, cut:] + 7) % 64  # the second document changes: the first must not notice
  np.testing.assert_allclose(forward(transformer, params, batch._replace(inputs=later))[0][0, :cut], base[:cut], atol=1e-6)
  if name != "capacity":  # slots of a sequence are shared by its documents, so an earlier one may take a later one's
    earlier = batch.inputs.copy()
    earlier[0, :cut] = (earlier[0, :cut] + 7) % 64
    changed = np.asarray(forward(transformer, params, batch._replace(inputs=earlier))[0][0])
    end = int((batch.segment_ids[0] > 0).sum())
    np.testing.assert_allclose(changed[cut:end], base[cut:end], atol=1e-6)
    assert np.abs(changed[:cut] - base[:cut]).max() > 1e-2


@pytest.mark.parametrize("changes", [
    pytest.param({"experts": {"capacity_factor": 0.5, "drop_policy": "probability"}}, marks=pytest.mark.slow),
    pytest.param({"experts": {"capacity_factor": 0.5, "drop_policy": "random"}}, marks=pytest.mark.slow),
    VARIANTS["expert_choice"], VARIANTS["soft"],
], ids=["probability", "random", "expert_choice", "soft"])
def test_lookahead_leaks_the_future(changes):
  """The negative control of the test above: what is refused or warned about does leak."""
  model = small.model(**changes)
  assert model.lookahead
  _, params = init(model)
  transformer = model_lib.build(model, deterministic=False)
  batch = small.batch(rows=4, padding=False)
  later = batch.inputs.copy()
  later[:, 8:] = (later[:, 8:] + 7) % 64

  def hidden(inputs):
    return transformer.apply({"params": params}, inputs, batch.segment_ids, batch.positions,
                             rngs={"routing": jax.random.key(0)}).hidden[:, :8]

  assert np.abs(hidden(batch.inputs) - hidden(later)).max() > 1e-3


def test_bfloat16_keeps_parameters_and_router_in_float32():
  model, batch = small.model(compute_dtype="bfloat16"), small.batch()
  transformer, params = init(model)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  logits, out = forward(transformer, params, batch)
  assert out.hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  assert out.stats.probability_sums.dtype == jnp.float32
  wide = forward(model_lib.build(small.model()), params, batch)[0]
  assert 1e-4 < np.abs(logits - wide).mean() < 0.1  # 8 bits of mantissa: differs, and not by much


@pytest.mark.slow
def test_dropout_needs_a_key_and_is_off_by_default():
  model, batch = small.model(dropout=0.3), small.batch()
  _, params = init(model)
  noisy = model_lib.build(model, deterministic=False)
  def run(key):
    return noisy.apply({"params": params}, batch.inputs, batch.segment_ids, batch.positions,
                       rngs={"dropout": jax.random.key(key)}).hidden
  np.testing.assert_array_equal(run(0), run(0))
  assert np.abs(run(0) - run(1)).max() > 1e-2


# ----------------------------------------------------------------------------------------------------------- sharding


def test_constraints_survive_under_set_mesh():
  """With the older `with mesh:` they vanish without a word; two in a layer and one at the embedding must be there."""
  model, batch = small.model(scan_unroll=0), small.batch()
  transformer, params = init(model)
  def lowered():
    return jax.jit(lambda p: forward.__wrapped__(transformer, p, batch)[0]).lower(params).as_text()

  assert lowered().count("sharding_constraint") == 0
  with jax.set_mesh(sharding.make_mesh(small.run(mesh={"data": 8}).mesh)):
    text = lowered()
  assert text.count("sdy.sharding_constraint") == 2 + 1  # the unrolled layers call one shared function


def test_table_refuses_unknown_and_colliding_axes():
  with pytest.raises(KeyError):
    sharding.spec("batsh")
  with pytest.raises(ValueError, match="collide"):
    sharding.spec("heads", "hidden")
