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
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


SPLASH = {"window": (2, 64, {"softcap": 0.0, "window_tokens": 40}),
          "soft_cap_two_widths": (4, 128, {"softcap": 5.0, "window_tokens": 0})}


@pytest.mark.parametrize("name", [pytest.param("window", marks=pytest.mark.slow), "soft_cap_two_widths"])
def test_splash_equals_the_written_out_form(name):
  kv_heads, v_width, options = SPLASH[name]
  bias, segments = biases(2, 128, options["window_tokens"])
  q, k, v = random(2, 128, 4, 64), random(2, 128, kv_heads, 64, seed=1), random(2, 128, kv_heads, v_width, seed=2)
  compare("splash", bias, segments, q, k, v, 2e-5, **options)  # float32 softmax in blocks, exp by another route


@pytest.mark.slow
def test_splash_on_a_mesh():
  bias, segments = biases(4, 128)
  q, k, v = random(4, 128, 4, 64), random(4, 128, 2, 64, seed=1), random(4, 128, 2, 64, seed=2)
  with jax.set_mesh(sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))):
    compare("splash", bias, segments, q, k, v, 2e-5, softcap=0.0, window_tokens=0)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 100])
def test_splash_with_the_sequence_split(window):
  """Keys gathered, queries dealt so that each device has an early and a late piece; documents and padding as always."""
  bias, segments = biases(2, 2048, window)
  q, k, v = random(2, 2048, 2, 64), random(2, 2048, 2, 64, seed=1), random(2, 2048, 2, 64, seed=2)
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
  assert attention.choose("auto", "tpu", (8, 1000, 16, 128), (8, 1000, 4, 128), 128, 0.0) == "plain"
  assert attention.choose("splash", "tpu", (8, 1, 16, 128), k, 128, 0.0) == "plain"  # decoding
  with pytest.raises(ValueError, match="multiples of 64 .got 80 and 80"):
    attention.choose("splash", "tpu", (8, 1024, 16, 80), (8, 1024, 4, 80), 80, 0.0)
