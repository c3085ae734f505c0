"""Whole jobs with hosts in network namespaces: lost, late and reordered packets, half-open links, strangers; and kills in the
midst of a commit. Needs root; elsewhere skipped.

The trainer is mostly that of tools/soak.py: a second's start, a state that is known at every step, and checked to the bit at
every restore. `bash tools/dev.sh faults` runs them after tests/faults_test.py.
"""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from moe.snapshot import wire
from tests import namespaces
from tests import small
from tests.namespaces import Fault
from tools import local_job
from tools import soak

pytestmark = pytest.mark.slow
GIB4 = 0xFFFFFFFF
SILENCE_SECONDS = 25  # after which a peer counts as gone (wire.Link.patient)


@pytest.fixture
def network():
  try:
    made = namespaces.Network(4)  # the last is no host of the job
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"no network namespaces can be made here: {error}")
  yield made
  made.close()


@pytest.fixture
def job(tmp_path):
  """job(hosts, changes, **options): a started job, ended with the test; without a trainer named, the known one."""
  made = []

  def make(hosts, changes=None, trainer="tools.soak", **options):
    changes = {"Snapshot.same_failures": 1000, "Snapshot.every_steps": soak._EVERY, **(changes or {})}
    made.append(local_job.Job(tmp_path / "run", hosts, changes, trainer=trainer, **options))
    return made[-1]

  yield make
  for one in made:
    one.close()


def committed(job) -> int:
  return job.events("commit")[-1]["step"]


def commits_again(job, count=2):
  """Waits for so many more."""
  at = len(job.events("commit"))
  job.wait_for(lambda: len(job.events("commit")) >= at + count, 60)


def assert_restored(job, least: int, hosts: int, tier: str):
  """All hosts got the same step of that tier back, not older than `least`, and every byte was what it must be."""
  recovery = job.events("recovery")[-1]
  assert recovery["tier"] == tier and recovery["step"] >= least, (recovery, least)
  logs = job.logs()
  assert "WRONG STATE" not in logs
  assert all(f"good {host} {recovery['step']}" in logs for host in range(hosts)), logs[-3000:]


# ------------------------------------------------------------------------------------------------------------ row 19


@pytest.mark.parametrize("host, ways", [(1, ("from", "to")), (1, ("from",)), (1, ("to",)), (0, ("from", "to"))])
def test_a_host_that_falls_silent_is_noticed_and_comes_back(job, network, host, ways):
  """Its packets are dropped, all or one way only, with no end of a connection to be seen: noticed in half a minute, and when
  the link is back all go on from the last commit."""
  j = job(3, network=network)
  soak.settled(j, 0)
  at, least, begin = len(j.events()), committed(j), time.monotonic()
  for way in ways:
    network.faults[way, host] = Fault(drop=1.0)
  failure = j.wait_for(lambda: j.events("failure"), 120)[0]
  assert failure["kind"] == "host lost" and time.monotonic() - begin < SILENCE_SECONDS + 15
  j.wait_for(lambda: "the leader is gone" in j.logs(), 30)  # both sides notice
  network.faults.clear()
  soak.settled(j, at)
  assert_restored(j, least, 3, "memory")


def test_five_seconds_of_delay_cost_snapshots_and_no_more(job, network):
  """Training goes on without being protected anew; a trainer killed meanwhile gets the last commit back."""
  j = job(3, network=network)
  soak.settled(j, 0)
  network.faults["from", 1] = Fault(delay=5.0)
  j.wait_for(lambda: [e for e in j.events("skipped") if "timed out" in e["reason"]], 90)
  assert not j.events("failure")
  at, least = len(j.events()), committed(j)
  assert j.kill(2)
  j.wait_for(lambda: any(e["event"] == "trainers" for e in j.events()[at:]), 90)
  network.faults.clear()
  soak.settled(j, at)
  commits_again(j)
  assert_restored(j, least, 3, "memory")
  assert len(j.events("failure")) == 1


def test_packets_that_overtake_each_other_change_nothing(job, network):
  """Reordered, and some lost: commits go on, and a lost host is decoded over the same wire."""
  for host in range(3):
    network.faults["from", host] = Fault(drop=0.02, jitter=0.02)
  j = job(3, network=network)
  soak.settled(j, 0)
  commits_again(j)
  at, least = len(j.events()), committed(j)
  assert j.kill(1, "host")
  j.start(1)
  soak.settled(j, at)
  assert_restored(j, least, 3, "decoded")


def test_a_real_run_over_a_link_that_was_half_open(job, network, tmp_path):
  """The trainer with JAX: its collectives hang; it is stopped, and its losses are those of a run that nobody disturbed."""
  folder = small.write_corpus(tmp_path / "tiny")
  changes = {"Data.domains": "(@tiny/Domain(),)", "tiny/Domain.name": '"tiny"', "tiny/Domain.path": f'"{folder}"',
             "Train.steps": 24}
  j = job(2, changes, trainer="tests.fault_trainer", network=network)
  j.wait_for_step(8)
  network.faults["from", 1] = Fault(drop=1.0)
  j.wait_for(lambda: j.events("failure"), 120)
  network.faults.clear()
  j.finish()
  assert j.events("recovery")[-1]["tier"] == "memory" and j.events("restore")[-1]["step"] >= 6
  with local_job.Job(tmp_path / "control", 2, {**changes, "Snapshot.every_steps": soak._EVERY},
                     trainer="tests.fault_trainer") as control:
    control.finish()
  assert local_job.losses(j.run_dir) == local_job.losses(control.run_dir)
  assert local_job.final_digests(j.run_dir, 24) == local_job.final_digests(control.run_dir, 24)


