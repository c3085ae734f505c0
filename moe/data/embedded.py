"""The corpora that need no download: the King James Bible, and the standard library of the running Python.

They are turned into ordinary domain directories once, in a cache folder ($MOE_CACHE, else ~/.cache/moe).
"""

from __future__ import annotations

import hashlib
import itertools
import lzma
import os
import pathlib
import re
import sys
import sysconfig
from collections.abc import Iterator

from moe import hardware
from moe.data import records
from moe.data.records import DataError, Document

_PREFIX = "embedded:"
_KJV_SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"


def resolve(path: str) -> pathlib.Path:
  """The directory of a domain's path; builds an embedded corpus, or fetches one from an object store, the first time.

  Raises:
    DataError: unknown embedded corpus, the cache cannot be written, or as `records.fetch`.
  """
  if not path.startswith(_PREFIX):
    return records.fetch(path) if "://" in path else pathlib.Path(os.path.expanduser(path))
  name = path.removeprefix(_PREFIX)
  if name not in _CORPORA:
    raise DataError(f"there is no embedded corpus {name!r}; there are {', '.join(_CORPORA)}")
  version, documents = _CORPORA[name]
  folder = hardware.cache_folder() / f"{name}-{version()}"
  if not folder.exists():
    try:
      records.write_domain(folder, documents())
    except DataError as error:
      if not folder.exists():  # else another process was faster
        raise DataError(f"{error}; set MOE_CACHE to a folder that can be written") from error
  return folder


def kjv_text() -> str:
  """The whole text, checked against its digest."""
  data = lzma.decompress((pathlib.Path(__file__).parent / "corpora" / "kjv.txt.xz").read_bytes())
  if hashlib.sha256(data).hexdigest() != _KJV_SHA256:
    raise DataError("the embedded King James text is damaged; install the package again")
  return data.decode()


def _kjv() -> dict[str, list[Document]]:
  """Chapters. The last 5% of the verses of each book are test, the 5% before validation."""
  splits = {split: [] for split in records.SPLITS}
  verses = [(re.match(r"(\d?[A-Za-z]+)(\d+):", line), line) for line in kjv_text().splitlines(keepends=True)]
  for _, book in itertools.groupby(verses, lambda verse: verse[0].group(1)):
    book = list(book)
    cuts = (0, int(len(book) * 0.90), int(len(book) * 0.95), len(book))
    for split, begin, end in zip(records.SPLITS, cuts, cuts[1:]):
      for chapter, lines in itertools.groupby(book[begin:end], lambda verse: verse[0].group(0)[:-1]):
        splits[split].append(Document("".join(line for _, line in lines), "kjv", f"kjv/{chapter}"))
  return splits


def _python() -> dict[str, Iterator[Document]]:
  """Source files without tests; of every 100 files one is validation and one test."""
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "ensurepip"}
  paths = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts[:-1])]
  chosen = {"validation": paths[49::100], "test": paths[99::100]}
  held_out = set(chosen["validation"] + chosen["test"])
  chosen["train"] = [p for p in paths if p not in held_out]

  def read(paths):
    for path in paths:
      try:
        text = path.read_text(encoding="utf-8")
      except (OSError, UnicodeDecodeError):
        continue  # a few files of the library are in other encodings on purpose
      if text:
        yield Document(text, "python", str(path.relative_to(root)))

  return {split: read(chosen[split]) for split in records.SPLITS}


_CORPORA = {
    "kjv": (lambda: _KJV_SHA256[:12], _kjv),
    "python": (lambda: "{}.{}.{}".format(*sys.version_info), _python),
}
