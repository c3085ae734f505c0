"""Decoding as trained: with a capacity, the tokens are those of the training forward; and tools.sample says what it does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import config
from moe import generate
from moe import hugging_face_files
from moe import model as model_lib
from moe.data import tokenizers
from tests import small
from tools import restore
from tools import sample

CAPACITY = {"experts": {"capacity_factor": 1.0}}
PRE_GATE = {"experts": {"capacity_factor": 0.5}, "router": {"pre_gate": {"d_model": 8, "num_heads": 2, "d_ff": 12}}}
PROMPT, ROW = np.array([1, 5, 9]), 26


def parameters(model, seed=0):
  transformer = model_lib.build(model)
  abstract = jax.eval_shape(lambda key: model_lib.unbox(model_lib.init(transformer, key))[0], jax.random.key(0))
  return small.params(abstract, seed)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, text):
  """(logits [S, V], selections that were dropped) of one row of a training forward."""
  transformer, tokens = model_lib.build(model), text[None]
  positions = jnp.arange(len(text))[None]
  out = transformer.apply({"params": params}, tokens, jnp.ones_like(positions), positions)
  return transformer.apply({"params": params}, out.hidden, method="logits")[0], out.stats.dropped.sum()


def best_next(model, params, text, vocab_size=60):
  """([S] the most probable token after each of a row, selections that were dropped)."""
  logits, dropped = forward(model, params, np.asarray(text, np.int32))
  return np.argmax(logits[:, :vocab_size], -1), int(dropped)


def greedy(model, params, count, **options):
  return generate.sample(model, params, PROMPT, count, vocab_size=60, temperature=0, **options)


@pytest.mark.parametrize("changes", [
    pytest.param(CAPACITY, id="capacity"), pytest.param(PRE_GATE, id="half_the_slots_pre_gate", marks=pytest.mark.slow)])
def test_greedy_tokens_as_trained_are_those_of_the_training_forward(changes):
  model = small.model(**changes)
  params, count = parameters(model), ROW - len(PROMPT)
  made = greedy(model, params, count, row_tokens=ROW)
  want, dropped = best_next(model, params, np.concatenate([PROMPT, made.ids]))
  assert dropped > 0
  np.testing.assert_array_equal(made.ids, want[len(PROMPT) - 1 : -1])
  assert made.experts.shape == (model.num_routers, ROW - 1, 2)
  # The control: from the cache nothing is dropped, and the forward over that text would have gone on otherwise.
  cached = greedy(model, params, count)
  want, _ = best_next(model, params, np.concatenate([PROMPT, cached.ids]))
  assert np.any(cached.ids != want[len(PROMPT) - 1 : -1])


def test_a_text_longer_than_a_row_is_read_by_its_end():
  model = small.model(**CAPACITY)
  params = parameters(model)
  made = greedy(model, params, 12, row_tokens=8)
  text = np.concatenate([PROMPT, made.ids])
  for end in range(8, len(text)):
    assert best_next(model, params, text[end - 8 : end])[0][-1] == text[end]
  assert made.experts.shape[1] == len(text) - 1
  with pytest.raises(config.ConfigError, match="3 tokens, a row of training 2"):
    greedy(model, params, 12, row_tokens=2)


def test_a_text_stops_at_the_first_of_its_ends():
  """Over several chunks of decoded tokens; what was made before the end does not change, and nothing after it is kept."""
  model = small.model()
  params, count = parameters(model), 70
  whole = greedy(model, params, count)
  best, _ = best_next(model, params, np.concatenate([PROMPT, whole.ids]))
  np.testing.assert_array_equal(whole.ids, best[len(PROMPT) - 1 : -1])
  end = int(np.flatnonzero(~np.isin(whole.ids, whole.ids[:3]))[0])  # the first token that none of the first three is
  stop = int(whole.ids[end])
  for stops in ((stop,), (stop, 61), [np.int64(stop)]):
    ended = greedy(model, params, count, stops=stops)
    np.testing.assert_array_equal(ended.ids, whole.ids[: end + 1])
    np.testing.assert_array_equal(ended.experts, whole.experts[:, : len(PROMPT) + end])
    np.testing.assert_array_equal(ended.log_probabilities, whole.log_probabilities[: end + 1])
  np.testing.assert_array_equal(greedy(model, params, count, stops=(61, 62)).ids, whole.ids)  # ids that are never made
  some = greedy(model, params, count, enough=lambda ids: len(ids) >= 20)
  assert 20 <= len(some.ids) < count and list(some.ids) == list(whole.ids[: len(some.ids)])
  in_rows = greedy(model, params, end + 5, row_tokens=32, stops=(stop,))
  np.testing.assert_array_equal(in_rows.ids, whole.ids[: end + 1])


@pytest.mark.slow
def test_without_a_capacity_both_ways_give_the_same():
  model = small.model()
  params = parameters(model)
  results = [generate.sample(model, params, PROMPT, 8, vocab_size=60, seed=3, row_tokens=row) for row in (0, 16)]
  np.testing.assert_array_equal(results[0].ids, results[1].ids)
  np.testing.assert_array_equal(results[0].experts, results[1].experts)
  np.testing.assert_allclose(results[0].log_probabilities, results[1].log_probabilities, atol=1e-4)


@pytest.mark.parametrize("factor, flags, noted", [(1.0, [], True), (1.0, ["--as_trained"], False), (0.0, [], False)])
def test_the_tool_notes_that_decoding_drops_nothing(factor, flags, noted, monkeypatch, capsys):
  run = small.run(length=16, model={"vocab_size": 264, "experts": {"capacity_factor": factor}})
  params = parameters(run.model)
  monkeypatch.setattr(restore, "load", lambda path: restore.Trained(run, 1, params, None, tokenizers.load("byte")))
  monkeypatch.setattr(hugging_face_files, "run_folder", lambda path: None)
  asked, models = {}, []

  def made(model, *_, **options):
    asked.update(options)
    models.append(model)
    return generate.Sample(np.array([68]), np.zeros((2, 3, 2), int), np.zeros(1))

  monkeypatch.setattr(generate, "sample", made)
  assert sample.main(["run", "--tokens=1", "--prompt=a", *flags]) == 0
  told = capsys.readouterr()
  assert told.out == "aA\n"
  assert ("--as_trained decodes with the slots of a row of 16 tokens" in told.err) == noted
  assert asked["row_tokens"] == (16 if flags else 0) and asked["stops"] == (1,)
  assert sample.main(["run", "--tokens=1", "--prompt=a", "--past_end", "--dtype=bfloat16"]) == 0
  assert asked["stops"] == () and models[-1].compute_dtype == "bfloat16"
