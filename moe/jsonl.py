"""Files of JSON lines: appended locally, numbered parts on object stores, which cannot append."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import threading
import time
from typing import Any
from collections.abc import Iterable, Iterator

from etils import epath

_READERS = 16  # parts that are fetched at once, and the most that are held


def read(path) -> Iterator[dict[str, Any]]:
  """Yields the records of a file and of its parts, and holds one line, or on an object store a few parts, at a time.

  Lines that are no record are passed over: one that a kill cut short, or that a disk damaged.
  """
  parts = _parts(path)
  if _is_local(path):
    for part in parts:
      with part.open("rb") as lines:
        yield from _records(lines)
    return
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:  # parts of a long run are many, and each is a request
    requests = iter(parts)
    fetching = collections.deque(pool.submit(part.read_bytes) for part in itertools.islice(requests, _READERS))
    while fetching:
      content = fetching.popleft().result()
      fetching.extend(pool.submit(part.read_bytes) for part in itertools.islice(requests, 1))
      yield from _records(content.split(b"\n"))


def read_one(path) -> dict[str, Any] | None:
  """The record of a file that `Writer.replace` wrote; None where there is none, or a damaged one."""
  path = epath.Path(path)
  return next(_records([path.read_bytes()]), None) if path.exists() else None


def _records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
  for line in lines:
    try:
      record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
      continue
    if isinstance(record, dict):  # the rest of a cut line may be a number
      yield record


def _is_local(path) -> bool:
  return "://" not in str(path)


def version(path) -> list:
  """Changes when records are written."""
  path = epath.Path(path)
  return [path.stat().length] if path.exists() else _parts(path)


def _parts(path) -> list[epath.Path]:
  path = epath.Path(path)
  # pathlib's pattern is relative: brackets in the name of the folder are no pattern there, in etils' they are.
  folder = pathlib.Path(path.parent) if _is_local(path) else path.parent
  numbered = folder.glob(f"{path.stem}-{'[0-9]' * 20}.jsonl")
  return ([path] if path.exists() else []) + sorted(epath.Path(part) for part in numbered)


def _ends_within_a_line(path: epath.Path) -> bool:
  if not path.exists() or not path.stat().length:
    return False
  with path.open("rb") as file:
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


class Writer:
  """Appends records; several processes may append to one file.

  On an object store a thread writes a part some seconds after the first record that waits, or when `flush` says so: training
  does not wait for the network, and what a failed write was to carry goes with the next. A process that is killed takes what
  waits with it.
  """

  def __init__(self, path: epath.Path, seconds: float = 20.0):
    """`seconds`: how long records may wait to be written together, on an object store."""
    self._path, self._seconds = path, seconds
    self._local = _is_local(path)
    self._pending: list[str] = []
    if self._local:
      self._end_line_first = _ends_within_a_line(path)  # a kill cut the last line
      return
    self._changed = threading.Condition()  # guards the fields below and _pending
    self._replacements: dict[epath.Path, str] = {}  # what waits to be written by `replace`
    self._urgent, self._closed, self._failure = False, False, None
    self._thread = threading.Thread(target=self._send, daemon=True, name="records")
    self._thread.start()

  def write(self, record: dict[str, Any]) -> None:
    """Raises OSError: this record, or on an object store an earlier one, could not be written."""
    line = json.dumps(record)
    if self._local:
      text = f"\n{line}\n" if self._end_line_first else f"{line}\n"
      self._end_line_first = True  # a full disk may take a part of the line
      with self._path.open("a") as file:
        file.write(text)
      self._end_line_first = False
      return
    with self._handing_over():
      self._pending.append(line)

  def replace(self, path: epath.Path, record: dict[str, Any]) -> None:
    """Makes a file that holds this record alone, in place of what it held; a reader sees the one or the other, whole.

    On an object store the thread does it, after it has written the records before.

    Raises:
      OSError: as `write`
    """
    line = json.dumps(record)
    if self._local:
      path.parent.mkdir(parents=True, exist_ok=True)
      aside = path.with_name(path.name + ".new")
      aside.write_text(line)
      aside.replace(path)
      return
    with self._handing_over():
      self._replacements[path] = line

  def flush(self) -> None:
    """What waits is written now, by the thread."""
    if not self._local:
      with self._changed:
        self._urgent = bool(self._pending or self._replacements)
        self._changed.notify()

  def close(self, seconds: float = 60.0) -> None:
    """Waits until all is written. Raises OSError: it could not be."""
    if self._local:
      return
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._thread.join(seconds)
    lost = len(self._pending) + len(self._replacements)
    if lost:
      raise OSError(f"{lost} records are lost: {self._failure or 'the store does not answer'}")

  @contextlib.contextmanager
  def _handing_over(self):
    """Wakes the thread up, and raises what it failed at since the last time."""
    with self._changed:
      yield
      failure, self._failure = self._failure, None
      self._changed.notify()
    if failure:
      raise OSError(failure)

  def _send(self) -> None:
    last, lines, part = False, [], None
    while not last:
      with self._changed:
        self._changed.wait_for(lambda: self._pending or self._replacements or self._closed)
        self._changed.wait_for(lambda: self._urgent or self._closed, self._seconds)
        last, self._urgent = self._closed, False
        if part is None or last:  # else the same again under the same name: the failed write may have come through
          lines = list(self._pending)
        replacements = dict(self._replacements)
      try:
        if lines:
          part = part or self._path.parent / f"{self._path.stem}-{time.time_ns():020}.jsonl"
          part.write_text("\n".join(lines) + "\n")
          self._written(lines)
          lines, part = [], None
        for path, line in replacements.items():
          path.write_text(line)
          self._replaced(path, line)
      except Exception as error:  # of whatever client the store has
        self._failure = f"{type(error).__name__}: {error}"

  def _written(self, lines: list[str]) -> None:
    with self._changed:
      del self._pending[: len(lines)]
      self._failure = None

  def _replaced(self, path: epath.Path, line: str) -> None:
    with self._changed:
      if self._replacements[path] is line:  # else a newer one came meanwhile
        del self._replacements[path]
      self._failure = None
