"""Documents on disk: ArrayRecord files and a manifest, one directory a domain.

A record is the UTF-8 JSON of a `Document`. The directory of a domain holds `manifest.json` and, for each split, one or
more `<split>-00000-of-00004.arrayrecord`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator

from typing import TYPE_CHECKING

from etils import epath

from moe import hardware
from moe.errors import UserError, storage_errors

if TYPE_CHECKING:
  import grain

# grain and ArrayRecord are imported where they are used: with JAX they take seconds, which processes that only read text lack.
SPLITS = ("train", "validation", "test")
_FORMAT = 1
_READ_AT_ONCE = 128  # records: four times as fast as one by one
_JSON = json.JSONEncoder(ensure_ascii=False)


class DataError(UserError):
  """Data that is missing, damaged or does not fit the config; one line of cause and remedy."""


@dataclasses.dataclass(frozen=True)
class Document:
  text: str
  domain: str
  source: str  # where it came from: a file, a chapter, a line of a file

  def encode(self, text_bytes: int | None = None) -> bytes:
    """The record. `text_bytes`: the text's size in UTF-8, where it is known already."""
    if text_bytes is None:
      text_bytes = len(self.text.encode())
    return _JSON.encode({"text": self.text, "domain": self.domain, "source": self.source, "bytes": text_bytes}).encode()

  @classmethod
  def decode(cls, record: bytes) -> "Document":
    fields = json.loads(record)
    return cls(fields["text"], fields["domain"], fields["source"])


def write_domain(folder: pathlib.Path, documents: dict[str, Iterable[Document]], shards: int = 1) -> dict:
  """Writes a domain's splits and manifest; the folder appears complete or not at all.

  Args:
    folder: must not exist yet.
    documents: split name -> documents, kept in order, dealt to `shards` files in turn.
    shards: files a split.

  Returns:
    The manifest.

  Raises:
    DataError: the folder exists, or cannot be written.
  """
  if folder.exists():
    raise DataError(f"{folder} exists already; remove it or choose another --output")
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
  except OSError as error:
    raise DataError(f"cannot write {folder}: {error}") from error
  try:
    manifest = write_manifest(scratch, {split: _write_split(scratch, split, docs, shards) for split, docs in documents.items()})
    scratch.chmod(0o755)
    os.replace(scratch, folder)
  except (OSError, RuntimeError, UnicodeEncodeError) as error:
    raise DataError(f"cannot write {folder}: {error}") from error
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return manifest


class SplitWriter:
  """Writes the ArrayRecord files of a split, one record at a time, dealt to the files in turn."""

  def __init__(self, paths: list[pathlib.Path], options: str = "group_size:1"):
    """`options`: of ArrayRecord. A group of one record, because the loader reads them in random order."""
    from array_record.python import array_record_module

    self._paths = paths
    self._writers = [array_record_module.ArrayRecordWriter(str(path), options) for path in paths]
    self._counts = [0] * len(paths)
    self.documents = 0

  def write(self, record: bytes) -> None:
    number = self.documents % len(self._paths)
    self._writers[number].write(record)
    self._counts[number] += 1
    self.documents += 1

  def close(self) -> list[dict]:
    """Closes the files; gives their entries in the manifest."""
    self.abandon()
    return [{"name": path.name, "documents": count, "file_bytes": path.stat().st_size, "sha256": sha256(path)}
            for path, count in zip(self._paths, self._counts)]

  def abandon(self) -> None:
    """Closes what is open."""
    writers, self._writers = self._writers, []
    for writer in writers:
      writer.close()


def shard_paths(folder: pathlib.Path, split: str, shards: int) -> list[pathlib.Path]:
  return [folder / f"{split}-{i:05}-of-{shards:05}.arrayrecord" for i in range(shards)]


