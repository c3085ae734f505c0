"""Scores checkpoints by domain: bits per byte, each byte once. `python -m tools.evaluate RUN_DIR --split=test [--series]`

`--series` scores every checkpoint of a run, with the tokens it had seen and what a token costs: forward FLOPs with the experts
that one token passes through.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

from moe import checkpoint
from moe import config
from moe import evaluate
from moe import sizes
from moe import step as step_lib
from moe.terminal import progress
from tools import restore
from tools import terminal


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("path", help="run directory, or checkpoints/<step> of one")
  parser.add_argument("--split", default="validation", choices=("validation", "test", "train"))
  parser.add_argument("--domain", action="append", metavar="NAME=PATH",
                      help="a domain to score in place of the run's own; repeatable")
  parser.add_argument("--limit", type=int, metavar="N", help="batches a domain (default: all)")
  parser.add_argument("--series", action="store_true", help="every checkpoint of the run, oldest first")
  parser.add_argument("--json", action="store_true", help="one JSON object, with all that is known of the routing")
  arguments = parser.parse_args(argv)
  folders = list(reversed(checkpoint.step_folders(arguments.path))) if arguments.series else [arguments.path]
  told = []
  for number, folder in enumerate(folders, 1):  # one in memory at a time
    trained = restore.load(folder)
    results = score(trained, arguments, f"checkpoint {number} of {len(folders)}, " if arguments.series else "")
    told.append(describe(trained, results))
  if arguments.json:
    shown = {"path": arguments.path, "split": arguments.split}
    terminal.as_json({**shown, "checkpoints": told} if arguments.series else {**shown, **told[0]})
  elif arguments.series:
    names = list(results)
    terminal.table(("step", "tokens", "MFLOP a token", *(f"{name}, bits/byte" for name in names)), [
        (row["step"], row["tokens_seen"], row["flops_per_token"] / 1e6,
         *(row["domains"][name]["bits_per_byte"] for name in names)) for row in told], left=())
  else:
    for name, result in results.items():
      print(f"{name:12s} {result['bits_per_byte']:.4f} bits/byte  {result['loss']:.4f} nats/token  "
            f"accuracy {result['accuracy']:.2%}  {result['bytes']:,} bytes of {arguments.split}")
      forward, floor = (result[key] / result["tokens"] for key in ("forward_tokens", "window_tokens"))
      print(f"{'':12s} {forward:.2f} tokens run for each that is scored, {floor:.2f} without padding")
    print("routing, all domains together", *evaluate.routing_table(results, trained.run.model), sep="\n")
  return terminal.FINE


def score(trained: restore.Trained, arguments, what: str = "") -> dict[str, dict]:
  """Results by domain, see `evaluate.evaluate_domain`.

  Args:
    arguments: the flags.
    what: before the name of the domain, where it says how far the work is.
  """
  domains = trained.run.data.domains
  if arguments.domain:
    pairs = [text.partition("=") for text in arguments.domain]
    if not all(path for _, _, path in pairs):
      raise config.ConfigError(f"--domain={arguments.domain} is not NAME=PATH")
    domains = tuple(config.Domain(name=name, path=path) for name, _, path in pairs)
  with jax.set_mesh(trained.mesh):
    eval_step = step_lib.jit_eval_step(trained.run, trained.mesh)
    results = {}
    for domain in domains:
      with progress(f"{what}scores {domain.name}", unit="batches") as work:
        results[domain.name], _ = evaluate.evaluate_domain(
            trained.run, trained.mesh, eval_step, trained.params, domain, trained.tokenizer, arguments.split, arguments.limit,
            stop=lambda work=work: bool(work.advance()))  # asked after each batch; advance returns nothing
    return results


def describe(trained: restore.Trained, results: dict[str, dict]) -> dict:
  """A checkpoint's step, tokens, forward FLOPs a token (experts counted as active), and its results as plain values."""
  run = trained.run
  return {"step": trained.step, "tokens_seen": trained.step * run.tokens_per_step,
          "flops_per_token": sizes.flops_per_token(run.model, run.data.sequence_tokens) / 3,
          "domains": {name: {key: np.asarray(value).tolist() for key, value in result.items()}
                      for name, result in results.items()}}


if __name__ == "__main__":
  terminal.run(main)
