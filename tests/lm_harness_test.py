"""The scorer against the model itself; and the harness, where it is installed."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import config
from moe import model as model_lib
from moe import sharding
from moe.data import tokenizers
from moe.errors import UserError
from tests import small
from tools import lm_harness
from tools import restore


@pytest.fixture(scope="module")
def scorer():
  run = small.run(length=64, model={"vocab_size": 384})
  params = model_lib.unbox(model_lib.init(model_lib.build(run.model), jax.random.key(0)))[0]
  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
  return lm_harness.Scorer(restore.Trained(run, 0, params, mesh, tokenizers.ByteTokenizer()))


def by_hand(scorer, ids) -> np.ndarray:
  """log p of every token after the first, written out."""
  transformer, tokens = model_lib.build(scorer.trained.run.model), jnp.array([ids])
  variables, places = {"params": scorer.trained.params}, jnp.arange(len(ids))[None]
  hidden = transformer.apply(variables, tokens, jnp.ones_like(tokens), places).hidden
  logits = transformer.apply(variables, hidden, method="logits")[0, :, :259]
  return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), np.array(ids[1:])]


def test_score_is_the_models_own(scorer):
  context, continuation = [1, *scorer.encode("In the ")], scorer.encode("beginning")
  expected = by_hand(scorer, context + continuation)[-len(continuation) :].sum()
  got, greedy = scorer.score(context, continuation)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert not greedy


def test_greedy_text_scores_as_greedy(scorer):
  context = [1, *scorer.encode("ab")]
  made = scorer.continue_greedily(context, [], 3)
  assert scorer.continue_greedily(context, [made[1:2]], 3) == made[: made.index(made[1:2])] if made else True
  ids = [1, *scorer.encode("ab")]
  for _ in range(3):  # token by token
    best = max(range(259), key=lambda t: scorer.score(ids, [t])[0])
    assert scorer.score(ids, [best])[1]
    ids.append(best)


def test_rolling_scores_every_token_once_with_context(scorer):
  text = scorer.encode("the words of the preacher, the son of David, king in Jerusalem. " * 3)
  assert scorer.rolling(text[:30]) == pytest.approx(scorer.score([1], text[:30])[0])
  total = sum(scorer.score([1, *text[:b]][-32:], text[b : b + 32])[0] for b in range(0, len(text), 32))
  assert scorer.rolling(text) == pytest.approx(total)


def test_what_is_too_long_is_cut_from_the_left(scorer):
  context, continuation = [5] * 500, scorer.encode("end")
  assert scorer.score(context, continuation) == scorer.score([5] * 61, continuation)


def test_toy_tasks_are_answerable_and_not_trivial(tmp_path):
  names = lm_harness.write_tasks(tmp_path, questions=40)
  rows = [json.loads(line) for line in (tmp_path / "toy_next_verse.jsonl").read_text().splitlines()]
  assert len(rows) == 40 and {row["label"] for row in rows} == {0, 1, 2, 3}
  assert all(len(set(row["choices"])) == 4 for row in rows) and names == ["toy_next_verse", "toy_kjv_text"]


@pytest.mark.parametrize("argv, words", [(["x"], "give a run"), ([], "give a run")])
def test_mistakes_are_one_line(argv, words):
  with pytest.raises(UserError, match=words):
    lm_harness.main(argv)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_runs_on_it(scorer, tmp_path):
  """A model whose every token is equally likely has exactly log2(259) bits a byte, and guesses."""
  import lm_eval
  from lm_eval.tasks import TaskManager

  class Uniform(lm_harness.Scorer):

    def score(self, context, continuation):
      return -len(continuation) * float(np.log(259)), False

  names = lm_harness.write_tasks(tmp_path, questions=20)
  manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
  found = lm_eval.simple_evaluate(model=lm_harness.harness_model(Uniform(scorer.trained)), tasks=names, task_manager=manager,
                                  limit=8, bootstrap_iters=0)["results"]
  assert found["toy_kjv_text"]["bits_per_byte,none"] == pytest.approx(np.log2(259), rel=1e-6)
  real = lm_eval.simple_evaluate(model=lm_harness.harness_model(scorer), tasks=names[:1], task_manager=manager, limit=8,
                                 bootstrap_iters=0)["results"]
  assert 0 <= real["toy_next_verse"]["acc,none"] <= 1
