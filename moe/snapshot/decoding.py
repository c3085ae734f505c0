"""Chunks of one host computed from those of the others of its group."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe.snapshot import copies
from moe.snapshot import memory
from moe.snapshot import parity
from moe.snapshot.wire import WireError


def decoded(code: parity.Code, stripe: int, wanted: int, blocks: list[tuple[str, int, np.ndarray]]) -> np.ndarray:
  """Chunk of host `wanted` from k blocks (kind, index, bytes)."""
  coefficients = code.recovery(stripe, wanted, [(kind, index) for kind, index, _ in blocks])
  out = np.zeros(len(blocks[0][2]), np.uint8)
  for coefficient, (_, _, data) in zip(coefficients, blocks):
    parity.accumulate(out, coefficient, data)
  return out


class Members(NamedTuple):
  """A group and how to ask its hosts."""

  code: parity.Code
  hosts: list[int]  # by place
  ask: Callable[[int, dict], tuple[dict, np.ndarray]]  # host, request -> answer, bytes; raises WireError

  def chunk(self, step: int, stripe: int, wanted: int, i: int) -> np.ndarray:
    """Chunk i of member `wanted` from k others of the stripe; a holder whose block is damaged refuses it.

    Raises:
      WireError: fewer than k are left.
    """
    blocks, problems = [], []

    def fetch(kind: str, index: int, place: int, **fields) -> None:
      try:
        request = {"do": "get", "kind": kind, "step": step, "chunk": i, **fields}
        blocks.append((kind, index, self.ask(self.hosts[place], request)[1]))
      except WireError as error:
        problems.append(str(error))

    for member in self.code.members(stripe):
      if member != wanted:
        fetch("data", member, member, segment=self.code.stripes(member).index(stripe))
    for row, holder in enumerate(self.code.holders(stripe)):
      if len(blocks) < self.code.k:
        fetch("parity", row, holder, stripe=stripe, row=row)
    if len(blocks) < self.code.k:
      raise WireError(f"{len(blocks)} of {self.code.k} blocks of stripe {stripe} are left: {'; '.join(problems)}")
    return decoded(self.code, stripe, wanted, blocks)

  def check(self, copy: copies.Copy, me: int, share: float) -> None:
    """Decodes a random share of the parity that member `me` holds, for a random member each, and compares the digests.

    Raises:
      WireError: one does not decode to the data.
    """
    for held, (stripe, row) in enumerate(self.code.rows(me)):
      count = min(max(1, round(share * copy.shape.chunks)), copy.shape.chunks)
      for i in random.sample(range(copy.shape.chunks), count):
        victim = random.choice(self.code.members(stripe))
        blocks = [("parity", row, copy.parity_chunk(held, i))]
        for member in self.code.members(stripe):
          if member != victim:
            request = {"do": "get", "kind": "data", "step": copy.step, "chunk": i,
                       "segment": self.code.stripes(member).index(stripe)}
            blocks.append(("data", member, self.ask(self.hosts[member], request)[1]))
        expected = copy.records[victim][1][self.code.stripes(victim).index(stripe) * copy.shape.chunks + i]
        if memory.digest(decoded(self.code, stripe, victim, blocks)) != int(expected):
          raise WireError(f"parity of stripe {stripe} on host {self.hosts[me]} does not decode to the data of host "
                          f"{self.hosts[victim]}")
