"""The activations of the feed-forward blocks."""

from __future__ import annotations

import jax


def activate(gate: jax.Array, up: jax.Array | None, kind: str) -> jax.Array:
  """SwiGLU silu(gate) * up (arXiv 2002.05202), or GELU(gate) where there is no up projection."""
  return jax.nn.silu(gate) * up if kind == "swiglu" else jax.nn.gelu(gate)
