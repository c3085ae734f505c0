"""Messages between processes and hosts: JSON and raw bytes under a digest, after a mutual proof of the job's token.

A message is a fixed head, a JSON object and at most one chunk of bytes. Sizes are capped before anything is allocated,
every wait has an end, and what an earlier generation of the job says is refused. No pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import ssl
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moe.snapshot import memory

_HEAD = struct.Struct("<4sIIQ")  # magic, bytes of JSON, bytes of payload, digest of both
_MAGIC = b"MOE1"
_MAX_JSON = 32 << 20
_MAX_GREETING = 1 << 10
_MAX_PENDING = 32  # strangers whose handshake is under way
TIMEOUT_SECONDS = 30.0
_HANDSHAKE_SECONDS = 5.0
_LINES_A_MINUTE = 20  # about callers who are turned away


class WireError(Exception):
  """A connection that cannot be used any more: closed, timed out, damaged, of a stranger or of an old generation."""


class Closed(WireError):
  """The other side has closed the connection."""


class Refused(WireError):
  """The other side will not; the connection is good."""


class Link:
  """One connection. `send` may be called by several threads, `receive` by one."""

  def __init__(self, sock: socket.socket, timeout: float | None = TIMEOUT_SECONDS, limit: int = _MAX_JSON):
    sock.settimeout(timeout)
    if sock.family == socket.AF_INET:
      sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self.sock, self.limit = sock, limit
    self._sending = threading.Lock()
    self._payload = bytearray()

  def send(self, message: dict[str, Any], payload: Any = b"") -> None:
    text = json.dumps(message, separators=(",", ":")).encode()
    payload = memoryview(payload).cast("B") if len(payload) else memoryview(b"")
    head = _HEAD.pack(_MAGIC, len(text), len(payload), _digest(text, payload))
    with self._sending, _broken():
      self.sock.sendall(head + text)
      if len(payload):
        self.sock.sendall(payload)

  def receive(self) -> tuple[dict[str, Any], np.ndarray]:
    """(message, payload [bytes] uint8); the payload is good until the next call.

    Raises:
      WireError
    """
    magic, text_size, payload_size, expected = _HEAD.unpack(self._read(bytearray(_HEAD.size)))
    if magic != _MAGIC or text_size > self.limit or payload_size > memory.MAX_CHUNK:
      raise WireError(f"a message of {text_size} + {payload_size} bytes with magic {magic!r} is none of ours")
    text = self._read(bytearray(text_size))
    if len(self._payload) < payload_size:
      self._payload = bytearray(payload_size)
    payload = self._read(memoryview(self._payload)[:payload_size])
    if _digest(text, payload) != expected:
      raise WireError("a message arrived damaged: its digest does not match")
    try:
      message = json.loads(bytes(text))
    except ValueError as error:
      raise WireError(f"a message is not JSON: {error}") from error
    if not isinstance(message, dict):
      raise WireError("a message is not a JSON object")
    return message, np.frombuffer(payload, np.uint8)

  def ask(self, message: dict[str, Any], payload: Any = b"") -> tuple[dict[str, Any], np.ndarray]:
    """Sends and waits for the answer; raises Refused when it is a refusal."""
    self.send(message, payload)
    answer, data = self.receive()
    if "refused" in answer:
      raise Refused(answer["refused"])
    return answer, data

  def _read(self, buffer):
    view, done = memoryview(buffer), 0
    with _broken():
      while done < len(view):
        count = self.sock.recv_into(view[done:])
        if not count:
          raise Closed("the other side closed the connection")
        done += count
    return buffer

  def patient(self) -> None:
    """Waits for the next message as long as the other side is alive; a dead one is noticed in half a minute.

    Probes are sent only while nothing is under way; what is and is not acknowledged has a timeout of its own, a quarter of an
    hour by default.
    """
    self.sock.settimeout(None)
    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 25_000)):
      self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self.sock.shutdown(socket.SHUT_RDWR)
    self.sock.close()


def _digest(text, payload) -> int:
  return memory.digest(text) ^ (memory.digest(payload) * 3 & (1 << 64) - 1 if len(payload) else 0)


@contextlib.contextmanager
def _broken():
  try:
    yield
  except (OSError, ValueError) as error:  # ValueError: closed by another thread
    raise WireError(f"the connection broke: {error}") from error


def socket_folder() -> str:
  """A new folder, 0700, for a Unix socket, whose path may have 107 bytes only."""
  folder = tempfile.mkdtemp(prefix="moe-")
  if len(folder) > 80:
    os.rmdir(folder)
    folder = tempfile.mkdtemp(prefix="moe-", dir="/tmp")
  return folder


# ---------------------------------------------------------------------------------------------------------- handshake


def new_token() -> bytes:
  return secrets.token_bytes(32)


def read_token(path: str) -> bytes:
  """The job's token from a file that only its owner can read.

  Raises:
    WireError: unreadable, too short, or open to others.
  """
  try:
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
      raise WireError(f"the token file {path} can be read by others; chmod 600 {path}")
    with open(path, "rb") as file:
      token = file.read(4096).strip()
  except OSError as error:
    raise WireError(f"the token file {path}: {error.strerror}") from error
  if len(token) < 32:
    raise WireError(f"the token in {path} has {len(token)} bytes; at least 32 (head -c 32 /dev/urandom | base64 > {path})")
  return token


def _proof(token: bytes, side: str, mine: str, theirs: str, hello: str) -> str:
  return hmac.new(token, "|".join((side, mine, theirs, hello)).encode(), hashlib.sha256).hexdigest()


def connect(address: tuple[str, int], token: bytes, hello: dict[str, Any], tls: ssl.SSLContext | None = None) -> Link:
  """Connects and proves the token, and that the other side has it too.

  Args:
    hello: who calls: {"role", "host", "generation", ...}; under the proof.
  """
  with _broken():
    sock = socket.create_connection(address, _HANDSHAKE_SECONDS)
    if tls:
      sock = tls.wrap_socket(sock, server_hostname=address[0])
  link = Link(sock, _HANDSHAKE_SECONDS, _MAX_GREETING)
  try:
    mine, text = secrets.token_hex(16), json.dumps(hello, sort_keys=True)
    link.send({"nonce": mine, "hello": hello})
    answer, _ = link.receive()
    if "refused" in answer:
      raise WireError(answer["refused"])
    theirs = str(answer.get("nonce"))
    if not hmac.compare_digest(str(answer.get("proof")), _proof(token, "server", theirs, mine, text)):
      raise WireError(f"{address[0]}:{address[1]} does not have this job's token")
    link.send({"proof": _proof(token, "client", mine, theirs, text)})
    answer, _ = link.receive()
    if "welcome" not in answer:
      raise WireError(str(answer.get("refused", "not welcome")))
  except WireError:
    link.close()
    raise
  sock.settimeout(TIMEOUT_SECONDS)
  link.limit = _MAX_JSON
  return link


def _greet(sock: socket.socket, token: bytes, admit: Callable[[dict], str | None], tls) -> tuple[Link, dict]:
  with _broken():
    sock.settimeout(_HANDSHAKE_SECONDS)
    if tls:
      sock = tls.wrap_socket(sock, server_side=True)
  link = Link(sock, _HANDSHAKE_SECONDS, _MAX_GREETING)
  try:
    first, _ = link.receive()
    hello, theirs = first.get("hello"), str(first.get("nonce"))
    if not isinstance(hello, dict):
      raise WireError("no hello")
    mine, text = secrets.token_hex(16), json.dumps(hello, sort_keys=True)
    link.send({"nonce": mine, "proof": _proof(token, "server", mine, theirs, text)})
    answer, _ = link.receive()
    if not hmac.compare_digest(str(answer.get("proof")), _proof(token, "client", theirs, mine, text)):
      raise WireError("the caller does not have this job's token")
    refusal = admit(hello)
    if refusal:
      link.send({"refused": refusal})
      raise WireError(refusal)
    link.send({"welcome": True})
  except WireError:
    link.close()
    raise
  link.sock.settimeout(TIMEOUT_SECONDS)
  link.limit = _MAX_JSON
  return link, hello


class Listener:
  """Accepts callers on one address of this host; a thread for each that proves the token."""

  def __init__(self, host: str, port: int, token: bytes, serve: Callable[[Link, dict], None],
               admit: Callable[[dict], str | None] = lambda hello: None, tls: ssl.SSLContext | None = None,
               log: Callable[[str], None] = lambda text: None):
    """
    Args:
      serve: called with every link and its hello; the link is closed when it returns or raises WireError.
      admit: why a caller with the token is refused all the same (an old generation), or None.
    """
    if host in ("", "0.0.0.0", "::"):
      raise ValueError("bind to the host's own address, not to all of them")
    self._socket = socket.create_server((host, port), backlog=128)
    self.address = self._socket.getsockname()[:2]
    self._token, self._serve, self._admit, self._tls, self._log = token, serve, admit, tls, log
    self._pending = threading.Semaphore(_MAX_PENDING)
    self._minute, self._lines = -1, 0
    threading.Thread(target=self._accept, daemon=True, name="listener").start()

  def _accept(self) -> None:
    while True:
      try:
        sock, address = self._socket.accept()
      except OSError:
        return
      if not self._pending.acquire(blocking=False):  # a flood of strangers costs them their connection, and us nothing
        sock.close()
        continue
      threading.Thread(target=self._one, args=(sock, address), daemon=True).start()

  def _one(self, sock: socket.socket, address) -> None:
    link = None
    try:
      try:
        link, hello = _greet(sock, self._token, self._admit, self._tls)
      finally:
        self._pending.release()
      with contextlib.suppress(Closed):  # its way to say goodbye
        self._serve(link, hello)
    except WireError as error:
      self._complain(f"connection from {address[0]}: {error}")
    finally:
      link.close() if link else sock.close()

  def _complain(self, text: str) -> None:
    """A flood of strangers must not fill the disk either."""
    minute = int(time.monotonic() // 60)
    if minute != self._minute:
      self._minute, self._lines = minute, 0
    self._lines += 1
    if self._lines <= _LINES_A_MINUTE:
      self._log(text)
    elif self._lines == _LINES_A_MINUTE + 1:
      self._log("more connections are turned away; nothing is said of them for a minute")

  def close(self) -> None:
    self._socket.close()


def tls_contexts(certificate: str, key: str, authority: str) -> tuple[ssl.SSLContext, ssl.SSLContext] | tuple[None, None]:
  """(for servers, for clients) with both sides' certificates demanded; (None, None) where no certificate is given."""
  if not certificate:
    return None, None
  contexts = []
  for purpose in (ssl.Purpose.CLIENT_AUTH, ssl.Purpose.SERVER_AUTH):
    context = ssl.create_default_context(purpose, cafile=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificate, key)
    contexts.append(context)
  return contexts[0], contexts[1]
