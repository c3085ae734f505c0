"""Everything that a run will read, opened before its first step: by the trainer, and by whoever only wants to know whether it
would start.

What is wrong with a mesh, a tokenizer or a split is said here, and not after hours at the first evaluation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe import boards
from moe import config
from moe import sharding
from moe.config import ConfigError
from moe.data import embedded
from moe.data import pipeline
from moe.data import records
from moe.data import tokenizers

_SAMPLED_DOCUMENTS = 32  # of a domain, for its tokens a byte
_MANY_EPOCHS = 4.0  # up to about as many, repeated text is as good as new (arXiv 2305.16264)


class Domain(NamedTuple):
  """What there is to train on of a domain, and how much of it the run takes."""

  name: str
  documents: int
  text_bytes: int
  tokens: float  # estimated from a sample
  tokens_in_run: float

  @property
  def epochs(self) -> float:
    return self.tokens_in_run / self.tokens

  def line(self) -> str:
    return (f"{self.name}: {self.documents:,} documents, {self.text_bytes:,} bytes, about {self.tokens:,.0f} tokens; the run "
            f"takes {self.tokens_in_run:,.0f}: {self.epochs:.2f} epochs")


class Inputs(NamedTuple):
  """What a run reads, opened."""

  tokenizer: tokenizers.Tokenizer
  loader: pipeline.Loader  # of this host's part; nothing is read yet
  evaluated: tuple[config.Domain, ...]  # those that have a validation split
  notes: tuple[str, ...]  # what a person should know before the run starts


def open_inputs(run: config.Run, mesh) -> Inputs:
  """Opens what the run reads, for this process.

  Raises:
    ConfigError: mesh, batch and model do not fit, or the tokenizer has more ids than the model.
    records.DataError: a file is missing or damaged.
  """
  sharding.check_run(run, mesh)
  boards.check(run.observers.wandb, run.observers.mlflow)
  part = sharding.host_part(sharding.batch_sharding(mesh), (run.data.batch_sequences, run.data.sequence_tokens))
  loader = pipeline.Loader(run.data, run.train.seed, *part)
  tokenizer = tokenizers.load(run.data.tokenizer, run.data.bos)
  if tokenizer.vocab_size > run.model.vocab_size:
    raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids but Model.vocab_size = {run.model.vocab_size}; "
                      f"set it to at least {tokenizer.vocab_size}")
  evaluated = tuple(domain for domain in run.data.domains if _has_documents(domain, "validation"))
  notes = [f"domain {domain.name!r} has no validation documents and is left out of the evaluations; build it with a larger "
           "--held_out" for domain in run.data.domains if domain not in evaluated]
  for domain in evaluated:
    records.open_split(embedded.resolve(domain.path), "validation")
  if run.data.tokenizer != "byte":
    texts = [text for domain in run.data.domains for text in _sample(domain)]
    notes += [tokenizers.described(tokenizer), *filter(None, [tokenizers.round_trip(tokenizer, texts, len(texts))])]
  return Inputs(tokenizer, loader, evaluated, tuple(notes))


def domains(run: config.Run, tokenizer: tokenizers.Tokenizer) -> list[Domain]:
  """How much there is of each domain, and how often the run goes through it. Reads a few documents of each.

  Raises:
    records.DataError
  """
  weights = np.array([domain.weight for domain in run.data.domains])
  tokens_in_run = run.tokens_per_step * run.train.steps * weights / weights.sum()
  return [_domain(domain, float(tokens), tokenizer) for domain, tokens in zip(run.data.domains, tokens_in_run)]


def repeats(found: list[Domain]) -> list[str]:
  """A line for each domain that the run goes through so often that it learns it by heart."""
  return [f"domain {domain.name!r} is gone through {domain.epochs:.1f} times: beyond {_MANY_EPOCHS:.0f} repeated text teaches "
          "less than new text; take fewer steps, a smaller weight, or more of it" for domain in found
          if domain.epochs > _MANY_EPOCHS]


def _domain(domain: config.Domain, tokens_in_run: float, tokenizer: tokenizers.Tokenizer) -> Domain:
  split = records.read_manifest(embedded.resolve(domain.path))["splits"]["train"]
  texts = _sample(domain)
  # A document has one token more than its text: the end.
  tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
  tokens_per_byte = tokens / max(sum(len(text.encode()) for text in texts), 1)
  return Domain(domain.name, split["documents"], split["text_bytes"], tokens_per_byte * split["text_bytes"], tokens_in_run)


def _sample(domain: config.Domain) -> list[str]:
  """Texts from all over the training split."""
  source = records.open_split(embedded.resolve(domain.path), "train")
  places = np.unique(np.linspace(0, len(source) - 1, _SAMPLED_DOCUMENTS).astype(int))
  return [records.Document.decode(source[int(place)]).text for place in places]


def _has_documents(domain: config.Domain, split: str) -> bool:
  splits = records.read_manifest(embedded.resolve(domain.path))["splits"]
  return splits.get(split, {}).get("documents", 0) > 0
