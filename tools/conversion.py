"""A source under other names, in another dtype, with layers stacked or taken apart; blocks are read when asked for."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable

import numpy as np

from moe import stored
from moe.errors import UserError

_STACK = re.compile(r"^(.*\.|)(dense_layers|layers)\.(?!\d)(.+)$")  # a stacked leaf of ours
_LAYER = re.compile(r"^(.*\.|)(dense_layers|layers)\.(\d+)\.(.+)$")  # one layer of it


class Watched:
  """A source that says how many bytes of it have been read."""

  def __init__(self, source: stored.Source, advance: Callable[[float], None]):
    self.kind, self.leaves = source.kind, source.leaves
    self._source, self._advance = source, advance

  def read(self, name, begin, end):
    block = self._source.read(name, begin, end)
    self._advance(block.nbytes)
    return block


class Changed:
  """Raises UserError: two leaves get one name, a layer is missing, or a pattern is none."""

  def __init__(self, source: stored.Source, glob: str = "*", dtype: str | None = None, renames=(), unstack: bool = False,
               stack: bool = False):
    self.kind, self._source, self._where, self.leaves = source.kind, source, {}, {}
    for name, leaf in source.leaves.items():
      if fnmatch.fnmatch(name, glob):
        for new, shape, at in self._split(name, leaf) if unstack else [(name, leaf.shape, None)]:
          self._add(new, leaf, shape, [(name, at)], dtype, renames)
    if not self.leaves:
      raise UserError(f"nothing to write: no leaf matches {glob!r}")
    if stack:
      self._stack()
    self.leaves = dict(sorted(self.leaves.items()))

  @staticmethod
  def _split(name: str, leaf: stored.Leaf):
    found = _STACK.match(name)
    if not found or not leaf.shape:
      return [(name, leaf.shape, None)]
    return [(f"{found[1]}{found[2]}.{i}.{found[3]}", leaf.shape[1:], i) for i in range(leaf.shape[0])]

  def _add(self, name, leaf, shape, parts, dtype, renames) -> None:
    for text in renames:
      pattern, equals, new = text.partition("=")
      if not equals:
        raise UserError(f"--map={text} is not REGEX=NAME")
      try:
        name = re.sub(pattern, new, name)
      except re.error as error:
        raise UserError(f"--map={text}: {error}") from error
    if name in self.leaves:
      raise UserError(f"two leaves would be called {name}")
    float_like = np.dtype(stored.dtype_of(leaf.dtype)).kind in "fV"
    self._where[name] = parts
    chunk = leaf.chunk[-len(shape) :] if shape else ()
    self.leaves[name] = stored.Leaf(name, shape, dtype if dtype and float_like else leaf.dtype, chunk)

  def _stack(self) -> None:
    groups: dict[str, dict[int, str]] = {}
    for name in self.leaves:
      found = _LAYER.match(name)
      if found:
        groups.setdefault(f"{found[1]}{found[2]}.{found[4]}", {})[int(found[3])] = name
    for new, names in groups.items():
      if sorted(names) != list(range(len(names))):
        raise UserError(f"{new}: layers {sorted(names)} are there, and one is missing")
      leaves = [self.leaves.pop(names[i]) for i in range(len(names))]
      if len({(leaf.shape, leaf.dtype) for leaf in leaves}) > 1:
        raise UserError(f"{new}: its layers differ in shape or dtype and cannot be stacked")
      self._where[new] = [part for i in range(len(names)) for part in self._where.pop(names[i])]
      self.leaves[new] = stored.Leaf(new, (len(leaves), *leaves[0].shape), leaves[0].dtype, (1, *leaves[0].chunk))

  def read(self, name, begin, end):
    parts, dtype = self._where[name], stored.dtype_of(self.leaves[name].dtype)
    if len(parts) == 1 and len(self.leaves[name].shape) <= len(self._source.leaves[parts[0][0]].shape):
      return self._one(parts[0], begin, end).astype(dtype)
    return np.stack([self._one(part, begin[1:], end[1:]) for part in parts[begin[0] : end[0]]]).astype(dtype)

  def _one(self, part, begin, end) -> np.ndarray:
    name, at = part
    if at is None:
      return self._source.read(name, begin, end)
    return self._source.read(name, (at, *begin), (at + 1, *end))[0]
