"""Files of JSON lines: appended locally, numbered parts on object stores, which cannot append."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import threading
import time
from typing import Any
from collections.abc import Iterator

from etils import epath


def read(path) -> Iterator[dict[str, Any]]:
  """The records of a file and of its parts; a last line cut short by a kill is passed over."""
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # parts of a long run are many, and each is a request
    for text in pool.map(lambda part: part.read_text(), _parts(path)):
      for line in text.splitlines():
        with contextlib.suppress(ValueError):
          yield json.loads(line)


def version(path) -> list:
  """Changes when records are written."""
  path = epath.Path(path)
  return [path.stat().length] if path.exists() else _parts(path)


def _parts(path) -> list[epath.Path]:
  path = epath.Path(path)
  return ([path] if path.exists() else []) + sorted(path.parent.glob(f"{path.stem}-{'[0-9]' * 20}.jsonl"))


class Writer:
  """Appends records; several processes may append to one file.

  On an object store a thread writes a part some seconds after the first record that waits, or when `flush` says so: training
  does not wait for the network, and what a failed write was to carry goes with the next. A process that is killed takes what
  waits with it.
  """

  def __init__(self, path: epath.Path, seconds: float = 20.0):
    """`seconds`: how long records may wait to be written together, on an object store."""
    self._path, self._seconds = path, seconds
    self._local = "://" not in str(path)
    self._pending: list[str] = []
    if self._local:
      if path.exists() and not ("\n" + path.read_text()).endswith("\n"):
        self._pending.append("")  # a kill cut the last line; end it
      return
    self._changed = threading.Condition()  # guards the fields below and _pending
    self._urgent, self._closed, self._failure = False, False, None
    self._thread = threading.Thread(target=self._send, daemon=True, name="records")
    self._thread.start()

  def write(self, record: dict[str, Any]) -> None:
    """Raises OSError: this record, or on an object store an earlier one, could not be written."""
    if self._local:
      self._pending.append(json.dumps(record))
      text, self._pending = "\n".join(self._pending) + "\n", []
      with self._path.open("a") as file:
        file.write(text)
      return
    with self._changed:
      self._pending.append(json.dumps(record))
      failure, self._failure = self._failure, None
      self._changed.notify()
    if failure:
      raise OSError(failure)

  def flush(self) -> None:
    """What waits is written now, by the thread."""
    if not self._local:
      with self._changed:
        self._urgent = bool(self._pending)
        self._changed.notify()

  def close(self, seconds: float = 60.0) -> None:
    """Waits until all is written. Raises OSError: it could not be."""
    if self._local:
      return
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._thread.join(seconds)
    if self._pending:
      raise OSError(f"{len(self._pending)} records are lost: {self._failure or 'the store does not answer'}")

  def _send(self) -> None:
    last, lines, part = False, [], None
    while not last:
      with self._changed:
        self._changed.wait_for(lambda: self._pending or self._closed)
        self._changed.wait_for(lambda: self._urgent or self._closed, self._seconds)
        last, self._urgent = self._closed, False
        if part is None or last:  # else the same again under the same name: the failed write may have come through
          lines = list(self._pending)
      if not lines:
        continue
      try:
        part = part or self._path.parent / f"{self._path.stem}-{time.time_ns():020}.jsonl"
        part.write_text("\n".join(lines) + "\n")
      except Exception as error:  # of whatever client the store has
        self._failure = f"{type(error).__name__}: {error}"
      else:
        with self._changed:
          del self._pending[: len(lines)]
          self._failure = part = None
