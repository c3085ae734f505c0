"""Norms, rotary positions and attention against library and hand references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import layers
from moe.config import Rope


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm():
  x, scale = random(3, 5, 8), random(8)
  want = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * scale
  np.testing.assert_allclose(layers.rms_norm(jnp.array(x), scale, 1e-6), want, rtol=1e-5)
  assert layers.rms_norm(jnp.array(x, jnp.bfloat16), scale, 1e-6).dtype == jnp.bfloat16


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
  ours = lambda q, k, v: layers.attention(q, k, v, bias, scale=0.3, softcap=0.0)
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
  np.testing.assert_allclose(layers.attention(q, k, v, bias, scale=1.0, softcap=5.0), want, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_rotation_by_relative_position(interleaved):
  rope, dim = Rope(interleaved=interleaved), 8
  q, k = random(1, 1, 1, dim), random(1, 1, 1, dim, seed=1)
  def score(i, j):
    at = lambda x, p: layers.apply_rope(x, layers.rope_tables(jnp.array([[p]]), rope, dim), interleaved)
    return float(jnp.vdot(at(q, i), at(k, j)))
  np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
  np.testing.assert_allclose(score(3, 3), float(np.vdot(q, k)), rtol=1e-5)
  assert abs(score(9, 4) - score(4, 9)) > 1e-2


def test_rope_layouts_are_permutations_of_each_other():
  x, order = random(1, 5, 2, 8), np.array([0, 2, 4, 6, 1, 3, 5, 7])  # interleaved pairs -> halves
  def rotated(x, interleaved):
    tables = layers.rope_tables(jnp.arange(5)[None], Rope(interleaved=interleaved), 8)
    return layers.apply_rope(jnp.array(x), tables, interleaved)
  np.testing.assert_allclose(rotated(x, True)[..., order], rotated(x[..., order], False), atol=1e-6)


def test_rope_by_hand():
  """Pair i of position p turns by p x theta^(-2i/dim), counter-clockwise."""
  x = random(1, 7, 1, 6)
  out = layers.apply_rope(jnp.array(x), layers.rope_tables(jnp.arange(7)[None], Rope(theta=100.0), 6), False)
  pairs = (x[0, :, 0, :3] + 1j * x[0, :, 0, 3:]) * np.exp(1j * np.outer(np.arange(7), 100.0 ** (-np.arange(3) / 3)))
  np.testing.assert_allclose(out[0, :, 0], np.concatenate([pairs.real, pairs.imag], -1), atol=1e-6)


def test_yarn():
  """Against the formulas of the paper: fast pairs keep their frequency, slow pairs are stretched, DeepSeek-V2's
  magnitudes with mscale == mscale_all cancel in cos and sin and appear squared in the attention scale."""
  rope = Rope(yarn_factor=40.0, yarn_original_tokens=4096, yarn_mscale=0.707, yarn_mscale_all=0.707)
  plain, stretched = layers.rope_frequencies(Rope(), 64), layers.rope_frequencies(rope, 64)
  turns = 4096 * plain / (2 * np.pi)
  np.testing.assert_allclose(stretched[turns > 40], plain[turns > 40], rtol=1e-6)
  np.testing.assert_allclose(stretched[turns < 0.8], plain[turns < 0.8] / 40, rtol=1e-6)
  assert np.all(np.diff(stretched) < 0)
  cos, _ = layers.rope_tables(jnp.zeros((1, 1), jnp.int32), rope, 64)
  np.testing.assert_allclose(cos, 1.0, rtol=1e-6)
  magnitude = 0.1 * 0.707 * np.log(40) + 1
  np.testing.assert_allclose(layers.attention_scale(rope, 192), magnitude**2 / np.sqrt(192), rtol=1e-6)
  cos, _ = layers.rope_tables(jnp.zeros((1, 1), jnp.int32), Rope(yarn_factor=4.0), 64)
  np.testing.assert_allclose(cos, 0.1 * np.log(4) + 1, rtol=1e-6)
