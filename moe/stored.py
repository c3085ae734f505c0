"""What a checkpoint's files hold, read without JAX.

`python -m moe.stored RUN/checkpoints/STEP [PART PARTS]` compares every leaf with its digest. The trainer starts it after each
save; only a checkpoint that reads back is good.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator

from etils import epath
import numpy as np
import tensorstore as ts

_BLOCK_BYTES = 64 << 20  # read at a time


class Unreadable(Exception):
  """The files are missing or damaged."""


def names(folder) -> list[str]:
  """Leaves in `<step>/state`, sorted. Raises Unreadable."""
  try:
    found = ts.KvStore.open(_store(folder)).result().list().result()
  except ValueError as error:
    raise Unreadable(str(error).splitlines()[0]) from error
  return sorted({key.decode().rpartition("/")[0] for key in found if key.rpartition(b"/")[2] in (b".zarray", b"zarr.json")})


def _store(folder) -> dict:
  path = str(epath.Path(folder) / "state") + "/"
  return {"driver": "ocdbt", "base": path if "://" in path else f"file://{path}"}


def blocks(folder, name: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """(index of the first element, block) of a leaf, by runs along its first axes. Raises Unreadable."""
  try:
    array = ts.open({"driver": "auto", "kvstore": {**_store(folder), "path": f"{name}/"}}, open=True, read=True).result()
    row = math.prod(array.shape[1:]) * array.dtype.numpy_dtype.itemsize
    many = max(_BLOCK_BYTES // max(row, 1), 1)
    if not array.shape:
      yield (), np.asarray(array.read().result())
    for begin in range(0, array.shape[0] if array.shape else 0, many):
      yield (begin, *[0] * (len(array.shape) - 1)), np.asarray(array[begin : min(begin + many, array.shape[0])].read().result())
  except ValueError as error:
    raise Unreadable(f"{name}: {str(error).splitlines()[0]}") from error


def digest(parts: Iterator[tuple[tuple[int, ...], np.ndarray]]) -> str:
  """16 hex digits, the same as `checkpoint.digests` gives for the whole array."""
  sums = np.zeros(2, np.uint32)
  with np.errstate(over="ignore"):
    for begin, block in parts:
      word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[block.dtype.itemsize]
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


def wrong(folder, part: int = 0, parts: int = 1) -> list[str]:
  """Leaves whose bytes do not have the digest saved with them, of every `parts`-th from `part` on. Raises Unreadable."""
  try:
    expected = json.loads((epath.Path(folder) / "digests" / "metadata").read_text())["leaves"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise Unreadable(f"digests of {folder}: {error}") from error
  found = names(folder)
  missing = sorted(set(expected) - set(found))
  return missing + [name for name in found[part::parts] if expected.get(name) != digest(blocks(folder, name))]


def main() -> int:
  folder, part, parts = sys.argv[1], *(int(a) for a in sys.argv[2:4] or (0, 1))
  try:
    bad = wrong(folder, part, parts)
  except Unreadable as error:
    print(error)
    return 2
  print(", ".join(bad[:3]) if bad else "good")
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
