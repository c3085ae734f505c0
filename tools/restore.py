"""What the tools share: a trained model from a run directory, and errors in one line."""

from __future__ import annotations

import logging
import sys
from typing import NamedTuple
from collections.abc import Callable

import jax

from moe import checkpoint
from moe import config
from moe import report
from moe import sharding
from moe import step as step_lib
from moe.data import tokenizers
from moe.data.records import DataError


class Trained(NamedTuple):
  run: config.Run
  step: int
  params: object  # on `mesh`
  mesh: jax.sharding.Mesh  # one device
  tokenizer: tokenizers.Tokenizer


def load(path: str) -> Trained:
  """The newest whole checkpoint of a run directory, or a step directory, on one device.

  Raises:
    checkpoint.CheckpointError, DataError
  """
  run = config.from_dict(config.Run, checkpoint.read_run_config(path))
  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
  step, params = checkpoint.restore_params(path, step_lib.abstract_state(run, mesh).params)
  return Trained(run, step, params, mesh, tokenizers.load(run.data.tokenizer))


def console(main: Callable[[list[str] | None], int]) -> None:
  """Runs a tool's main; what a user can mend is one line and exit code 2."""
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  try:
    code = main(None)
  except (checkpoint.CheckpointError, config.ConfigError, DataError, report.ReportError) as error:
    print(f"error: {error}", file=sys.stderr)
    code = 2
  sys.exit(code)
