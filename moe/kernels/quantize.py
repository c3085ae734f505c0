"""Weights in 8 bits for the forward: a scale for each column of each expert, and a gradient that passes straight through."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


class Quantized(NamedTuple):
  """values x scale is the matrix."""

  values: jax.Array  # [E, I, O] int8 or float8_e4m3fn
  scale: jax.Array  # [E, 1, O] float32


def quantize(weights: jax.Array, dtype: str) -> Quantized:
  """The nearest 8-bit matrix whose largest entry of a column is its type's largest.

  Args:
    weights: [E, I, O].
    dtype: a key of `LARGEST`.
  """
  weights = weights.astype(jnp.float32)
  most = jnp.max(jnp.abs(weights), 1, keepdims=True)
  scale = jnp.where(most > 0, most / LARGEST[dtype], 1.0)
  values = weights / scale
  return Quantized((jnp.round(values) if dtype == "int8" else values).astype(dtype), scale)


def dequantize(quantized: Quantized, dtype) -> jax.Array:
  return (quantized.values.astype(jnp.float32) * quantized.scale).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rounded(weights: jax.Array, dtype: str) -> jax.Array:
  """The weights as 8 bits hold them, in their own dtype; the gradient is that of the identity."""
  return dequantize(quantize(weights, dtype), weights.dtype)


rounded.defvjp(lambda weights, dtype: (rounded(weights, dtype), None), lambda dtype, _, grad: (grad,))
