"""Norms, rotary positions and attention arithmetic: functions on arrays, softmax and norms in float32."""

from __future__ import annotations

import functools
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


def attention(q, k, v, bias, *, scale: float, softcap: float) -> jax.Array:
  """Softmax attention with shared key/value heads; logits and softmax in float32.

  Written out because jax.nn.dot_product_attention has no soft cap, wants keys and values of one width, and its
  layout (heads last but one) is about half as fast on CPU; the tests hold the two equal where both apply.

  Args:
    q: [B, S, H, d]; k: [B, T, G, d]; v: [B, T, G, d_v], query head h reads key/value head h // (H / G).
    bias: [B, S, T] float32, added to the logits.
    scale: multiplies the logits.
    softcap: cap of cap * tanh(logits / cap); 0: none.

  Returns:
    [B, S, H, d_v] in q's dtype.
  """
  length = q.shape[1]
  if length == k.shape[1] and length % 128 == 0:
    # No token sees a later place of its row, so the first half of the queries needs only the first half of the keys.
    half = length // 2
    parts = [_attention(q[:, begin:end], k[:, :end], v[:, :end], bias[:, begin:end, :end], scale, softcap)
             for begin, end in ((0, half), (half, length))]
    return jnp.concatenate(parts, 1)
  return _attention(q, k, v, bias, scale, softcap)


def _attention(q, k, v, bias, scale: float, softcap: float) -> jax.Array:
  batch, length, heads, width = q.shape
  q, k, v = (t.swapaxes(1, 2) for t in (q * scale, k, v))
  q = q.reshape(batch, k.shape[1], heads // k.shape[1], length, width)
  logits = jnp.einsum("bghsd,bgtd->bghst", q, k, preferred_element_type=jnp.float32)
  if softcap:
    logits = softcap * jnp.tanh(logits / softcap)
  weights = jax.nn.softmax(logits + bias[:, None, None]).astype(v.dtype)
  out = jnp.einsum("bghst,bgtd->bghsd", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)
  return out.reshape(batch, heads, length, -1).swapaxes(1, 2)


def matmul(x: jax.Array, weight: jax.Array, out_dtype=None) -> jax.Array:
  """x [..., D] @ weight [D, ...], in x's dtype or `out_dtype`, accumulated in float32.

  Its gradient is written out because the automatic one contracts the output's gradient transposed, and XLA:CPU then
  writes that array column by column: for the logits as slow as a matmul of a fifth of their size.
  """
  flat = _matmul(x, weight.reshape(weight.shape[0], -1), jnp.dtype(out_dtype or x.dtype))
  return flat.reshape(*x.shape[:-1], *weight.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, weight, dtype):
  return jnp.matmul(x, weight, preferred_element_type=jnp.float32).astype(dtype)


def _matmul_backward(dtype, saved, grad):
  x, weight = saved
  grad, tokens = grad.astype(x.dtype), tuple(range(x.ndim - 1))
  grad_x = jax.lax.dot_general(grad, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
  grad_weight = jax.lax.dot_general(x, grad, ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32)
  return grad_x.astype(x.dtype), grad_weight.astype(weight.dtype)


_matmul.defvjp(lambda x, weight, dtype: (_matmul(x, weight, dtype), (x, weight)), _matmul_backward)


def activate(gate: jax.Array, up: jax.Array | None, kind: str) -> jax.Array:
  """SwiGLU silu(gate) * up (arXiv 2002.05202), or GELU(gate) where there is no up projection."""
  return jax.nn.silu(gate) * up if kind == "swiglu" else jax.nn.gelu(gate)
