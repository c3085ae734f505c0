"""Keepers of several hosts in this process, each with a supervisor and a trainer of a few lines, for tests and benches."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time

import numpy as np

from moe.snapshot import keeper as keeper_lib
from moe.snapshot import memory
from moe.snapshot.wire import Link, WireError

TOKEN = b"t" * 32


class Host:
  """One host; `folder` is where its Unix socket lies."""

  def __init__(self, number: int, folder):
    self.number, (ours, theirs) = number, socket.socketpair()
    self.control, self.heard = Link(ours, None), queue.Queue()
    threading.Thread(target=self._read, daemon=True).start()
    self.path = f"{folder}/keeper-{number}-{time.monotonic_ns()}"
    self.keeper = keeper_lib.Keeper(Link(theirs, None), TOKEN, "127.0.0.1", self.path)
    threading.Thread(target=self.keeper.run, daemon=True).start()
    self.hear("listening")

  def _read(self):
    with contextlib.suppress(WireError):
      while True:
        self.heard.put(self.control.receive()[0])

  def hear(self, *keys: str, seconds: float = 20) -> dict:
    """The next message of the keeper with one of these keys. Raises queue.Empty."""
    while True:
      message = self.heard.get(timeout=seconds)
      if any(key in message for key in keys):
        return message

  def attach(self, generation: int, sizes: list[int], slots: int = 2) -> None:
    """As a trainer whose hosts have so many bytes each."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(self.path)
    self.trainer, self.generation = Link(sock, 120), generation
    self.answer = self.ask({"do": "attach", "layout": "L", "sizes": sizes, "slots": slots})
    self.slots = memory.received(sock, self.answer["slots"])

  def ask(self, message: dict) -> dict:
    """The keeper's answer to the trainer; the bytes that came with it are in `payload`."""
    self.trainer.send({**message, "generation": self.generation})
    while True:
      answer, payload = self.trainer.receive()
      if answer.keys() != {"committed"}:  # said unasked
        self.payload = payload
        return answer

  def copied(self, step: int, data: np.ndarray) -> bool:
    """Copies the state of a step into its slot; False when the keeper is busy."""
    answer = self.ask({"do": "begin", "step": step})
    if "slot" in answer:
      self.slots[answer["slot"]][: len(data)] = data
    return "slot" in answer

  def ready(self, step: int) -> None:
    self.ask({"do": "ready", "step": step, "header": json.dumps({"step": step, "host": self.number})})

  def close(self) -> None:
    self.control.close()
    self.keeper.listener.close()
    self.slots = []  # the memory goes with its last mapping


def configure(hosts: list[Host], parity_hosts: int, generation: int = 1) -> list[dict]:
  """Makes the hosts one group, as the leader does; their inventories."""
  peers = {str(h.number): list(h.keeper.listener.address) for h in hosts}
  for host in hosts:
    host.control.send({"do": "configure", "generation": generation, "host": host.number, "group": list(range(len(hosts))),
                       "parity": parity_hosts, "peers": peers, "check_share": 0.01})
  return [host.hear("configured")["inventory"] for host in hosts]
