"""EleutherAI's lm-evaluation-harness on a checkpoint: `python -m tools.lm_harness RUN_DIR --tasks=NAME,... --tasks_dir=DIR`

Needs `pip install lm-eval`. Text becomes tokens, windows and answers by the harness's own rules, so the figures are those that
its `hf` model gives for the exported checkpoint. Nothing is fetched: tasks are the YAML files of a folder. `--write_tasks=DIR`
writes two from the embedded King James text, whose names say what they are: toys.

    toy_next_verse     which of four verses follows the text; chance is 0.25
    toy_kjv_text       bits per byte of validation text, by loglikelihood_rolling
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import pathlib
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np

from moe import generate
from moe import hugging_face_files
from moe import model as model_lib
from moe.data import embedded
from moe.data import records
from moe.errors import UserError
from tools import restore
from tools import terminal

_SHORTEST = 64  # tokens; sequences are padded to this times a power of two, so that few programs are compiled
_ANSWER = 256  # tokens of an answer where a task does not say; the harness's own number
_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")  # of generation, that are carried out here

_NEXT_VERSE = """task: toy_next_verse
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1
"""
_TEXT = """task: toy_kjv_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1
"""


class Scorer:
  """Log-probabilities of tokens under a trained model, and its text, one sequence at a time, on one device.

  Attributes:
    longest: tokens that the model reads at once.
    answer: tokens of an answer where a task does not say.
  """

  def __init__(self, trained: restore.Trained, kept: hugging_face_files.Kept | None = None, *, max_length: int | None = None,
               dtype: str | None = None, as_trained: bool = False):
    """`kept`: of the model that this one was imported from. `as_trained`: with a capacity, in rows as long as in training."""
    self.trained, self.tokenizer = trained, trained.tokenizer
    self.kept = kept or hugging_face_files.Kept(trained.run)
    self.model = dataclasses.replace(trained.run.model, compute_dtype=dtype) if dtype else trained.run.model
    row_tokens = trained.run.data.sequence_tokens
    positions = self.kept.config.get("max_position_embeddings") if self.kept.descended else None
    self.longest = max_length or max(positions or 0, row_tokens)
    self.answer = min(_ANSWER, self.longest // 2)
    self.stops = self.kept.stops(self.tokenizer)
    self.end = hugging_face_files.name_of(self.tokenizer, self.tokenizer.eos)
    self._row_tokens = row_tokens if as_trained else 0

  def encode(self, text: str, start: bool = True) -> list[int]:
    """The ids of a text, after what stands before one."""
    return self.kept.encode(text, self.tokenizer, start)

  @property
  def first(self) -> int:
    """What a text without a context follows."""
    return self.kept.first(self.tokenizer)

  def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """(sum of log p of the continuation in nats, whether each of its tokens was the most probable one).

    The context, at least one token, is cut from the left so that the model reads at most `longest` tokens.
    """
    ids = (context + continuation)[-(self.longest + 1) :]
    read, count = ids[:-1], min(len(continuation), self.longest)
    if not count:
      return 0.0, True
    length = self._row_tokens or _SHORTEST
    while length < len(read):
      length *= 2
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(read)] = read
    following = np.zeros((1, length), np.int32)
    following[0, : len(read)] = ids[1:]
    segments = (np.arange(length) < len(read)).astype(np.int32)[None]
    log_p, best = (np.asarray(x)[0] for x in _program(self.model)(self.trained.params, tokens, following, segments))
    at = slice(len(read) - count, len(read))
    return float(log_p[at].sum(dtype=np.float64)), bool((best[at] == following[0, at]).all())

  def continue_text(self, context: list[int], until: list[str], count: int, temperature: float = 0.0,
                    top_p: float = 1.0) -> str:
    """The text after a context, up to the end of the text or of the first of `until`, of `count` tokens at most."""
    if count >= self.longest:
      raise UserError(f"a task asks for answers of {count} tokens, and the model reads {self.longest}: there is no room for a "
                      "question; lower max_gen_toks in the task, or raise --max_length")
    context = (context or [self.first])[-(self.longest - count) :]
    made = generate.sample(self.model, self.trained.params, np.array(context, np.int32), count, temperature=temperature,
                           top_p=top_p, vocab_size=self.tokenizer.vocab_size, row_tokens=self._row_tokens, stops=self.stops,
                           enough=lambda ids: any(stop and stop in self._text(ids) for stop in until))
    return self._text(made.ids.tolist())

  def _text(self, ids: list[int]) -> str:
    return self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.stops else ids)


@functools.cache
def _program(model):
  transformer = model_lib.build(model)

  @jax.jit
  def run(params, tokens, following, segments):
    """[1, S] -> log p of the token that follows each, and the most probable one."""
    places = jnp.arange(tokens.shape[1])[None]
    hidden = transformer.apply({"params": params}, tokens, segments, places).hidden
    logits = transformer.apply({"params": params}, hidden, method="logits")
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), following[..., None], -1)[..., 0]
    return log_p, jnp.argmax(logits, -1)

  return run


def harness_model(scorer: Scorer):
  """An `lm_eval.api.model.TemplateLM` that asks the scorer: what becomes of a request is decided by the harness's functions."""
  from lm_eval import utils
  from lm_eval.api.model import TemplateLM
  from lm_eval.models import utils as model_utils

  class Model(TemplateLM):
    eot_token_id = scorer.tokenizer.eos
    prefix_token_id = scorer.first
    tokenizer_name = f"moe-{scorer.tokenizer.digest}"

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
      return scorer.encode(string, start=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
      return [scorer.score(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
      totals = []
      for request in requests:
        windows = utils.get_rolling_token_windows(token_list=self.tok_encode(request.args[0]), context_len=1,
                                                  prefix_token=self.prefix_token_id, max_seq_len=scorer.longest)
        totals.append(sum(scorer.score(*utils.make_disjoint_window(window))[0] for window in windows))
      return totals

    def generate_until(self, requests, disable_tqdm: bool = False):
      return [self._answer(*request.args) for request in requests]

    def _answer(self, context: str, options: dict) -> str:
      chosen = model_utils.normalize_gen_kwargs(options, scorer.answer)
      foreign = sorted(set(chosen) - set(_OPTIONS))
      if foreign:
        raise UserError(f"a task asks for {foreign[0]} = {chosen[foreign[0]]!r} in its answers, which is not there; only "
                        f"{', '.join(_OPTIONS)} are")
      until = model_utils.handle_stop_sequences(chosen["until"], eos=scorer.end)
      temperature = chosen.get("temperature", 1.0 if chosen["do_sample"] else 0.0)
      text = scorer.continue_text(self.tok_encode(context), until, chosen["max_gen_toks"], temperature,
                                  chosen.get("top_p", 1.0))
      return model_utils.postprocess_generated_text(text, until, None)

  return Model()


def write_tasks(folder: pathlib.Path, questions: int = 200, seed: int = 0) -> list[str]:
  """The two toy tasks; their names."""
  folder.mkdir(parents=True, exist_ok=True)
  documents = [d.text for d in records.read_documents(embedded.resolve("embedded:kjv"), "validation")]
  chapters = [[line.partition(" ")[2] for line in text.splitlines()] for text in documents]
  verses, rng = [v for chapter in chapters for v in chapter], random.Random(seed)
  rows = []
  while len(rows) < questions:
    chapter = rng.choice([c for c in chapters if len(c) > 4])
    at = rng.randrange(3, len(chapter))
    choices = [chapter[at], *rng.sample([v for v in verses if v not in chapter], 3)]
    order = rng.sample(range(4), 4)
    rows.append({"text": "\n".join(chapter[at - 3 : at]) + "\n", "choices": [choices[i] for i in order],
                 "label": order.index(0)})
  for name, text, content in (("toy_next_verse", _NEXT_VERSE, rows),
                              ("toy_kjv_text", _TEXT, [{"text": t} for t in documents[:40]])):
    file = (folder / f"{name}.jsonl").resolve()
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / f"{name}.yaml").write_text(text.format(file=file))
  return ["toy_next_verse", "toy_kjv_text"]


def _scorer(arguments: argparse.Namespace) -> Scorer:
  trained = restore.load(arguments.path)
  kept = hugging_face_files.of(trained.run, hugging_face_files.run_folder(arguments.path))
  scorer = Scorer(trained, kept, max_length=arguments.max_length, dtype=arguments.dtype, as_trained=arguments.as_trained)
  note = generate.capacity_note(trained.run)
  if note and not arguments.as_trained:
    print(f"note: {note}, and texts are scored in rows of another length; --as_trained takes rows of "
          f"{trained.run.data.sequence_tokens} tokens", file=sys.stderr)
  if scorer.answer < _ANSWER:
    print(f"note: the model reads {scorer.longest} tokens, so answers have {scorer.answer} where a task does not say, instead "
          f"of the harness's {_ANSWER}", file=sys.stderr)
  return scorer


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.lm_harness", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("path", nargs="?", help="run directory, or checkpoints/<step> of one")
  parser.add_argument("--tasks", help="names, with commas between them")
  parser.add_argument("--tasks_dir", type=pathlib.Path, help="folder of their YAML files")
  parser.add_argument("--write_tasks", type=pathlib.Path, metavar="DIR", help="write the toy tasks there")
  parser.add_argument("--limit", type=int, help="documents a task")
  parser.add_argument("--max_length", type=int, help="tokens that the model reads at once (default: Data.sequence_tokens of "
                      "the run; of an import, its max_position_embeddings)")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                      help="to compute in (default: the run's; of an import, its parameters')")
  parser.add_argument("--as_trained", action="store_true", help="with a capacity, drop what the rows of training would")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args(argv)
  names = arguments.tasks.split(",") if arguments.tasks else []
  if arguments.write_tasks:
    names, arguments.tasks_dir = write_tasks(arguments.write_tasks), arguments.write_tasks
    if arguments.path is None:
      print(f"{arguments.write_tasks}: {', '.join(names)}")
      return terminal.FINE
  if arguments.path is None or not names or arguments.tasks_dir is None:
    raise UserError("give a run, --tasks and --tasks_dir; or --write_tasks=DIR for two toy tasks")
  if importlib.util.find_spec("lm_eval") is None:
    raise UserError("lm-evaluation-harness is not installed: pip install lm-eval")
  import lm_eval
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=str(arguments.tasks_dir), include_defaults=False)
  unknown = sorted(set(names) - set(manager.all_tasks))
  if unknown:
    raise UserError(f"{arguments.tasks_dir} has no task {', '.join(unknown)}; it has {', '.join(manager.all_tasks) or 'none'}")
  found = lm_eval.simple_evaluate(model=harness_model(_scorer(arguments)), tasks=names, task_manager=manager,
                                  limit=arguments.limit, bootstrap_iters=0)["results"]
  rows = [(name, key.partition(",")[0], value) for name, table in found.items() for key, value in table.items()
          if isinstance(value, float)]
  if arguments.json:
    terminal.as_json({"path": arguments.path, "results": [dict(zip(("task", "metric", "value"), row)) for row in rows]})
  else:
    terminal.table(("task", "metric", "value"), rows, left=("task", "metric"))
  return terminal.FINE


if __name__ == "__main__":
  terminal.run(main)
