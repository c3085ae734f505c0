"""What is in a checkpoint's files, read in blocks and without JAX.

A `Source` is the arrays of one place: an Orbax item (`<step>/state`), a directory of safetensors, the committed snapshot of a
live run (`snapshot/reader.py`). `find` takes a path at any level.

`python -m moe.stored RUN/checkpoints/STEP [PART PARTS]` compares every leaf with its digest. The trainer starts it after each
save, a part on every host; only a checkpoint that reads back is good.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import contextlib
import fnmatch
import functools
import itertools
import json
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from etils import epath
import ml_dtypes
import numpy as np
import tensorstore as ts

from moe.errors import UserError, storage_errors
from moe.run_dir import absolute

COMMITTED = "commit_success.txt"  # Orbax's mark of a whole checkpoint on an object store
FORMAT = 1  # of our checkpoints; a higher one is refused
_BLOCK_BYTES = 64 << 20  # read at a time
_DIGEST_ELEMENTS = 4 << 20  # digested at a time


class Unreadable(UserError):
  """The files are missing, damaged or not a checkpoint."""


class Leaf(NamedTuple):
  name: str  # path entries joined by dots
  shape: tuple[int, ...]
  dtype: str
  chunk: tuple[int, ...]  # the least that is read at once
  sharding: str = ""  # when it was saved

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    return self.size * dtype_of(self.dtype).itemsize


class Source(Protocol):
  kind: str
  leaves: dict[str, Leaf]  # sorted by name

  def read(self, name: str, begin: tuple[int, ...], end: tuple[int, ...]) -> np.ndarray:
    """The block [begin, end) of a leaf. Raises Unreadable."""


def listed(folder, pattern: str) -> list[epath.Path]:
  """What in a folder has a name like the pattern, sorted. Unlike `glob` of etils it takes brackets in the name of the folder
  for what they are."""
  folder = epath.Path(folder)
  return sorted(path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, pattern)) if folder.is_dir() else []


def dtype_of(name: str) -> np.dtype:
  return np.dtype(getattr(ml_dtypes, name, name))


# --------------------------------------------------------------------------------------------------------------- Orbax


class Orbax:
  """The arrays of an Orbax item, OCDBT or one directory a leaf, zarr 2 or 3."""

  kind = "orbax"

  def __init__(self, folder):
    self._folder = absolute(folder)
    self._context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 32 << 20}})  # its directories, not the arrays

  @functools.cached_property
  def leaves(self) -> dict[str, Leaf]:
    found, shardings = {}, self._shardings()
    for name, array in self._opened.items():
      found[name] = Leaf(name, tuple(array.shape), array.dtype.name, tuple(array.chunk_layout.read_chunk.shape or ()),
                         shardings.get(name, ""))
    return found

  def read(self, name, begin, end):
    where = tuple(slice(b, e) for b, e in zip(begin, end))
    return np.asarray(_result(name, self._opened[name][where].read()))

  @functools.cached_property
  def _store(self) -> dict:
    path = str(self._folder) + "/"
    base = path if "://" in path else {"driver": "file", "path": path}
    if (self._folder / "manifest.ocdbt").exists():
      return {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#ocdbt"}
    return ts.KvStore.Spec(base).to_json()

  def _names(self) -> list[str]:
    folder = str(self._folder)
    keys = _result(folder, _result(folder, ts.KvStore.open(self._store, context=self._context)).list())
    names = {key.rpartition(b"/")[0].decode() for key in keys if key.rpartition(b"/")[2] in (b".zarray", b"zarr.json")}
    if not names:
      raise Unreadable(f"{self._folder} holds no arrays")
    return sorted(names)

  @functools.cached_property
  def _opened(self) -> dict[str, Any]:
    def begin(name: str):
      place = {**self._store, "path": f"{self._store.get('path', '')}{name}/"}
      return ts.open({"driver": "auto", "kvstore": place}, open=True, read=True, context=self._context)

    return {name: _result(name, future) for name, future in {name: begin(name) for name in self._names()}.items()}

  def _shardings(self) -> dict[str, str]:
    try:
      told = json.loads((self._folder / "_sharding").read_text())
      return {base64.b64decode(key).decode(): _sharding_text(json.loads(value)) for key, value in told.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):  # a damaged one: it is told, not needed
      return {}


def _result(name: str, future) -> Any:
  try:
    return future.result()
  except ValueError as error:
    said = str(error).splitlines()[0][:300]
    away = any(word in said for word in ("UNAVAILABLE", "DEADLINE_EXCEEDED"))  # of the store; says nothing of the files
    raise OSError(f"{name}: {said}") if away else Unreadable(f"{name}: {said}") from error


def _sharding_text(told: dict) -> str:
  """`(fsdp, -, expert) of fsdp 4 x expert 2`; `whole` where it was on every device."""
  if told.get("sharding_type") != "NamedSharding":
    return told.get("sharding_type", "")
  spec = ["-" if not axes else axes if isinstance(axes, str) else "+".join(axes) for axes in told["partition_spec"]]
  used = {axis for axes in spec for axis in axes.split("+")}
  mesh = [f"{axis} {size}" for axis, size in zip(told["axis_names"], told["shape"]) if axis in used and size > 1]
  return f"({', '.join(spec)}) of {' x '.join(mesh)}" if mesh else "whole"


# --------------------------------------------------------------------------------------------------------- safetensors


class Safetensors:
  """A Hugging Face directory, or one file of it; only headers are read until a block is asked for (whole files of gs://)."""

  kind = "safetensors"

  def __init__(self, path):
    path = epath.Path(path)
    self._files = [path] if path.suffix == ".safetensors" else self._listed(path)

  @staticmethod
  def _listed(folder: epath.Path) -> list[epath.Path]:
    """The files that the index names, or all."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
      return listed(folder, "*.safetensors")
    try:
      named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
      raise Unreadable(f"{index} is no index: {error!r}") from error
    missing = [name for name in named if not (folder / name).exists()]
    if missing:
      raise Unreadable(f"{folder} lacks {', '.join(missing[:3])}, which its index names ({len(missing)} of {len(named)} files)")
    return [folder / name for name in named]

  @functools.cached_property
  def leaves(self) -> dict[str, Leaf]:
    return {name: leaf for name, (leaf, _) in self._where.items()}

  @functools.cached_property
  def _where(self) -> dict[str, tuple[Leaf, Any]]:
    """Each leaf and the open file it is in."""
    import safetensors

    names = {"BOOL": "bool", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    long = {"F": "float", "I": "int", "U": "uint"}
    found = {}
    for path in self._files:
      try:
        file = safetensors.safe_open(_local(path), framework="np")
        for name in file.keys():  # noqa: SIM118
          part = file.get_slice(name)
          short, shape = part.get_dtype(), tuple(part.get_shape())
          if short not in names and (short[0] not in long or not short[1:].isdigit()):
            raise Unreadable(f"{path}: {name} has the element type {short}, which is not read here")
          dtype = names.get(short) or long[short[0]] + short[1:]
          found[name] = Leaf(name, shape, dtype, (1,) * min(len(shape), 1) + shape[1:]), file
      except (OSError, safetensors.SafetensorError) as error:
        raise Unreadable(f"{path}: {error}") from error
    return dict(sorted(found.items()))

  def read(self, name, begin, end):
    leaf, file = self._where[name]
    if not leaf.shape:
      return file.get_tensor(name)
    return file.get_slice(name)[tuple(slice(b, e) for b, e in zip(begin, end))]


def _local(path: epath.Path) -> str:
  """The library reads local files only: one of an object store is copied, for as long as this process lives."""
  if "://" not in str(path):
    return str(path)
  import fsspec

  return fsspec.open_local(f"simplecache::{path}")


def write_shards(arrays: Source, folder: epath.Path, shard_bytes: int) -> int:
  """Writes model.safetensors, or numbered files with an index; returns the number of files."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, leaf in arrays.leaves.items():
    if shards[-1] and size + leaf.bytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += leaf.bytes
  named = ["model.safetensors"] if len(shards) == 1 else [
      f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  for file, names in zip(named, shards):
    save_tensors(folder / file, {name: whole(arrays, name) for name in names})
  if len(shards) > 1:
    index = {"metadata": {"total_size": sum(leaf.bytes for leaf in arrays.leaves.values())},
             "weight_map": {name: file for file, names in zip(named, shards) for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
  return len(shards)


def save_tensors(path: epath.Path, tensors: dict[str, np.ndarray]) -> None:
  """The one place that writes safetensors: its NumPy writer takes the memory of an array as it lies, so it must be in order."""
  import safetensors.numpy

  ordered = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in tensors.items()}  # a scalar stays one
  path.write_bytes(safetensors.numpy.save(ordered, metadata={"format": "pt"}))


# -------------------------------------------------------------------------------------------------------------- blocks


def blocks(source: Source, name: str, block_bytes: int = _BLOCK_BYTES) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """(index of the first element, block) of a leaf; whole chunks, two read ahead. Raises Unreadable."""
  leaf = source.leaves[name]
  step, item = list(leaf.chunk), dtype_of(leaf.dtype).itemsize
  for axis in reversed(range(len(step))):
    room = block_bytes // max(math.prod(step) * item, 1)
    step[axis] = min(leaf.shape[axis], step[axis] * max(room, 1))
  if 0 in leaf.shape:
    return
  begins = itertools.product(*(range(0, n, s) for n, s in zip(leaf.shape, step)))

  def read(begin):
    return begin, source.read(name, begin, tuple(min(b + s, n) for b, s, n in zip(begin, step, leaf.shape)))

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    ahead: collections.deque = collections.deque()
    for begin in begins:
      ahead.append(pool.submit(read, begin))
      if len(ahead) > 2:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()


def whole(source: Source, name: str) -> np.ndarray:
  shape = source.leaves[name].shape
  return source.read(name, (0,) * len(shape), shape)


# ---------------------------------------------------------------------------------------------------------------- find


class Found(NamedTuple):
  source: Source
  folder: epath.Path  # the step, or the Hugging Face directory
  step: int | None
  config: dict | None  # our config.Run as a dict, or the config.json of a Hugging Face directory


def steps(path) -> list[epath.Path]:
  """The step directories of a run, newest first; [] where it is no run."""
  path = epath.Path(path)
  root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  found = [p for p in root.iterdir() if p.name.isdigit() and saved_whole(p)] if root.is_dir() else []
  return sorted(found, key=lambda p: int(p.name), reverse=True)


def saved_whole(step_folder: epath.Path) -> bool:
  """False for what an interrupted save left on an object store, where names are final from the beginning."""
  return "://" not in str(step_folder) or (step_folder / COMMITTED).exists()


def read_back(step_folder) -> str:
  """What became of reading the checkpoint back: good | bad | not read back."""
  return next((mark for mark in ("bad", "good") if listed(step_folder, f"{mark}.*")), "not read back")


def find(path) -> Found:
  """The arrays at a path: a run (its newest checkpoint), a step, an Orbax item, a Hugging Face directory or a safetensors file.

  Raises:
    Unreadable: it is none of these, or of a newer format.
  """
  path = absolute(path)
  if not path.exists():
    raise Unreadable(f"{path} does not exist")
  if path.suffix == ".safetensors" or listed(path, "*.safetensors"):
    return Found(Safetensors(path), path, None, read_json(path / "config.json") if path.is_dir() else None)
  if _is_item(path):
    return _step(path.parent, path)
  if not path.is_dir():
    raise Unreadable(f"{path} is a file, but no .safetensors")
  items = [p for p in sorted(path.iterdir()) if p.is_dir() and _is_item(p)]
  if items:
    chosen = next((p for p in items if p.name == "state"), items[0])
    if chosen.name != "state" and len(items) > 1:
      raise Unreadable(f"{path} holds several items, {', '.join(p.name for p in items)}; give the path of one")
    return _step(path, chosen)
  if (path / "config").is_dir() and (path / "digests").is_dir():
    raise Unreadable(f"{path} is a checkpoint without its state directory, or its state is damaged")
  newest = steps(path)
  if newest:
    return find(newest[0])
  raise Unreadable(f"{path} is neither a run, a checkpoint nor a Hugging Face directory (no checkpoints/, no step "
                   "directories, no Orbax metadata, no .safetensors)")


def _is_item(path: epath.Path) -> bool:
  return path.is_dir() and any((path / name).exists() for name in ("manifest.ocdbt", "_METADATA"))


def _step(folder: epath.Path, item: epath.Path) -> Found:
  side = read_json(folder / "config" / "metadata") or {}
  if side.get("format", FORMAT) > FORMAT:
    raise Unreadable(f"{folder} is of format {side['format']}; this version reads up to {FORMAT}: take a newer one")
  return Found(Orbax(item), folder, int(folder.name) if folder.name.isdigit() else None, side.get("run"))


def read_json(path: epath.Path) -> dict | None:
  """None where there is no such file. Raises Unreadable."""
  try:
    return json.loads(path.read_text()) if path.exists() else None
  except (OSError, ValueError) as error:
    raise Unreadable(f"{path} is damaged: {error}") from error


# -------------------------------------------------------------------------------------------------------------- digests


def digest(parts: Iterator[tuple[tuple[int, ...], np.ndarray]]) -> str:
  """16 hex digits, the same as `checkpoint.digests` gives for the whole array."""
  sums = np.zeros(2, np.uint32)
  with np.errstate(over="ignore"):
    for begin, block in (piece for part in parts for piece in _pieces(*part)):
      word = {1: np.uint8, 2: np.uint16, 4: np.uint32}.get(block.dtype.itemsize)
      if word is None:
        raise Unreadable(f"there is no digest of {block.dtype} elements, only of 1, 2 and 4 bytes; convert with --dtype")
      bits = np.ascontiguousarray(block).reshape(block.shape).view(word)
      place = np.zeros(block.shape, np.uint32)
      for axis in range(block.ndim):
        shape = [1] * block.ndim
        shape[axis] = block.shape[axis]
        place += np.arange(begin[axis], begin[axis] + block.shape[axis], dtype=np.uint32).reshape(shape)
        place *= np.uint32(0x9E3779B1)
        place ^= place >> np.uint32(15)
      for i, factor in enumerate((0x85EBCA77, 0xC2B2AE3D)):
        mixed = place * np.uint32(factor)
        mixed ^= mixed >> np.uint32(13)
        sums[i] += np.sum((bits.astype(np.uint32) + np.uint32(1)) * (mixed | np.uint32(1)), dtype=np.uint32)
  return "".join(f"{int(word):08x}" for word in sums)


def _pieces(begin: tuple[int, ...], block: np.ndarray):
  """A block in parts of a few million elements, whose 32-bit words are small."""
  if block.size <= _DIGEST_ELEMENTS:
    yield begin, block
    return
  axis = int(np.argmax(block.shape))
  step = max(block.shape[axis] * _DIGEST_ELEMENTS // block.size, 1)
  for at in range(0, block.shape[axis], step):
    where = tuple(slice(at, at + step) if i == axis else slice(None) for i in range(block.ndim))
    yield from _pieces((*begin[:axis], begin[axis] + at, *begin[axis + 1 :]), block[where]) if step > 1 else [
        ((*begin[:axis], begin[axis] + at, *begin[axis + 1 :]), block[where])]


def expected_digests(folder) -> dict[str, str]:
  """Leaf name -> digest, saved with a checkpoint of ours. Raises Unreadable."""
  try:
    return json.loads((epath.Path(folder) / "digests" / "metadata").read_text())["leaves"]
  except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
    raise Unreadable(f"digests of {folder}: {error}") from error


def wrong(folder, part: int = 0, parts: int = 1) -> list[str]:
  """Leaves whose bytes do not have the digest saved with them, of every `parts`-th from `part` on. Raises Unreadable."""
  expected, source = expected_digests(folder), Orbax(epath.Path(folder) / "state")
  missing = sorted(set(expected) - set(source.leaves))
  return missing + [name for name in list(source.leaves)[part::parts] if expected.get(name) != digest(blocks(source, name))]


def main() -> int:
  """`FOLDER [PART PARTS]`: 0 good, 1 wrong, 2 damaged, 3 the store does not answer; with PART leaves good.* or bad.* there."""
  folder, (part, parts) = sys.argv[1], [int(a) for a in sys.argv[2:4]] or (0, 1)
  try:
    bad = wrong(folder, part, parts)
    said, code = (", ".join(bad[:3]), 1) if bad else ("good", 0)
  except Unreadable as error:
    said, code = str(error), 2
  except Exception as error:
    said, code = f"{type(error).__name__}: {error}", 3
  print(said)
  if len(sys.argv) > 2 and code < 3:
    with contextlib.suppress(*storage_errors()):  # an unmarked one is as one that was not read back
      (epath.Path(folder) / f"{'bad' if code else 'good'}.{part}-of-{parts}").write_text(said + "\n")
  return code


if __name__ == "__main__":
  sys.exit(main())
