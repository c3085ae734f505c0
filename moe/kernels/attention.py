"""Causal attention behind one function: segment ids, sliding window, soft cap, shared key/value heads, two head widths.

Backends, chosen by name or by the device:
  plain        written out; the reference, and on CPU the quickest. jax.nn.dot_product_attention has no soft cap, wants keys
               and values of one width, and its layout (heads last but one) is about half as fast on CPU
  splash       JAX's Pallas kernel for TPU: no array of S x S, blocks outside the mask skipped; gradient included. Heads and
               sequences of other sizes than it takes are padded
  dot_product  jax.nn.dot_product_attention, the default on GPU where it applies
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from moe import config
from moe import sharding

# What splash is padded to. Its own tests have no other heads than multiples of 64, and its smallest block is of 128 tokens.
_WIDTH, _LENGTH = 64, 128


def describe(a: config.Attention, length: int, platform: str, shards: int = 1) -> str:
  """The backend of a training step and what it pads or holds, for people to read.

  Args:
    length: tokens of a sequence.
    platform: cpu | gpu | tpu.
    shards: parts of the sequence.

  Raises:
    ValueError: as `choose`.
  """
  q_shape, k_shape = (1, length, a.num_heads, a.qk_dim), (1, length, a.kv_heads, a.qk_dim)
  chosen = choose(a.backend, platform, q_shape, k_shape, a.v_dim, a.logit_softcap, shards)
  if chosen == "plain":
    return f"plain: all logits at once, {a.num_heads} x {length} x {length} for a sequence"
  if chosen == "dot_product":
    return "dot_product: jax.nn.dot_product_attention"
  padded = [f"{what} from {size} to {_up(size, multiple)}" for what, size, multiple in (
      ("query and key heads", a.qk_dim, _WIDTH), ("value heads", a.v_dim, _WIDTH), ("sequences", length, _multiple(shards)))
            if size % multiple]
  return "splash" + (f", padded: {', '.join(padded)}" if padded else "")


def choose(backend: str, platform: str, q_shape, k_shape, v_width: int, softcap: float, shards: int = 1) -> str:
  """The backend for a name of `config.Attention.backend`.

  Args:
    platform: cpu | gpu | tpu.
    q_shape, k_shape: [B, S, H, d], [B, T, G, d]; T differs from S when decoding.
    shards: parts of S.

  Raises:
    ValueError: the name asks for what the shapes do not allow.
  """
  length, width = q_shape[1], q_shape[3]
  splash = ""
  if length != k_shape[1] or length < _LENGTH:  # decoding and initialisation, whose logits are few
    splash = f"queries and keys of equal length, at least {_LENGTH} (got {length} and {k_shape[1]})"
  product = "no soft cap and one head width" if softcap or width != v_width else ""
  if backend == "auto":
    if platform == "tpu" and not splash:
      return "splash"
    return "dot_product" if platform in ("gpu", "cuda", "rocm") and not product else "plain"
  reason = {"splash": splash, "dot_product": product}.get(backend, "")
  if reason and length == k_shape[1] and length >= _LENGTH:
    raise ValueError(f"Attention.backend = {backend!r} needs {reason}; use 'auto' or 'plain'")
  return "plain" if reason else backend


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _multiple(shards: int) -> int:
  """What splash needs sequences to be a multiple of: whole blocks in each of the two pieces of a shard, see `_balanced`."""
  return _LENGTH if shards == 1 else 2 * _LENGTH * shards


def attention(q, k, v, bias, segment_ids, *, scale: float, softcap: float, window_tokens: int,
              backend: str = "auto") -> jax.Array:
  """Softmax attention; logits and softmax in float32.

  Args:
    q: [B, S, H, d]; k: [B, T, G, d]; v: [B, T, G, d_v], query head h reads key/value head h // (H / G). Split over the batch
      axes, sequences over context, heads over tensor, if a mesh is set. Keys and values are gathered over context.
    bias: [B, S, T] float32, added to the logits: who may see whom (layers.attention_bias).
    segment_ids: [B, S] int32; what splash makes of it and of the window equals the bias.
    scale: multiplies the logits.
    softcap: cap of cap * tanh(logits / cap); 0: none.
    window_tokens: a token sees itself and the window_tokens - 1 before it; 0: all.

  Returns:
    [B, S, H, d_v] in q's dtype.
  """
  platform = sharding.current_device().platform
  shards = sharding.parts("sequence", jax.sharding.get_abstract_mesh())
  chosen = choose(backend, platform, q.shape, k.shape, v.shape[-1], softcap, shards)
  if chosen == "splash":
    # The kernel takes no scale. The product is rounded once to the query's dtype: `q * scale` would round the factor as well,
    # which moves all logits the same way (by 0.25% for heads of 112 in bfloat16).
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    return _padded_splash(q, k, v, segment_ids, softcap, window_tokens, interpret=platform == "cpu")
  if shards > 1:
    k, v = (sharding.constrain(t, "batch", None, "kv_heads", None) for t in (k, v))
  if chosen == "dot_product":
    return jax.nn.dot_product_attention(q, k, v, bias=bias[:, None].astype(q.dtype), scale=scale)
  return plain(q, k, v, bias, scale=scale, softcap=softcap)


def _padded_splash(q, k, v, segment_ids, softcap: float, window_tokens: int, interpret: bool):
  """Splash with heads and sequences padded to what it takes; arguments as in `attention`, q scaled."""
  length, v_width = q.shape[1], v.shape[3]
  tokens = _up(length, _multiple(sharding.parts("sequence", jax.sharding.get_abstract_mesh()))) - length

  def padded(x):
    return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, _up(x.shape[3], _WIDTH) - x.shape[3])))

  # Zeros at the end of a head add nothing to a logit, and those of the values are cut off. Tokens at the end of a row are in
  # the future of all real ones.
  ids = jnp.pad(segment_ids, ((0, 0), (0, tokens)))
  out = _splash(padded(q), padded(k), padded(v), ids, softcap, window_tokens, interpret)
  return out[:, :length, :, :v_width]


def _splash(q, k, v, segment_ids, softcap: float, window_tokens: int, interpret: bool):
  mesh, length = jax.sharding.get_abstract_mesh(), q.shape[1]
  shards = sharding.parts("sequence", mesh)
  # The queries of a device are two pieces of the sequence (see _balanced), so a block may not be longer than one.
  pieces = 2 * shards if shards > 1 else 1
  block = next(size for size in (512, 384, 256, 128) if length // pieces % size == 0)
  sizes = splash_attention_kernel.BlockSizes(
      block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
      block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)
  shape = (length, length)
  mask = splash_attention_mask.CausalMask(shape)
  if window_tokens:
    mask = splash_attention_mask.LocalMask(shape, window_size=(window_tokens - 1, 0), offset=0)

  if shards > 1:
    mask.q_sequence = balanced_order(length, shards)
  heads = q.shape[2] // sharding.parts("heads", mesh)
  kernel = splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=shards,
      attn_logits_soft_cap=softcap or None, interpret=interpret)

  def device(kernel, q, k, v, ids):
    q_ids = ids
    if shards > 1:
      q, q_ids = (_balanced(t, "context", shards) for t in (q, ids))
      k, v, ids = (jax.lax.all_gather(t, "context", axis=1, tiled=True) for t in (k, v, ids))

    def row(q, k, v, q_ids, ids):
      return kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(q_ids, ids))

    out = jax.vmap(row)(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), q_ids, ids).swapaxes(1, 2)
    return _balanced(out, "context", shards, back=True) if shards > 1 else out

  if mesh.empty:
    return device(kernel, q, k, v, segment_ids)
  # The partitioner cannot split a kernel by itself.
  spec, rows = sharding.spec("batch", "sequence", "heads", "head_dim"), sharding.spec("batch", "sequence")
  which = kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, jax.P(None, "context" if shards > 1 else None)))
  return jax.shard_map(device, in_specs=(which, spec, spec, spec, rows), out_specs=spec,
                       check_vma=False)(kernel, q, k, v, segment_ids)


# A causal query costs as many keys as its place, so the last device along context would have most of the work. Each takes
# one of the first and one of the last pieces of the sequence instead, for the attention only: the model keeps its order.


def balanced_order(length: int, shards: int) -> np.ndarray:
  """[S] int32: the place of each query once device i holds the pieces i and 2 x shards - 1 - i of 2 x shards."""
  pieces = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
  return np.concatenate([pieces[[i, 2 * shards - 1 - i]].reshape(-1) for i in range(shards)])


def _balanced(x, axis: str, shards: int, back: bool = False):
  """[B, S / shards, ...] in the order of the sequence -> in the balanced one; `back` reverses it.

  Device i has pieces 2i and 2i + 1. All even pieces go to different devices, and so do all odd ones: two permutations.
  """
  owner = [min(piece, 2 * shards - 1 - piece) for piece in range(2 * shards)]
  ways = [[(i, owner[2 * i + odd]) for i in range(shards)] for odd in (0, 1)]
  swap = jax.lax.axis_index(axis) % 2 == 1  # device j's first piece is j: an odd one on the odd devices
  first, second = jnp.split(x, 2, 1)
  if not back:
    even, odd = (jax.lax.ppermute(half, axis, way) for half, way in zip((first, second), ways))
    return jnp.concatenate([jnp.where(swap, odd, even), jnp.where(swap, even, odd)], 1)
  even, odd = jnp.where(swap, second, first), jnp.where(swap, first, second)
  halves = [jax.lax.ppermute(half, axis, [(b, a) for a, b in way]) for half, way in zip((even, odd), ways)]
  return jnp.concatenate(halves, 1)


def plain(q, k, v, bias, *, scale: float, softcap: float) -> jax.Array:
  """The same written out; arguments as in `attention`."""
  length = q.shape[1]
  if length == k.shape[1] and length % 128 == 0 and sharding.parts("sequence", jax.sharding.get_abstract_mesh()) == 1:
    # No token sees a later place of its row, so the first half of the queries needs only the first half of the keys.
    half = length // 2
    parts = [_attention(q[:, begin:end], k[:, :end], v[:, :end], bias[:, begin:end, :end], scale, softcap)
             for begin, end in ((0, half), (half, length))]
    return jnp.concatenate(parts, 1)
  return _attention(q, k, v, bias, scale, softcap)


def _attention(q, k, v, bias, scale: float, softcap: float) -> jax.Array:
  batch, length, heads, width = q.shape
  # In float32 the query is scaled, which is less work. A narrower query would round the scale and the product to its dtype, so
  # there the float32 logits are scaled.
  scale_query = q.dtype == jnp.float32
  if scale_query:
    q = q * scale
  q, k, v = (t.swapaxes(1, 2) for t in (q, k, v))
  q = q.reshape(batch, k.shape[1], heads // k.shape[1], length, width)
  logits = jnp.einsum("bghsd,bgtd->bghst", q, k, preferred_element_type=jnp.float32)
  if not scale_query:
    logits = logits * scale
  if softcap:
    logits = softcap * jnp.tanh(logits / softcap)
  weights = jax.nn.softmax(logits + bias[:, None, None]).astype(v.dtype)
  out = jnp.einsum("bghst,bgtd->bghsd", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)
  return out.reshape(batch, heads, length, -1).swapaxes(1, 2)
