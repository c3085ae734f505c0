"""Evaluation windows: every token of every document is scored exactly once, with at least half a window of context.

A document longer than the window is read in windows that overlap by half; each scores what the one before did not. Several
windows share a row of a batch, told apart by their segment ids, so that short documents do not leave rows empty.
"""

from __future__ import annotations

import bisect
import itertools
from typing import NamedTuple
from collections.abc import Iterator

import numpy as np

from moe.data import embedded
from moe.data import records
from moe.data.tokenizers import Tokenizer

# What waits to be packed: as many windows as fill rows without gaps, in at most 17 bytes a token, so about 70 MB.
_BUFFER_TOKENS = 1 << 22
_BUFFER_WINDOWS = 1 << 13


class Window(NamedTuple):
  """A window of a document, [n], or rows of an evaluation batch, [B, S]; int32, `scored` bool."""

  inputs: np.ndarray
  targets: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  scored: np.ndarray


class _Part(NamedTuple):
  """A window, and the bytes of text that it scores."""

  window: Window
  text_bytes: float

  @property
  def tokens(self) -> int:
    return len(self.window.inputs)


def windows(ids: np.ndarray, eos: int, length: int, bos: int | None = None) -> Iterator[Window]:
  """The windows of one document of ids [n], each of at most `length` tokens; n + 1 targets are scored, the last is eos.

  The first input is bos; None: eos.
  """
  inputs = np.concatenate([[eos if bos is None else bos], ids]).astype(np.int32)
  targets = np.concatenate([ids, [eos]]).astype(np.int32)
  total = len(inputs)
  scored_to = begin = 0
  while scored_to < total:
    end = min(begin + length, total)
    places = np.arange(begin, end)
    yield Window(inputs[begin:end], targets[begin:end], np.ones(end - begin, np.int32), (places - begin).astype(np.int32),
                 places >= scored_to)
    scored_to = end
    begin = end - length // 2


def batches(path: str, split: str, tokenizer: Tokenizer, length: int, batch: int, limit: int | None = None,
            packed: bool = True) -> Iterator[tuple[Window, float]]:
  """Batches of windows of a domain's split, each with the text bytes it scores; the same on every host.

  A document's bytes are spread over its windows by scored tokens, so that a part of a split can be evaluated; over a
  whole split they add up to its bytes exactly. Rows come about in the order of the documents: with a limit, they are the
  split's first documents, as many as the batches have room for.

  Args:
    path: as in config.Domain.
    split: validation | test | train.
    tokenizer: of the model.
    length: S.
    batch: rows; the last batch is filled with padding rows.
    limit: stop after this many batches; None: all.
    packed: several windows share a row; else a row holds one window.

  Raises:
    records.DataError
  """
  parts = _parts(path, split, tokenizer, length)
  rows = packed_rows(parts, length, None if limit is None else limit * batch) if packed else ([part] for part in parts)
  made = 0
  while limit is None or made < limit:
    chunk = list(itertools.islice(rows, batch))
    if not chunk:
      return
    yield _batch(chunk, batch, length), sum(part.text_bytes for row in chunk for part in row)
    made += 1


def _parts(path: str, split: str, tokenizer: Tokenizer, length: int) -> Iterator[_Part]:
  """All windows of a split, in order."""
  for document in records.read_documents(embedded.resolve(path), split):
    ids = tokenizer.encode(document.text)
    bytes_per_token = len(document.text.encode()) / (len(ids) + 1)
    for window in windows(ids, tokenizer.eos, length, tokenizer.bos):
      yield _Part(window, bytes_per_token * int(window.scored.sum()))


def packed_rows(parts: Iterator[_Part], length: int, most: int | None = None) -> Iterator[list[_Part]]:
  """Rows of windows that together have at most `length` tokens, none cut.

  Windows wait in a buffer and are packed by best fit, the largest first. The fuller half of the rows goes out; the windows of
  the others are packed anew beside those that follow.

  Args:
    parts: windows, in order; read only as far as there is room for in the buffer or in the rows that are left.
    length: tokens of a row.
    most: rows, at most; None: all.
  """
  waiting: list[_Part] = []
  while most is None or most > 0:
    # A limited evaluation reads no further than its rows could hold: else short windows from further on would be taken to
    # fill gaps, and the score would be one of short documents.
    room = _BUFFER_TOKENS if most is None else min(_BUFFER_TOKENS, most * length)
    tokens = sum(part.tokens for part in waiting)
    exhausted = False
    while tokens < room and len(waiting) < _BUFFER_WINDOWS and not exhausted:
      part = next(parts, None)
      exhausted = part is None
      if not exhausted:
        waiting.append(part)
        tokens += part.tokens
    last = exhausted or (most is not None and tokens >= most * length)
    rows = _best_fit(np.array([part.tokens for part in waiting], np.int64), length)
    if not last:
      rows.sort(key=lambda row: -sum(waiting[i].tokens for i in row))
      rows = rows[: -(-len(rows) // 2)]
    rows = sorted(sorted(row) for row in rows)[:most]  # in the order of the documents, by their first windows
    for row in rows:
      yield [waiting[i] for i in row]
    if last:
      return
    gone = {i for row in rows for i in row}
    waiting = [part for i, part in enumerate(waiting) if i not in gone]
    most = None if most is None else most - len(rows)


def _best_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
  """Rows of indices of `sizes` [n], none with a sum above `length`: the largest first, each where least room is left over."""
  rows: list[list[int]] = []
  rooms: list[tuple[int, int]] = []  # (room that is left, row), ascending; full rows are not in it
  for i in np.argsort(-sizes, kind="stable").tolist():
    size = int(sizes[i])
    at = bisect.bisect_left(rooms, (size, -1))
    if at < len(rooms):
      room, row = rooms.pop(at)
      rows[row].append(i)
    else:
      room, row = length, len(rows)
      rows.append([i])
    if room > size:
      bisect.insort(rooms, (room - size, row))
  return rows


def _batch(rows: list[list[_Part]], batch: int, length: int) -> Window:
  """The rows as arrays [batch, length]; segments are numbered from 1 in each row, 0 is padding."""
  fields = Window(*(np.zeros((batch, length), dtype) for dtype in (np.int32, np.int32, np.int32, np.int32, bool)))
  for i, row in enumerate(rows):
    begin = 0
    for segment, part in enumerate(row, start=1):
      window = part.window._replace(segment_ids=segment)
      for field, values in zip(fields, window):
        field[i, begin : begin + part.tokens] = values
      begin += part.tokens
  return fields
