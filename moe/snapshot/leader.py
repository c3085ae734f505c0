"""The leader: a thread of host 0's supervisor that decides for the whole job.

One round: all hosts join -> a generation number -> the newest step that is whole, or can be decoded, in every group ->
every host proves its copy -> the trainers start -> snapshots are committed -> something fails, and the next round begins; or
all trainers end well, or the failure is one that a restart cannot mend.
"""

from __future__ import annotations

import collections
import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from moe.errors import storage_errors
from moe.snapshot import parity
from moe.snapshot.wire import Link, WireError

# What a trainer's exit code means; the others (13 a crash, signals) are worth a restart.
FINAL_CODES = {0: "done", 2: "usage", 3: "data", 4: "checkpoint", 5: "numerics", 143: "preempted"}
_COLLECT_SECONDS = 0.3  # when one trainer dies the others soon see it and fail too: wait for the one that says why
_VERIFY_SECONDS = 900.0


class Settings(NamedTuple):
  """What the leader needs of config.Snapshot, and of the job."""

  hosts: int
  group_hosts: int
  parity_hosts: int
  check_share: float
  same_failures: int
  address: str  # of host 0, where JAX's coordinator will listen
  socket: str = ""  # of host 0's snapshot process, for its own user


class Failure(NamedTuple):
  host: int
  kind: str  # "signal 9", "exit 13", "stuck", "host lost"
  step: int  # last step the trainer began
  phase: str

  def __str__(self) -> str:
    return f"host {self.host}: {self.kind} at step {self.step} ({self.phase})"


