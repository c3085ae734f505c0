"""Learning-rate schedules in tokens.

optax hands a schedule an int32 step. The token count is formed in float32, never in int32, which overflows at 2^31.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax

from moe.config import Optimizer


def learning_rate(optimizer: Optimizer, tokens_per_step: int, total_steps: int) -> optax.Schedule:
  """The learning rate of step i (from 0), linear warm-up, then cosine or warm-up-stable-decay.

  cosine: from the peak at the end of the warm-up to final_fraction x peak at the last token.
  wsd:    the peak, then linear to final_fraction x peak over the last decay_tokens (MiniCPM, arXiv 2404.06395).

  The rate of a step is that of the middle of its tokens, so a warm-up shorter than a step is not a zero step.
  """
  total = float(tokens_per_step) * total_steps
  warmup, decay = float(optimizer.warmup_tokens), float(optimizer.decay_tokens)
  final = optimizer.final_fraction

  def schedule(step):
    tokens = (jnp.asarray(step, jnp.float32) + 0.5) * tokens_per_step
    if optimizer.schedule == "cosine":
      progress = jnp.clip((tokens - warmup) / max(total - warmup, 1.0), 0.0, 1.0)
      scale = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    else:
      scale = 1 - (1 - final) * jnp.clip((tokens - (total - decay)) / max(decay, 1.0), 0.0, 1.0)
    return optimizer.learning_rate * scale * jnp.clip(tokens / max(warmup, 1e-6), 0.0, 1.0)

  return schedule
