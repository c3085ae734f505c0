"""Text from a model, on one device: prefill, then one token at a time from the key/value cache.

A model with a capacity drops selections in training, where the tokens of a row compete for an expert's slots. A token that is
decoded by itself has no rivals, so from the cache nothing is dropped after the prompt. `row_tokens` decodes as trained, reading
the whole text again for every token, in a row of that length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe import config
from moe import model as model_lib


_CHUNK = 32  # tokens decoded in one program, between which the text is looked at for its end


class Sample(NamedTuple):
  ids: np.ndarray  # [n] the new tokens, the one that ended the text among them
  experts: np.ndarray  # [L, P + n - 1, K] chosen for every token that was read
  log_probabilities: np.ndarray  # [n] of the new tokens, before temperature


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(transformer: model_lib.Transformer, length: int, params, prompt):
  cache = model_lib.empty_cache(transformer.model, prompt.shape[0], length)
  positions = jnp.broadcast_to(jnp.arange(prompt.shape[1]), prompt.shape)
  out = transformer.apply({"params": params}, prompt, jnp.ones_like(prompt), positions, cache, jnp.int32(0))
  return transformer.apply({"params": params}, out.hidden[:, -1], method="logits"), out.cache, out.experts


def _pick(logits, key, temperature, top_p, limit):
  """(token [B] int32, its log probability [B]) from logits [B, V], by nucleus sampling; temperature 0 takes the largest."""
  logits = jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)
  log_p = jax.nn.log_softmax(logits)
  scaled = logits / jnp.maximum(temperature, 1e-6)
  order = jnp.sort(jax.nn.softmax(scaled), axis=-1)[:, ::-1]
  enough = jnp.sum(jnp.cumsum(order, -1) < top_p, -1, keepdims=True)
  floor = jnp.take_along_axis(order, jnp.minimum(enough, order.shape[-1] - 1), -1)
  allowed = jnp.where(jax.nn.softmax(scaled) >= floor, scaled, -jnp.inf)
  token = jnp.where(temperature > 0, jax.random.categorical(key, allowed), jnp.argmax(logits, -1)).astype(jnp.int32)
  return token, jnp.take_along_axis(log_p, token[:, None], -1)[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(transformer: model_lib.Transformer, steps: int, params, cache, logits, start, done, key, *choice):
  """((cache, logits), (token, log probability, experts) of each step) of `steps` tokens after `done` new ones."""
  def step(carry, i):
    cache, logits = carry
    token, log_p = _pick(logits, jax.random.fold_in(key, i), *choice)
    position = jnp.full_like(token[:, None], start + i)
    out = transformer.apply({"params": params}, token[:, None], jnp.ones_like(position), position, cache, start + i)
    return (out.cache, transformer.apply({"params": params}, out.hidden[:, -1], method="logits")), (token, log_p, out.experts)

  return jax.lax.scan(step, (cache, logits), done + jnp.arange(steps))


def _sample_from_cache(transformer, params, prompt, count: int, ended, key, *choice) -> Sample:
  """Prefill, then chunks of tokens until one of them ends the text."""
  prompt = jnp.asarray(prompt, jnp.int32)[None]
  start, chunk = prompt.shape[1], min(_CHUNK, count)
  room = -(-count // chunk) * chunk
  logits, cache, read = _prefill(transformer, start + room, params, prompt)
  ids: list[int] = []
  log_p, experts, end = [], [np.asarray(read)[:, 0]], None
  while len(ids) < count and end is None:
    carried, made = _decode(transformer, chunk, params, cache, logits, jnp.int32(start), jnp.int32(len(ids)), key, *choice)
    cache, logits = carried
    tokens, chunk_log_p, chosen = jax.device_get(made)
    ids += tokens[:, 0].tolist()
    log_p.append(chunk_log_p[:, 0])
    experts.append(chosen[:, :, 0, 0].swapaxes(0, 1))
    end = ended(ids[:count])
  length = len(ids[:count]) if end is None else end
  # The last token is chosen and not read.
  return Sample(np.array(ids[:length], np.int32), np.concatenate(experts, 1)[:, : start + length - 1],
                np.concatenate(log_p)[:length])


@functools.partial(jax.jit, static_argnums=0)
def _read_row(transformer: model_lib.Transformer, params, row, length, key, *choice):
  """(token, log probability, experts [L, 1, R, K]) after the first `length` tokens of a row [1, R]; the rest is padding."""
  positions = jnp.arange(row.shape[1])[None]
  real = (positions < length).astype(jnp.int32)
  out = transformer.apply({"params": params}, row, real, positions * real)
  logits = transformer.apply({"params": params}, out.hidden[:, length - 1], method="logits")
  return *_pick(logits, key, *choice), out.experts


def _sample_in_rows(transformer, params, prompt, count: int, row_tokens: int, ended, key, *choice) -> Sample:
  """Reads the text from its beginning for every token, or its last `row_tokens` where it is longer than a row."""
  text, experts, log_p = prompt.tolist(), [], []
  for i in range(count):
    seen = text[-row_tokens:]
    # A row has its full length from the start: the slots of an expert follow from it, not from the text so far.
    row = np.zeros((1, row_tokens), np.int32)
    row[0, : len(seen)] = seen
    token, token_log_p, chosen = _read_row(transformer, params, row, len(seen), jax.random.fold_in(key, i), *choice)
    text.append(int(token[0]))
    log_p.append(float(token_log_p[0]))
    # Of every token what it chose when it was the newest; of the prompt, all at once.
    begin = len(seen) - 1 if i else 0
    experts.append(np.asarray(chosen)[:, 0, begin : len(seen)])
    if ended(text[len(prompt) :]) is not None:
      break
  return Sample(np.array(text[len(prompt) :], np.int32), np.concatenate(experts, 1), np.array(log_p, np.float32))


def capacity_note(run: config.Run) -> str:
  """How decoding from the cache differs from training, where it does; empty where it does not."""
  factor = run.model.experts.capacity_factor
  if not factor:
    return ""
  return (f"this model was trained with Experts.capacity_factor = {factor}, and decoding token by token drops nothing after "
          "the prompt")


def sample(model: config.Model, params, prompt_ids: np.ndarray, count: int, *, vocab_size: int, temperature: float = 0.8,
           top_p: float = 0.95, seed: int = 0, row_tokens: int = 0, stops: Collection[int] = (),
           enough: Callable[[list[int]], bool] | None = None) -> Sample:
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
    row_tokens: decode as trained, in rows of so many tokens (Data.sequence_tokens), each alone in its micro-batch: a forward
      over a whole row for every token, of the last row_tokens of a longer text, as if a document began there. 0: from a cache,
      which drops nothing after the prompt; the same where the model has no capacity.
    stops: ids of which each ends the text; it is the last of the new tokens then.
    enough: given the new ids so far, says that no more are wanted; asked now and then, so some more may have been made.

  Raises:
    ConfigError: the routing looks ahead, so tokens cannot be made one after the other; or the prompt is longer than a row.
  """
  if model.lookahead:
    raise config.ConfigError(f"{model.lookahead} lets earlier tokens depend on later ones; such a model cannot be sampled "
                             "from token by token")
  if row_tokens and len(prompt_ids) > row_tokens:
    raise config.ConfigError(f"the prompt has {len(prompt_ids)} tokens, a row of training {row_tokens}: shorten the prompt, or "
                             "decode from the cache")
  device = jax.local_devices()[0]
  transformer = model_lib.build(model)
  params = jax.device_put(jax.device_get(params), device)
  key = jax.random.key(seed)
  choice = jnp.float32(temperature), jnp.float32(top_p), jnp.int32(vocab_size)
  stops = frozenset(int(stop) for stop in stops)

  def ended(ids: list[int]) -> int | None:
    """How many of the new tokens there are up to the end of the text; None while it goes on."""
    if stops:
      at = next((i for i, token in enumerate(ids) if token in stops), None)
      if at is not None:
        return at + 1
    return len(ids) if enough is not None and enough(ids) else None

  if row_tokens:
    return _sample_in_rows(transformer, params, np.asarray(prompt_ids), count, row_tokens, ended, key, *choice)
  return _sample_from_cache(transformer, params, prompt_ids, count, ended, key, *choice)
