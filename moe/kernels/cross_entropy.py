"""Cross-entropy over a vocabulary without the logits of all tokens at once.

    log_z = logsumexp(hidden @ head)        nll = log_z - (hidden @ head)[target]

`token_loss` multiplies the rows of a sequence a chunk at a time; its gradient computes each chunk's logits again (a third more
work for the head), so that the largest array is one chunk's. Where all logits are small it is the plain form.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe import sharding
from moe.kernels.matmul import matmul

_LOGITS_BYTES = 64 << 20  # float32 logits of one chunk on one device
_TOKENS = 1024  # at least so many in a chunk: below, adding up the head's gradient takes longer than the matmuls


class TokenLoss(NamedTuple):
  """Each [B, S]."""

  nll: jax.Array  # float32, negative log likelihood of the target
  log_z: jax.Array  # float32, logsumexp of the logits, for the z-loss
  hit: jax.Array  # bool, whether the target has the largest logit


def token_loss(hidden, head, targets, chunks: int | None = None) -> TokenLoss:
  """Loss of every token.

  Args:
    hidden: [B, S, D], split over the batch axes and context of the mesh that is set (or no mesh).
    head: [D, V] of hidden's dtype, D over fsdp and context and V over tensor.
    targets: [B, S] int32.
    chunks: into how many parts S is cut, the last one padded; None: as many as keep a chunk's logits within 64 MiB, or to 1024
      tokens, on a device.

  Raises:
    ValueError: chunks is not between 1 and the tokens that a device has of a sequence.
  """
  length, mesh = hidden.shape[1], jax.sharding.get_abstract_mesh()
  length //= sharding.parts("sequence", mesh)
  if chunks is None:
    chunks = chunks_for(hidden.shape[0] // sharding.parts("batch", mesh), length, head.shape[1])
  if not 1 <= chunks <= length:
    raise ValueError(f"token_loss cannot cut sequences of {length} tokens into {chunks} chunks; use 1 to {length}")
  if chunks == 1:
    return plain(hidden, head, targets)
  if mesh.empty:
    return TokenLoss(*_chunked(chunks, None, hidden, head, targets))

  def device(hidden, head, targets):
    if split:
      head = jax.lax.all_gather(head, split, axis=0, tiled=True)
    return _chunked(chunks, "tensor" if mesh.shape["tensor"] > 1 else None, hidden, head, targets)

  # A shard_map, because in a loop over chunks the partitioner would reduce the head's gradient once a chunk.
  rows, split, head = sharding.spec("batch", "sequence"), sharding.axes_of("embed", mesh), _barred(head)
  return TokenLoss(*jax.shard_map(device, in_specs=(rows, sharding.spec("embed", "vocab"), rows), out_specs=(rows,) * 3,
                                  check_vma=False)(hidden, head, targets))


@jax.custom_vjp
def _barred(head):
  """The identity, with a barrier behind its gradient: libtpu 0.0.50 fails (while_loop_all_reduce_code_motion.cc) where the
  reduced gradient is converted and added up over micro-batches."""
  return head


_barred.defvjp(lambda head: (head, None), lambda _, grad: (jax.lax.optimization_barrier(grad),))


def chunks_for(rows: int, length: int, vocabulary: int) -> int:
  """The fewest parts of a sequence whose logits stay within the bound; a token at a time if nothing else does.

  Equal parts, unless that takes twice as many as with a shorter last one: the head's gradient is added up once a chunk.
  """
  most = max(max(_LOGITS_BYTES // (4 * vocabulary), _TOKENS) // max(rows, 1), 1)
  fewest = -(-length // most)
  equal = next(n for n in range(fewest, length + 1) if length % n == 0)
  return equal if equal < 2 * fewest else fewest


def plain(hidden, head, targets) -> TokenLoss:
  """The same with all logits at once: the reference, and the quicker form for a small vocabulary."""
  logits = matmul(hidden, head, jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  one_hot = targets[..., None] == jnp.arange(logits.shape[-1])
  nll = log_z - jnp.sum(jnp.where(one_hot, logits, 0.0), -1)
  return TokenLoss(nll, log_z, jnp.argmax(logits, -1) == targets)


def _cut(x, chunks: int):
  """[B, S, ...] -> [chunks, B, ceil(S / chunks), ...], the end padded with zeros."""
  padding = -x.shape[1] % chunks
  # A padded token has hidden state, target and gradients 0: it adds 0 to the head's gradient, and `_join` drops the rest.
  x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
  return x.reshape(x.shape[0], chunks, -1, *x.shape[2:]).swapaxes(0, 1)


def _join(x, length: int):
  """The inverse of `_cut`, less the padding: [chunks, B, C, ...] -> [B, length, ...]."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _logits(hidden, head):
  return jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(chunks: int, axis: str | None, hidden, head, targets):
  """(nll, log_z, hit) on one device; `axis`: the mesh axis over which the vocabulary is split."""
  first = 0 if axis is None else jax.lax.axis_index(axis) * head.shape[1]

  def across(reduce, x):
    return x if axis is None else reduce(x, axis)

  def part(_, rows):
    hidden, targets = rows
    logits = _logits(hidden, head)
    most = jnp.max(logits, -1)
    top = across(jax.lax.pmax, most)
    log_z = top + jnp.log(across(jax.lax.psum, jnp.sum(jnp.exp(logits - top[..., None]), -1)))
    column = (targets - first)[..., None]
    chosen = across(jax.lax.psum, jnp.sum(jnp.where(column == jnp.arange(head.shape[1]), logits, 0.0), -1))
    # The first of equal logits is the answer, as with argmax; on other devices it is past the end.
    best = jnp.where(most == top, first + jnp.argmax(logits, -1), jnp.iinfo(jnp.int32).max)
    return None, (log_z - chosen, log_z, across(jax.lax.pmin, best) == targets)

  _, out = jax.lax.scan(part, None, (_cut(hidden, chunks), _cut(targets, chunks)))
  return tuple(_join(x, targets.shape[1]) for x in out)


