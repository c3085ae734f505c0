"""Files of JSON lines: appended locally, numbered parts on object stores, which cannot append.

The sinks write for an `outlet.Outlet`, which has the thread, the queue and the tries.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import time
from typing import Any, NamedTuple
from collections.abc import Callable, Iterable, Iterator

from etils import epath

from moe import outlet

_WAITING_BYTES = 64 << 20  # of records that wait for the disk: 100,000 steps of scalars. The oldest are dropped beyond it
_PART_SECONDS = 20.0  # that records wait to be written together, on an object store
_READERS = 16  # parts that are fetched at once, and the most that are held


def read(path) -> Iterator[dict[str, Any]]:
  """Yields the records of a file and of its parts, and holds one line, or on an object store a few parts, at a time.

  Lines that are no record are passed over: one that a kill cut short, or that a disk damaged.
  """
  parts = _parts(path)
  if is_local(path):
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


def read_end(path, most_bytes: int = 1 << 20) -> Iterator[dict[str, Any]]:
  """The records in the last bytes of a local file; none where there is no file."""
  path = pathlib.Path(path)
  if not path.exists():
    return
  with path.open("rb") as lines:
    start = max(path.stat().st_size - most_bytes, 0)
    lines.seek(start)
    if start:
      lines.readline()  # the end of a line, most likely
    yield from _records(lines)


def read_one(path) -> dict[str, Any] | None:
  """The record of a file that a `Replacement` wrote; None where there is none, or a damaged one."""
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


def is_local(path) -> bool:
  """Whether a file can be appended to; object stores have addresses such as gs://."""
  return "://" not in str(path)


def version(path) -> list:
  """Changes when records are written."""
  path = epath.Path(path)
  return [path.stat().length] if path.exists() else _parts(path)


def _parts(path) -> list[epath.Path]:
  path = epath.Path(path)
  # pathlib's pattern is relative: brackets in the name of the folder are no pattern there, in etils' they are.
  folder = pathlib.Path(path.parent) if is_local(path) else path.parent
  numbered = folder.glob(f"{path.stem}-{'[0-9]' * 20}.jsonl")
  return ([path] if path.exists() else []) + sorted(epath.Path(part) for part in numbered)


class Replacement(NamedTuple):
  """The text of a file that holds one record."""

  path: epath.Path
  text: str


def open_outlet(path: epath.Path, on_news: Callable[[outlet.News], None]) -> outlet.Outlet:
  """Takes lines (str) and Replacements for a file of records and the folder about it."""
  one = sink(path)  # for all tries: on a store they go under one name
  linger_seconds = 0.0 if is_local(path) else _PART_SECONDS
  return outlet.Outlet(path.name, lambda: one, on_news=on_news, capacity=_WAITING_BYTES, weigh=_weight,
                       linger_seconds=linger_seconds)


def sink(path: epath.Path) -> LocalSink | StoreSink:
  """What an outlet of records writes with."""
  return LocalSink(path) if is_local(path) else StoreSink(path)


def _weight(item: str | Replacement) -> int:
  """Bytes in memory, nearly."""
  return len(item.text if isinstance(item, Replacement) else item)


class LocalSink:
  """Appends lines; several processes may append to one file. What is written is taken out of `items`."""

  def __init__(self, path: epath.Path):
    self._path = path

  def write(self, items: collections.deque) -> None:
    while items:
      if isinstance(items[0], Replacement):
        _replace(*items[0])
        items.popleft()
      else:
        self._append(items)

  def _append(self, items: collections.deque) -> None:
    """The lines up to the next Replacement."""
    written = []
    file = open(self._path, "a+b", buffering=0)
    try:
      # A kill, or a full disk, may have cut the last line.
      if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
          file.write(b"\n")
      while items and not isinstance(items[0], Replacement):
        rest = items[0].encode() + b"\n"
        try:
          while rest:  # a disk that fills up takes a part, and raises at the rest
            rest = rest[file.write(rest) :]
        finally:
          if len(rest) <= 1:  # whole but for its end, which the next one writes
            written.append(items.popleft())
    finally:
      try:
        file.close()
      except OSError:  # here a network's disk tells that it did not take the lines after all
        items.extendleft(reversed(written))
        raise

  def close(self) -> None:
    pass


def _replace(path: epath.Path, text: str) -> None:
  """A reader sees the old file or the new one, whole."""
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(path.name + ".new")
  try:
    aside.write_text(text)
    aside.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      aside.unlink(missing_ok=True)  # on a full disk a part of it takes room
    raise


class StoreSink:
  """Writes numbered parts, for object stores cannot append."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._part: epath.Path | None = None

  def write(self, items: collections.deque) -> None:
    """A try that failed goes again under the same name: it may have come through. So `items` are then the same ones."""
    lines = [item for item in items if not isinstance(item, Replacement)]
    if lines:
      self._part = self._part or self._path.parent / f"{self._path.stem}-{time.time_ns():020}.jsonl"
      self._part.write_text("\n".join(lines) + "\n")
      self._part = None
      replacements = [item for item in items if isinstance(item, Replacement)]
      items.clear()
      items.extend(replacements)
    while items:
      path, text = items[0]
      path.write_text(text)
      items.popleft()

  def close(self) -> None:
    pass
