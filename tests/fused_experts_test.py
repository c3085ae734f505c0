"""The Pallas kernels of the experts, interpreted: against a float64 reference, for every kind of load, and their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import config
from moe import experts
from moe.kernels import fused_experts
from moe.kernels import plan as plan_lib
from moe.kernels import quantize
from moe.kernels import visits
from moe.kernels.fused_experts import Blocks
from tools.bench import static_model

T, K, E, D, F = 192, 2, 4, 256, 256
BLOCKS = Blocks(tile_rows=64, hidden=128, contract=128, width=256, gradient=128)


def even(rng):
  return np.stack([rng.choice(E, K, replace=False) for _ in range(T)])


def one_takes_all(rng):  # and some tokens are dropped
  chosen = np.full((T, K), E)
  chosen[:150, 0] = 2
  return chosen


def ragged(rng):  # an empty expert, sizes that are multiples of nothing
  chosen = np.full((T, K), E)
  chosen[:97, 0], chosen[:131, 1], chosen[100:133, 0] = 0, 3, 1
  return chosen


def nothing(rng):
  return np.full((T, K), E)


LOADS = {f.__name__: f for f in (even, one_takes_all, ragged, nothing)}


def inputs(load, seed=0, tokens=T, num_experts=E, top_k=K, width=D, hidden=F):
  rng = np.random.default_rng(seed)
  chosen = LOADS[load](rng) if isinstance(load, str) else load
  x = rng.normal(size=(tokens, width))
  gates = rng.uniform(0.2, 1, (tokens, top_k))
  weights = [0.05 * rng.normal(size=s) for s in ((num_experts, width, hidden),) * 2 + ((num_experts, hidden, width),)]
  bf16 = lambda a: jnp.asarray(a, jnp.bfloat16)
  return chosen, bf16(x), jnp.asarray(gates, jnp.float32), [bf16(w) for w in weights]


def fused(chosen, blocks=BLOCKS, activation="swiglu", interpret=True, forward_weights=None):
  num_experts, top_k = (E, K) if chosen.shape[1] == K else (512, chosen.shape[1])
  (plan,), _ = experts.make_plan(jnp.asarray(chosen, jnp.int32)[None], config.Experts(num_experts=num_experts, d_expert=F))
  tiles = visits.make(plan.order, plan.inverse, plan.sizes, top_k, blocks.tile_rows)

  def run(x, gates, weights):
    return fused_experts.fused_experts(x, gates, tiles, weights, activation=activation, blocks=blocks, interpret=interpret,
                                       forward_weights=forward_weights)

  return run


def reference(chosen, x, gates, weights, cotangent, activation="swiglu"):
  """(output, gradients of x, gates, weights) in float64, expert by expert."""
  x, gates, cotangent = (np.asarray(a, np.float64) for a in (x, gates, cotangent))
  gate, up, down = (None if w is None else np.asarray(w, np.float64) for w in weights)
  out, grad_x, grad_gates = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gates)
  grads = [None if w is None else np.zeros_like(w) for w in (gate, up, down)]
  for e in range(len(gate)):
    for t, k in zip(*np.nonzero(chosen == e)):
      a = x[t] @ gate[e]
      if activation == "swiglu":
        b, s = x[t] @ up[e], 1 / (1 + np.exp(-a))
        h = a * s * b
      else:
        c = np.sqrt(2 / np.pi)
        tanh = np.tanh(c * (a + 0.044715 * a**3))
        h = 0.5 * a * (1 + tanh)
      y, w = h @ down[e], gates[t, k]
      out[t] += w * y
      grad_gates[t, k] = y @ cotangent[t]
      back = w * (down[e] @ cotangent[t])
      grads[2][e] += np.outer(w * h, cotangent[t])
      if activation == "swiglu":
        da, db = back * b * (s + a * s * (1 - s)), back * a * s
        grads[1][e] += np.outer(x[t], db)
        grad_x[t] += up[e] @ db
      else:
        da = back * (0.5 * (1 + tanh) + 0.5 * a * (1 - tanh**2) * c * (1 + 3 * 0.044715 * a**2))
      grads[0][e] += np.outer(x[t], da)
      grad_x[t] += gate[e] @ da
  return out, (grad_x, grad_gates, grads)


def check(load, blocks=BLOCKS, activation="swiglu", **shape):
  chosen, x, gates, weights = inputs(load, **shape)
  if activation == "gelu":
    weights[1] = None
  cotangent = jnp.asarray(np.random.default_rng(9).normal(size=x.shape), jnp.bfloat16)
  out, pull = jax.vjp(fused(chosen, blocks, activation), x, gates, weights)
  want_out, want = reference(chosen, x, gates, weights, cotangent, activation)
  # Rounded to bfloat16 on the way: the hidden rows, the products, their gradients and the results, each by at most 2^-9.
  # Errors add up like random ones, so relative to the largest entry 8 roundings stay below 2^-6.
  for got, value in zip(jax.tree.leaves((out, pull(cotangent))), jax.tree.leaves((want_out, want))):
    np.testing.assert_allclose(np.asarray(got, np.float64), value, atol=max(np.abs(value).max(), 1e-6) / 64, rtol=0)


@pytest.mark.parametrize("load", ["ragged", pytest.param("even", marks=pytest.mark.slow),
                                  pytest.param("one_takes_all", marks=pytest.mark.slow),
                                  pytest.param("nothing", marks=pytest.mark.slow)])
def test_equals_reference(load):
  check(load)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [Blocks(32, 256, 256, 256, 256), Blocks(128, 128, 256, 256, 128, 1)],
                         ids=["small_tiles", "one_buffer"])
def test_blocks_do_not_matter(blocks):
  check("ragged", blocks)


@pytest.mark.slow
def test_width_is_split():
  check("even", Blocks(64, 128, 256, 256, 256), width=512, hidden=256)


@pytest.mark.slow
def test_gelu_has_no_up_projection():
  check("ragged", activation="gelu")


@pytest.mark.slow
def test_many_experts_and_choices():
  """512 experts, 16 for each token."""
  rng = np.random.default_rng(3)
  chosen = np.stack([rng.choice(512, 16, replace=False) for _ in range(16)])
  _, x, gates, weights = inputs(chosen, tokens=16, num_experts=512, top_k=16, hidden=128)
  out, pull = jax.vjp(fused(chosen, Blocks(32, 128, 128, 256, 128)), x, gates, weights)
  want_out, want = reference(chosen, x, gates, weights, jnp.ones_like(x))
  for got, value in zip(jax.tree.leaves((out, pull(jnp.ones_like(x)))), jax.tree.leaves((want_out, want))):
    np.testing.assert_allclose(np.asarray(got, np.float64), value, atol=np.abs(value).max() / 64)


@pytest.mark.parametrize("dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
def test_weights_of_8_bits(dtype):
  """The kernel reads 8 bits, scaled after the product; so it equals the float64 experts with the matrices so rounded."""
  chosen, x, gates, weights = inputs("ragged")
  weights[0] = weights[0].at[1, :, 3].set(0)  # a column without a scale
  small = [quantize.quantize(w, dtype) for w in weights]
  exact = [np.asarray(q.values, np.float64) * np.asarray(q.scale, np.float64) for q in small]
  step = {"int8": 1 / 254, "float8_e4m3fn": 1 / 16}[dtype]  # half a step of the largest entries
  for w, e in zip(weights, exact):
    w = np.asarray(w, np.float64)
    assert np.all(np.abs(w - e) <= 1.01 * step * np.abs(w).max(1, keepdims=True))
  out = fused(chosen, forward_weights=small)(x, gates, [0 * w for w in weights])
  want, _ = reference(chosen, x, gates, exact, jnp.zeros_like(x))
  np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=np.abs(want).max() / 64)


def test_gradient_passes_through_the_rounding():
  w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 4)), jnp.float32)
  grad = jax.grad(lambda w: jnp.sum(quantize.rounded(w, "int8") ** 2))(w)
  np.testing.assert_array_equal(grad, 2 * quantize.rounded(w, "int8"))


def test_same_bits_each_time():
  chosen, x, gates, weights = inputs("ragged")
  first, second = (fused(chosen)(x, gates, weights) for _ in range(2))
  np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_token(value):
  chosen, x, gates, weights = inputs("even")
  out = np.asarray(fused(chosen)(x.at[5, 7].set(value), gates, weights), np.float32)
  assert not np.isfinite(out[5]).any()
  assert np.isfinite(np.delete(out, 5, 0)).all()


def test_accumulates_in_float32():
  """A bfloat16 sum of 256 ones stops growing at 256; the hidden rows here sum to 256 x 256."""
  chosen = np.zeros((T, K), int)
  chosen[:, 1] = E
  one = lambda *s: jnp.ones(s, jnp.bfloat16)
  weights = [one(E, D, F), one(E, D, F) / 256, one(E, F, D)]
  out = fused(chosen, activation="swiglu")(one(T, D), jnp.ones((T, K)), weights)
  np.testing.assert_array_equal(np.asarray(out, np.float32), 256.0 * 256.0)


def test_no_tokens():
  _, x, gates, weights = inputs("even")
  tiles = visits.make(jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32), jnp.zeros(E, jnp.int32), K, 64)
  out = fused_experts.fused_experts(x[:0], gates[:0], tiles, weights, activation="swiglu", blocks=BLOCKS)
  assert out.shape == (0, D)


def test_refuses_what_it_cannot_do():
  _, x, gates, weights = inputs("even")
  with pytest.raises(ValueError, match="bfloat16, not float32"):
    fused_experts.fused_experts(x.astype(jnp.float32), gates, None, weights, activation="swiglu", blocks=BLOCKS)
  with pytest.raises(ValueError, match="multiples of 256 .* got 128 and 256"):
    fused_experts.fused_experts(x[:, :128], gates, None, weights, activation="swiglu", blocks=BLOCKS)


@pytest.mark.slow
def test_memory_is_used_as_it_should_be():
  """Under the TPU interpreter: uninitialised memory is NaN, reads out of bounds raise, races are looked for. Forward and
  backward, equal to the plain interpreter to the last bit. (A failure to end is caught by the suite's time limit.)"""
  pltpu = pytest.importorskip("jax.experimental.pallas.tpu")
  chosen, x, gates, weights = inputs("ragged")
  strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
  results = []
  for interpret in (True, strict):
    out, pull = jax.vjp(fused(chosen, interpret=interpret), x, gates, weights)
    results.append(jax.tree.leaves((out, pull(jnp.ones_like(out)))))
  for a, b in zip(*results):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.slow
def test_the_interpreter_sees_a_read_out_of_bounds():
  """The control of the test above: a token that does not exist."""
  pltpu = pytest.importorskip("jax.experimental.pallas.tpu")
  packed = visits.pack(jnp.ones((128, D), jnp.bfloat16))
  token = jnp.full((1, 1, 64), 10_000, jnp.int32)
  _, _, _, weights = inputs("even")
  with pytest.raises(Exception, match="[Oo]ut.of.bounds"):
    jax.block_until_ready(fused_experts.hidden(
        visits.Even(1, 64), packed, token, [w[:1] for w in weights[:2]], activation="swiglu", blocks=BLOCKS, residuals=False,
        interpret=pltpu.InterpretParams(out_of_bounds_reads="raise")))
  pltpu.reset_tpu_interpret_mode_state()


# ------------------------------------------------------------------------------------------------------------ choice


SHAPE = plan_lib.Shape(8192, 8, 64, 64, 2048, 1408)


def test_choice_by_chip_and_by_name(tmp_path, monkeypatch):
  monkeypatch.setenv("MOE_CACHE", str(tmp_path))
  assert plan_lib.choose("auto", SHAPE, "cpu").backend == "loop"
  assert plan_lib.choose("auto", SHAPE, "TPU v5 lite").backend == "fused"
  assert plan_lib.choose("auto", SHAPE, "TPU v6 lite").backend == "ragged_dot"  # no trust in the model there
  assert plan_lib.choose("fused", SHAPE, "TPU v6 lite").blocks.width == 2048
  assert plan_lib.choose("auto", SHAPE._replace(dtype="float32"), "TPU v5 lite").backend == "ragged_dot"
  with pytest.raises(ValueError, match="'tokamax' needs a TPU and the tokamax package .* the device is cpu"):
    plan_lib.choose("tokamax", SHAPE, "cpu")
  big = SHAPE._replace(tokens=65536)
  assert "do not fit 64 MiB" in plan_lib.choose("auto", big, "TPU v5").reason
  with pytest.raises(ValueError, match="cannot be had on TPU v5: the tokens .* do not fit"):
    plan_lib.choose("fused", big, "TPU v5")


def test_an_autotuned_choice_goes_before_the_model(tmp_path, monkeypatch):
  monkeypatch.setenv("MOE_CACHE", str(tmp_path))
  plan_lib.remember(SHAPE, "TPU v6 lite", "fused", {"fused": 1.0, "ragged_dot": 2.0})
  assert plan_lib.choose("auto", SHAPE, "TPU v6 lite").reason == "autotuned on such a device"
  assert plan_lib.choose("ragged_dot", SHAPE, "TPU v6 lite").backend == "ragged_dot"  # a name goes before both
  plan_lib.cache_path().write_text("{ torn")
  assert plan_lib.choose("auto", SHAPE, "TPU v6 lite").backend == "ragged_dot"


@pytest.mark.parametrize("tokens, most", [(8192, 1.05), (1024, 1.15)])
def test_rows_computed_and_bytes_moved(tokens, most):
  """The goals: rows within 1.15 of the useful ones at 128 an expert, bytes within 1.10 of the floor at 8192 tokens."""
  shape = SHAPE._replace(tokens=tokens)
  sizes = np.random.default_rng(0).multinomial(tokens * 8, [1 / 64] * 64)
  blocks, _ = plan_lib.fit(shape, plan_lib.VECTOR_MEMORY["v5e"])
  for gradient in (False, True):
    kernels = plan_lib.KERNELS if gradient else ("hidden", "combine")
    counted = plan_lib.traffic(shape, blocks, sizes, kernels, residuals=gradient)
    assert counted.computed_rows / sizes.sum() < most
    moved = sum(counted.bytes.values()) + (2 if gradient else 1) * static_model.pack_bytes(shape)
    assert moved < 1.10 * static_model.layer_floor(shape, gradient)
