"""Chunks of the loss over rows whose length no power of two divides, and its seconds.

PYTHONPATH=CHECKOUT python tests/symptoms/prime_rows.py
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels import cross_entropy

for rows, length in ((8, 4096), (8, 4093), (8, 4098), (4, 1021)):
  chunks = cross_entropy.chunks_for(rows, length, 129_280)
  print(f"{rows} rows of {length}, 129280 ids: {chunks} chunks of {-(-length // chunks)} tokens")

rows, length, width, vocabulary = 2, 1021, 256, 32_000
rng = np.random.default_rng(0)
hidden = jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32)
head = jnp.asarray(rng.normal(size=(width, vocabulary)), jnp.float32)
targets = jnp.asarray(rng.integers(0, vocabulary, (rows, length)), jnp.int32)


@jax.jit
def value_and_gradient(hidden, head):
  loss = lambda hidden, head: jnp.sum(cross_entropy.token_loss(hidden, head, targets).nll)
  return jax.value_and_grad(loss, (0, 1))(hidden, head)


jax.block_until_ready(value_and_gradient(hidden, head))
begin = time.perf_counter()
jax.block_until_ready(value_and_gradient(hidden, head))
chunks = cross_entropy.chunks_for(rows, length, vocabulary)
print(f"{rows} x {length} tokens, width {width}, {vocabulary} ids: {chunks} chunks, "
      f"value and gradient {time.perf_counter() - begin:.2f} s")
