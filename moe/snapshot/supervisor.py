"""One a host: starts the snapshot process and the trainer, watches both, and does what the leader says. No JAX.

`python -m moe.train --supervise ...` comes here. On several hosts every host runs the same command with
`--multihost=ADDRESS:PORT,HOSTS,INDEX`; ADDRESS:PORT is the leader's, on host 0, for the whole life of the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from moe import command_line
from moe import config
from moe import gin_config
from moe import jsonl
from moe import run_dir
from moe.errors import storage_errors
from moe.snapshot import leader as leader_lib
from moe.snapshot import wire
from moe.snapshot.wire import Link, WireError

_LEADER_SECONDS = 600.0  # how long a host looks for its leader
_FLAGS = ("--supervise", "--multihost", "--token_file", "--run_dir", "--resume")  # not for the trainer as they are


class Trainer:
  """The trainer's process, its last sign of life, and how long it may stay silent."""

  def __init__(self, command: list[str], environment: dict[str, str], events: queue.Queue, limits: config.Snapshot):
    read, write = os.pipe()
    settings = json.loads(environment[command_line.SUPERVISED])
    environment = {**environment, command_line.SUPERVISED: json.dumps({**settings, "beat_fd": write})}
    self.process = subprocess.Popen(command, env=environment, pass_fds=[write])
    os.close(write)
    self.phase, self.step, self.seen, self.why = "start", settings["step"] or 0, time.monotonic(), ""
    self._limits, self._durations, self._events = limits, [], events
    threading.Thread(target=self._beats, args=(read,), daemon=True).start()
    threading.Thread(target=self._wait, daemon=True).start()

  def _beats(self, fd: int) -> None:
    with os.fdopen(fd) as lines:
      for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
          beat, now = json.loads(line), time.monotonic()
          if beat["phase"] == self.phase == "step":
            self._durations = [*self._durations[-499:], now - self.seen]
          self.phase, self.step, self.seen = str(beat["phase"]), int(beat["step"]), now

  def _wait(self) -> None:
    code = self.process.wait()
    self._events.put(("trainer", {"process": self, "code": code}))

  def allowed_seconds(self) -> float:
    """max(3 x the 99th percentile of the steps, the least patience); what compiles or restores has its own allowance."""
    if self.phase != "step":
      return self._limits.compile_seconds
    slow = sorted(self._durations)[int(len(self._durations) * 0.99)] if self._durations else 0.0
    return max(3 * slow, self._limits.stuck_seconds)

  def stuck(self) -> bool:
    return time.monotonic() - self.seen > self.allowed_seconds()

  def kill(self, why: str = "") -> None:
    """At once; `why` also asks for the stacks of its threads first (stacks-<host>.txt)."""
    self.why = why or self.why
    with contextlib.suppress(ProcessLookupError):
      if why:
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
      self.process.kill()
      self.process.wait()

  def kind(self, code: int) -> str:
    return self.why or (f"signal {-code}" if code < 0 else f"exit {code}")


