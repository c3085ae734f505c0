"""tools.launch_tpu_vm with a stand-in for gcloud (fake_gcloud.py): its command lines, and whole lives of jobs."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import threading
import time

import pytest

from moe.errors import UserError
from tests import fake_gcloud
from tests import small
from tools import launch_tpu_vm
from tools import local_job

PLACE = ["--name=try-1", "--project=p", "--zone=us-west4-a", "--bucket=gs://b/jobs"]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """A cloud of this test's own; its folder."""
  folder = tmp_path / "cloud"
  monkeypatch.setenv("PATH", f"{fake_gcloud.install(tmp_path / 'bin')}:{os.environ['PATH']}")
  monkeypatch.setenv("FAKE_CLOUD", str(folder))
  yield folder
  for path in (folder / "resources").glob("*.json"):
    fake_gcloud.power_off(json.loads(path.read_text()))


def launch(*argv) -> int:
  return launch_tpu_vm.main([str(a) for a in argv])


def commands(cloud) -> list[list[str]]:
  return [json.loads(line) for line in (cloud / "commands.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------- command lines


def said(capsys, *argv) -> list[str]:
  assert launch(*argv) == 0
  return [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("flags, expected", [
    ([], "--node-id=try-1 --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"),
    (["--spot", "--type=v6e-8"], "--node-id=try-1 --accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e --spot"),
    (["--reserved", "--type=v5p-128", "--valid_until=6h"],
     "--node-id=try-1 --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --reserved --valid-until-duration=6h"),
    (["--num_slices=4"],
     "--node-count=4 --node-prefix=try-1 --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"),
])
def test_golden_create(capsys, flags, expected):
  create = [line for line in said(capsys, "up", *PLACE, "--dry_run", *flags) if " create " in line]
  head, _, tail = create[0].partition(" --metadata=")
  assert head == f"gcloud compute tpus queued-resources create try-1 --project=p --zone=us-west4-a {expected}"
  assert tail.startswith("moe-incarnation=TIME,moe-slices=") and tail.endswith(".sh --quiet")
  assert "--metadata-from-file=startup-script=" in tail


def test_golden_dry_run_of_a_job(capsys):
  lines = said(capsys, "run", *PLACE, "--dry_run", "--", "--gin_file=configs/run/quickstart.gin", """--gin.Train.steps=5""")
  shape = [" ".join(shlex.split(line)[1:5]) for line in lines]
  assert shape == ["compute tpus queued-resources describe", "compute tpus queued-resources create",
                   shape[2], "storage cp - gs://b/jobs/try-1/token", "storage cp - gs://b/jobs/try-1/job.json"]
  assert shape[2].startswith("storage cp - gs://b/jobs/try-1/code-") and shape[2].endswith(".tar.gz")
  assert [" ".join(shlex.split(line)[1:6]) for line in said(capsys, "down", *PLACE, "--dry_run")] == [
      "compute tpus queued-resources delete try-1"]


@pytest.mark.parametrize("kind, slices, count", [
    ("v5litepod-16", 1, 4), ("v5litepod-1", 1, 1), ("v6e-64", 2, 32), ("v5p-128", 1, 16), ("v4-32", 1, 4), ("tpu7x-64", 1, 16),
    ("v6e-8", 2, 2)])
def test_hosts_of_a_type(kind, slices, count):
  assert launch_tpu_vm.hosts(launch_tpu_vm.parse(["up", *PLACE, f"--type={kind}", f"--num_slices={slices}"])) == count


@pytest.mark.parametrize("flags, words", [
    (["--type=v9-8"], "--type=v9-8 is none we know"), (["--name=Try_1"], "small letters"), (["--bucket=b"], "not gs://"),
    (["--env=A"], "not KEY=VALUE"), (["--num_slices=0"], "at least 1"), (["--", "--run_dir=x"], "give --run_dir before the --"),
    (["--", "--multihost"], "is set by the launcher")])
def test_mistakes_are_one_line(flags, words):
  with pytest.raises(UserError, match=words):
    launch_tpu_vm.parse(["up", *PLACE, *flags])


def test_without_gcloud_it_says_so(monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(UserError, match="gcloud is not installed"):
    launch("up", *PLACE)


def test_an_existing_name_is_refused(cloud):
  assert launch("up", *PLACE, "--poll_seconds=0.01", "--type=v5litepod-4") == 0
  with pytest.raises(UserError, match=r"try-1 exists already \(ACTIVE\)"):
    launch("up", *PLACE)
  assert launch("down", *PLACE) == 0
  assert launch("status", *PLACE, "--json") == 1


def test_what_cannot_be_asked_is_not_taken_for_gone(cloud, monkeypatch, capsys):
  """A service that does not answer for a while costs no VM and no try."""
  place = [*PLACE, "--type=v5litepod-4", "--poll_seconds=0.2", "--setup=true", "--python=true", "--retries=1"]
  arguments = launch_tpu_vm.parse(["run", *place])
  one = launch_tpu_vm.Cloud(arguments)
  launch_tpu_vm._create(one)
  number = launch_tpu_vm._ship(one, launch_tpu_vm.archive())
  (cloud / "unavailable").touch()
  with pytest.raises(UserError, match="UNAVAILABLE"):
    one.state()
  with pytest.raises(UserError, match="UNAVAILABLE"):
    launch("down", *PLACE)
  threading.Timer(1.5, (cloud / "unavailable").unlink).start()
  assert launch_tpu_vm._stay(one, number) == 0
  assert sum("create" in line for line in commands(cloud)) == 1 and "UNAVAILABLE" in capsys.readouterr().out


@pytest.mark.parametrize("value", ['"a b"', "it's", "$HOME `x`", 'x"y\'z'])
def test_quoting_survives_ssh(cloud, value, tmp_path):
  """The command travels through a shell on the other side; what arrives there is what was given here."""
  (cloud / "resources").mkdir(parents=True)
  fake_gcloud.CLOUD = cloud
  fake_gcloud.save("try-1", {"asked": 9, "state": "ACTIVE", "nodes": ["try-1"], "pids": [], "node_state": "READY"})
  show = tmp_path / "show"
  show.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" \"$KEPT\" > " + str(tmp_path / "arrived") + "\n")
  show.chmod(0o755)
  assert launch("run", *PLACE, "--mode=ssh", "--setup=true", f"--python={show}", f"--env=KEPT={value}", "--",
                f"--gin.Data.tokenizer={value}") == 0
  assert (tmp_path / "arrived").read_text().splitlines() == [
      "-m", "moe.train", "--multihost", "--run_dir=gs://b/jobs/try-1/run", f"--gin.Data.tokenizer={value}", value]


def test_the_token_is_in_no_command_line(cloud):
  assert launch("run", *PLACE, "--type=v5litepod-4", "--poll_seconds=0.01", "--setup=true", "--python=true") == 0
  token = (cloud / "buckets" / "b" / "jobs" / "try-1" / "token").read_text()
  assert len(token) == 64 and token not in json.dumps(commands(cloud))
  assert token not in (cloud / "buckets" / "b" / "jobs" / "try-1" / "job.json").read_text()


def test_the_archive_is_all_a_host_needs(tmp_path):
  """Unpacked anywhere, with configs and tools, and without a package called tools in site-packages."""
  data = launch_tpu_vm.archive()
  assert data == launch_tpu_vm.archive()
  subprocess.run(["tar", "-xzf", "-"], input=data, cwd=tmp_path, check=True)
  done = subprocess.run([sys.executable, "-m", "moe.train", "--dry_run", f"--run_dir={tmp_path}/run"], cwd=tmp_path,
                        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "tools" / "inspect_checkpoint.py").exists() and not (tmp_path / "tests").exists()


# ------------------------------------------------------------------------------------------------------------- whole lives


def job_flags(corpus) -> list[str]:
  changes = {**local_job.MODEL, **corpus, "Mesh.expert": 2, "Snapshot.group_hosts": 2, "Train.steps": 24,
             "Checkpoint.every_steps": 6}
  return ["--allow_unused", *(f"--gin.{key}={value}" for key, value in changes.items())]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = small.write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")
  return {"Data.domains": "(@tiny/Domain(),)", "tiny/Domain.name": '"tiny"', "tiny/Domain.path": f'"{folder}"'}


def run_job(cloud, name, run_dir, corpus, *, preempt_as=None) -> tuple[int, str]:
  """`run --retries=1` of two hosts, in a process of its own; preempted once after a checkpoint if asked. (code, output)."""
  place = [f"--name={name}", "--project=p", "--zone=z", "--bucket=gs://b/jobs"]
  command = [sys.executable, "-m", "tools.launch_tpu_vm", "run", *place, "--type=v4-16", "--poll_seconds=0.5",
             "--setup=true", f"--python={sys.executable}", f"--run_dir={run_dir}", "--retries=1",
             "--env=XLA_FLAGS=--xla_backend_optimization_level=0", "--", *job_flags(corpus)]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=local_job.ROOT)
  told: list[str] = []
  reader = threading.Thread(target=lambda: told.extend(process.stdout))
  reader.start()
  if preempt_as:
    deadline = time.monotonic() + 200
    while not (run_dir / "checkpoints" / "6" / "commit_success.txt").exists():
      assert time.monotonic() < deadline and process.poll() is None, "".join(told)
      time.sleep(0.05)
    fake_gcloud.preempt(cloud, name, preempt_as)
  code = process.wait(400)
  reader.join()
  return code, "".join(told)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["SUSPENDED", "PREEMPTED"])
def test_up_run_preempt_recreate_resume_down(cloud, tmp_path, corpus, state, capsys):
  """Bit for bit the job that nobody disturbed, whatever state the preemption is reported in."""
  code, _ = run_job(cloud, "calm", tmp_path / "calm", corpus)
  assert code == 0
  code, told = run_job(cloud, "struck", tmp_path / "struck", corpus, preempt_as=state)
  assert code == 0, told
  assert f"struck: {state}; 1 more try" in told and told.count("queued-resources create struck") == 1 + 1
  assert "resumed at step" in told and "host 0: 0, host 1: 0" in told
  assert local_job.losses(tmp_path / "struck") == local_job.losses(tmp_path / "calm")
  assert local_job.final_digests(tmp_path / "struck", 24) == local_job.final_digests(tmp_path / "calm", 24)
  capsys.readouterr()
  place = ["--name=struck", *PLACE[1:]]
  assert launch("status", *place, "--json") == 0
  status = json.loads(capsys.readouterr().out)
  assert status["state"] == "ACTIVE" and status["ended"] == {"0": 0, "1": 0}
  assert launch("logs", *place, "--host=1") == 0
  assert {line[:3] for line in capsys.readouterr().out.splitlines()} == {"1| "}
  (pathlib.Path(os.environ.get("MOE_TRANSCRIPT", tmp_path)) / f"transcript-{state}.txt").write_text(told)
  assert launch("down", *place) == 0


@pytest.mark.slow
def test_stop_saves_and_a_new_run_goes_on(cloud, tmp_path, corpus):
  place = ["--name=halt", *PLACE[1:], "--type=v5litepod-4", "--poll_seconds=0.2", "--setup=true", f"--python={sys.executable}",
           f"--run_dir={tmp_path}/run", "--env=XLA_FLAGS=--xla_backend_optimization_level=0"]
  flags = [f for f in job_flags(corpus) if not f.startswith(("--gin.Mesh", "--gin.Train.steps", "--gin.Checkpoint"))]
  flags += ["--gin.Train.steps=100000"]
  assert launch("run", *place, "--", *flags) == 0
  metrics = tmp_path / "run" / "metrics.jsonl"
  wait_for(lambda: metrics.exists() and '"step": 5,' in metrics.read_text())
  assert launch("stop", *place) == 0
  wait_for(lambda: (tmp_path / "run" / "PREEMPTED").exists())
  steps = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
  flags[-1] = f"--gin.Train.steps={max(steps) + 3}"
  assert launch("run", *place, "--follow", "--", *flags) == 0
  assert (tmp_path / "run" / "DONE").exists()


def wait_for(condition, seconds=200):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.1)
