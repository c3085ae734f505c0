"""Chunks of the loss over rows whose length no power of two divides, and its seconds."""
# ruff: noqa: E501
import time
import jax
import jax.numpy as jnp
import numpy as np
from moe.kernels import cross_entropy as c

for rows, length in ((8, 4096), (8, 4093), (8, 4098), (4, 1021)):
  n = c.chunks_for(rows, length, 129280)
  print(f"rows {rows}, length {length}: {n} chunks of {-(-length // n)} tokens")
rows, length, V, D = 2, 1021, 32000, 256
rng = np.random.default_rng(0)
h = jnp.asarray(rng.normal(size=(rows, length, D)), jnp.float32)
w = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
t = jnp.asarray(rng.integers(0, V, (rows, length)), jnp.int32)
f = jax.jit(jax.value_and_grad(lambda h, w: jnp.sum(c.token_loss(h, w, t).nll), (0, 1)))
f(h, w)[0].block_until_ready()
b = time.perf_counter()
jax.block_until_ready(f(h, w))
print(
  f"2 x 1021 tokens, width 256, 32000 ids: {c.chunks_for(rows, length, V)} chunks, value and gradient {time.perf_counter() - b:.2f} s"
)
