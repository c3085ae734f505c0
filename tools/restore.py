"""A trained model from a run directory, for the tools that compute with it."""

from __future__ import annotations

import logging
from typing import NamedTuple

import jax

from moe import checkpoint
from moe import config
from moe import hugging_face_files
from moe import sharding
from moe import step as step_lib
from moe.data import tokenizers


class Trained(NamedTuple):
  run: config.Run
  step: int
  params: object  # on `mesh`
  mesh: jax.sharding.Mesh  # one device
  tokenizer: tokenizers.Tokenizer


def load(path: str) -> Trained:
  """The newest whole checkpoint of a run directory, or a step directory, on one device.

  Raises:
    checkpoint.CheckpointError, config.ConfigError, records.DataError
  """
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  run = config.from_dict(config.Run, checkpoint.read_run_config(path))
  tokenizer = tokenizers.load(hugging_face_files.tokenizer_of(run, hugging_face_files.run_folder(path)), run.data.bos)
  if tokenizer.vocab_size > run.model.vocab_size:
    raise config.ConfigError(f"the tokenizer {run.data.tokenizer!r} has {tokenizer.vocab_size} ids but the model only "
                             f"{run.model.vocab_size}: it is of another tokenizer")
  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
  step, params = checkpoint.restore_params(path, step_lib.abstract_state(run, mesh).params)
  return Trained(run, step, params, mesh, tokenizer)
