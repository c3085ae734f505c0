"""The committed snapshot of a live run as a `stored.Source`, read on host 0 through its snapshot process.

Only the user the run belongs to can do it, on the machine of host 0. While it reads, the hosts do not overwrite that snapshot:
the one after it is still taken (not with Snapshot.slots = 1), later ones are skipped. The hold ends by itself seconds after the
last read.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time

from etils import epath
import numpy as np

from moe import stored
from moe.snapshot import memory
from moe.snapshot.wire import Link, WireError


_HOLD_SECONDS, _RENEW_SECONDS = 15.0, 4.0


class Live:
  """Raises stored.Unreadable: no run is alive there, or nothing is committed yet."""

  kind = "snapshot"

  def __init__(self, run_dir):
    try:
      told = json.loads((epath.Path(run_dir) / "snapshots.json").read_text())
      sock = socket.socket(socket.AF_UNIX)
      sock.connect(told["socket"])
    except (OSError, ValueError, KeyError) as error:
      raise stored.Unreadable(f"{run_dir}: no live snapshots can be reached ({error}); they are on the machine of the run's "
                              "host 0 while it runs under --supervise") from error
    self._link, self._lock = Link(sock, 60.0), threading.RLock()
    self._generation = self.step = -1
    status = self._ask({"do": "status"})[0]
    self._generation, self.step = status["generation"], status["committed"]
    if self.step < 0:
      raise stored.Unreadable(f"{run_dir}: no snapshot is committed yet")
    self._pieces: dict[str, list] = {}
    self._hosts = told["hosts"]
    for host, text in enumerate(self._hold()):
      header = json.loads(text)
      self.fingerprints = header["fingerprints"]  # the same on every host
      for name, dtype, shape, index, offset, size in header["pieces"]:
        self._pieces.setdefault(name, []).append((host, dtype, tuple(shape), tuple(map(tuple, index)), offset, size))
    self.leaves = {}
    for name, pieces in sorted(self._pieces.items()):
      shape = tuple(max(ends) for ends in zip(*((end for _, end in index) for _, _, _, index, _, _ in pieces)))
      piece = pieces[0][2]
      hosts = len({p[0] for p in pieces})
      self.leaves[name] = stored.Leaf(name, shape, pieces[0][1], (1,) * min(len(piece), 1) + piece[1:], f"on {hosts} hosts")

  def _ask(self, message: dict):
    try:
      with self._lock:  # blocks are read by several threads, and the link has one buffer
        answer, payload = self._link.ask({**message, "generation": self._generation})
        return answer, np.array(payload)
    except WireError as error:
      raise stored.Unreadable(f"the snapshot of step {self.step} is not to be had any more: {error}") from error

  def _hold(self) -> list[str]:
    """Renews the hold on all hosts; their headers."""
    self._held_at = time.monotonic()
    return [self._ask({"do": "hold", "host": host, "step": self.step, "seconds": _HOLD_SECONDS})[0]["header"]
            for host in range(self._hosts)]

  def read(self, name, begin, end):
    leaf = self.leaves[name]
    out = np.empty([e - b for b, e in zip(begin, end)], stored.dtype_of(leaf.dtype))
    for host, _, shape, index, offset, _ in self._pieces[name]:
      low = [max(b, i[0]) for b, i in zip(begin, index)]
      high = [min(e, i[1]) for e, i in zip(end, index)]
      if any(a >= b for a, b in zip(low, high)):
        continue
      row = math.prod(shape[1:]) * out.dtype.itemsize
      first, last = (low[0] - index[0][0], high[0] - index[0][0]) if shape else (0, 1)
      rows = self._bytes(host, offset + first * row, (last - first) * row).view(out.dtype)
      rows = rows.reshape((last - first, *shape[1:]) if shape else ())
      here = tuple(slice(a - b, c - b) for a, c, b in zip(low, high, begin))
      there = tuple(slice(a - i[0], c - i[0]) for a, c, i in zip(low[1:], high[1:], index[1:]))
      out[here] = rows[(slice(None), *there)] if shape else rows
    return out

  def _bytes(self, host: int, offset: int, length: int) -> np.ndarray:
    out = np.empty(length, np.uint8)
    if time.monotonic() - self._held_at > _RENEW_SECONDS:
      self._hold()
    for at in range(0, length, memory.MAX_CHUNK):
      count = min(memory.MAX_CHUNK, length - at)
      wanted = {"do": "read", "host": host, "step": self.step, "offset": offset + at, "length": count}
      out[at : at + count] = self._ask(wanted)[1]
    return out
