"""Whole jobs with faults: supervisors, snapshot processes and trainers as real processes on loopback.

Every row is one of docs/faults.md's table; what goes on afterwards is compared to the bit with a run that nobody disturbed.
`bash tools/dev.sh faults` runs them all; with MOE_TURN=n/4 every fourth from the n-th on.
"""

import json
import os
import pathlib
import signal
import time

import pytest

from moe import jsonl
from moe import stored
from moe.snapshot import reader
from tests import small
from tools import local_job
from tools.local_job import Job

pytestmark = pytest.mark.slow
STEPS = 30


def fault(what: str, folder=None) -> dict[str, str]:
  """Environment of tests/fault_trainer.py; with a folder the fault strikes once in the whole job."""
  return {"MOE_TEST_KILL": what, **({"MOE_TEST_ONCE": str(folder / "once")} if folder else {})}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  folder = small.write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")
  return {"Data.domains": "(@tiny/Domain(),)", "tiny/Domain.name": '"tiny"', "tiny/Domain.path": f'"{folder}"'}


@pytest.fixture
def job(tmp_path, corpus):
  """job(hosts, **changes): a started job, ended with the test."""
  made = []

  def make(hosts, changes=None, name="run", **options):
    made.append(Job(tmp_path / name, hosts, {**corpus, **(changes or {})}, **options))
    return made[-1]

  yield make
  for one in made:
    one.close()


@pytest.fixture(scope="session")
def control(tmp_path_factory, corpus):
  """control(hosts, **changes): run directory of the same job, undisturbed."""
  made = {}

  def make(hosts, changes=None):
    key = (hosts, json.dumps(changes, sort_keys=True))
    if key not in made:
      with Job(tmp_path_factory.mktemp("control"), hosts, {**corpus, **(changes or {})}) as one:
        one.finish()
        made[key] = one.run_dir
    return made[key]

  return make


def assert_as_if_nothing_had_happened(found, expected, steps=STEPS):
  assert local_job.losses(found.run_dir) == local_job.losses(expected)
  assert local_job.final_digests(found.run_dir, steps) == local_job.final_digests(expected, steps)


def assert_recovered(found, tier, at_least=1):
  recoveries = found.events("recovery")
  assert recoveries and recoveries[-1]["tier"] == tier, recoveries
  if tier != "persistent":
    assert recoveries[-1]["step"] >= at_least
    assert found.events("restore")[-1]["step"] == recoveries[-1]["step"]


# ------------------------------------------------------------------------------------------------------ trainers die


def test_a_killed_trainer_resumes_from_memory(job, control):
  """Row 1, one host: SIGKILL; the snapshot process is the same one afterwards."""
  j = job(1, trainer="moe.train")
  j.wait_for_step(8)
  keeper = j.child(0, "keeper")
  # When memory runs out the kernel takes the trainer.
  scores = [int(open(f"/proc/{pid}/oom_score_adj").read()) for pid in (keeper, j.child(0, "trainer"))]
  assert scores == [0, 800]
  assert j.kill(0)
  j.wait_for(lambda: j.events("restore"))
  assert j.child(0, "keeper") == keeper
  j.finish()
  assert_recovered(j, "memory", 6)
  assert_as_if_nothing_had_happened(j, control(1))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_trainer_of_two(job, control, victim):
  """Rows 1 and 2: any trainer, and process 0, which JAX's coordinator lives in."""
  j = job(2)
  j.wait_for_step(8)
  live = reader.Live(j.run_dir)
  assert live.fingerprints == {name: stored.digest(stored.blocks(live, name)) for name in live.leaves}
  assert j.kill(victim)
  j.finish()
  assert_recovered(j, "memory", 6)
  assert_as_if_nothing_had_happened(j, control(2))


@pytest.mark.parametrize("phase", ["digest", "copy", "ready", "restore", "save"])
def test_a_kill_in_every_phase(job, control, phase, tmp_path):
  """Row 1: the trainer kills itself inside the phase, once."""
  j = job(2, environment=fault(f"{phase}:9", tmp_path),
          changes={"Checkpoint.every_steps": 9})
  j.finish()
  assert len(j.events("failure")) == (2 if phase == "restore" else 1) and "signal 9" in j.events("failure")[0]["kind"]
  assert_as_if_nothing_had_happened(j, control(2, {"Checkpoint.every_steps": 9}))


def test_out_of_memory_takes_the_trainer_alone(job):
  """Row 12: trainer and snapshot process in one control group whose limit is reached."""
  groups = pathlib.Path("/sys/fs/cgroup/memory")
  limit = "memory.limit_in_bytes"
  if not groups.exists():
    groups, limit = pathlib.Path("/sys/fs/cgroup"), "memory.max"
  group = groups / f"moe-test-{os.getpid()}"
  try:
    group.mkdir()
    (group / limit).read_text()
  except OSError as error:
    pytest.skip(f"no control group can be made here: {error}")
  j = job(1, {"Train.steps": 2000})
  try:
    j.wait_for_step(8)
    keeper = j.child(0, "keeper")
    for pid in (keeper, j.child(0, "trainer")):
      (group / "cgroup.procs").write_text(str(pid))
    (group / limit).write_text(str(2 << 20))
    failure = j.wait_for(lambda: j.events("failure"))[0]
    assert failure["kind"] == "signal 9" and j.child(0, "keeper") == keeper
    (group / limit).write_text("-1" if "limit_in" in limit else "max")
    j.wait_for(lambda: j.events("restore"))
    assert_recovered(j, "memory", 6)
    assert j.child(0, "keeper") == keeper
  finally:
    j.close()
    time.sleep(0.5)
    group.rmdir()


