"""Norms, rotary positions and attention against library and hand references."""

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
