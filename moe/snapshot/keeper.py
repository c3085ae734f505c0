"""The snapshot-management process of one host: `python -m moe.snapshot.keeper`, started by the supervisor, without JAX.

It owns two copies of this host's share of the state, and of the parity it holds for its group. The trainer writes into the
copy that is not committed; the keeper digests it, sends it to the parity holders, checks the parity it holds itself, and
says `prepared`. The leader commits a step when every host is prepared. A copy is only overwritten when another one is
committed, so at any instant the group has one complete step.

    copy: empty -> writing (trainer) -> ready -> stored (digested, acknowledged by the holders) -> prepared -> committed -> old
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any

import numpy as np

from moe.snapshot import copies
from moe.snapshot import decoding
from moe.snapshot import memory
from moe.snapshot import parity
from moe.snapshot import wire
from moe.snapshot.wire import Link, WireError

_MAX_HOLD_SECONDS = 30.0  # that somebody who looks at a snapshot can keep it from being overwritten
_WAIT_SECONDS = 120.0  # for the parity of the slowest member, before a snapshot is given up


class Keeper:
  """State and services of one keeper; `control` is the link to the supervisor."""

  def __init__(self, control: Link, token: bytes, address: str, socket_path: str, tls=(None, None)):
    self._control, self._token, self._path, self._tls = control, token, socket_path, tls
    self._changed = threading.Condition()  # guards everything below
    self.generation, self.host, self.group, self.code = 0, -1, [0], parity.Code(1, 0)
    self.peers: dict[int, tuple[str, int]] = {}
    self.copies: list[copies.Copy] = []
    self.layout, self.sizes, self.committed = "", [], -1
    self.abandoned: set[int] = set()  # steps that will never be committed, though earlier ones may still be
    self.check_share = 0.01
    self._held = -1, 0.0  # (step, until when) of a snapshot that somebody looks at
    self._links: dict[int, Link] = {}  # for questions to other keepers
    self._asking: dict[int, threading.Lock] = {}
    self._trainer: Link | None = None
    self.listener = wire.Listener(address, 0, token, self._serve_peer, self._admit, tls[0], self._log)
    self._open_socket()

  # ------------------------------------------------------------------------------------------------------- supervisor

  def run(self) -> None:
    """Serves the supervisor until it goes away."""
    self._control.send({"listening": list(self.listener.address), "socket": self._path})
    with contextlib.suppress(WireError):
      while True:
        message, _ = self._control.receive()
        try:
          getattr(self, f"_do_{message['do']}")(message)
        except (KeyError, AttributeError, WireError, memory.MemoryRefused) as error:
          self._tell({"error": f"{message.get('do')}: {error!r}"})

  def _tell(self, message: dict[str, Any]) -> None:
    with contextlib.suppress(WireError):
      self._control.send({"generation": self.generation, **message})

  def _log(self, text: str) -> None:
    self._tell({"log": text})

  def _do_configure(self, message: dict) -> None:
    """A new generation, or a peer's new address within one."""
    with self._changed:
      fresh = message["generation"] > self.generation
      self.generation, self.host = message["generation"], message["host"]
      self.check_share = message["check_share"]
      self.peers = {int(h): tuple(address) for h, address in message["peers"].items()}
      group, code = message["group"], parity.Code(len(message["group"]), message["parity"])
      if (group, code) != (self.group, self.code):
        self._forget()
        self.group, self.code = group, code
      for link in self._links.values():
        link.close()  # whoever asks next connects anew
      if fresh:
        self.abandoned.clear()
        for copy in self.copies:  # what the last trainer left half done
          if copy.status not in ("prepared", "committed"):
            copy.reset(-1)
        if self._trainer:
          self._trainer.close()  # of an older generation
          self._trainer = None
      self._changed.notify_all()
    self._tell({"configured": self.generation, "inventory": self.inventory()})

  def inventory(self) -> dict[str, Any]:
    with self._changed:
      return {"layout": self.layout, "committed": self.committed,
              "steps": [c.step for c in self.copies if c.status in ("prepared", "committed")]}

  def _do_commit(self, message: dict) -> None:
    self._commit(message["step"])

  def _commit(self, step: int) -> None:
    with self._changed:
      done = next((c for c in self.copies if c.step == step and c.status == "prepared"), None)
      if done:
        for copy in self.copies:
          if copy.status == "committed":
            copy.status = "old"
        done.status, self.committed = "committed", step
        self.abandoned = {s for s in self.abandoned if s > step}
      trainer = self._trainer if done else None
    if trainer:
      with contextlib.suppress(WireError):
        trainer.send({"committed": step})

  def _do_abandon(self, message: dict) -> None:
    """The step will never be committed: somebody skipped it or failed."""
    with self._changed:
      self.abandoned.add(message["step"])
      for copy in self.copies:
        if copy.step == message["step"] and copy.status in ("ready", "stored", "prepared", "empty"):
          copy.reset(-1)
      self._changed.notify_all()

  def _do_clear(self, message: dict) -> None:
    """Nothing in memory is to be restored."""
    with self._changed:
      self.committed = -1
      for copy in self.copies:
        copy.reset(-1)

  def _do_verify(self, message: dict) -> None:
    """Proves this host's copy of a step, repairs it from the group where it is damaged or missing; the only copy then."""
    step, begin = message["step"], time.monotonic()

    def work():
      try:
        copy, repaired = self._proven(step)
        with self._changed:
          copy.status, self.committed = "committed", step
          for other in self.copies:
            if other is not copy:
              other.reset(-1)
        self._tell({"verified": step, "repaired": repaired, "chunks": len(copy.table),
                    "seconds": round(time.monotonic() - begin, 3)})
      except (WireError, memory.MemoryRefused) as error:
        self._tell({"unverified": step, "reason": str(error)})

    threading.Thread(target=work, daemon=True).start()

  def _do_protect(self, message: dict) -> None:
    """The copies of all hosts are proven, and this one's was decoded: the parity it is to hold is computed again."""
    def work():
      try:
        self._protect(message["step"])
        self._tell({"protected": message["step"]})
      except (WireError, copies.GivenUp) as error:  # then the next snapshot brings it
        self._log(f"the parity of step {message['step']} is not computed again: {error}")

    threading.Thread(target=work, daemon=True).start()

  # ----------------------------------------------------------------------------------------------------------- trainer

  def _open_socket(self) -> None:
    server = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
      os.unlink(self._path)
    server.bind(self._path)
    os.chmod(self._path, 0o600)
    server.listen(8)

    def accept():
      while True:
        sock, _ = server.accept()
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
          self._log(f"a process of user {uid} tried to attach")
          sock.close()
          continue
        threading.Thread(target=self._serve_local, args=(Link(sock, None),), daemon=True).start()

    threading.Thread(target=accept, daemon=True, name="trainer").start()

  def _serve_local(self, link: Link) -> None:
    try:
      while True:
        message, _ = link.receive()
        try:
          answer, payload, fds = self._answer_local(link, message)
        except (WireError, memory.MemoryRefused) as error:
          answer, payload, fds = {"refused": str(error)}, b"", []
        link.send(answer, payload)
        if fds:
          socket.send_fds(link.sock, [b"F"], fds)
    except (WireError, KeyError, OSError):
      with self._changed:
        if self._trainer is link:
          self._trainer = None
          for copy in self.copies:
            if copy.status == "writing":
              copy.reset(-1)
    finally:
      link.close()

  def _answer_local(self, link: Link, message: dict):
    do = message["do"]
    if do == "status":
      return self.status(), b"", []
    if message["generation"] != self.generation:
      raise WireError(f"generation {message['generation']} is over, this is {self.generation}")
    if do == "attach":
      self._allocate(message["layout"], message["sizes"], message["slots"])
      with self._changed:
        self._trainer = link
        slot = next((i for i, c in enumerate(self.copies) if c.status == "committed"), None)
        copy = self.copies[slot] if slot is not None else None
        answer = {"slots": len(self.copies), "committed": slot, "step": copy.step if copy else -1,
                  "header": copy.header if copy else ""}
        return answer, b"", [c.data.fd for c in self.copies]
    if do == "begin":
      return self._begin(message["step"]), b"", []
    if do == "ready":
      self._ready(message["step"], message["header"])
      return {"accepted": message["step"]}, b"", []
    if do == "cancel":
      with self._changed:
        for copy in self.copies:
          if copy.step == message["step"] and copy.status == "writing":
            copy.reset(-1)
      return {}, b"", []
    if do == "read":
      _, payload = self._ask(message["host"], {**message, "do": "bytes"})
      return {}, payload, []
    if do == "hold":
      return self._ask(message["host"], message)[0], b"", []
    raise WireError(f"unknown request {do!r}")

  def _allocate(self, layout: str, sizes: list[int], slots: int) -> None:
    """Memory for this layout; what was there of another one is dropped. Raises MemoryRefused."""
    with self._changed:
      if (self.layout, self.sizes, len(self.copies)) == (layout, sizes, slots):
        return
      self._forget()
      shape = copies.geometry(self.code, max(sizes[h] for h in self.group))
      begin = time.monotonic()
      try:
        for i in range(slots):
          self.copies.append(copies.Copy(shape, f"moe-{self.host}-{i}"))
      except memory.MemoryRefused:
        self._forget()
        raise
      self.layout, self.sizes = layout, list(sizes)
    total = slots * (shape.data_bytes + shape.parity_bytes)
    self._log(f"{total / 1e6:,.1f} MB for {slots} copies, faulted in after {time.monotonic() - begin:.2f} s")

  def _forget(self) -> None:
    for copy in self.copies:
      copy.close()
    self.copies, self.layout, self.sizes, self.committed = [], "", [], -1

  def _begin(self, step: int) -> dict[str, Any]:
    with self._changed:
      copy = self._free(step)
      busy = copy is None or step in self.abandoned or copy.status in ("writing", "ready", "stored", "prepared")
      if not busy:
        if copy.step != step:
          copy.reset(step)
        copy.status = "writing"
        if len(self.copies) == 1:
          self.committed = -1
        return {"slot": self.copies.index(copy)}
    self._tell({"skipped": step})
    return {"busy": step}

  def _free(self, step: int) -> copies.Copy | None:
    """The copy that holds the step already (parity of quicker members), else one that is not the committed one."""
    for copy in self.copies:
      if copy.step == step:
        return copy if copy.status != "committed" else None
    spare = [c for c in self.copies if c.status != "committed"] or (self.copies if len(self.copies) == 1 else [])
    held, until = self._held
    spare = [c for c in spare if c.step != held or time.monotonic() > until]
    return spare[0] if spare else None

  def _ready(self, step: int, header: str) -> None:
    with self._changed:
      copy = next((c for c in self.copies if c.step == step and c.status == "writing"), None)
      if copy is None:
        raise WireError(f"step {step} was not begun")
      copy.status, copy.header = "ready", header
      epoch = copy.epoch
    threading.Thread(target=self._store, args=(copy, step, epoch), daemon=True, name="store").start()

  # ------------------------------------------------------------------------------------------------- storing a snapshot

  def _store(self, copy: copies.Copy, step: int, epoch: int) -> None:
    """Digests the copy, sends it to the members, and waits for the parity held here."""
    begin = time.monotonic()
    try:
      table = memory.digests(copy.data.bytes[: copy.shape.data_bytes], copy.shape.chunk)
      hashed = time.monotonic()
      with self._changed:
        self._current(copy, epoch)
        copy.set_record(copy.header, table)
        others = [place for place, host in enumerate(self.group) if host != self.host]
      failures: list[str] = []
      senders = [threading.Thread(target=self._send_copy, args=(copy, step, epoch, table, place, failures), daemon=True)
                 for place in others]
      for thread in senders:
        thread.start()
      for thread in senders:
        thread.join()
      if failures:
        raise WireError(failures[0])
      with self._changed:
        self._current(copy, epoch)
        copy.status = "stored"
        deadline = time.monotonic() + _WAIT_SECONDS
        while not (copy.verified.all() and len(copy.records) == len(others)):
          if not self._changed.wait(max(deadline - time.monotonic(), 0)) and time.monotonic() > deadline:
            raise WireError(f"the parity of step {step} is not complete after {_WAIT_SECONDS:.0f} s")
          self._current(copy, epoch)
      self._members().check(copy, self._place(), self.check_share)
      with self._changed:
        self._current(copy, epoch)
        copy.status = "prepared"
      self._tell({"prepared": step, "bytes": copy.shape.data_bytes, "hash_seconds": round(hashed - begin, 4),
                  "seconds": round(time.monotonic() - begin, 4)})
    except WireError as error:
      with self._changed:
        mine = copy.epoch == epoch
        if mine:
          copy.reset(-1)
      if mine:
        self._tell({"skipped": step, "reason": str(error)})

  def _current(self, copy: copies.Copy, epoch: int) -> None:
    if copy.failure:
      raise WireError(copy.failure)
    if copy.epoch != epoch:
      raise WireError("the step was given up")

  def _send_copy(self, copy: copies.Copy, step: int, epoch: int, table: np.ndarray, place: int, failures: list[str]) -> None:
    """To one member: header and digests, and the segments whose parity it holds. Over a connection of its own, so that
    nothing of a step that was given up is in the way of the next."""
    host, me, sent = self.group[place], self._place(), []
    try:
      with contextlib.closing(self._connect(host)) as link:
        link.send({"do": "record", "step": step, "after": self.committed, "header": copy.header, "table": copies.text_of(table),
                   "seal": copies.seal(copy.header, table)})
        for segment, stripe in enumerate(self.code.stripes(me)):
          for row, holder in enumerate(self.code.holders(stripe)):
            for i in range(copy.shape.chunks if holder == place else 0):
              if copy.epoch != epoch:
                raise WireError("the step was given up")
              data = copy.chunk(segment, i)
              link.send({"do": "chunk", "step": step, "stripe": stripe, "row": row, "chunk": i,
                         "fold": parity.fold(data).tobytes().hex()}, data)
              sent.append(table[segment * copy.shape.chunks + i])
        answer, _ = link.ask({"do": "done", "step": step})
        if answer.get("digest") != memory.digest(np.array(sent, np.uint64).tobytes()):
          raise WireError(f"host {host} holds other bytes of step {step} than were sent")
    except (WireError, KeyError) as error:
      failures.append(f"to host {host}: {error}")

  # -------------------------------------------------------------------------------------------------------------- peers

  def _admit(self, hello: dict) -> str | None:
    if hello.get("generation") != self.generation:
      return f"generation {hello.get('generation')} is not {self.generation}"
    if hello.get("host") not in self.peers:
      return f"host {hello.get('host')} is not one of ours"
    return None

  def _connect(self, host: int) -> Link:
    hello = {"role": "keeper", "host": self.host, "generation": self.generation}
    if host not in self.peers:
      raise WireError(f"host {host} is not one of ours")
    return wire.connect(self.peers[host], self._token, hello, self._tls[1])

  def _ask(self, host: int, message: dict) -> tuple[dict, np.ndarray]:
    """A question to another keeper, over a link that is kept; the payload is a copy."""
    if host == self.host:
      return self._answer_peer(self._place(), message, np.empty(0, np.uint8), [])
    with self._asking.setdefault(host, threading.Lock()):
      try:
        try:
          return self._asked(host, self._links.pop(host), message)
        except wire.Refused:
          raise
        except (KeyError, WireError):  # none is kept, or it died meanwhile
          return self._asked(host, self._connect(host), message)
      except WireError as error:
        raise WireError(f"host {host}: {error}") from error

  def _asked(self, host: int, link: Link, message: dict) -> tuple[dict, np.ndarray]:
    try:
      answer, payload = link.ask(message)
    except wire.Refused:
      self._links[host] = link
      raise
    self._links[host] = link
    return answer, payload.copy()

  def _members(self) -> decoding.Members:
    return decoding.Members(self.code, self.group, self._ask)

  def _place(self) -> int:
    return self.group.index(self.host)

  def _serve_peer(self, link: Link, hello: dict) -> None:
    generation, place = hello["generation"], None
    if hello["host"] in self.group:
      place = self.group.index(hello["host"])
    received: list[int] = []  # digests of the chunks of the step under way
    link.patient()
    while True:
      message, payload = link.receive()
      if generation != self.generation:
        raise WireError(f"generation {generation} is over, this is {self.generation}")
      try:
        answer = self._answer_peer(place, message, payload, received)
      except (KeyError, IndexError, TypeError, ValueError) as error:
        raise WireError(f"a message that makes no sense: {error!r}") from error
      except WireError as error:
        if message.get("do") in ("record", "chunk", "done"):
          link.send({"refused": str(error)})
          raise
        answer = {"refused": str(error)}, b""
      if answer is not None:
        link.send(*answer)
      answer = None  # it may be a view that keeps a copy's memory, while the next message is waited for

  def _answer_peer(self, place: int, message: dict, payload: np.ndarray, received: list[int]):
    do, step = message["do"], message.get("step")
    if do == "record":
      received.clear()
      header, table = message["header"], copies.table_of(message["table"])
      if copies.seal(header, table) != message["seal"]:
        raise WireError("a digest table arrived damaged")
      self._commit(message["after"])  # the sender knows of the commit, so it is one
      with self._changed:
        copy = self._free(step)
        if copy is None or step in self.abandoned or step <= self.committed or not self.copies:
          raise WireError(f"step {step} is not wanted here")
        if copy.step != step:
          copy.reset(step)
        copy.records[place] = header, table
        self._changed.notify_all()
      return None
    if do == "chunk":
      self._fold_in(self._copy(step), place, message, payload)
      received.append(memory.digest(payload))
      return None
    if do == "done":
      return {"digest": memory.digest(np.array(received, np.uint64).tobytes())}, b""
    if do == "get":
      copy = self._copy(step)
      if message["kind"] == "data":
        segment, i = message["segment"], message["chunk"]
        data, expected = copy.chunk(segment, i), copy.table[segment * copy.shape.chunks + i]
      else:
        held = self.code.rows(self._place()).index((message["stripe"], message["row"]))
        if not copy.verified[held, message["chunk"]]:
          raise WireError("no such parity here")
        data, expected = copy.parity_chunk(held, message["chunk"]), copy.parity_table[held, message["chunk"]]
      if memory.digest(data) != int(expected):
        raise WireError(f"the {message['kind']} of host {self.host} is damaged there")
      return {}, data
    if do == "get_record":
      for copy in self.copies:
        known = {**copy.records, self._place(): (copy.header, copy.table)}
        if copy.step == step and message["member"] in known:
          header, table = known[message["member"]]
          return {"header": header, "table": copies.text_of(table), "layout": self.layout, "sizes": self.sizes,
                  "slots": len(self.copies)}, b""
      raise WireError(f"no record of step {step}")
    if do == "hold":  # somebody looks at it (reader.py): it is not overwritten for so long
      copy = self._copy(step)
      if copy.status not in ("committed", "old"):
        raise WireError(f"step {step} is not committed")
      with self._changed:
        self._held = step, time.monotonic() + min(float(message["seconds"]), _MAX_HOLD_SECONDS)
      return {"header": copy.header}, b""
    if do == "bytes":
      copy, begin, count = self._copy(step), message["offset"], message["length"]
      inside = 0 <= begin <= begin + count <= copy.shape.data_bytes and count <= memory.MAX_CHUNK
      if copy.status not in ("committed", "old") or not inside:
        raise WireError(f"bytes {begin} to {begin + count} of step {step} are not to be had")
      return {}, copy.data.bytes[begin : begin + count]
    raise WireError(f"unknown request {do!r}")

  def _copy(self, step: int) -> copies.Copy:
    with self._changed:
      for copy in self.copies:
        if copy.step == step:
          return copy
    raise WireError(f"step {step} is not here")

  def _fold_in(self, copy: copies.Copy, place: int, message: dict, data: np.ndarray) -> None:
    """Adds a member's chunk to the parity held here; the last one of a chunk checks what was written."""
    stripe, row, i, epoch = message["stripe"], message["row"], message["chunk"], copy.epoch
    held = self.code.rows(self._place()).index((stripe, row))
    if len(data) != copy.shape.chunk or not 0 <= i < copy.shape.chunks:
      raise WireError(f"chunk {i} of {len(data)} bytes does not fit")
    segment = self.code.stripes(place).index(stripe)
    if memory.digest(data) != int(copy.records[place][1][segment * copy.shape.chunks + i]):
      raise WireError(f"chunk {i} is not the one in the member's digest table")
    fold = np.frombuffer(bytes.fromhex(message["fold"]), np.uint8)
    try:
      good = copy.fold_in(held, i, self.code.coefficient(row, stripe, place), data, fold, epoch)
    except copies.GivenUp as error:
      raise WireError(str(error)) from error
    if good is not None:
      with self._changed:
        if not good:
          copy.failure = f"the parity written for step {copy.step} on host {self.host} is wrong"
        copy.verified[held, i] = good
        if not good or copy.verified.all():
          self._changed.notify_all()

  # ------------------------------------------------------------------------------------------------------------ recovery

  def _proven(self, step: int) -> tuple[copies.Copy, int]:
    """(the copy of the step with every digest checked, number of chunks that had to be decoded).

    Raises:
      WireError: it cannot be made whole.
    """
    me = self._place()
    copy = next((c for c in self.copies if c.step == step and c.status in ("prepared", "committed")), None)
    if copy is None or copies.seal(copy.header, copy.table) != copy.seal:
      header, table = self._record_from_peers(step, me)
      if copy is None:
        self._held = -1, 0.0  # who looks at an older one gives way
        copy = self._free(step)
        if copy is None:
          raise WireError(f"no copy is free for step {step}")
        copy.reset(step)
      copy.set_record(header, table)
    found = memory.digests(copy.data.bytes[: copy.shape.data_bytes], copy.shape.chunk)
    bad = np.flatnonzero(found != copy.table).tolist()
    for c in bad:
      segment, i = divmod(c, copy.shape.chunks)
      copy.chunk(segment, i)[:] = self._members().chunk(step, self.code.stripes(me)[segment], me, i)
      if memory.digest(copy.chunk(segment, i)) != int(copy.table[c]):
        raise WireError(f"chunk {c} of step {step} does not decode to its digest")
    return copy, len(bad)

  def _protect(self, step: int) -> None:
    """Records and parity of this host for a step, from the data of the members. Raises WireError, GivenUp."""
    copy, me = self._copy(step), self._place()
    epoch = copy.epoch
    for place, host in enumerate(self.group):
      if host != self.host and place not in copy.records:
        answer, _ = self._ask(host, {"do": "get_record", "step": step, "member": place})
        with self._changed:
          self._current(copy, epoch)
          copy.records[place] = answer["header"], copies.table_of(answer["table"])
    for held, (stripe, row) in enumerate(self.code.rows(me)):
      for i in np.flatnonzero(~copy.verified[held]).tolist():
        total = np.zeros(copy.shape.chunk, np.uint8)
        for place in self.code.members(stripe):
          segment = self.code.stripes(place).index(stripe)
          _, data = self._ask(self.group[place], {"do": "get", "kind": "data", "step": step, "segment": segment, "chunk": i})
          if memory.digest(data) != int(copy.records[place][1][segment * copy.shape.chunks + i]):
            raise WireError(f"chunk {i} of host {self.group[place]} is not the one in its digest table")
          parity.accumulate(total, self.code.coefficient(row, stripe, place), data)
        copy.set_parity(held, i, total, epoch)

  def _record_from_peers(self, step: int, member: int) -> tuple[str, np.ndarray]:
    """This host's header and digests as the others of the group hold them; and memory for them."""
    problems = []
    for host in self.group:
      if host == self.host:
        continue
      try:
        answer, _ = self._ask(host, {"do": "get_record", "step": step, "member": member})
        self._allocate(answer["layout"], answer["sizes"], answer["slots"])
        return answer["header"], copies.table_of(answer["table"])
      except WireError as error:
        problems.append(str(error))
    raise WireError(f"nobody has host {self.host}'s digests of step {step}: {'; '.join(problems) or 'it has no group'}")

  # -------------------------------------------------------------------------------------------------------------- status

  def status(self) -> dict[str, Any]:
    with self._changed:
      return {"host": self.host, "generation": self.generation, "group": self.group, "parity_hosts": self.code.m,
              "committed": self.committed, "layout": self.layout,
              "copies": [{"step": c.step, "status": c.status} for c in self.copies],
              "bytes": sum(c.shape.data_bytes + c.shape.parity_bytes for c in self.copies),
              "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "pid": os.getpid()}


def main() -> None:
  """`keeper FD`: the supervisor's socket; settings are its first message, so that no secret is in a command line."""
  control = Link(socket.socket(fileno=int(sys.argv[1])), None)
  settings, _ = control.receive()
  memory.die_with_parent(settings["parent"])
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to the whole group; it ends when the supervisor does
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the state of a model is not for core dumps
  with contextlib.suppress(OSError):
    pathlib.Path("/proc/self/oom_score_adj").write_text("0")
  tls = wire.tls_contexts(*settings["tls"])
  Keeper(control, bytes.fromhex(settings["token"]), settings["address"], settings["socket"], tls).run()


if __name__ == "__main__":
  main()
