"""The trainer's side of the snapshots: what of the state lies where, copying it out at a step boundary, and back.

Each distinct shard is stored once over all its replicas, by the host with the fewest bytes so far, so the layout follows
from the shardings alone and every host can compute every other's.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import faulthandler
import hashlib
import json
import os
import pathlib
import signal
import sys
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from moe import checkpoint
from moe import command_line
from moe import config
from moe.snapshot import copies
from moe.snapshot import leader
from moe.snapshot import memory
from moe.snapshot import parity
from moe.snapshot.wire import Link, WireError

_ALIGN = 64
_BUCKET_BYTES = 128 << 20  # asked from the device ahead of the copying
_PIECE_BYTES = 16 << 20  # copied by one thread at a time


class Piece(NamedTuple):
  """One distinct shard of a leaf."""

  leaf: int
  name: str
  dtype: str
  shape: tuple[int, ...]  # of the shard
  index: tuple[tuple[int, int], ...]  # begin and end along every axis of the leaf
  host: int  # that stores it
  offset: int  # in that host's bytes
  size: int  # bytes


class Layout(NamedTuple):
  pieces: list[Piece]
  sizes: list[int]  # bytes of every host
  digest: str  # the same on all hosts; a snapshot of another layout is not read


def layout(abstract: Any, hosts: int, model: str = "") -> Layout:
  """Where the shards of a state (of arrays or ShapeDtypeStructs with shardings) are kept.

  Args:
    model: what else a snapshot must agree in, such as the config.
  """
  pieces, sizes = [], [0] * hosts
  for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(abstract)):
    holders: dict[tuple, set[int]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
      holders.setdefault(_bounds(index, leaf.shape), set()).add(device.process_index)
    for index in sorted(holders):
      shape = tuple(end - begin for begin, end in index)
      size = int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
      host = min(holders[index], key=lambda h: (sizes[h], h))
      pieces.append(Piece(number, checkpoint.leaf_name(path), leaf.dtype.name, shape, index, host, sizes[host], size))
      sizes[host] += -(-size // _ALIGN) * _ALIGN
  text = json.dumps([model, pieces, sizes])
  return Layout(pieces, sizes, hashlib.sha256(text.encode()).hexdigest()[:32])


def _bounds(index, shape) -> tuple[tuple[int, int], ...]:
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape))


def budget(sizes: list[int], limits: config.Snapshot) -> list[str]:
  """The arithmetic of a host's memory for its snapshots, checked against what the host has left; lines to print.

  Raises:
    config.ConfigError: it does not fit, with the sum and what to change.
  """
  hosts = len(sizes)
  group = next(g for g in leader.groups(hosts, limits.group_hosts, limits.parity_hosts) if jax.process_index() in g)
  code = parity.Code(len(group), limits.parity_hosts if len(group) > 1 else 0)
  shape = copies.geometry(code, max(sizes[h] for h in group))
  need, left = limits.slots * (shape.data_bytes + shape.parity_bytes), memory.available_bytes()
  sum_text = (f"{limits.slots} x ({_size(shape.data_bytes)} of state + {_size(shape.parity_bytes)} of parity) = {_size(need)} "
              f"of the {_size(left)} this host has left")
  if need > limits.memory_share * left:
    half = "set Snapshot.slots = 1 (half; a kill during a copy then costs the memory tier), " if limits.slots == 2 else ""
    raise config.ConfigError(
        f"snapshots do not fit: {sum_text}, Snapshot.memory_share = {limits.memory_share}; {half}"
        + f"a larger Snapshot.group_hosts (parity is {code.m}/{code.k} of the state), or Snapshot.every_steps = 0")
  lines = [f"snapshots every {limits.every_steps} steps: {sum_text}"]
  if code.m:
    devices = jax.devices()
    one_slice = devices[0].platform == "tpu" and len({getattr(d, "slice_index", 0) for d in devices}) == 1
    lines += [f"survive a trainer's death, and the loss of {code.m} of the {code.n} hosts of a group; "
              f"{_size(code.m * sizes[jax.process_index()])} sent by this host for each",
              "one slice: where it is recreated as a whole, all memory goes with it; the checkpoints are next" if one_slice else
              "the other hosts must keep their memory and a replacement join (docs/faults.md), else the checkpoints are next"]
  else:
    lines.append("survive a trainer's death; the loss of the host falls back to the checkpoints (docs/faults.md)")
  if limits.slots == 1:
    lines.append("WARNING: one slot: while a snapshot is copied there is none in memory, and a failure then falls back to the "
                 "checkpoints")
  return lines


def _size(count: int) -> str:
  """1.5 GB, or 1.5 MB below one."""
  return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class Found(NamedTuple):
  step: int
  state: Any
  data: dict  # position of this host's loader


class Snapshots:
  """What the training loop says to its supervisor and snapshot process. Without a supervisor every method does nothing."""

  def __init__(self):
    self._settings = json.loads(os.environ.get(command_line.SUPERVISED, "null"))
    self.active = self._settings is not None
    self.committed = -1
    self._link, self._slots, self._layout = None, [], None
    if not self.active:
      return
    memory.die_with_parent(self._settings["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor makes a SIGTERM of it, which saves
    with contextlib.suppress(OSError):  # when memory runs out the trainer goes, and not the snapshots
      pathlib.Path("/proc/self/oom_score_adj").write_text("800")

  def watch(self, run_dir) -> None:
    """Keeps the stacks of all threads when the supervisor asks (SIGUSR1): in the run directory, or the log."""
    if self.active:
      local = "://" not in str(run_dir)
      self._stacks = open(pathlib.Path(run_dir) / f"stacks-{self._settings['host']}.txt", "a") if local else sys.stderr
      faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)

  def beat(self, phase: str, step: int) -> None:
    """A sign of life: `step` for the loop itself, another phase for what may take long."""
    if self.active:
      with contextlib.suppress(OSError):
        os.write(self._settings["beat_fd"], (json.dumps({"phase": phase, "step": step}) + "\n").encode())

  # ------------------------------------------------------------------------------------------------------------ attach

  def attach(self, abstract: Any, run: config.Run) -> list[str]:
    """Memory for this state at the snapshot process; returns lines to print.

    Raises:
      config.ConfigError: it does not fit.
    """
    self._every = run.snapshot.every_steps if self.active else 0
    if not self._every:
      return ["snapshots: none (Snapshot.every_steps = 0)"] if self.active else []
    self._limits = run.snapshot
    self._layout = layout(abstract, self._settings["hosts"], json.dumps(config.to_dict(run)["model"], sort_keys=True))
    self._host = self._settings["host"]
    self._mine = [p for p in self._layout.pieces if p.host == self._host]
    self._background, self._finishing = concurrent.futures.ThreadPoolExecutor(1), None
    self._pool = concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    answer = self._connect()
    lines = [] if answer["had"] else budget(self._layout.sizes, run.snapshot)
    self._reserve()
    return lines

  def _connect(self) -> dict:
    sock = socket.socket(socket.AF_UNIX)
    try:
      sock.connect(self._settings["socket"])
    except OSError as error:
      raise WireError(f"the snapshot process cannot be reached: {error}") from error
    self._link = Link(sock, 600.0)
    status, _ = self._ask({"do": "status"})
    return {"had": status["layout"] == self._layout.digest}

  def _reserve(self) -> None:
    answer, _ = self._ask({"do": "attach", "layout": self._layout.digest, "sizes": self._layout.sizes,
                           "slots": self._limits.slots})
    self._slots = memory.received(self._link.sock, answer["slots"])
    self._restorable = answer

  def _ask(self, message: dict):
    if self._link is None:
      raise WireError("there is no snapshot process")
    self._link.send({**message, "generation": self._settings["generation"]})
    while True:
      answer, payload = self._link.receive()
      if answer.keys() == {"committed"}:  # said unasked
        self.committed = max(self.committed, answer["committed"])
        continue
      if "refused" in answer:
        raise WireError(answer["refused"])
      return answer, payload

  # ----------------------------------------------------------------------------------------------------------- restore

  def offered_step(self) -> int:
    """The step that all hosts have proven in memory, or -1."""
    return self._settings["step"] if self._layout and self._settings["step"] is not None else -1

  def restore(self, abstract: Any) -> Found:
    """The state of the proven step, equal by the fingerprint of every leaf to what was saved.

    Raises:
      checkpoint.CheckpointError: it is not; the persistent tier is next.
      WireError: a snapshot process was lost meanwhile; the whole job starts again.
    """
    found = self._restorable
    if found["committed"] is None or found["step"] != self.offered_step():
      # It died after the proof. A new round decodes what it held, so this is no case for the checkpoints.
      raise WireError(f"the snapshot process holds step {found['step']}, not {self.offered_step()} any more")
    state, problem = self._read(abstract, self._slots[found["committed"]], found["step"]), ""
    try:
      header = json.loads(found["header"])
      fingerprints, data = header["fingerprints"], header["data"]
    except (ValueError, KeyError) as error:
      problem = repr(error)
    if not min(checkpoint.all_hosts(int(not problem))):  # all hosts go on, or none: what follows is computed by all together
      raise checkpoint.CheckpointError(f"the snapshot of step {self.offered_step()} cannot be read: "
                                       f"{problem or 'another host has no part of it'}")
    wrong = [name for name, value in checkpoint.digests(state).items() if fingerprints.get(name) != value]
    if wrong:
      raise checkpoint.CheckpointError(f"the snapshot of step {found['step']} is not what was saved: {', '.join(wrong[:3])}")
    self.committed = found["step"]
    return Found(found["step"], state, data)

  def rewound(self, abstract: Any) -> Found | None:
    """The last committed snapshot again, for a replay within this process; None where there is none."""
    if not (self.active and self._slots):
      return None
    self._finished()
    for _ in range(100):  # until the last commit has reached every host
      self._reserve()
      steps = checkpoint.all_hosts(self._restorable["step"])
      if min(steps) == max(steps):
        break
      time.sleep(0.1)
    if min(steps) < 0 or min(steps) != max(steps):
      return None
    self._settings["step"] = steps[0]
    return self.restore(abstract)

  def _read(self, abstract: Any, slot: np.ndarray, step: int) -> Any:
    leaves, tree = jax.tree.flatten(abstract)
    where: list[dict] = [{} for _ in leaves]
    for piece in self._layout.pieces:
      where[piece.leaf][piece.index] = piece

    def leaf(number: int, x) -> jax.Array:
      fetched: dict[tuple, np.ndarray] = {}

      def part(index):
        bounds = _bounds(index, x.shape)
        if bounds not in fetched:
          piece = where[number][bounds]
          raw = slot[piece.offset : piece.offset + piece.size].copy() if piece.host == self._host else self._remote(piece, step)
          fetched[bounds] = raw.view(x.dtype).reshape(piece.shape)
        return fetched[bounds]

      return jax.make_array_from_callback(x.shape, x.sharding, part)

    return jax.tree.unflatten(tree, [leaf(i, x) for i, x in enumerate(leaves)])

  def _remote(self, piece: Piece, step: int) -> np.ndarray:
    out = np.empty(piece.size, np.uint8)
    for begin in range(0, piece.size, memory.MAX_CHUNK):
      length = min(memory.MAX_CHUNK, piece.size - begin)
      _, out[begin : begin + length] = self._ask({"do": "read", "host": piece.host, "step": step,
                                                   "offset": piece.offset + begin, "length": length})
    return out

  # ------------------------------------------------------------------------------------------------------------ snapshot

  def warm(self, state: Any) -> None:
    """Compiles the fingerprint, so that the first snapshot does not wait for it."""
    if self.active and self._layout:
      jax.block_until_ready(checkpoint.start_digests(state))

  def take(self, step: int, state: Any, data: Callable[[], dict], due: bool = False) -> list[tuple[str, dict]]:
    """Copies the state of step `step` out when it is due and the last snapshot is through on all hosts, else does nothing.

    The state must not be donated before this returns. What follows (digests, parity, commit) happens in the snapshot process.
    All hosts call it together.

    Args:
      data: gives the position of this host's loader.

    Returns:
      events: ("snapshot" | "snapshot_skipped" | "unprotected", fields).
    """
    if not (self.active and self._layout) or not (due or step % self._every == 0):
      return []
    begin, slot = time.monotonic(), None
    problem = self._finished()
    try:
      if self._link is None:  # the last snapshot process died
        self._connect()
        self._reserve()
      slot = self._ask({"do": "begin", "step": step})[0].get("slot")
    except (WireError, OSError) as error:
      problem = self._lost(error)
    together = min(checkpoint.all_hosts(int(slot is not None)))  # what follows is computed by all hosts or by none
    if not together:
      with contextlib.suppress(WireError):
        if slot is not None:
          self._ask({"do": "cancel", "step": step})
      return [("unprotected", {"reason": problem}) if problem else ("snapshot_skipped", {})]
    fingerprints = checkpoint.start_digests(state)  # runs while the copies are under way; the devices keep its inputs for it
    self._copy(state, self._slots[slot])
    header = {"step": step, "layout": self._layout.digest, "data": data(),
              "pieces": [[p.name, p.dtype, p.shape, p.index, p.offset, p.size] for p in self._mine]}
    self._finishing = self._background.submit(self._finish, step, header, fingerprints)
    return [("snapshot", {"bytes": sum(p.size for p in self._mine), "stall_seconds": round(time.monotonic() - begin, 4)})]

  def _finish(self, step: int, header: dict, fingerprints) -> str:
    """Hands the copy over as soon as its fingerprints are computed, beside the next step; what went wrong, or ""."""
    try:
      self._ask({"do": "ready", "step": step, "header": json.dumps(
          {**header, "fingerprints": checkpoint.finish_digests(fingerprints)})})
    except WireError as error:
      return self._lost(error)
    return ""

  def _finished(self) -> str:
    """Waits for the copy before, if it is still being handed over; what went wrong with it, or ""."""
    finishing, self._finishing = self._finishing, None
    return finishing.result() if finishing else ""

  def _copy(self, state: Any, slot: np.ndarray) -> None:
    """This host's pieces into the slot: transfers from the devices a bucket ahead, copies by several threads."""
    leaves = jax.tree.leaves(state)
    local = [_shard(leaves[piece.leaf], piece) for piece in self._mine]
    asked, ahead, jobs = 0, 0, []
    for i, piece in enumerate(self._mine):
      while asked < len(local) and ahead < _BUCKET_BYTES:
        local[asked].copy_to_host_async()
        ahead += self._mine[asked].size
        asked += 1
      source = np.ascontiguousarray(np.asarray(local[i])).reshape(-1).view(np.uint8)
      local[i], target = None, slot[piece.offset : piece.offset + piece.size]
      for at in range(0, piece.size, _PIECE_BYTES):
        jobs.append(self._pool.submit(np.copyto, target[at : at + _PIECE_BYTES], source[at : at + _PIECE_BYTES]))
      ahead -= piece.size
    for job in jobs:
      job.result()

  def _lost(self, error: Exception) -> str:
    """The snapshot process died: training goes on, and its successor is looked for at the next snapshot."""
    if self._link:
      self._link.close()
    self._link = None
    return str(error)

  def wait(self, step: int, seconds: float = 60.0) -> bool:
    """Whether step `step` is committed within that time; for the last snapshot before the process ends."""
    if not self.active or self._layout is None:
      return False
    self._finished()
    deadline = time.monotonic() + seconds
    with contextlib.suppress(WireError):
      while self.committed < step and time.monotonic() < deadline:
        time.sleep(0.02)
        self._ask({"do": "status"})
    return self.committed >= step


def _shard(leaf: jax.Array, piece: Piece) -> jax.Array:
  return next(s.data for s in leaf.addressable_shards if _bounds(s.index, leaf.shape) == piece.index)