# -------------------------------------------------------------------------------------------------------- rows 19 and 20


def listening(pid: int) -> int:
  """The TCP port a process listens on."""
  inodes = {os.readlink(path) for path in pathlib.Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
  for line in pathlib.Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
    fields = line.split()
    if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
      return int(fields[1].partition(":")[2], 16)
  raise AssertionError(f"{pid} does not listen")


def resident(pid: int) -> int:
  return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Caller:
  """A program on a host that may talk to others; `ask` gives it a line of Python, which prints one line."""

  def __init__(self, network, host: int):
    program = "import sys, json, socket, struct; from moe.snapshot import wire\nfor line in sys.stdin: exec(line)"
    self.process = subprocess.Popen([*network.command(host), sys.executable, "-uc", program], cwd=local_job.ROOT, text=True,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

  def ask(self, *lines: str) -> str:
    self.process.stdin.write("".join(f"exec({line!r})\n" for line in lines))
    self.process.stdin.flush()
    return self.process.stdout.readline()


# What is tried, and "refused: why" or "let in".
TRY = """
try:
  {}
  print("let in")
except Exception as error:
  print("refused:", type(error).__name__, error)
"""


def test_what_an_older_generation_says_is_refused(job, network):
  """By a host that has the token: a new connection of it, and a message over one that was good."""
  j = job(2, network=network)
  soak.settled(j, 0)
  token, generation = wire.read_token(str(j.token)), j.events("trainers")[-1]["generation"]
  place = network.address(0), listening(j.child(0, "keeper"))
  caller = Caller(network, 1)
  connect = f"link = wire.connect({place}, {token!r}, {{'role': 'keeper', 'host': 1, 'generation': {generation}}})"
  ask = "link.ask({'do': 'get_record', 'step': -5, 'member': 0})"
  assert caller.ask(TRY.format(connect)) == "let in\n"
  assert "no record of step -5" in caller.ask(TRY.format(ask))  # it is answered
  at = len(j.events())
  assert j.kill(1)
  soak.settled(j, at)
  assert "refused: Closed" in caller.ask(TRY.format(ask))
  assert f"generation {generation} is not" in caller.ask(TRY.format(connect))
  caller.process.kill()
  assert len(j.events("failure")) == 1


def test_strangers_do_not_disturb_a_job(job, network):
  """From a host that is not of the job: without the token, with a wrong one, with a recorded handshake, with 4 GiB announced,
  and ten thousand at once; at the snapshot process and at the leader."""
  network.recorded = []
  j = job(2, network=network)
  soak.settled(j, 0)
  keeper = listening(j.child(0, "keeper"))
  hello, proof, *_ = namespaces.payloads(network.recorded, keeper)
  network.recorded = None
  caller, watched = Caller(network, 3), [j.supervisors[0].pid, j.child(0, "keeper")]
  before = [resident(pid) for pid in watched]
  for port in (keeper, j._port):
    open_raw = f"raw = socket.create_connection(({network.address(0)!r}, {port}), 20)"
    closed = "if raw.recv(1) == b'': raise OSError('closed')"
    for said in (b"GET / HTTP/1.1\r\n\r\n" * 4, *(wire._HEAD.pack(b"MOE1", *sizes, 0) for sizes in ((10, GIB4), (GIB4, 0)))):
      assert "refused" in caller.ask(TRY.format(f"{open_raw}; raw.sendall({said!r})\n  {closed}"))
    assert "does not have this job's token" in caller.ask(TRY.format(
        f"wire.connect({(network.address(0), port)}, b'x' * 64, {{'role': 'keeper', 'host': 1, 'generation': 0}})"))
    replay = f"{open_raw}; raw.sendall({hello!r}); answer = wire.Link(raw, 20).receive(); raw.sendall({proof!r})"
    assert "refused" in caller.ask(TRY.format(f"{replay}\n  {closed}"))
    flood = f"for _ in range(5000): socket.create_connection(({network.address(0)!r}, {port}), 20).close()"
    assert caller.ask(TRY.format(flood)) == "let in\n"  # by the kernel
  commits_again(j)
  assert all(resident(pid) - old < 30 << 20 for pid, old in zip(watched, before))
  caller.process.kill()
  assert not j.events("failure") and "does not have this job's token" in j.logs()
  assert len(j.logs().splitlines()) < 300  # ten thousand callers do not fill the disk


# ------------------------------------------------------------------------------------------------------------- row 7


def test_kills_between_prepare_and_commit_in_all_orders(job, tmp_path):
  """The leader dies with its host when some hosts have heard of the commit: all choose that step, decoded where it was lost."""
  file = tmp_path / "commit"
  j = job(3, environment={"MOE_TEST_COMMIT": str(file)}, supervisor="tests.fault_supervisor")
  soak.settled(j, 0)
  for heard in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4)):
    at, least = len(j.events()), committed(j)
    file.with_suffix(".new").write_text(json.dumps(heard))
    file.with_suffix(".new").rename(file)
    j.supervisors[0].wait(60)
    assert j.supervisors[0].returncode == -signal.SIGKILL and not file.exists()
    told = committed(j)  # what the leader had said of earlier ones
    j.start(0)
    soak.settled(j, at)
    assert_restored(j, max(told + 1, least), 3, "decoded")