def test_an_exception_ends_the_job_at_once(job):
  """Row 3: all trainers are gone in a second, not in the five minutes of JAX's barrier; the same one twice ends the job."""
  j = job(2, environment=fault("exception:7"))
  j.wait_for(lambda: j.events("failure"))
  begin = time.monotonic()
  j.finish(13)
  failures = j.events("failure")
  assert [f["step"] for f in failures] == [7, 7] and all("exit" in f["kind"] for f in failures)
  assert j.events("stopped") and "ValueError: thrown at step 7" in j.logs()
  assert time.monotonic() - begin < 120


@pytest.mark.parametrize("how", ["stop", "sleep"])
def test_a_stuck_trainer_is_noticed(job, control, how, tmp_path):
  """Row 4: SIGSTOP, and a sleep while the heartbeats go on; the stacks are kept."""
  patience = {"Snapshot.stuck_seconds": 6.0}
  if how == "stop":
    j = job(2, patience)
    j.wait_for_step(8)
    assert j.kill(1, "trainer", signal.SIGSTOP)
  else:
    j = job(2, patience, environment=fault("sleep:8", tmp_path))
  failure = j.wait_for(lambda: j.events("failure"))[0]
  silent = failure["time"] - max(r["time"] for r in jsonl.read(j.run_dir / "metrics.jsonl") if r["time"] < failure["time"])
  assert failure["kind"] == "stuck" and silent < 6.0 + 5.0
  j.finish()
  assert_recovered(j, "memory", 3)
  assert_as_if_nothing_had_happened(j, control(2))
  if how == "sleep":
    assert any("train.py" in (j.run_dir / f"stacks-{h}.txt").read_text() for h in range(2))


# --------------------------------------------------------------------------------------------------------- hosts are lost


@pytest.mark.parametrize("hosts, m, lost", [(2, 1, (0,)), (3, 1, (1,))])
def test_lost_hosts_are_decoded_onto_replacements(job, control, hosts, m, lost):
  """Row 5: trainer, snapshot process and supervisor of m hosts; host 0 is the leader."""
  changes = {"Snapshot.parity_hosts": m}
  j = job(hosts, changes)
  j.wait_for_step(8)
  for host in lost:
    assert j.kill(host, "host")
  for host in lost:
    j.start(host)
  j.finish()
  assert_recovered(j, "decoded", 6)
  assert [e["host"] for e in j.events("protected")] == list(lost)
  assert_as_if_nothing_had_happened(j, control(hosts, changes))


def test_one_host_too_many_falls_back_to_the_checkpoints(job, control):
  """Row 5: m + 1 hosts; said so, and resumed from the newest checkpoint."""
  changes = {"Checkpoint.every_steps": 5}
  j = job(2, changes)
  j.wait_for(lambda: (j.run_dir / "checkpoints" / "5" / "digests").exists() and j.last_step() >= 7)
  for host in (0, 1):
    j.kill(host, "host")
  for host in (0, 1):
    j.start(host)
  j.finish()
  assert_recovered(j, "persistent")
  assert j.events("restore")[-1]["step"] in (5, 10)
  assert_as_if_nothing_had_happened(j, control(2, changes))


def test_a_lost_snapshot_process_leaves_the_training_alone(job, control):
  """Row 6: degraded until the next snapshot; the trainer is never restarted."""
  j = job(2, {"Train.steps": 60})
  j.wait_for_step(8)
  trainer = j.child(1, "trainer")
  assert j.kill(1, "keeper")
  j.wait_for(lambda: j.events("degraded"))
  at = j.events("degraded")[0]["time"]
  j.wait_for(lambda: [e for e in j.events("commit") if e["time"] > at])
  assert j.child(1, "trainer") == trainer
  status = json.loads((j.run_dir / "snapshots.json").read_text())
  assert status["groups"][0]["holding"] == [0, 1]
  j.finish()
  assert not j.events("failure")
  assert_as_if_nothing_had_happened(j, control(2, {"Train.steps": 60}), 60)


# ------------------------------------------------------------------------------------------------------- the other tiers


def test_a_flipped_bit_in_a_slot_is_mended(job, control, tmp_path):
  """Row 8, through the whole job."""
  j = job(2, environment=fault("flip:9", tmp_path))
  j.finish()
  assert j.events("recovery")[0]["tier"] == "decoded" and j.events("recovery")[0]["repaired"] == {"1": 1}
  assert_as_if_nothing_had_happened(j, control(2))