def write_manifest(folder: pathlib.Path, splits: dict[str, dict]) -> dict:
  """Writes manifest.json of a domain's splits, each {"documents", "text_bytes", "files": entries}."""
  manifest = {"format": _FORMAT, "splits": splits}
  (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
  return manifest


def _write_split(folder: pathlib.Path, split: str, documents: Iterable[Document], shards: int) -> dict:
  writer, text_bytes = SplitWriter(shard_paths(folder, split, shards)), 0
  try:
    for document in documents:
      writer.write(document.encode())
      text_bytes += len(document.text.encode())
  finally:
    writer.abandon()
  return {"documents": writer.documents, "text_bytes": text_bytes, "files": writer.close()}


def sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def fetch(url: str) -> pathlib.Path:
  """A copy of an object store's domain in the cache folder ($MOE_CACHE), every file compared with its digest; made once.

  ArrayRecord reads files at random places, so they must be local. What does not fit is for a mount (gcsfuse), by its folder.
  A copy that was begun is gone on with; while the store does not answer, the newest copy there is serves.

  Raises:
    DataError: there is no domain, it does not fit, or it arrives damaged.
  """
  cache = hardware.cache_folder()
  newest = cache / f"data-of-{hashlib.sha256(url.encode()).hexdigest()[:16]}"  # names the copy
  try:
    text = (epath.Path(url) / "manifest.json").read_text()
  except (*storage_errors(), ImportError) as error:
    if not isinstance(error, FileNotFoundError) and newest.exists() and (cache / newest.read_text()).exists():
      return cache / newest.read_text()
    raise DataError(f"{url} is not a data directory: its manifest.json cannot be read: {error}") from error
  manifest = _parsed(url, text)
  folder = cache / f"data-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
  try:
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{folder.name}.lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # one process of this machine
      if not folder.exists():
        _fetch_files(url, manifest, text, folder)
      newest.write_text(folder.name)
  except (*storage_errors(), ImportError) as error:
    raise DataError(f"{url} cannot be fetched: {error}") from error
  return folder


def _fetch_files(url: str, manifest: dict, text: str, folder: pathlib.Path) -> None:
  part = folder.with_name(f".{folder.name}.part")
  part.mkdir(exist_ok=True)
  files = [entry for split in manifest["splits"].values() for entry in split["files"]
           if not (part / entry["name"]).exists() or sha256(part / entry["name"]) != entry["sha256"]]
  size, free = sum(entry["file_bytes"] for entry in files), shutil.disk_usage(part).free
  if size > free:
    raise DataError(f"{url} has {size / 1e9:.1f} GB, {part.parent} has {free / 1e9:.1f} GB free; set MOE_CACHE to a larger "
                    "disk, or mount the bucket (gcsfuse) and give the mounted folder")

  def get(entry):
    with epath.Path(f"{url}/{entry['name']}").open("rb") as source, open(part / entry["name"], "wb") as file:
      shutil.copyfileobj(source, file, 16 << 20)
    if sha256(part / entry["name"]) != entry["sha256"]:
      raise DataError(f"{url}/{entry['name']} does not have the digest its manifest says: it was changed or arrived damaged")

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(get, files))
  (part / "manifest.json").write_text(text)
  os.replace(part, folder)


def read_manifest(folder: pathlib.Path) -> dict:
  """The manifest of a domain.

  Raises:
    DataError: there is none, or it is not one of ours.
  """
  path = folder / "manifest.json"
  try:
    return _parsed(path, path.read_text())
  except FileNotFoundError as error:
    raise DataError(f"{folder} is not a data directory: {path} is missing; make one with "
                    "python -m tools.build_data") from error
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"{path} cannot be read: {error}") from error


def _parsed(path, text: str) -> dict:
  try:
    manifest = json.loads(text)
  except ValueError as error:
    raise DataError(f"{path} cannot be read: {error}") from error
  if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT or "splits" not in manifest:
    found = manifest.get("format") if isinstance(manifest, dict) else manifest
    raise DataError(f"{path} has format {found!r}, this version reads {_FORMAT}; build the data again")
  return manifest


def open_split(folder: pathlib.Path, split: str) -> grain.sources.ArrayRecordDataSource:
  """Random access to the records of a split, after checking the files against the manifest's sizes.

  Raises:
    DataError: a missing, truncated or unreadable file, or a split without documents.
  """
  manifest = read_manifest(folder)
  if split not in manifest["splits"]:
    raise DataError(f"{folder} has no split {split!r}; it has {', '.join(manifest['splits'])}")
  paths = []
  for entry in manifest["splits"][split]["files"]:
    path = folder / entry["name"]
    try:
      size = path.stat().st_size
    except OSError as error:
      raise DataError(f"data file {path} cannot be read: {error.strerror}") from error
    if size != entry["file_bytes"]:
      raise DataError(f"data file {path} has {size} bytes, its manifest says {entry['file_bytes']}: it is truncated or "
                      "was changed; build the data again")
    if entry["documents"]:
      paths.append(str(path))
  if not paths:
    raise DataError(f"{folder} split {split!r} holds no documents")
  import grain

  try:
    return grain.sources.ArrayRecordDataSource(paths)
  except (OSError, RuntimeError) as error:
    raise DataError(f"data file {', '.join(paths)} cannot be read: {error or 'not an ArrayRecord file'}") from error


def read_documents(folder: pathlib.Path, split: str) -> Iterator[Document]:
  """The documents of a split, in order.

  Raises:
    DataError
  """
  source = open_split(folder, split)
  for begin in range(0, len(source), _READ_AT_ONCE):
    numbers = range(begin, min(begin + _READ_AT_ONCE, len(source)))
    try:
      contents = source.__getitems__(numbers)
    except (RuntimeError, ValueError):
      contents = (source[i] for i in numbers)  # one by one, so that the one which cannot be read is named
    number = begin
    try:
      for content in contents:
        yield Document.decode(content)
        number += 1
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
      raise DataError(f"record {number} of {folder}/{split} cannot be read: {error}; build the data again") from error
