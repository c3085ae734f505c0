"""Norms, rotary positions and attention arithmetic: functions on arrays, softmax and norms in float32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import Rope


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last axis (arXiv 1910.07467), computed in float32, returned in x's dtype."""
  wide = x.astype(jnp.float32)
  normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
  return (normal * scale).astype(x.dtype)


def rope_frequencies(rope: Rope, dim: int) -> np.ndarray:
  """[dim / 2] float32 angle per position, with YaRN's blend of stretched and unstretched frequencies.

  A pair that turns more than 32 times within the original context keeps its frequency, one that turns less than
  once is stretched by the factor, and between them the blend is linear (YaRN, arXiv 2309.00071, section 3.2).
  """
  base = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
  if rope.yarn_factor == 1:
    return base.astype(np.float32)

  def pair_with_turns(turns):
    return dim * math.log(rope.yarn_original_tokens / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

  low = max(math.floor(pair_with_turns(32)), 0)
  high = min(math.ceil(pair_with_turns(1)), dim - 1)
  stretched = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
  return (base * (1 - stretched) + base / rope.yarn_factor * stretched).astype(np.float32)


def yarn_magnitude(factor: float, mscale: float) -> float:
  """0.1 x mscale x ln(factor) + 1 (YaRN, section 3.4)."""
  return 0.1 * mscale * math.log(factor) + 1.0


def attention_scale(rope: Rope, qk_dim: int) -> float:
  """What the attention logits are multiplied by: 1 / sqrt(qk_dim), times DeepSeek-V2's YaRN correction."""
  correction = yarn_magnitude(rope.yarn_factor, rope.yarn_mscale_all) if rope.yarn_mscale_all else 1.0
  return correction**2 / math.sqrt(qk_dim)


def rope_tables(positions: jax.Array, rope: Rope, dim: int) -> tuple[jax.Array, jax.Array]:
  """cos and sin, each [B, S, dim] float32 in the layout of the heads, for positions [B, S]."""
  angles = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, dim)
  angles = jnp.repeat(angles, 2, -1) if rope.interleaved else jnp.concatenate([angles, angles], -1)
  magnitude = (yarn_magnitude(rope.yarn_factor, rope.yarn_mscale)
               / yarn_magnitude(rope.yarn_factor, rope.yarn_mscale_all))
  return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def _quarter_turn(dim: int, interleaved: bool) -> np.ndarray:
  """[dim, dim] with one +-1 a column: x @ it turns each pair (a, b) into (-b, a)."""
  turn, half = np.zeros((dim, dim), np.float32), dim // 2
  first, second = (np.arange(0, dim, 2), np.arange(1, dim, 2)) if interleaved else (np.arange(half), half + np.arange(half))
  turn[second, first], turn[first, second] = -1.0, 1.0
  return turn


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array], interleaved: bool) -> jax.Array:
  """Rotates the pairs of each head of x [B, S, H, dim] by its position's angles.

  The quarter turn is a matmul with a signed permutation: exact in any dtype (each output is one input), and several
  times quicker on CPU than splitting and concatenating the head.
  """
  cos, sin = (t[:, :, None, :] for t in tables)
  turned = jnp.matmul(x, _quarter_turn(x.shape[-1], interleaved).astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
  return (x.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x.dtype)


def attention_bias(q_positions, k_positions, q_segments, k_segments, window_tokens: int) -> jax.Array:
  """[B, S, T] float32, 0 where key t is in the past of query s, in its document and in its window; else very low.

  Segment id 0 is padding: nothing attends to it from a document, and it attends only to padding, which keeps its
  softmax finite. A float bias, because XLA:CPU is ten times slower at a select inside the softmax; the barrier keeps
  it from being recomputed in every layer.
  """
  distance = q_positions[:, :, None] - k_positions[:, None, :]
  mask = (distance >= 0) & (q_segments[:, :, None] == k_segments[:, None, :])
  if window_tokens:
    mask &= distance < window_tokens
  return jax.lax.optimization_barrier(jnp.where(mask, 0.0, -1e30).astype(jnp.float32))
