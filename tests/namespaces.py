"""Hosts of a job as network namespaces, whose wire is this process: what a host sends can be dropped, delayed or reordered.

Each namespace has one tunnel interface; its packets are read here and written to the interface of their destination. So
nothing of it touches the machine's own interfaces, and no kernel module beside the tunnel's is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import selectors
import struct
import subprocess
import threading
import time
from typing import NamedTuple

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUN_WITHOUT_HEAD = 0x400454CA, 0x1001
_MTU = 9000


class Fault(NamedTuple):
  """Of the packets from or to a host."""

  drop: float = 0.0  # share
  delay: float = 0.0  # seconds
  jitter: float = 0.0  # seconds at most, at random on top: packets overtake each other


def run(*command: str) -> None:
  subprocess.run(command, check=True, capture_output=True, text=True)


class Network:
  """`count` namespaces that reach each other, 192.0.2.1 and on.

  Raises:
    OSError, subprocess.CalledProcessError: this machine or user cannot make them.
  """

  def __init__(self, count: int):
    _sweep()
    self._names = [f"moe-{os.getpid()}-{i}" for i in range(count)]
    self.faults: dict[tuple[str, int], Fault] = {}  # ("from" or "to", host) -> what happens to such packets
    self.recorded: list[bytes] | None = None  # packets, when somebody asks for them
    self._devices: list[int] = []
    self._closed = False
    try:
      for i, name in enumerate(self._names):
        run("ip", "netns", "add", name)
        self._devices.append(_tunnel(name))
        run("ip", "-n", name, "address", "add", f"{self.address(i)}/24", "dev", "tun0")
        run("ip", "-n", name, "link", "set", "tun0", "mtu", str(_MTU), "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
    except BaseException:
      self._remove()
      raise
    self._thread = threading.Thread(target=self._carry, daemon=True, name="wire")
    self._thread.start()

  def address(self, host: int) -> str:
    return f"192.0.2.{host + 1}"

  def command(self, host: int) -> list[str]:
    """What goes before a command that runs on a host; the name of the host is its address, which JAX's collectives look up."""
    return ["ip", "netns", "exec", self._names[host], "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"',
            self.address(host)]

  def close(self) -> None:
    self._closed = True
    self._thread.join()
    self._remove()

  def _remove(self) -> None:
    for device in self._devices:
      os.close(device)
    for name in self._names:
      with contextlib.suppress(subprocess.CalledProcessError):
        run("ip", "netns", "delete", name)

  def _carry(self) -> None:
    poll, waiting, order = selectors.DefaultSelector(), [], itertools.count()
    for host, device in enumerate(self._devices):
      poll.register(device, selectors.EVENT_READ, host)
    while not self._closed:
      wait = min(max(waiting[0][0] - time.monotonic(), 0), 0.1) if waiting else 0.1
      for key, _ in poll.select(wait):
        with contextlib.suppress(BlockingIOError):
          packet = os.read(key.fd, 1 << 16)
          to = packet[19] - 1
          if packet[0] >> 4 != 4 or not 0 <= to < len(self._devices):
            continue
          if self.recorded is not None:
            self.recorded.append(packet)
          met = [self.faults[k] for k in (("from", key.data), ("to", to)) if k in self.faults]
          if any(random.random() < fault.drop for fault in met):
            continue
          due = time.monotonic() + sum(fault.delay + fault.jitter * random.random() for fault in met)
          heapq.heappush(waiting, (due, next(order), to, packet))
      while waiting and waiting[0][0] <= time.monotonic():
        _, _, to, packet = heapq.heappop(waiting)
        with contextlib.suppress(OSError):  # its queue is full: lost, as on any wire
          os.write(self._devices[to], packet)


def _tunnel(namespace: str) -> int:
  """The file of a new interface tun0 inside the namespace."""
  made: list = []

  def make() -> None:  # a thread of its own is there for good
    try:
      libc, place = ctypes.CDLL(None, use_errno=True), os.open(f"/run/netns/{namespace}", os.O_RDONLY)
      if libc.setns(place, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
      os.close(place)
      device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
      fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _TUN_WITHOUT_HEAD))
      made.append(device)
    except OSError as error:
      made.append(error)

  thread = threading.Thread(target=make)
  thread.start()
  thread.join()
  if isinstance(made[0], OSError):
    raise made[0]
  return made[0]


def _sweep() -> None:
  """Removes what a killed test process left."""
  listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
  for name in (line.split()[0] for line in listed.splitlines() if line.startswith("moe-")):
    if not os.path.exists(f"/proc/{name.split('-')[1]}"):
      run("ip", "netns", "delete", name)


def payloads(packets: list[bytes], port: int) -> list[bytes]:
  """What was said to a TCP port, a piece a packet, as sent."""
  found = []
  for packet in packets:
    head = (packet[0] & 15) * 4
    body = packet[head + (packet[head + 12] >> 4) * 4 :] if packet[9] == 6 else b""
    if body and int.from_bytes(packet[head + 2 : head + 4], "big") == port:
      found.append(body)
  return found
