"""Text from a model: prefill, then one token at a time from the key/value cache, on one device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe import config
from moe import model as model_lib


class Sample(NamedTuple):
  ids: np.ndarray  # [n] the new tokens
  experts: np.ndarray  # [L, P + n - 1, K] chosen for every token that was read
  log_probabilities: np.ndarray  # [n] of the new tokens, before temperature


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(transformer: model_lib.Transformer, length: int, params, prompt):
  cache = model_lib.empty_cache(transformer.model, prompt.shape[0], length)
  positions = jnp.broadcast_to(jnp.arange(prompt.shape[1]), prompt.shape)
  out = transformer.apply({"params": params}, prompt, jnp.ones_like(prompt), positions, cache, jnp.int32(0))
  return transformer.apply({"params": params}, out.hidden[:, -1], method="logits"), out.cache, out.experts


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(transformer: model_lib.Transformer, steps: int, params, cache, logits, start, key, temperature, top_p, limit):
  def pick(logits, key):
    logits = jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)
    log_p = jax.nn.log_softmax(logits)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    order = jnp.sort(jax.nn.softmax(scaled), axis=-1)[:, ::-1]
    enough = jnp.sum(jnp.cumsum(order, -1) < top_p, -1, keepdims=True)
    floor = jnp.take_along_axis(order, jnp.minimum(enough, order.shape[-1] - 1), -1)
    allowed = jnp.where(jax.nn.softmax(scaled) >= floor, scaled, -jnp.inf)
    token = jnp.where(temperature > 0, jax.random.categorical(key, allowed), jnp.argmax(logits, -1)).astype(jnp.int32)
    return token, jnp.take_along_axis(log_p, token[:, None], -1)[:, 0]

  def step(carry, i):
    cache, logits = carry
    token, log_p = pick(logits, jax.random.fold_in(key, i))
    position = jnp.full_like(token[:, None], start + i)
    out = transformer.apply({"params": params}, token[:, None], jnp.ones_like(position), position, cache, start + i)
    return (out.cache, transformer.apply({"params": params}, out.hidden[:, -1], method="logits")), (token, log_p, out.experts)

  return jax.lax.scan(step, (cache, logits), jnp.arange(steps))[1]


def sample(model: config.Model, params, prompt_ids: np.ndarray, count: int, *, vocab_size: int, temperature: float = 0.8,
           top_p: float = 0.95, seed: int = 0) -> Sample:
  """Continues a prompt.

  Args:
    model: the model's config.
    params: its parameters, addressable; copied to the first device if they are spread.
    prompt_ids: [P] int32, at least one; starts with the end-of-document id at a document's begin.
    count: tokens to make.
    vocab_size: ids from here on are never chosen (the padding of the table).
    temperature: 0 takes the most probable token.
    top_p: smallest set of tokens with this much probability; 1 keeps all.
    seed: of the choices.

  Raises:
    ConfigError: the routing looks ahead, so tokens cannot be made one after the other.
  """
  if model.lookahead:
    raise config.ConfigError(f"{model.lookahead} lets earlier tokens depend on later ones; such a model cannot be sampled "
                             "from token by token")
  device = jax.local_devices()[0]
  transformer = model_lib.build(model)
  params = jax.device_put(jax.device_get(params), device)
  prompt = jnp.asarray(prompt_ids, jnp.int32)[None]
  start = prompt.shape[1]
  logits, cache, read = _prefill(transformer, start + count, params, prompt)
  tokens, log_p, experts = _decode(transformer, count, params, cache, logits, jnp.int32(start), jax.random.key(seed),
                                   jnp.float32(temperature), jnp.float32(top_p), jnp.int32(vocab_size))
  chosen = np.concatenate([np.asarray(read)[:, 0], np.asarray(experts)[:, :, 0, 0].swapaxes(0, 1)], 1)
  return Sample(np.asarray(tokens)[:, 0], chosen[:, :-1], np.asarray(log_p)[:, 0])
