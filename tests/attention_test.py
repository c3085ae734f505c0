"""Attention: the written-out form against the library and by hand, splash (interpreted) against the written-out form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import config
from moe import layers
from moe import sharding
from moe.kernels import attention


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def biases(batch, length, window=0):
  positions = np.tile(np.arange(length), (batch, 1))
  segments = np.sort(np.random.default_rng(0).integers(1, 3, (batch, length)))
  return layers.attention_bias(*map(jnp.array, (positions, positions, segments, segments)), window), segments


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 5])
def test_attention_equals_the_library(kv_heads, window):
  bias, segments = biases(2, 16, window)
  q, k, v = random(2, 16, 4, 8), random(2, 16, kv_heads, 8, seed=1), random(2, 16, kv_heads, 8, seed=2)
  steps = np.arange(16)[:, None] - np.arange(16)
  mask = (steps >= 0) & (segments[:, :, None] == segments[:, None])
  if window:
    mask &= steps < window
  np.testing.assert_array_equal(np.asarray(bias) == 0, mask)
  ours = lambda q, k, v: attention.plain(q, k, v, bias, scale=0.3, softcap=0.0)
  library = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=jnp.array(mask)[:, None], scale=0.3)
  np.testing.assert_allclose(ours(q, k, v), library(q, k, v), atol=1e-6)
  for a, b in zip(*(jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), (0, 1, 2))(q, k, v) for f in (ours, library))):
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_attention_soft_cap_and_two_widths_by_hand():
  bias, _ = biases(1, 6)
  q, k, v = random(1, 6, 2, 4), random(1, 6, 2, 4, seed=1), random(1, 6, 2, 3, seed=2)
  logits = 5 * np.tanh(np.einsum("bshd,bthd->bhst", q, k).astype(np.float64) / 5) + np.asarray(bias)[:, None]
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  want = np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), v)
  np.testing.assert_allclose(attention.plain(q, k, v, bias, scale=1.0, softcap=5.0), want, atol=1e-6)


def compare(backend, bias, segments, q, k, v, tolerance, **options):
  """Value and gradients of a backend and of the written-out form."""
  results = []
  for name in (backend, "plain"):
    out, pull = jax.vjp(lambda *x, name=name: attention.attention(
        *x, bias, jnp.array(segments, jnp.int32), scale=0.1, backend=name, **options), q, k, v)
    results.append((out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))))
  for a, b in zip(*results):
    assert a.shape == b.shape
    # Nothing depends on the queries and keys where a token sees only itself: their gradients are 0.
    np.testing.assert_allclose(a, b, atol=tolerance * (np.abs(b).max() or 1.0))


# Key heads, length, width of the keys and of the values, options.
SPLASH = {"window": (2, 128, 64, 64, {"softcap": 0.0, "window_tokens": 40}),
          "window_of_one": (2, 128, 64, 64, {"softcap": 0.0, "window_tokens": 1}),
          "soft_cap_two_widths": (4, 128, 64, 128, {"softcap": 5.0, "window_tokens": 0}),
          "padded": (2, 200, 16, 80, {"softcap": 5.0, "window_tokens": 90})}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "padded" else pytest.mark.slow) for name in SPLASH])
def test_splash_equals_the_written_out_form(name):
  kv_heads, length, width, v_width, options = SPLASH[name]
  bias, segments = biases(2, length, options["window_tokens"])
  q, k = random(2, length, 4, width), random(2, length, kv_heads, width, seed=1)
  v = random(2, length, kv_heads, v_width, seed=2)
  compare("splash", bias, segments, q, k, v, 2e-5, **options)  # float32 softmax in blocks, exp by another route


@pytest.mark.slow
def test_splash_on_a_mesh():
  bias, segments = biases(4, 128)
  q, k, v = random(4, 128, 4, 64), random(4, 128, 2, 64, seed=1), random(4, 128, 2, 64, seed=2)
  with jax.set_mesh(sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))):
    compare("splash", bias, segments, q, k, v, 2e-5, softcap=0.0, window_tokens=0)


@pytest.mark.slow
@pytest.mark.parametrize("window, length", [(0, 2048), (100, 2000)])
def test_splash_with_the_sequence_split(window, length):
  """Keys gathered, queries dealt so that each device has an early and a late piece; documents and padding as always."""
  bias, segments = biases(2, length, window)
  q, k, v = (random(2, length, 2, 64, seed=seed) for seed in range(3))
  with jax.set_mesh(sharding.make_mesh(config.Mesh(context=4, tensor=2))):
    compare("splash", bias, segments, q, k, v, 2e-5, softcap=0.0, window_tokens=window)


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_balanced_order_gives_every_device_the_same_work(shards):
  order = attention.balanced_order(12 * shards, shards)
  assert sorted(order) == list(range(12 * shards))
  assert len(set(order.reshape(shards, -1).sum(1))) == 1
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:shards]), ("context",))
  x = jnp.arange(12 * shards)[None]
  there = functools.partial(attention._balanced, axis="context", shards=shards)
  both = lambda x: (there(x), there(there(x), back=True))
  got, again = jax.shard_map(both, mesh=mesh, in_specs=jax.P(None, "context"), out_specs=jax.P(None, "context"))(x)
  np.testing.assert_array_equal(got[0], order)
  np.testing.assert_array_equal(again, x)


def test_library_equals_the_written_out_form():
  bias, segments = biases(2, 16, 5)
  q, k, v = random(2, 16, 4, 8), random(2, 16, 2, 8, seed=1), random(2, 16, 2, 8, seed=2)
  compare("dot_product", bias, segments, q, k, v, 1e-5, softcap=0.0, window_tokens=5)


def test_choice():
  q, k = (8, 1024, 16, 128), (8, 1024, 4, 128)
  assert attention.choose("auto", "tpu", q, k, 128, 0.0) == "splash"
  assert attention.choose("auto", "cpu", q, k, 128, 0.0) == "plain"
  assert attention.choose("auto", "gpu", q, k, 128, 0.0) == "dot_product"
  assert attention.choose("auto", "gpu", q, k, 128, 30.0) == "plain"
  assert attention.choose("splash", "tpu", (8, 1, 16, 128), k, 128, 0.0) == "plain"  # decoding
  with pytest.raises(ValueError, match="no soft cap and one head width"):
    attention.choose("dot_product", "gpu", q, k, 64, 0.0)


@pytest.mark.parametrize("heads, length, shards", [(16, 32768, 1), (80, 4096, 1), (64, 1000, 1), (24, 4000, 8)])
def test_no_size_of_a_training_step_takes_all_logits_on_tpu(heads, length, shards):
  """Neither by the choice nor in the description, which says what is padded to what."""
  a = config.Attention(num_heads=4, head_dim=heads)
  said = attention.describe(a, length, "tpu", shards)
  assert said.startswith("splash, padded: ")
  assert ("query and key heads from" in said) == (heads % 64 > 0)
  assert (f"sequences from {length} to" in said) == (length % (256 * shards) > 0)
  assert "4 x 1000 x 1000" in attention.describe(a, 1000, "cpu")  # the control


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("width, length, context", [(16, 8192, 1), (64, 8000, 1), (80, 8000, 4)])
def test_no_size_holds_all_logits_when_compiled_for_tpu(width, length, context):
  """Value and gradient of four heads, for a v5e; the written-out form is the control."""
  pytest.importorskip("libtpu", reason="libtpu is in the environment of tools/dev.sh tpu only (Python >= 3.12)")
  from tools import compile_check

  def temporary_bytes(backend):
    def loss(q, k, v, ids):
      positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
      bias = layers.attention_bias(positions, positions, ids, ids, 0)
      out = attention.attention(q, k, v, bias, ids, scale=0.25, softcap=0.0, window_tokens=0, backend=backend)
      return jnp.sum(out.astype(jnp.float32))

    placed = jax.NamedSharding(mesh, sharding.spec("batch", "sequence"))
    heads = jax.ShapeDtypeStruct((1, length, 4, width), jnp.bfloat16, sharding=placed)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=placed)
    with jax.set_mesh(mesh):
      program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(heads, heads, heads, ids).compile()
    return program.memory_analysis().temp_size_in_bytes

  mesh = sharding.make_mesh(config.Mesh(context=context), compile_check.devices_of("v5e:2x2")[:context])
  all_logits = 4 * 4 * length**2 // context
  assert temporary_bytes("auto") < all_logits / 8
  assert temporary_bytes("plain") > all_logits / 8


def test_the_scale_is_applied_in_float32(monkeypatch):
  """Heads of 112 and 192, whose scales are no powers of two: bfloat16 rounds the scale itself by up to 0.25%, so all logits
  would be off the same way. The reference is float64 over the same bfloat16 queries and keys."""
  for width in (112, 192):
    scale = width**-0.5
    q, k = (jnp.array(random(1, 128, 1, width, seed=seed), jnp.bfloat16) for seed in (0, 1))
    wide_q, wide_k = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k))
    # Written out: values in float32, one for each key, return the weights, whose logarithms are the logits less a constant.
    weights = attention.plain(q, k, jnp.eye(128)[None, :, None], jnp.zeros((1, 128, 128)), scale=scale, softcap=0.0)
    got = np.log(np.asarray(weights, np.float64)[0, 64:, 0])
    want = scale * (wide_q @ wide_k.T)[64:]
    centred = [x - x.mean(-1, keepdims=True) for x in (got, want)]
    # float32 sums of 192 products and the exponential of a logit of up to 5: some 1e-6. Rounding q x scale gives 5e-3.
    np.testing.assert_allclose(*centred, atol=2e-5)

    # Splash takes no scale, so its query holds the product, rounded once: by at most half a unit in the last of 8 bits.
    monkeypatch.setattr(attention, "_splash", lambda q, *rest: q)
    zeros, ids = jnp.zeros((1, 128, 128)), jnp.ones((1, 128), jnp.int32)
    scaled = attention.attention(q, k, k, zeros, ids, scale=scale, softcap=0.0, window_tokens=0, backend="splash")
    def error(x):
      return np.max(np.abs(np.asarray(x, np.float64)[0, :, 0] / (scale * wide_q) - 1))
    assert error(scaled) <= 2**-8 < error(q * scale)  # the control: the scale rounded, too