def groups(hosts: int, group_hosts: int, parity_hosts: int) -> list[list[int]]:
  """Hosts in groups of about `group_hosts`, by stride: hosts are numbered slice by slice, so a group spans the slices.

  Raises:
    ValueError: a group would be too small for its parity.
  """
  if hosts == 1:
    return [[0]]
  count = -(-hosts // min(group_hosts, hosts))
  made = [list(range(g, hosts, count)) for g in range(count)]
  smallest = min(map(len, made))
  if smallest <= parity_hosts or parity_hosts > parity.MAX_PARITY:
    raise ValueError(f"{hosts} hosts in groups of {group_hosts} leave a group of {smallest}, which cannot have "
                     f"{parity_hosts} parity hosts; change Snapshot.group_hosts or Snapshot.parity_hosts (at most 2)")
  return made


def candidates(inventories: dict[int, dict], grouped: list[list[int]], parity_hosts: int) -> list[int]:
  """Steps that every group holds or can decode, newest first.

  A host that is prepared holds its data and the whole parity it is to hold; so a group that misses at most m of them has
  the step.
  """
  steps = {step for inventory in inventories.values() for step in inventory["steps"]}
  layouts = collections.defaultdict(set)
  for inventory in inventories.values():
    for step in inventory["steps"]:
      layouts[step].add(inventory["layout"])

  def whole(step: int) -> bool:
    missing = [sum(step not in inventories[h]["steps"] for h in group) for group in grouped]
    return all(n <= (parity_hosts if len(g) > 1 else 0) for n, g in zip(missing, grouped)) and len(layouts[step]) == 1

  return sorted(filter(whole, steps), reverse=True)


class Leader:
  """`run` returns the exit code of the job."""

  def __init__(self, settings: Settings, run_dir, record: Callable[..., None], say: Callable[[str], None]):
    """
    Args:
      record: writes an event: record(name, **fields).
      say: prints a line.
    """
    self.settings, self._record, self._say = settings, record, say
    self._status = _Status(epath.Path(run_dir) / "snapshots.json", say)
    self._checkpoints = epath.Path(run_dir) / "checkpoints"
    self._grouped = groups(settings.hosts, settings.group_hosts, settings.parity_hosts)
    self._parity = settings.parity_hosts if settings.hosts > 1 else 0
    self._inbox: queue.Queue[tuple[int, dict]] = queue.Queue()
    self._links: dict[int, Link] = {}
    self._keepers: dict[int, list] = {}  # host -> address of its keeper
    self._holding: dict[int, int] = {}  # host -> committed step in its keeper
    self._failures: collections.Counter = collections.Counter()
    self.generation, self.committed = 0, -1

  # -------------------------------------------------------------------------------------------------------------- links

  def serve(self, link: Link, hello: dict) -> None:
    """A supervisor's connection; a thread of its own."""
    host = hello.get("host")
    if hello.get("role") != "supervisor" or host not in range(self.settings.hosts):
      raise WireError(f"host {host} is not one of {self.settings.hosts}")
    link.patient()
    try:
      while True:
        message, _ = link.receive()
        self._inbox.put((host, {**message, "link": link}))
    finally:
      self._inbox.put((host, {"say": "lost", "link": link}))

  def _tell(self, message: dict, hosts=None) -> None:
    for host in self._links if hosts is None else hosts:
      try:
        self._links[host].send(message)
      except (WireError, KeyError):
        pass  # its thread reports the loss

  # ------------------------------------------------------------------------------------------------------------- rounds

  def run(self) -> int:
    while True:
      self._gather()
      step = self._recover()
      if step is False:
        self._tell({"do": "stop", "generation": self.generation})  # a host was lost meanwhile: all join again
        continue
      outcome = self._watch(step)
      if isinstance(outcome, int):
        self._tell({"do": "exit", "code": outcome})
        return outcome
      failure = outcome
      self._record("failure", host=failure.host, kind=failure.kind, step=failure.step, phase=failure.phase,
                   generation=self.generation, committed=self.committed)
      self._failures[failure.kind, failure.step, failure.host] += 1
      if self._failures[failure.kind, failure.step, failure.host] >= self.settings.same_failures:
        self._say(f"{failure}: the same failure {self.settings.same_failures} times, so a restart will not mend it. The "
                  f"last committed snapshot is of step {self.committed}; see the trainer's traceback above, and stacks-*.txt")
        self._record("stopped", reason=str(failure))
        self._tell({"do": "exit", "code": 13})
        return 13
      self._say(f"{failure}; all trainers start again")
      self._tell({"do": "stop", "generation": self.generation})

  def _gather(self) -> None:
    """Until every host has joined for a new round."""
    joined: dict[int, dict] = {}
    told = 0.0
    while len(joined) < self.settings.hosts:
      host, message = self._next(5.0)
      if message["say"] == "join":
        self._links[host], joined[host] = message["link"], message
        self._keepers[host] = message["keeper"]
      elif message["say"] == "lost" and self._links.get(host) is message["link"]:
        joined.pop(host, None)
        del self._links[host]
        self._holding.pop(host, None)
      elif message["say"] == "keeper" and host in joined:
        self._keepers[host] = message["keeper"]
      missing = sorted(set(range(self.settings.hosts)) - set(joined))
      if missing and time.monotonic() - told > 30:
        told = time.monotonic()
        self._say(f"waiting for host(s) {', '.join(map(str, missing))} of {self.settings.hosts}")
    # Later than any number of a job that was lost whole, whose stragglers may still talk.
    self.generation = max([self.generation + 1, int(time.time())] + [m["generation"] + 1 for m in joined.values()])

  def _configure(self) -> None:
    peers = {str(h): address for h, address in self._keepers.items()}
    for group in self._grouped:
      for host in group:
        self._tell({"do": "keeper", "message": {
            "do": "configure", "generation": self.generation, "host": host, "group": group, "peers": peers,
            "parity": self._parity if len(group) > 1 else 0, "check_share": self.settings.check_share}}, [host])

  def _replies(self, key: str, negative: str, hosts, seconds: float):
    """{host: message} of the keepers' answers; None when a host is lost or says nothing in time."""
    answers: dict[int, dict] = {}
    deadline = time.monotonic() + seconds
    while len(answers) < len(hosts):
      host, message = self._next(max(deadline - time.monotonic(), 0.01))
      if message["say"] in ("lost", "join", "keeper") or time.monotonic() > deadline:
        if message["say"] != "tick":
          self._inbox.put((host, message))
        return None
      if message["say"] == "from keeper" and (key in message["message"] or negative in message["message"]):
        answers[host] = message["message"]
    return answers

  def _recover(self):
    """The step that every keeper has proven, None for the persistent tier, False when a host was lost meanwhile."""
    self._configure()
    hosts = range(self.settings.hosts)
    answers = self._replies("configured", "error", hosts, 60.0)
    if answers is None:
      return False
    inventories = {h: a.get("inventory", {"steps": [], "layout": ""}) for h, a in answers.items()}
    for step in candidates(inventories, self._grouped, self._parity):
      self._tell({"do": "keeper", "message": {"do": "verify", "step": step}})
      answers = self._replies("verified", "unverified", hosts, _VERIFY_SECONDS)
      if answers is None:
        return False
      refused = {h: a["reason"] for h, a in answers.items() if "unverified" in a}
      repaired = {h: a["repaired"] for h, a in answers.items() if a.get("repaired")}
      if not refused:
        self.committed, self._holding = step, {h: step for h in hosts}
        self._say(f"memory tier: step {step}" + "".join(f", {n} chunk(s) of host {h} decoded" for h, n in repaired.items()))
        self._record("recovery", tier="decoded" if repaired else "memory", step=step, repaired=repaired,
                     seconds=max(a["seconds"] for a in answers.values()))
        self._tell({"do": "keeper", "message": {"do": "protect", "step": step}}, repaired)
        return step
      self._say(f"memory tier: step {step} refused: " + "; ".join(f"host {h}: {why}" for h, why in refused.items()))
      self._record("refused", tier="memory", step=step, reasons=list(refused.values()))
    if self.committed >= 0 or self._has_checkpoints():  # else the job is new
      self._say("memory tier: no step is whole in every group (more hosts were lost than their parity covers); the checkpoints "
                "are next")
      self._record("recovery", tier="persistent", step=None)
    self._tell({"do": "keeper", "message": {"do": "clear"}})
    self.committed, self._holding = -1, {}
    return None

  def _has_checkpoints(self) -> bool:
    try:
      return self._checkpoints.exists()
    except storage_errors():  # nobody knows: the trainer will say
      return True

  def _watch(self, step: int | None) -> int | Failure:
    """Starts the trainers and commits snapshots until the round is over: an exit code, or what failed."""
    with socket.socket() as probe:
      probe.bind((self.settings.address, 0))
      coordinator = f"{self.settings.address}:{probe.getsockname()[1]}"  # a new one, so that no zombie can join
    self._tell({"do": "start", "generation": self.generation, "coordinator": coordinator, "step": step})
    self._record("trainers", generation=self.generation, step=step)
    self._publish()
    prepared: dict[int, set[int]] = collections.defaultdict(set)
    abandoned: set[int] = set()
    finished: dict[int, int] = {}
    while True:
      host, message = self._next(5.0)
      said = message["say"]
      if said == "lost" and self._links.get(host) is message["link"]:
        self._inbox.put((host, message))  # for the next round
        return self._cause(Failure(host, "host lost", -1, "unknown"))
      if said == "join":
        self._inbox.put((host, message))
        return self._cause(Failure(host, "host restarted", -1, "unknown"))
      if said == "keeper":  # it died and was started again, empty
        self._keepers[host] = message["keeper"]
        self._holding.pop(host, None)
        self._configure()
        self._say(f"host {host} lost its snapshot process; degraded until the next snapshot")
        self._record("degraded", host=host)
        self._publish()
      elif said == "failed" and message["generation"] == self.generation:
        return self._cause(Failure(host, message["kind"], message["step"], message["phase"]))
      elif said == "finished" and message["generation"] == self.generation:
        finished[host] = message["code"]
        if message["code"] not in (0, 143) or len(finished) == self.settings.hosts:
          return max(finished.values())
      elif said == "from keeper" and message["message"].get("generation") == self.generation:
        body = message["message"]
        if "prepared" in body:
          prepared[body["prepared"]].add(host)
          if len(prepared[body["prepared"]]) == self.settings.hosts and body["prepared"] not in abandoned:
            self.committed = body["prepared"]
            self._holding = {h: self.committed for h in range(self.settings.hosts)}
            self._tell({"do": "keeper", "message": {"do": "commit", "step": self.committed}})
            self._record("commit", step=self.committed, bytes=body["bytes"], seconds=body["seconds"])
            prepared.clear()
            self._publish()
        elif "protected" in body:
          self._record("protected", host=host, step=body["protected"])
        elif "skipped" in body and body["skipped"] > self.committed and body["skipped"] not in abandoned:
          abandoned.add(body["skipped"])
          self._tell({"do": "keeper", "message": {"do": "abandon", "step": body["skipped"]}})
          self._record("skipped", step=body["skipped"], host=host, reason=body.get("reason", "the one before is not committed"))

  def _cause(self, first: Failure) -> Failure:
    """Of the failures that come together the one that says most: a signal, then another code, then a crash by JAX's error."""
    found, deadline, kept = [first], time.monotonic() + _COLLECT_SECONDS, []
    while (left := deadline - time.monotonic()) > 0:
      host, message = self._next(left)
      if message["say"] == "failed":
        found.append(Failure(host, message["kind"], message["step"], message["phase"]))
      elif message["say"] in ("lost", "join"):
        kept.append((host, message))
        if message["say"] == "lost":
          found.append(Failure(host, "host lost", -1, "unknown"))
    for item in kept:
      self._inbox.put(item)
    order = ("host lost", "signal", "stuck", "host restarted", "exit 1", "exit 13")
    return min(found, key=lambda f: next((i for i, kind in enumerate(order) if f.kind.startswith(kind)), 3))

  def _next(self, seconds: float) -> tuple[int, dict]:
    try:
      return self._inbox.get(timeout=seconds)
    except queue.Empty:
      return -1, {"say": "tick"}

  # ------------------------------------------------------------------------------------------------------------- status

  def _publish(self) -> None:
    """`snapshots.json` for tools.snapshot_status; nothing is ever restored from it."""
    state = {"generation": self.generation, "committed": self.committed, "time": round(time.time(), 3),
             "parity_hosts": self._parity, "hosts": self.settings.hosts, "socket": self.settings.socket,
             "groups": [{"hosts": g, "holding": [h for h in g if self._holding.get(h) == self.committed >= 0]}
                        for g in self._grouped]}
    self._status.put(json.dumps(state) + "\n")

  def close(self) -> None:
    self._status.close()


class _Status:
  """The newest text in a file or object; an object from a thread, for a store takes its time, and one write of it a second."""

  def __init__(self, path: epath.Path, say: Callable[[str], None]):
    self._path, self._say, self._newest, self._written = path, say, "", ""
    self._local = "://" not in str(path)
    if not self._local:
      self._wake, self._closed = threading.Event(), threading.Event()
      self._thread = threading.Thread(target=self._send, daemon=True, name="status")
      self._thread.start()

  def put(self, text: str) -> None:
    self._newest = text
    if self._local:
      self._write()
    else:
      self._wake.set()

  def close(self) -> None:
    if not self._local:
      self._closed.set()
      self._wake.set()
      self._thread.join(30)

  def _send(self) -> None:
    while not self._closed.is_set():
      self._wake.wait()
      self._wake.clear()
      self._write()
      self._closed.wait(1.0)
    self._write()

  def _write(self) -> None:
    text = self._newest
    if text == self._written:
      return
    try:
      written = self._path.parent / "snapshots.tmp" if self._local else self._path  # an object appears whole or not at all
      written.write_text(text)
      if self._local:
        written.replace(self._path)
      self._written = text
    except Exception as error:  # of whatever client the store has
      self._say(f"ALARM the status could not be written: {error}")
