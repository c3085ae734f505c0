"""The scorer against the model itself; and the harness, where it is installed."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import config
from moe import generate
from moe import hugging_face_files
from moe import sharding
from moe.data import tokenizers
from moe.errors import UserError
from tests import generate_test
from tests import hugging_face_test
from tests import small
from tools import export_hf
from tools import lm_harness
from tools import restore


@pytest.fixture(scope="module")
def scorer():
  run = small.run(length=64, model={"vocab_size": 384})
  params = generate_test.parameters(run.model)
  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
  return lm_harness.Scorer(restore.Trained(run, 0, params, mesh, tokenizers.ByteTokenizer()))


def logits_by_hand(scorer, ids) -> np.ndarray:
  return np.asarray(generate_test.forward(scorer.trained.run.model, scorer.trained.params, jnp.array(ids))[0])


def by_hand(scorer, ids) -> np.ndarray:
  """log p of every token after the first, over the whole table, as in training and in transformers."""
  logits = logits_by_hand(scorer, ids)
  return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), np.array(ids[1:])]


def test_score_is_the_models_own(scorer):
  context, continuation = scorer.encode("In the "), scorer.encode("beginning", start=False)
  assert context[0] == 1 != continuation[0]
  expected = by_hand(scorer, context + continuation)[-len(continuation) :].sum()
  got, greedy = scorer.score(context, continuation)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert not greedy


def test_an_answer_is_the_most_probable_text(scorer):
  """Of the ids that the tokenizer has, each the best after those before it; up to a stop, which may lie across tokens."""
  context = scorer.encode("ab")
  made = scorer.continue_text(context, [], 12)
  ids = generate.sample(scorer.model, scorer.trained.params, np.array(context), 12, vocab_size=259, temperature=0).ids
  assert made == scorer.tokenizer.decode(ids) and scorer.tokenizer.eos not in ids
  best = logits_by_hand(scorer, [*context, *ids])[len(context) - 1 : -1, :259].argmax(-1)
  np.testing.assert_array_equal(ids, best)
  stop = made[4:6]
  assert scorer.continue_text(context, [stop], 12).startswith(made[: made.index(stop) + 2])


def test_what_is_too_long_is_cut_from_the_left(scorer):
  """64 tokens are read, and the last one of the text is only predicted."""
  context, continuation = [5] * 500, scorer.encode("end", start=False)
  assert scorer.score(context, continuation) == scorer.score([5] * 62, continuation)
  assert scorer.score(context, continuation) != scorer.score([5] * 61, continuation)


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
  """A model whose every token is equally likely has exactly log2(259) bits a token, and guesses."""
  import lm_eval
  from lm_eval.tasks import TaskManager

  class Uniform(lm_harness.Scorer):

    def score(self, context, continuation):
      return -len(continuation) * float(np.log(259)), False

  names = lm_harness.write_tasks(tmp_path, questions=20)
  manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
  found = lm_eval.simple_evaluate(model=lm_harness.harness_model(Uniform(scorer.trained)), tasks=names, task_manager=manager,
                                  limit=8, bootstrap_iters=0)["results"]
  texts = [json.loads(line)["text"] for line in (tmp_path / "toy_kjv_text.jsonl").read_text().splitlines()[:8]]
  total = sum(len(text.encode()) for text in texts)
  # The harness scores what stands before a text as a token of it, after another one of the same.
  assert found["toy_kjv_text"]["bits_per_byte,none"] == pytest.approx(np.log2(259) * (total + 8) / total, rel=1e-6)
  real = lm_eval.simple_evaluate(model=lm_harness.harness_model(scorer), tasks=names[:1], task_manager=manager, limit=8,
                                 bootstrap_iters=0)["results"]
  assert 0 <= real["toy_next_verse"]["acc,none"] <= 1


PAIRS = [("in the", " word"), ("in the ", "word"), ("", "in the word"), ("the light, and", " the word"), ("a\nb", "\n and"),
         ("the word was with " * 12, " the word"), ("é", "t</s>")]
ASKED = [("in the", {"until": ["\n\n"], "max_gen_toks": 20}), ("the word", {"until": "e", "max_gen_toks": 20}),
         ("light", {"until": []}), ("", {"until": [" th", "w"], "max_new_tokens": 12, "do_sample": False})]


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.skipif(not all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate", "torch", "transformers")),
                    reason="lm-eval[hf] is not installed")
@pytest.mark.parametrize("kind", ["byte", "bpe", "first", "always", "normalizer", "no_bos"])
def test_figures_are_those_of_the_harness_own_model(tmp_path, kind, monkeypatch):
  """Log-probabilities, whole texts and answers, beside lm-eval's model of transformers on the exported checkpoint."""
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

  run_dir = hugging_face_test.RUNS[kind](tmp_path)
  export_hf.main([str(run_dir), f"--out={tmp_path}/hf", "--max_positions=64"])
  trained = restore.load(str(run_dir))
  scorer = lm_harness.Scorer(trained, hugging_face_files.of(trained.run, run_dir), max_length=64)
  scorer.answer = 24  # both: there is no room for 256 after a question
  monkeypatch.setattr(HFLM, "max_gen_toks", 24)
  ours = lm_harness.harness_model(scorer)
  # Its cache takes requests with the same tokens for the same, wherever the continuation begins.
  theirs = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=1, logits_cache=False)
  assert theirs.max_length == scorer.longest

  def asked(name, arguments):
    requests = [Instance(name, {}, args, i) for i, args in enumerate(arguments)]
    return [getattr(model, name)(requests, disable_tqdm=True) for model in (ours, theirs)]

  a, b = asked("loglikelihood", PAIRS)
  np.testing.assert_allclose([p for p, _ in a], [p for p, _ in b], rtol=1e-4)
  assert [best for _, best in a] == [best for _, best in b]
  a, b = asked("loglikelihood_rolling", [("in the beginning was the word",), ("and the word was with the light " * 8,)])
  np.testing.assert_allclose(a, b, rtol=1e-4)
  a, b = asked("generate_until", ASKED[: 3 if kind == "no_bos" else 4])  # theirs reads no empty text without a beginning
  assert a == b and any(a)
  # Control: encoded by itself, as it once was, the continuation is another text for a tokenizer that puts a space before it.
  if kind == "normalizer":
    alone = scorer.score(scorer.encode("in the"), scorer.encode(" word", start=False))[0]
    assert abs(alone - ours.loglikelihood([Instance("loglikelihood", {}, PAIRS[0], 0)], disable_tqdm=True)[0][0]) > 0.1
