"""Memory that outlives its writer: sealed memfds, faulted in at the start, and their digests.

`multiprocessing.shared_memory` will not do: its segment is unlinked when any process that attached it ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import pathlib
import signal
import socket

import numpy as np
import xxhash

PAGE = 4096
MAX_CHUNK = 4 << 20  # bytes under one digest


class MemoryRefused(Exception):
  """The host has not the memory."""


class Region:
  """`size` bytes that can be handed to another process by their file descriptor and neither shrink nor grow."""

  def __init__(self, name: str, size: int):
    if size > available_bytes():  # the kernel would rather kill somebody than refuse
      raise MemoryRefused(f"{size / 1e9:.2f} GB for {name}, and this host has {available_bytes() / 1e9:.2f} GB left")
    self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    size = max(-(-size // PAGE) * PAGE, PAGE)
    try:
      # First touch costs fifteen times a copy; here, before the first snapshot, and charged to this process.
      os.posix_fallocate(self.fd, 0, size)
    except OSError as error:
      os.close(self.fd)
      raise MemoryRefused(f"{size / 1e9:.2f} GB for {name}: {error.strerror}") from error
    fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    self.bytes = mapped(self.fd)

  def close(self) -> None:
    """The memory goes when its last mapping does."""
    os.close(self.fd)
    self.bytes = np.empty(0, np.uint8)


def mapped(fd: int) -> np.ndarray:
  """[size] uint8, the whole of a memfd, writable."""
  buffer = mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
  return np.frombuffer(buffer, np.uint8)


def received(sock: socket.socket, count: int) -> list[np.ndarray]:
  """The memories of `count` memfds that the other side of a Unix socket hands over."""
  _, fds, _, _ = socket.recv_fds(sock, 1, count)
  found = [mapped(fd) for fd in fds]
  for fd in fds:
    os.close(fd)
  return found


def digest(data) -> int:
  """xxh3, 64 bits: against accidents, not against forgers."""
  return xxhash.xxh3_64_intdigest(data)


def digests(data: np.ndarray, chunk: int) -> np.ndarray:
  """[chunks] uint64, one for each `chunk` bytes."""
  return np.array([digest(data[i : i + chunk]) for i in range(0, len(data), chunk)], np.uint64)


def available_bytes() -> int:
  """What this host can still give: the least of the kernel's MemAvailable and what the control group has left."""
  found = []
  for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
    if line.startswith("MemAvailable:"):
      found.append(int(line.split()[1]) * 1024)
  for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
    try:
      texts = [pathlib.Path("/sys/fs/cgroup", name).read_text().strip() for name in (limit, used)]
    except OSError:
      continue
    if texts[0] != "max":
      found.append(int(texts[0]) - int(texts[1]))
  return max(min(found), 0)


def die_with_parent(parent: int) -> None:
  """Asks the kernel to kill this process when its parent, of that process number, ends; at once if it is gone already."""
  PR_SET_PDEATHSIG = 1
  ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(13)
