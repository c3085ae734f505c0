"""The optax chain, aware of stacked leaves; where its moments live: split over replicas (ZeRO-1), in the host's memory."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from moe import config
from moe import schedules

_EXEMPT = ("scale", "bias")  # norm scales and biases are vectors, also where they are stacked over layers
_STACKS = ("dense_layers", "layers")  # parameters with a leading axis of layers


def decay_mask(params):
  """True for the leaves that decay: matrices and stacks of them, by role and not by rank.

  A norm scale of shape [L, D] has the rank of a matrix, so rank alone would decay it.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: not name_of(path).endswith(_EXEMPT), params)


def name_of(path) -> str:
  """`layers/experts/moe/gate` of a leaf's path; a boxed leaf adds an entry of its own, which does not count."""
  return "/".join(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _parts(run: config.Run, step) -> tuple[optax.GradientTransformation, ...]:
  o = run.optimizer
  # Not optax's own count, which is of accepted updates: a skipped step has used up its tokens, and schedules go by tokens.
  rate = schedules.learning_rate(o, run.tokens_per_step, run.train.steps)(step)
  return (
      optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
      optax.scale_by_adam(b1=o.beta1, b2=o.beta2, eps=1e-8),
      optax.add_decayed_weights(o.weight_decay, mask=decay_mask),
      optax.scale_by_learning_rate(rate),
  )


def make(run: config.Run, step=0) -> optax.GradientTransformation:
  """Global-norm clip and AdamW (arXiv 1711.05101) with the learning rate of one step; its state is the same for all steps."""
  return optax.chain(*_parts(run, step))


def update(run: config.Run, grads, state, params, accept, step):
  """(parameters, optimizer state) after a step; both as they were where `accept` is false.

  Args:
    grads: like params.
    state: of `make(run)`; the moments of `on_host` leaves are in the host's memory and stay there.
    accept: [] bool.
    step: [] int32, steps before this one, skipped ones included.
  """
  clip, *rest = _parts(run, step)
  rest, (clip_state, adam, *others) = optax.chain(*rest), state
  grads, _ = clip.update(grads, clip_state, params)

  def advance(grads, mu, nu, params):
    before = (adam._replace(mu=mu, nu=nu), *others)
    updates, after = rest.update(grads, before, params)
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), (optax.apply_updates(params, updates), after), (params, before))

  hosted = on_host(run.optimizer.offload, params)
  if not hosted:
    params, after = advance(grads, adam.mu, adam.nu, params)
    return params, (clip_state, *after)

  def stream(name, grads, mu, nu, params):
    """The same for one stacked leaf, a layer at a time: what is on the device of its moments is one layer's part."""
    def layer(i, carry):
      part = [jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False) for x in (grads, *carry)]
      mu, nu = (jax.device_put(x, jax.memory.Space.Device) for x in part[1:3])
      params, (new, *_) = advance(*({name: x} for x in (part[0], mu, nu, part[3])))
      new = (*(jax.device_put(x[name], jax.memory.Space.Host) for x in (new.mu, new.nu)), params[name])
      return tuple(jax.lax.dynamic_update_index_in_dim(x, y, i, 0) for x, y in zip(carry, new))

    return jax.lax.fori_loop(0, grads.shape[0], layer, (mu, nu, params))

  structure = jax.tree.structure(params)
  flat = [{name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
          for tree in (grads, adam.mu, adam.nu, params)]
  new, (after, *unchanged) = advance(*({n: x for n, x in tree.items() if n not in hosted} for tree in flat))
  mu, nu = dict(after.mu), dict(after.nu)
  for name in hosted:
    mu[name], nu[name], new[name] = stream(name, *(tree[name] for tree in flat))
  mu, nu, params = (jax.tree.unflatten(structure, [tree[n] for n in flat[-1]]) for tree in (mu, nu, new))
  return params, (clip_state, after._replace(mu=mu, nu=nu), *unchanged)


def on_host(share: float, params) -> tuple[str, ...]:
  """Names of the leaves whose moments live in the host's memory: stacked ones, largest first, while all before them are less
  than this share of the parameters. Whole leaves, so that a state has the same form for any share."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  budget = share * sum(math.prod(x.shape) for _, x in leaves)
  names, before = [], 0
  for path, x in sorted(leaves, key=lambda leaf: -math.prod(leaf[1].shape)):
    if before < budget and name_of(path).split("/")[0] in _STACKS:
      names.append(name_of(path))
      before += math.prod(x.shape)
  return tuple(names)