class Supervisor:
  """`run` returns the exit code of the job on this host."""

  def __init__(self, arguments, run: config.Run, trainer_command: list[str]):
    address, self.hosts, self.host = "127.0.0.1", 1, 0
    if arguments.multihost:
      found = command_line.hosts(arguments.multihost)
      if not found:
        raise config.ConfigError("--supervise needs --multihost=ADDRESS:PORT,HOSTS,INDEX written out")
      (address, _, port), self.hosts, self.host = found[0].rpartition(":"), found[1], found[2]
    else:
      port = 0
    run_dir.named(arguments.run_dir, self.hosts)  # made further down, when nothing else can be wrong
    if self.hosts > 1 and not arguments.token_file:
      raise config.ConfigError("--supervise on several hosts needs --token_file: the same secret on all of them "
                               "(head -c 32 /dev/urandom | base64 > FILE; chmod 600 FILE)")
    self._token = wire.read_token(arguments.token_file) if arguments.token_file else wire.new_token()
    self._tls_files = command_line.tls(arguments.tls)
    self._tls = wire.tls_contexts(*self._tls_files)
    self.limits = run.snapshot
    self.run_dir = run_dir.choose(arguments.run_dir, self.hosts)
    self._command, self._resume = [*trainer_command, f"--run_dir={self.run_dir}"], arguments.resume
    self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
    self._folder = wire.socket_folder()
    self._generation, self._trainer, self._keeper_address, self._terminated = 0, None, None, False
    self._leader_address = (address, int(port))
    self._closing: list[Callable[[], None]] = []
    if self.host == 0:
      owner = run_dir.Owner(self.run_dir, self._say)  # for all of its trainers
      self._closing.append(owner.release)
      self._start_leader(address, int(port), run.snapshot)

  def _start_leader(self, address: str, port: int, limits: config.Snapshot) -> None:
    settings = leader_lib.Settings(self.hosts, limits.group_hosts, limits.parity_hosts, limits.check_share,
                                   limits.same_failures, address, f"{self._folder}/keeper")
    events = jsonl.open_outlet(self.run_dir / "events.jsonl", lambda news: self._say(f"ALARM {news.message}"))

    def record(name: str, **fields) -> None:
      events.put(json.dumps({"event": name, "time": round(time.time(), 3), "source": "leader", **fields}))

    leader = leader_lib.Leader(settings, self.run_dir, record, self._say)
    self._closing += [leader.close, events.close]
    listener = wire.Listener(address, port, self._token, leader.serve, tls=self._tls[0], log=self._say)
    self._leader_address = listener.address

    def run() -> None:
      try:
        leader.run()
      except BaseException as error:  # without a leader there is no job
        self._events.put(("leader", {"do": "exit", "code": 13}))
        self._say(f"the leader failed: {error!r}")
        raise

    threading.Thread(target=run, daemon=True, name="leader").start()

  def _say(self, text: str) -> None:
    print(f"[supervisor {self.host}] {text}", file=sys.stderr, flush=True)

  # ---------------------------------------------------------------------------------------------------------- children

  def _start_keeper(self, address: str) -> None:
    ours, theirs = socket.socketpair()
    self._keeper = subprocess.Popen([sys.executable, "-m", "moe.snapshot.keeper", str(theirs.fileno())],
                                    pass_fds=[theirs.fileno()], cwd=pathlib.Path(__file__).parents[2])
    theirs.close()
    link, process = Link(ours, None), self._keeper
    self._keeper_link = link
    link.send({"token": self._token.hex(), "address": address, "socket": f"{self._folder}/keeper", "tls": self._tls_files,
               "parent": os.getpid()})

    def read() -> None:
      with contextlib.suppress(WireError):
        while True:
          self._events.put(("keeper", link.receive()[0]))
      process.wait()
      self._events.put(("keeper gone", process))

    threading.Thread(target=read, daemon=True).start()

  def _start_trainer(self, message: dict) -> None:
    step = message["step"]
    settings = {"socket": f"{self._folder}/keeper", "generation": message["generation"], "step": step, "host": self.host,
                "hosts": self.hosts, "parent": os.getpid()}
    command = [*self._command, f"--resume={self._resume}"]
    self._resume = "auto"  # "never" and "must" are about the first start
    if self.hosts > 1:
      command.append(f"--multihost={message['coordinator']},{self.hosts},{self.host}")
    environment = {**os.environ, command_line.SUPERVISED: json.dumps(settings)}
    self._trainer = Trainer(command, environment, self._events, self.limits)

  def _stop_trainer(self) -> None:
    trainer, self._trainer = self._trainer, None  # its end is no news then
    if trainer:
      trainer.kill()

  # ------------------------------------------------------------------------------------------------------------- leader

  def _connect(self) -> Link | None:
    """To the leader; None when it is not found in time."""
    hello, deadline, told = {"role": "supervisor", "host": self.host}, time.monotonic() + _LEADER_SECONDS, False
    while time.monotonic() < deadline and not self._terminated:
      try:
        link = wire.connect(self._leader_address, self._token, hello, self._tls[1])
        link.patient()
      except WireError as error:
        if not told:
          self._say(f"no leader at {self._leader_address[0]}:{self._leader_address[1]} yet: {error}")
        told = True
        time.sleep(0.5)
        continue

      def read() -> None:
        with contextlib.suppress(WireError):
          while True:
            self._events.put(("leader", link.receive()[0]))
        self._events.put(("leader gone", link))

      threading.Thread(target=read, daemon=True).start()
      return link
    return None

  def _report(self, message: dict) -> None:
    with contextlib.suppress(WireError):  # the reader notices that it is gone
      self._leader.send(message)

  def _join(self) -> None:
    self._report({"say": "join", "generation": self._generation, "keeper": self._keeper_address})

  # --------------------------------------------------------------------------------------------------------------- run

  def run(self) -> int:
    signal.signal(signal.SIGTERM, self._on_sigterm)
    signal.signal(signal.SIGINT, self._on_sigterm)
    try:
      self._leader = self._connect()
      if self._leader is None:
        self._say("the leader was not found")
        return leader_code(self._terminated)
      self._start_keeper(self._leader.sock.getsockname()[0])
      while True:
        try:
          source, message = self._events.get(timeout=0.25)
        except queue.Empty:
          source, message = "tick", None
        code = self._on(source, message)
        if code is not None:
          return code
        if self._trainer and self._trainer.stuck() and not self._trainer.why:
          trainer = self._trainer
          self._say(f"the trainer is stuck: nothing since step {trainer.step} ({trainer.phase}) for "
                    f"{trainer.allowed_seconds():.1f} s; its stacks are in "
                    + (f"{self.run_dir}/stacks-{self.host}.txt" if "://" not in str(self.run_dir) else "this log"))
          trainer.kill("stuck")
    finally:
      self._stop_trainer()
      if hasattr(self, "_keeper"):
        self._keeper_link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
          self._keeper.wait(5)
        self._keeper.kill()
      for close in self._closing:
        try:
          close()
        except storage_errors() as error:
          self._say(f"ALARM {error}")
      with contextlib.suppress(OSError):
        for path in pathlib.Path(self._folder).iterdir():
          path.unlink()
        os.rmdir(self._folder)

  def _on(self, source: str, message: Any) -> int | None:
    """One event; an exit code ends the supervisor."""
    if source == "keeper":
      if "listening" in message:
        again, self._keeper_address = self._keeper_address is not None, message["listening"]
        if again and self._trainer:
          self._report({"say": "keeper", "keeper": self._keeper_address})
        else:
          self._join()
      elif "log" in message or "error" in message:
        self._say(f"snapshot process: {message.get('log') or message['error']}")
      if "configured" in message:
        self._generation = message["configured"]
      self._report({"say": "from keeper", "message": message})
    elif source == "keeper gone" and message is self._keeper:
      self._say(f"the snapshot process ended ({message.returncode}); starting another")
      self._start_keeper(self._leader.sock.getsockname()[0])
    elif source == "leader":
      return self._on_leader(message)
    elif source == "leader gone" and message is self._leader:
      if self._terminated:
        return 143
      self._say("the leader is gone; trainer stopped, looking for it")
      self._stop_trainer()
      self._leader = self._connect()
      if self._leader is None:
        return leader_code(self._terminated)
      self._join()
    elif source == "trainer" and message["process"] is self._trainer:
      trainer, code, self._trainer = self._trainer, message["code"], None
      if self._terminated and code < 0:  # before it could save, or when its grace was over
        code = 143
      common = {"generation": self._generation, "step": trainer.step, "phase": trainer.phase}
      if code in leader_lib.FINAL_CODES:
        self._report({"say": "finished", "code": code, **common})
      else:
        self._report({"say": "failed", "kind": trainer.kind(code), **common})
    return None

  def _on_leader(self, message: dict) -> int | None:
    do = message["do"]
    if do == "keeper":
      with contextlib.suppress(WireError):
        self._keeper_link.send(message["message"])
    elif do == "start":
      if self._terminated:
        return 143
      self._stop_trainer()
      self._start_trainer(message)
    elif do == "stop":
      self._stop_trainer()
      self._join()
    elif do == "exit":
      return message["code"]
    return None

  def _on_sigterm(self, signum, frame) -> None:
    """The trainer saves and ends with 143; the leader then ends the job."""
    self._terminated = True
    if self._trainer:
      with contextlib.suppress(ProcessLookupError):
        self._trainer.process.send_signal(signal.SIGTERM)
    else:
      self._events.put(("leader", {"do": "exit", "code": 143}))


def leader_code(terminated: bool) -> int:
  return 143 if terminated else 13


def main(argv: list[str] | None = None, trainer: tuple[str, ...] = ("-m", "moe.train")) -> int:
  """Returns the exit code.

  Args:
    trainer: what python runs as the trainer.
  """
  argv = sys.argv[1:] if argv is None else argv
  arguments, rest = command_line.parse(argv)
  passed, skip = [], False
  for i, flag in enumerate(argv):
    if skip:
      skip = False
    elif flag.partition("=")[0] in _FLAGS:
      skip = "=" not in flag and flag != "--supervise" and i + 1 < len(argv) and not argv[i + 1].startswith("--")
    else:
      passed.append(flag)
  command = [sys.executable, *trainer, *passed]
  try:
    run = gin_config.from_arguments(arguments, rest).run
    if arguments.print_config or arguments.dry_run:
      return subprocess.run(command + ([f"--run_dir={arguments.run_dir}"] if arguments.run_dir else [])).returncode
    return Supervisor(arguments, run, command).run()
  except (config.ConfigError, WireError, ValueError, ImportError, *storage_errors()) as error:
    if arguments.traceback:
      raise
    print(f"config error: {error}", file=sys.stderr)
    return 2
