"""Evaluation windows: every token of every document is scored exactly once, with at least half a window of context.

A document longer than the window is read in windows that overlap by half; each scores what the one before did not.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple
from collections.abc import Iterator

import numpy as np

from moe.data import embedded
from moe.data import records
from moe.data.tokenizers import Tokenizer


class Window(NamedTuple):
  """Rows of one evaluation batch, each [B, S]; int32, `scored` bool."""

  inputs: np.ndarray
  targets: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  scored: np.ndarray


def windows(ids: np.ndarray, eos: int, length: int) -> Iterator[Window]:
  """The windows of one document [n] of ids, each field [S]; n + 1 targets are scored, the last is eos."""
  inputs, targets = np.concatenate([[eos], ids]), np.concatenate([ids, [eos]])
  total, scored_to, begin = len(inputs), 0, 0
  while scored_to < total:
    end = min(begin + length, total)
    fields = np.zeros((4, length), np.int32)
    fields[:, : end - begin] = inputs[begin:end], targets[begin:end], np.ones(end - begin), np.arange(end - begin)
    place = begin + np.arange(length)
    yield Window(*fields, (place >= scored_to) & (place < total))
    scored_to, begin = end, end - length // 2


def batches(path: str, split: str, tokenizer: Tokenizer, length: int, batch: int, limit: int | None = None
            ) -> Iterator[tuple[Window, float]]:
  """Batches of windows of a domain's split, in order, each with the text bytes it scores.

  A document's bytes are spread over its windows by scored tokens, so that a part of a split can be evaluated; over a
  whole split they add up to its bytes exactly.

  Args:
    path: as in config.Domain.
    split: validation | test | train.
    tokenizer: of the model.
    length: S.
    batch: rows; the last batch is filled with padding rows.
    limit: stop after this many batches; None: all.

  Raises:
    records.DataError
  """
  def rows():
    for document in records.read_documents(embedded.resolve(path), split):
      ids = tokenizer.encode(document.text)
      bytes_per_token = len(document.text.encode()) / (len(ids) + 1)
      for part in windows(ids, tokenizer.eos, length):
        yield part, bytes_per_token * int(part.scored.sum())

  empty = Window(*np.zeros((4, length), np.int32), np.zeros(length, bool))
  iterator, made = rows(), 0
  while (limit is None or made < limit) and (chunk := list(itertools.islice(iterator, batch))):
    filled = [part for part, _ in chunk] + [empty] * (batch - len(chunk))
    yield Window(*(np.stack(field) for field in zip(*filled))), sum(size for _, size in chunk)
    made += 1
