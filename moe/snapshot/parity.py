"""Erasure code over the hosts of a group: any m of its n = k + m hosts may be lost. JAX-free.

Each host's bytes are k segments, each host also holds m parity segments. There are n stripes; of stripe c the hosts c, c+1,
.. c+m-1 (modulo n) hold the parity and the other k one data segment each, so parity rotates and a host is in every stripe.

    parity[r] = sum over the k data segments of GENERATOR[r] ** place * segment,   GENERATOR = 1, 2   (P and Q of RAID-6)

in GF(2^8), polynomial 0x11d: for m = 1 the XOR. Multiplying and adding is `accumulate`, by ISA-L where its library is (it
comes inside pyeclib's wheel), else by NumPy.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import pathlib
from typing import NamedTuple

import numpy as np

MAX_PARITY = 2
_POLYNOMIAL = 0x11D


# ----------------------------------------------------------------------------------------------------------- stripes


class Code(NamedTuple):
  """n hosts of a group, m of them dispensable."""

  n: int
  m: int

  @property
  def k(self) -> int:
    return self.n - self.m

  def holders(self, stripe: int) -> list[int]:
    """Places of the hosts with the stripe's parity, in the order of the rows."""
    return [(stripe + r) % self.n for r in range(self.m)]

  def members(self, stripe: int) -> list[int]:
    """Places of the k hosts with the stripe's data, in the order of the generator's powers."""
    return [h for h in range(self.n) if (h - stripe) % self.n >= self.m]

  def stripes(self, host: int) -> list[int]:
    """Stripes of a host's data segments: segment t is in the t-th."""
    return [c for c in range(self.n) if (host - c) % self.n >= self.m]

  def rows(self, host: int) -> list[tuple[int, int]]:
    """(stripe, row) of a host's parity segments, in their order."""
    return [((host - r) % self.n, r) for r in range(self.m)]

  def coefficient(self, row: int, stripe: int, host: int) -> int:
    return power(2, row * self.members(stripe).index(host))

  def recovery(self, stripe: int, wanted: int, have: list[tuple[str, int]]) -> list[int]:
    """Coefficients with which k blocks of a stripe sum to the data of host `wanted`.

    Args:
      have: k blocks, each ("data", host) or ("parity", row).

    Raises:
      ValueError: fewer than k, or the blocks do not determine it.
    """
    members = self.members(stripe)
    if len(have) != self.k:
      raise ValueError(f"stripe {stripe} needs {self.k} blocks and has {len(have)}")
    matrix = [[int(h == index) for h in members] if kind == "data" else
              [self.coefficient(index, stripe, h) for h in members] for kind, index in have]
    return _inverse(matrix)[members.index(wanted)]


# -------------------------------------------------------------------------------------------------------- arithmetic


@functools.cache
def _tables() -> tuple[list[int], list[int]]:
  exp, log, x = [0] * 512, [0] * 256, 1
  for i in range(255):
    exp[i], log[x] = x, i
    x = x << 1 ^ (_POLYNOMIAL if x & 0x80 else 0)
  exp[255:] = exp[:257]
  return exp, log


def multiply(a: int, b: int) -> int:
  exp, log = _tables()
  return exp[log[a] + log[b]] if a and b else 0


def power(a: int, n: int) -> int:
  exp, log = _tables()
  return exp[log[a] * n % 255]


def _inverse(matrix: list[list[int]]) -> list[list[int]]:
  """Of a square matrix over GF(2^8), by Gauss and Jordan."""
  n = len(matrix)
  rows = [list(row) + [int(i == j) for j in range(n)] for i, row in enumerate(matrix)]
  for i in range(n):
    pivot = next((r for r in range(i, n) if rows[r][i]), None)
    if pivot is None:
      raise ValueError("the blocks do not determine the data")
    rows[i], rows[pivot] = rows[pivot], rows[i]
    scale = power(rows[i][i], 254)
    rows[i] = [multiply(scale, v) for v in rows[i]]
    for r in range(n):
      if r != i and rows[r][i]:
        rows[r] = [v ^ multiply(rows[r][i], w) for v, w in zip(rows[r], rows[i])]
  return [row[n:] for row in rows]


@functools.cache
def _isal():
  """ISA-L's library, or None where pyeclib's wheel is not installed or brings none."""
  spec = importlib.util.find_spec("pyeclib")
  if spec is None or spec.origin is None:
    return None
  found = sorted(pathlib.Path(spec.origin).parents[1].glob("pyeclib.libs/libisal*"))
  return ctypes.CDLL(str(found[0])) if found else None


def backend() -> str:
  return "isal" if _isal() else "numpy"


@functools.cache
def _isal_table(coefficient: int):
  table = ctypes.create_string_buffer(32)
  _isal().ec_init_tables(1, 1, bytes([coefficient]), table)
  return table


@functools.cache
def _pair_table(coefficient: int) -> np.ndarray:
  """[65536] uint16: both bytes of a word times the coefficient."""
  one = np.array([multiply(coefficient, v) for v in range(256)], np.uint16)
  return (one[:, None] << 8 | one[None, :]).reshape(-1)


def accumulate(out: np.ndarray, coefficient: int, data: np.ndarray, how: str | None = None) -> None:
  """out += coefficient * data in GF(2^8), in place; both [bytes] uint8 of one length.

  Args:
    how: "isal" or "numpy"; None takes what there is.
  """
  if coefficient == 0:
    return
  if coefficient == 1:
    np.bitwise_xor(out, data, out=out)
    return
  if (how or backend()) == "isal":
    pointers = [(ctypes.c_void_p * 1)(x.ctypes.data) for x in (data, out)]
    _isal().ec_encode_data_update(len(out), 1, 1, 0, _isal_table(coefficient), ctypes.c_void_p(pointers[0][0]), pointers[1])
    return
  even = len(data) & ~1
  out[:even].view(np.uint16)[:] ^= _pair_table(coefficient)[data[:even].view(np.uint16)]
  if even < len(data):
    out[even] ^= multiply(coefficient, int(data[even]))


def fold(data: np.ndarray) -> np.ndarray:
  """[64] uint8: the XOR of all 64-byte words. The fold of a sum is the sum of the folds, with the same coefficients, so the
  folds of the data tell what a parity segment must fold to. `data` is a multiple of 4096 bytes."""
  rows = np.bitwise_xor.reduce(data.view(np.uint64).reshape(64, -1), axis=0)  # long rows: at the speed of memory
  return np.bitwise_xor.reduce(rows.reshape(-1, 8), axis=0).view(np.uint8)
