"""One host's copies of the state: how their bytes are cut into segments and chunks, their digests, the parity beside them."""

from __future__ import annotations

import base64
import threading
from typing import NamedTuple

import numpy as np

from moe.snapshot import memory
from moe.snapshot import parity


class Geometry(NamedTuple):
  """How the bytes of a group's hosts are cut; the same on all of its hosts."""

  code: parity.Code
  chunk: int  # bytes
  chunks: int  # of a segment

  @property
  def segment(self) -> int:
    return self.chunk * self.chunks

  @property
  def data_bytes(self) -> int:
    return self.code.k * self.segment

  @property
  def parity_bytes(self) -> int:
    return self.code.m * self.segment


def geometry(code: parity.Code, largest: int) -> Geometry:
  """For a group whose largest host has that many bytes; smaller ones are padded with zeros."""
  segment = -(-max(largest, 1) // code.k)
  chunk = min(memory.MAX_CHUNK, -(-segment // memory.PAGE) * memory.PAGE)
  return Geometry(code, chunk, -(-segment // chunk))


class GivenUp(Exception):
  """The step is not wanted any more."""


class Copy:
  """One step of this host: its data, the parity it holds, and what the members said of theirs."""

  def __init__(self, shape: Geometry, name: str):
    self.shape = shape
    self.data = memory.Region(f"{name}-data", shape.data_bytes)
    self.parity = memory.Region(f"{name}-parity", shape.parity_bytes) if shape.code.m else None
    self.locks = [threading.Lock() for _ in range(32)]
    self.epoch = 0
    self.reset(-1)

  def reset(self, step: int) -> None:
    rows, chunks = self.shape.code.m, self.shape.chunks
    self.step, self.status, self.failure = step, "empty", None
    self.epoch += 1  # whoever works on the old step notices
    self.header, self.table, self.seal = "", np.zeros(0, np.uint64), 0
    self.records: dict[int, tuple[str, np.ndarray]] = {}  # place of a member -> header, digests
    self.arrived = np.zeros((rows, chunks), np.int64)
    self.folds = np.zeros((rows, chunks, 64), np.uint8)
    self.parity_table = np.zeros((rows, chunks), np.uint64)
    self.verified = np.zeros((rows, chunks), bool)

  def chunk(self, segment: int, i: int) -> np.ndarray:
    begin = segment * self.shape.segment + i * self.shape.chunk
    return self.data.bytes[begin : begin + self.shape.chunk]

  def parity_chunk(self, row: int, i: int) -> np.ndarray:
    begin = row * self.shape.segment + i * self.shape.chunk
    return self.parity.bytes[begin : begin + self.shape.chunk]

  def fold_in(self, held: int, i: int, coefficient: int, data: np.ndarray, fold: np.ndarray, epoch: int) -> bool | None:
    """Adds a member's chunk to the parity held here.

    Returns:
      None while members are missing; with the last one, whether the parity as written folds to the sum of the folds.

    Raises:
      GivenUp: the copy is of another step by now.
    """
    target = self.parity_chunk(held, i)
    with self.locks[(held * self.shape.chunks + i) % len(self.locks)]:
      if self.epoch != epoch:
        raise GivenUp("the step was given up")
      if not self.arrived[held, i]:
        target[:] = 0
      parity.accumulate(target, coefficient, data)
      parity.accumulate(self.folds[held, i], coefficient, fold)
      self.arrived[held, i] += 1
      if self.arrived[held, i] < self.shape.code.k:
        return None
      self.parity_table[held, i] = memory.digest(target)
      return np.array_equal(parity.fold(target), self.folds[held, i])

  def set_parity(self, held: int, i: int, data: np.ndarray, epoch: int) -> None:
    """Parity that was computed elsewhere. Raises GivenUp."""
    with self.locks[(held * self.shape.chunks + i) % len(self.locks)]:
      if self.epoch != epoch:
        raise GivenUp("the step was given up")
      self.parity_chunk(held, i)[:] = data
      self.parity_table[held, i], self.verified[held, i] = memory.digest(data), True

  def set_record(self, header: str, table: np.ndarray) -> None:
    self.header, self.table, self.seal = header, table, seal(header, table)

  def close(self) -> None:
    for region in (self.data, self.parity):
      if region:
        region.close()


def seal(header: str, table: np.ndarray) -> int:
  """Digest of a header and a digest table."""
  return memory.digest(header.encode() + table.tobytes())


def text_of(table: np.ndarray) -> str:
  return base64.b64encode(table.astype("<u8").tobytes()).decode()


def table_of(text: str) -> np.ndarray:
  return np.frombuffer(base64.b64decode(text), "<u8").astype(np.uint64)
