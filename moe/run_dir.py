"""The directory of a run: its name, its one owner, and what each start leaves in it. No JAX: the supervisor has none."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from typing import Any

from etils import epath

from moe import command_line
from moe import config
from moe import gin_config
from moe.config import ConfigError
from moe.errors import UserError, storage_errors

_PATTERN = "[*?"  # Orbax lists with patterns: in such a folder it would save empty checkpoints
_BEAT_SECONDS = 15.0  # between the signs of life of an owner on an object store
_STALE_BEATS = 4  # without any, the owner is taken for dead
_SETTLE_SECONDS = 1.0  # until two who take a lease at the same time see which of them was last


def choose(given: str | None, hosts: int = 1) -> epath.Path:
  """Makes the directory of a run.

  Args:
    given: --run_dir, which may exist; None: a new one, named after the time.
    hosts: of the job, which must all mean the same directory.

  Raises:
    ConfigError: it cannot be made, or a checkpoint could not be saved in it.
  """
  path = named(given, hosts)
  try:
    return _made(path) if given is None else _there(path)
  except storage_errors() as error:
    raise ConfigError(f"--run_dir={path} cannot be made: {getattr(error, 'strerror', None) or error}") from error


def named(given: str | None, hosts: int = 1) -> epath.Path:
  """The directory that `choose` would make, where nobody has one of this second's name.

  Raises:
    ConfigError: a checkpoint could not be saved in it, or several hosts would each mean another.
  """
  if given is None and hosts > 1:
    raise ConfigError(f"a job of {hosts} hosts needs --run_dir, the same on all of them")
  path = absolute(given or time.strftime("runs/%Y%m%d-%H%M%S"))
  if found := set(_PATTERN) & set(str(path)):
    raise ConfigError(f"--run_dir={path} has {' and '.join(sorted(found))} in it, and no checkpoint can be saved there: "
                      "patterns begin with it; choose another name")
  return path


def absolute(path) -> epath.Path:
  """The path a user gave, `~` expanded."""
  return epath.Path(path) if "://" in str(path) else epath.Path(os.path.abspath(os.path.expanduser(path)))


def _there(path: epath.Path) -> epath.Path:
  path.mkdir(parents=True, exist_ok=True)
  if "://" not in str(path) and not os.access(path, os.W_OK):
    raise ConfigError(f"--run_dir={path} may not be written by this user; choose another")
  return path


def _made(path: epath.Path) -> epath.Path:
  """`path`, or `path`-2 and so on: one that nobody else has made in the same second."""
  number = 1
  while True:
    tried = path.with_name(path.name + (f"-{number}" if number > 1 else ""))
    try:
      tried.mkdir(parents=True, exist_ok=False)
      return tried
    except FileExistsError:
      number += 1


def holds_a_run(path: epath.Path) -> bool:
  """Whether a run was ever begun in it. The events do not count: a supervisor writes some before its trainer starts."""
  return any((path / name).exists() for name in ("config.json", "metrics.jsonl"))


# -------------------------------------------------------------------------------------------------------------- owner


class Owner:
  """Holds a directory, so that no other job writes into it: a context manager.

  On a disk it is a lock of the kernel, which ends with the process. On an object store it is a lease: an object that is
  written again every few seconds, and that counts as left behind when it stays the same.
  """

  def __init__(self, path: epath.Path, say=print):
    """Takes the directory.

    Args:
      path: that exists.
      say: gets a line while a lease must be waited for, and where a directory cannot be locked.

    Raises:
      ConfigError: another process has it.
    """
    self._path, self._say = path, say
    self._me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    self._file, self._ended = None, threading.Event()
    if "://" in str(path):
      self._lease = path / "owner.json"
      self._take_lease()
    else:
      self._lock()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.release()

  def release(self) -> None:
    """Once; again it does nothing."""
    if self._file:
      self._file.close()
      self._file = None
    elif not self._ended.is_set():
      self._ended.set()
      if "://" in str(self._path):
        self._thread.join(_BEAT_SECONDS)
        self._write_lease(None)

  def _lock(self) -> None:
    file = open(self._path / ".owner", "a+b", buffering=0)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      owner = _parsed(file.read())
      file.close()
      raise self._taken(owner) from None
    except OSError as error:  # a file system without locks
      file.close()
      self._say(f"note: {self._path} cannot be locked ({error.strerror}): take care that no other job uses it")
      self._ended.set()
      return
    self._file = file
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the text
      file.truncate(0)
      file.write(json.dumps(self._me).encode())

  def _taken(self, owner: dict[str, Any]) -> ConfigError:
    who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "another process"
    return ConfigError(f"{self._path} is in use by {who}; stop that job first, or choose another --run_dir")

  def _take_lease(self) -> None:
    owner = self._read_lease()
    if owner and not self._left_behind(owner):
      self._say(f"{self._path} was in use by process {owner['pid']} on {owner['host']}; waiting up to "
                f"{_STALE_BEATS * _BEAT_SECONDS:.0f} s for a sign of life")
      # The clocks of two machines differ: only a change counts.
      deadline = time.monotonic() + _STALE_BEATS * _BEAT_SECONDS
      while time.monotonic() < deadline:
        time.sleep(_BEAT_SECONDS / 5)
        now = self._read_lease()
        if not now:
          break
        if now != owner:
          raise self._taken(now)
    self._write_lease(0)
    time.sleep(_SETTLE_SECONDS)
    now = self._read_lease()
    if now and any(now.get(key) != value for key, value in self._me.items()):
      raise self._taken(now)
    self._thread = threading.Thread(target=self._beat, daemon=True, name="owner")
    self._thread.start()

  def _left_behind(self, owner: dict[str, Any]) -> bool:
    """Whether it is known at once that the owner is dead: its process was on this machine."""
    return owner["host"] == self._me["host"] and not pathlib.Path(f"/proc/{owner['pid']}").exists()

  def _beat(self) -> None:
    beats = 0
    while not self._ended.wait(_BEAT_SECONDS):
      beats += 1
      self._write_lease(beats)

  def _read_lease(self) -> dict[str, Any]:
    try:
      return _parsed(self._lease.read_text())
    except storage_errors():
      return {}

  def _write_lease(self, beat: int | None) -> None:
    try:
      if beat is None:
        self._lease.unlink(missing_ok=True)
      else:
        self._lease.write_text(json.dumps({**self._me, "beat": beat}))
    except storage_errors():
      pass  # a store that is away for a moment ends no run


def _parsed(text: str | bytes) -> dict[str, Any]:
  try:
    owner = json.loads(text)
    return owner if {"host", "pid", "since"} <= owner.keys() else {}
  except (ValueError, AttributeError):
    return {}


# ------------------------------------------------------------------------------------------------------------- starts


def keep_start(path: epath.Path, files: dict[str, str]) -> None:
  """Keeps what describes this start: the newest under its plain name, and every one in `starts/<number>/`."""
  numbered = path / "starts"
  numbered.mkdir(parents=True, exist_ok=True)
  before = numbered.iterdir() if numbered.exists() else ()  # an object store has no empty folders
  number = max((int(found.name) for found in before if found.name.isdigit()), default=0) + 1
  folder = numbered / f"{number:04}"
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in files.items():
    (folder / name).write_text(text)
    (path / name).write_text(text)


def finished(argv: list[str]) -> str | None:
  """What to say where a command of moe.train only repeats a run that is finished; None where there is something to do.

  Mistakes in the flags are for the trainer to say.
  """
  arguments, rest = command_line.parse(argv)
  if not arguments.run_dir or arguments.again or arguments.dry_run or arguments.print_config or arguments.resume == "never":
    return None
  try:
    path = absolute(arguments.run_dir)
    done = int((path / "DONE").read_text())
    run = gin_config.from_arguments(arguments, rest).run
    kept = json.loads((path / "config.json").read_text())
  except (UserError, ValueError, *storage_errors()):
    return None
  if done != run.train.steps or config.differences(kept, json.loads(json.dumps(config.to_dict(run)))):
    return None
  return (f"done: {path} has all {done} steps\n"
          f"  report       {path}/report/index.html\n"
          f"  records      {path}/metrics.jsonl\n"
          f"  checkpoints  {path}/checkpoints\n"
          "--again evaluates and draws the report again")
