"""The dense matmul of the model, with a gradient that XLA:CPU likes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


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