def _chunked_forward(chunks, axis, hidden, head, targets):
  out = _chunked(chunks, axis, hidden, head, targets)
  return out, (hidden, head, targets, out[1])


def _chunked_backward(chunks, axis, saved, grads):
  hidden, head, targets, log_z = saved
  grad_nll, grad_log_z, _ = grads
  if axis is not None:  # a result that is the same on all devices of an axis brings each of them a share of the gradient
    grad_nll, grad_log_z = (jax.lax.psum(g, axis) for g in (grad_nll, grad_log_z))
  first = 0 if axis is None else jax.lax.axis_index(axis) * head.shape[1]

  def part(grad_head, rows):
    hidden, targets, log_z, grad_nll, grad_log_z = rows
    share = jnp.exp(_logits(hidden, head) - log_z[..., None])
    at_target = (targets - first)[..., None] == jnp.arange(head.shape[1])
    grad = (grad_nll + grad_log_z)[..., None] * share - jnp.where(at_target, grad_nll[..., None], 0.0)
    grad = grad.astype(hidden.dtype)
    grad_hidden = jnp.einsum("bsv,dv->bsd", grad, head, preferred_element_type=jnp.float32).astype(hidden.dtype)
    grad_head = grad_head + jnp.einsum("bsd,bsv->dv", hidden, grad, preferred_element_type=jnp.float32)
    return grad_head, grad_hidden

  rows = tuple(_cut(x, chunks) for x in (hidden, targets, log_z, grad_nll, grad_log_z))
  grad_head, grad_hidden = jax.lax.scan(part, jnp.zeros(head.shape, jnp.float32), rows)
  return _join(grad_hidden, targets.shape[1]), grad_head.astype(head.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)
