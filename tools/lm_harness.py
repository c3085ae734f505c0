"""EleutherAI's lm-evaluation-harness on a checkpoint: `python -m tools.lm_harness RUN_DIR --tasks=NAME,... --tasks_dir=DIR`

Needs `pip install lm-eval` (an extra of this package, `pip install .[eval]`). Nothing is fetched: tasks are the YAML files of a
folder. `--write_tasks=DIR` writes two from the embedded King James text, whose names say what they are: toys.

    toy_next_verse     which of four verses follows the text; chance is 0.25
    toy_kjv_text       bits per byte of validation text, by loglikelihood_rolling
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np

from moe import generate
from moe import model as model_lib
from moe.data import embedded
from moe.data import records
from moe.errors import UserError
from tools import restore
from tools import terminal

_SHORTEST = 64  # tokens; sequences are padded to this times a power of two, so that few programs are compiled

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
  """Log-probabilities of tokens under a trained model, one sequence at a time, on one device."""

  def __init__(self, trained: restore.Trained):
    self.trained, self.tokenizer = trained, trained.tokenizer
    self.longest = trained.run.data.sequence_tokens

  def encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text).tolist()

  def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """(sum of log p of the continuation in nats, whether each of its tokens was the most probable one).

    The context is cut from the left so that both fit into the run's sequence length.
    """
    continuation = continuation[-(self.longest - 1) :]
    context = (context or [self.tokenizer.eos])[-(self.longest - len(continuation)) :]
    ids = context + continuation
    length = _SHORTEST
    while length < len(ids):
      length *= 2
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(ids)] = ids
    segments = (np.arange(length) < len(ids)).astype(np.int32)[None]
    log_p, best = (np.asarray(x)[0] for x in _program(self.trained.run.model, self.tokenizer.vocab_size)(
        self.trained.params, tokens, segments))
    at = np.arange(len(context) - 1, len(ids) - 1)
    return float(log_p[at].sum(dtype=np.float64)), bool((best[at] == np.array(continuation)).all())

  def rolling(self, ids: list[int]) -> float:
    """Sum of log p of all tokens, each scored once, with at least half a sequence of context where there is that much."""
    total, step = 0.0, max(self.longest // 2, 1)
    for begin in range(0, len(ids), step):
      context = [self.tokenizer.eos, *ids[:begin]]
      total += self.score(context[-(self.longest - step) :], ids[begin : begin + step])[0]
    return total

  def continue_greedily(self, context: list[int], until: list[str], count: int) -> str:
    """The most probable text after the context, up to the first of `until`."""
    context = (context or [self.tokenizer.eos])[-max(self.longest - count, 1) :]
    made = generate.sample(self.trained.run.model, self.trained.params, np.array(context, np.int32), count, temperature=0.0,
                           vocab_size=self.tokenizer.vocab_size)
    ids = made.ids.tolist()
    text = self.tokenizer.decode(ids[: ids.index(self.tokenizer.eos)] if self.tokenizer.eos in ids else ids)
    return text[: min([text.find(stop) for stop in until if stop and stop in text] or [len(text)])]


@functools.cache
def _program(model, vocab_size: int):
  transformer = model_lib.build(model)

  @jax.jit
  def run(params, tokens, segments):
    """[1, S] -> log p of the token after each, and the most probable one."""
    places = jnp.arange(tokens.shape[1])[None]
    hidden = transformer.apply({"params": params}, tokens, segments, places).hidden
    logits = transformer.apply({"params": params}, hidden, method="logits")
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    following = jnp.roll(tokens, -1, 1)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), following[..., None], -1)[..., 0]
    return log_p, jnp.argmax(logits, -1)

  return run


def harness_model(scorer: Scorer):
  """An `lm_eval.api.model.LM` that asks the scorer."""
  from lm_eval.api.model import LM

  class Model(LM):

    def loglikelihood(self, requests, disable_tqdm: bool = False):
      return [scorer.score([scorer.tokenizer.eos, *scorer.encode(context)], scorer.encode(continuation))
              for context, continuation in (request.args for request in requests)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
      return [scorer.rolling(scorer.encode(request.args[0])) for request in requests]

    def generate_until(self, requests, disable_tqdm: bool = False):
      made = []
      for context, options in (request.args for request in requests):
        until = options.get("until") or []
        count = int(options.get("max_gen_toks", 64))
        made.append(scorer.continue_greedily([scorer.tokenizer.eos, *scorer.encode(context)],
                                             [until] if isinstance(until, str) else until, count))
      return made

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


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.lm_harness", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("path", nargs="?", help="run directory, or checkpoints/<step> of one")
  parser.add_argument("--tasks", help="names, with commas between them")
  parser.add_argument("--tasks_dir", type=pathlib.Path, help="folder of their YAML files")
  parser.add_argument("--write_tasks", type=pathlib.Path, metavar="DIR", help="write the toy tasks there")
  parser.add_argument("--limit", type=int, help="documents a task")
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
  found = lm_eval.simple_evaluate(model=harness_model(Scorer(restore.load(arguments.path))), tasks=names, task_manager=manager,
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
