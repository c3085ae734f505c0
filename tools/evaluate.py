"""Scores a checkpoint by domain: bits per byte, each byte once. `python -m tools.evaluate RUN_DIR --split=test`"""

from __future__ import annotations

import argparse
import json

import jax
import numpy as np

from moe import config
from moe import evaluate
from moe import step as step_lib
from tools import restore
from tools import terminal


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=__doc__.splitlines()[0])
  parser.add_argument("path", help="run directory, or checkpoints/<step> of one")
  parser.add_argument("--split", default="validation", choices=("validation", "test", "train"))
  parser.add_argument("--domain", action="append", metavar="NAME=PATH",
                      help="a domain to score in place of the run's own; repeatable")
  parser.add_argument("--limit", type=int, metavar="N", help="batches a domain (default: all)")
  parser.add_argument("--json", action="store_true", help="one JSON object, with all that is known of the routing")
  arguments = parser.parse_args(argv)
  trained = restore.load(arguments.path)
  domains = trained.run.data.domains
  if arguments.domain:
    pairs = [text.partition("=") for text in arguments.domain]
    if not all(path for _, _, path in pairs):
      raise config.ConfigError(f"--domain={arguments.domain} is not NAME=PATH")
    domains = tuple(config.Domain(name=name, path=path) for name, _, path in pairs)
  results = {}
  with jax.set_mesh(trained.mesh):
    eval_step = step_lib.jit_eval_step(trained.run, trained.mesh)
    for domain in domains:
      result, _ = evaluate.evaluate_domain(trained.run, trained.mesh, eval_step, trained.params, domain, trained.tokenizer,
                                           arguments.split, arguments.limit)
      results[domain.name] = result
      if not arguments.json:
        print(f"{domain.name:12s} {result['bits_per_byte']:.4f} bits/byte  {result['loss']:.4f} nats/token  "
              f"accuracy {result['accuracy']:.2%}  {result['bytes']:,} bytes of {arguments.split}")
  if arguments.json:
    plain = {name: {key: np.asarray(value).tolist() for key, value in result.items()} for name, result in results.items()}
    print(json.dumps({"path": arguments.path, "step": trained.step, "split": arguments.split, "domains": plain}))
  else:
    print("routing, all domains together", *evaluate.routing_table(results), sep="\n")
  return 0


if __name__ == "__main__":
  terminal.run(main)
