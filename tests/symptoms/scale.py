"""Logits of bfloat16 attention against float64 of the same bfloat16 queries and keys: what the scale costs."""

import jax
import jax.numpy as jnp
import numpy as np
from moe.kernels import attention

rng = np.random.default_rng(0)
S = 512
for width in (64, 112, 128, 192):
  scale = width**-0.5
  q = jnp.array(rng.normal(size=(1, S, 1, width)), jnp.bfloat16)
  k = jnp.array(rng.normal(size=(1, S, 1, width)), jnp.bfloat16)
  exact = np.einsum("bshd,bthd->bst", np.asarray(q, np.float64), np.asarray(k, np.float64))[0] * scale
  mask = np.tril(np.ones((S, S), bool))
  line = f"width {width:3d}"
  for backend in ("plain", "splash", "dot_product"):
    seen = {}
    if backend == "plain":
      # capture what softmax receives
      real = jax.nn.softmax

      def softmax(x, axis=-1):
        seen.setdefault("x", []).append(np.asarray(x, np.float64))
        return real(x, axis)

      attention.jax.nn.softmax = softmax
      attention._attention(q, k, k, jnp.zeros((1, S, S)), scale, 0.0)
      attention.jax.nn.softmax = real
      got = seen["x"][0].reshape(S, S)
    elif backend == "splash":
      names = [n for n in ("_padded_splash", "_splash") if hasattr(attention, n)]
      real = getattr(attention, names[0])

      def caught(q, *a, **o):
        seen["q"] = q
        return q

      setattr(attention, names[0], caught)
      try:
        attention.attention(
          q,
          k,
          k,
          jnp.zeros((1, S, S)),
          jnp.ones((1, S), jnp.int32),
          scale=scale,
          softcap=0.0,
          window_tokens=0,
          backend="splash",
        )
      except ValueError:
        seen["q"] = q * scale  # the old tree takes no such width; what it does to others
      setattr(attention, names[0], real)
      got = np.einsum("bshd,bthd->bst", np.asarray(seen["q"], np.float64), np.asarray(k, np.float64))[0]
    else:
      got = np.asarray(jnp.einsum("bshd,bthd->bst", q, k, preferred_element_type=jnp.float32) * jnp.float32(scale), np.float64)[
        0
      ]  # the library's own formula
    slope = (got * exact).sum() / (exact * exact).sum() - 1
    rms = np.sqrt(((got - exact) ** 2).mean() / (exact**2).mean())
    line += f"   {backend}: all logits x (1 {slope:+.1e}), rms error {rms:.1e}"
  print(line)