def test_a_memory_tier_that_is_not_what_was_saved_is_refused(job, control, tmp_path):
  """G4: chunks and parity agree but the fingerprint of the devices does not (damage on the way to the slot)."""
  changes = {"Checkpoint.every_steps": 5}
  j = job(1, changes, environment=fault("garbage:9", tmp_path))
  j.finish()
  assert any("is not what was saved" in e["message"] for e in j.events("alarm"))
  assert j.events("restore")[0]["step"] == 5
  assert_as_if_nothing_had_happened(j, control(1, changes))


@pytest.mark.parametrize("step", [9, STEPS])
def test_a_checkpoint_that_one_host_cannot_read_back_is_saved_again(job, control, tmp_path, step):
  """In the midst, at the next step of the log; the last one, in its place."""
  j = job(2, {"Checkpoint.every_steps": 9}, environment=fault(f"misread:{step}", tmp_path))
  j.finish()
  assert any(f"checkpoint {step} is damaged, by host(s) 1; saved again at once" in e["message"] for e in j.events("alarm"))
  saves = [e["step"] for e in j.events("save")]
  assert saves == [9, 18, 27, 30, 30] if step == STEPS else len(saves) == 5 and set(saves) > {9, 18, 27, 30}, saves
  assert len(list((j.run_dir / "checkpoints" / str(STEPS)).glob("good.*"))) == 2
  assert_as_if_nothing_had_happened(j, control(2, {"Checkpoint.every_steps": 9}))


def test_sigterm_saves_and_the_same_command_resumes(job, control, tmp_path):
  """Row 13: SIGTERM on one host; all save the same step, in memory and in a checkpoint, and end with 143."""
  j = job(2)
  j.wait_for_step(8)
  os.kill(j.supervisors[1].pid, signal.SIGTERM)
  j.finish(143)
  step = j.events("preempted")[0]["step"]
  assert (j.run_dir / "checkpoints" / str(step) / "digests").exists()
  assert step in [e["step"] for e in j.events("commit")]
  again = job(2)
  again.finish()
  assert again.events("restore")[-1]["step"] == step
  assert_as_if_nothing_had_happened(again, control(2))


def test_control_c_saves_too(job):
  """SIGINT reaches all processes of the terminal; one host."""
  j = job(1)
  j.wait_for_step(8)
  os.killpg(j.supervisors[0].pid, signal.SIGINT)
  j.finish(143)
  step = j.events("preempted")[0]["step"]
  assert (j.run_dir / "checkpoints" / str(step) / "digests").exists() and (j.run_dir / "PREEMPTED").exists()


def test_a_straggler_is_waited_for_and_snapshots_are_skipped(job, control):
  """Row 14: a slow snapshot process; steps are skipped and not queued, and the job ends as it should."""
  j = job(2, {"Train.steps": 60, "Snapshot.every_steps": 1})
  j.wait_for_step(5)
  keeper = j.child(1, "keeper")
  os.kill(keeper, signal.SIGSTOP)
  time.sleep(3)
  os.kill(keeper, signal.SIGCONT)
  j.finish()
  assert not j.events("failure")
  assert_as_if_nothing_had_happened(j, control(2, {"Train.steps": 60}), 60)


BROKEN = [("nan", 12), ("spike", 33)]  # the guard judges spikes after 32 steps


@pytest.mark.parametrize("what, step", BROKEN)
def test_what_is_broken_for_ever_is_replayed_once_and_then_stops(job, what, step):
  """Row 16: every step skipped, rewound, replayed to the same bits: the data or the model is at fault."""
  j = job(1, {"Train.steps": 60}, environment=fault(f"{what}:{step}"))
  j.finish(5)
  assert [e["to"] for e in j.events("rewind")] == [step // 3 * 3]
  assert j.events("replayed")[0]["same"] is True
  assert "data or the model" in j.logs()


@pytest.mark.parametrize("what, step", BROKEN)
def test_what_a_replay_does_not_repeat_is_the_hardware(job, control, tmp_path, what, step):
  """Row 16, once: the replay comes out differently, which is said, and training goes on from it."""
  j = job(1, {"Train.steps": 60}, environment=fault(f"{what}:{step}", tmp_path))
  j.finish()
  assert j.events("replayed")[0]["same"] is False
  assert local_job.final_digests(j.run_dir, 60) == local_job.final_digests(control(1, {"Train.steps": 60}), 60)


def test_a_spike_without_a_rule_for_spikes_is_not_skipped(job):
  """The control of the two above."""
  j = job(1, {"Train.steps": 60, "Optimizer.skip_spike_sigmas": 0}, environment=fault("spike:33"))
  j.finish()
  assert not j.events("rewind") and not j.events("alarm")


def test_an_old_leader_address_and_a_wrong_token(job, tmp_path):
  """Row 20: a host with another token never joins, and the job is not disturbed."""
  j = job(2)
  other = tmp_path / "token"
  other.write_text("x" * 64)
  other.chmod(0o600)
  stranger = j.start(1, token=other)
  j.finish()
  assert "does not have this job's token" in j.logs()
  assert stranger.poll() is None  # it goes on looking, and is not let in
  stranger.kill()
  assert not j.events("failure")
