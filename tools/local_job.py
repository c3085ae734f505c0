"""A job of several hosts on this machine, every one a supervisor with its own children: for the fault tests and tools.soak."""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import time

from etils import epath

from moe import jsonl

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Small, but with expert shards that no other host has a replica of, and leaves that are replicated.
MODEL = {
    "Train.steps": 30, "Train.log_every_steps": 1, "Train.eval_batches": 1, "Model.num_layers": 2, "Model.d_model": 48,
    "Attention.head_dim": 24, "Experts.d_expert": 48, "Experts.num_experts": 12, "Data.batch_sequences": 12,
    "Data.virtual_shards": 12, "Data.sequence_tokens": 64,
    "Checkpoint.every_steps": 0, "Optimizer.decay_tokens": 2000, "Optimizer.warmup_tokens": 2000, "Train.eval_every_steps": 0,
    "Snapshot.every_steps": 3, "Snapshot.stuck_seconds": 20.0, "Snapshot.compile_seconds": 240.0,
}


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Job:
  """`hosts` supervisors of one job; killing one kills its host, for its children die with it."""

  def __init__(self, run_dir, hosts: int, changes: dict | None = None, flags=(), trainer: str = "tests.fault_trainer",
               environment=None, logs=None, network=None, supervisor: str = "tools.local_job"):
    """
    Args:
      logs: folder of the hosts' output and the token, where the run directory is on an object store.
      network: gives every host an address and what goes before its command (tests/namespaces.py); default: all on loopback.
      supervisor: the module that runs as the supervisor.
    """
    self.run_dir, self.hosts = epath.Path(run_dir), hosts
    self.run_dir.mkdir(parents=True, exist_ok=True)
    self._logs = pathlib.Path(logs or run_dir)
    self.token = self._logs / "token"
    self.token.write_text(secrets.token_hex(32))
    self.token.chmod(0o600)
    self._port, self._network, self._supervisor = free_port(), network, supervisor
    bindings = {**MODEL, "Mesh.expert": hosts, "Snapshot.group_hosts": hosts, **(changes or {})}
    self._arguments = ["--supervise", f"--run_dir={self.run_dir}", "--allow_unused", *flags,
                       *(f"--gin.{key}={value}" for key, value in bindings.items())]
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    self._environment = {**kept, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
                         "MOE_TRAINER": trainer, **(environment or {})}
    self.supervisors: dict[int, subprocess.Popen] = {}
    for host in range(hosts):
      self.start(host)

  def start(self, host: int, token=None) -> subprocess.Popen:
    """A host, new or in the place of a lost one; with a token of its own it is a stranger."""
    address, before = (self._network.address(0), self._network.command(host)) if self._network else ("127.0.0.1", [])
    place = f"{address}:{self._port},{self.hosts},{host}"
    several = [f"--multihost={place}", f"--token_file={token or self.token}"] if self.hosts > 1 else []
    with open(self._logs / f"log-{host}.txt", "a") as log:
      process = subprocess.Popen([*before, sys.executable, "-m", self._supervisor, *self._arguments, *several], cwd=ROOT,
                                 env=self._environment, stdout=log, stderr=log, start_new_session=True)
    if token is None:
      self.supervisors[host] = process
    return process

  def child(self, host: int, what: str) -> int | None:
    """Process number of a host's "trainer" or "keeper"; None while there is none."""
    parent = self.supervisors[host].pid
    for path in pathlib.Path("/proc").glob("[0-9]*"):
      try:
        if int((path / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
          continue
        command = (path / "cmdline").read_bytes().split(b"\0")
      except (OSError, IndexError, ValueError):
        continue
      if (b"moe.snapshot.keeper" in command) == (what == "keeper"):
        return int(path.name)
    return None

  def kill(self, host: int, what: str = "trainer", number: int = signal.SIGKILL) -> bool:
    """Sends a signal to a child of a host, or with "host" kills all of it; whether there was something to kill."""
    pid = self.supervisors[host].pid if what == "host" else self.child(host, what)
    if pid is None:
      return False
    try:
      os.kill(pid, number)
    except ProcessLookupError:
      return False
    if what == "host":
      self.supervisors[host].wait()
    return True

  def events(self, name: str | None = None) -> list[dict]:
    return [event for event in jsonl.read(self.run_dir / "events.jsonl") if name in (None, event["event"])]

  def last_step(self) -> int:
    return max((r["step"] for r in jsonl.read(self.run_dir / "metrics.jsonl") if r["kind"] == "train"), default=-1)

  def wait_for(self, condition, seconds: float = 240.0):
    """Until `condition()` is true; its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
      value = condition()
      if value:
        return value
      if all(p.poll() is not None for p in self.supervisors.values()):
        break
      time.sleep(0.02)
    raise AssertionError(f"did not come true:\n{self.logs()}")

  def wait_for_step(self, step: int, seconds: float = 240.0) -> None:
    self.wait_for(lambda: self.last_step() >= step, seconds)

  def finish(self, expected: int | None = 0, seconds: float = 300.0) -> list[int]:
    deadline = time.monotonic() + seconds
    try:
      codes = [p.wait(max(deadline - time.monotonic(), 1)) for p in self.supervisors.values()]
    except subprocess.TimeoutExpired as error:
      raise AssertionError(f"the job did not end:\n{self.logs()}") from error
    assert expected is None or codes == [expected] * self.hosts, f"{codes}\n{self.logs()}"
    return codes

  def logs(self) -> str:
    return "\n".join(f"--- host {h}\n{(self._logs / f'log-{h}.txt').read_text()[-20000:]}" for h in range(self.hosts))

  def close(self) -> None:
    for process in self.supervisors.values():
      if process.poll() is None:
        process.kill()
        process.wait()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def losses(run_dir) -> dict[int, str]:
  """Loss by step to the bit; a step that was done twice must have the same both times."""
  found: dict[int, str] = {}
  for record in jsonl.read(epath.Path(run_dir) / "metrics.jsonl"):
    if record["kind"] == "train":
      value = float(record["loss"]).hex()
      assert found.setdefault(record["step"], value) == value, record["step"]
  return found


def final_digests(run_dir, step: int) -> dict:
  return json.loads((epath.Path(run_dir) / "checkpoints" / str(step) / "digests" / "metadata").read_text())["leaves"]


if __name__ == "__main__":
  from moe.snapshot import supervisor

  sys.exit(supervisor.main(trainer=("-m", os.environ["MOE_TRAINER"])))
