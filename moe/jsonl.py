"""Files of JSON lines: appended locally, numbered parts on object stores, which cannot append."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any
from collections.abc import Iterator

from etils import epath


def read(path) -> Iterator[dict[str, Any]]:
  """The records of a file and of its parts; a last line cut short by a kill is passed over."""
  path = epath.Path(path)
  for part in [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*.jsonl")):
    for line in part.read_text().splitlines():
      with contextlib.suppress(ValueError):
        yield json.loads(line)


class Writer:
  """Appends records; several processes may append to one file."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._local = "://" not in str(path)
    self._pending: list[str] = []
    if self._local and path.exists() and not ("\n" + path.read_text()).endswith("\n"):
      self._pending.append("")  # a kill cut the last line; end it

  def write(self, record: dict[str, Any]) -> None:
    self._pending.append(json.dumps(record))
    if self._local or len(self._pending) >= 100:
      self.flush()

  def flush(self) -> None:
    if not self._pending:
      return
    text = "\n".join(self._pending) + "\n"
    self._pending = []
    if self._local:
      with self._path.open("a") as file:
        file.write(text)
    else:
      part = self._path.parent / f"{self._path.stem}-{time.time_ns():020}.jsonl"
      part.write_text(text)
