"""The optax chain, aware of stacked leaves."""

from __future__ import annotations

import jax
import optax

from moe import config
from moe import schedules

_EXEMPT = ("scale", "bias")  # norm scales and biases are vectors, also where they are stacked over layers


def decay_mask(params):
  """True for the leaves that decay: matrices and stacks of them, by role and not by rank.

  A norm scale of shape [L, D] has the rank of a matrix, so rank alone would decay it.
  """
  def decays(path, _):
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]  # a boxed leaf adds its own entry
    return not names[-1].endswith(_EXEMPT)

  return jax.tree_util.tree_map_with_path(decays, params)


def make(run: config.Run) -> optax.GradientTransformation:
  """Global-norm clip and AdamW (arXiv 1711.05101) with the schedule of the run."""
  o = run.optimizer
  schedule = schedules.learning_rate(o, run.tokens_per_step, run.train.steps)
  return optax.chain(
      optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
      optax.scale_by_adam(b1=o.beta1, b2=o.beta2, eps=1e-8),
      optax.add_decayed_weights(o.weight_decay, mask=decay_mask),
      optax.scale_by_learning_rate(schedule),
  )
