"""tools.launch_tpu_vm with a stand-in for gcloud (fake_gcloud.py): its command lines, and whole lives of jobs."""

import ast
import collections
import json
import os
import pathlib
import re
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
from tools import tpu_prices
from tools import tpu_types
from tools import vm_agent

PLACE = ["--name=try-1", "--project=p", "--zone=us-west4-a", "--bucket=gs://b/jobs"]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """A cloud of this test's own; its folder."""
  folder = tmp_path / "cloud"
  monkeypatch.setenv("PATH", f"{fake_gcloud.install(tmp_path / 'bin')}:{os.environ['PATH']}")
  monkeypatch.setenv("FAKE_CLOUD", str(folder))
  with fake_gcloud.serve(folder) as environment:
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    yield folder
    for path in (folder / "resources").glob("*.json"):
      fake_gcloud.power_off(json.loads(path.read_text()))


def launch(*argv) -> int:
  return launch_tpu_vm.main([str(a) for a in argv])


def commands(cloud) -> list[list[str]]:
  """Every command of gcloud so far."""
  path = cloud / "commands.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def bought(cloud) -> int:
  """How often VMs were asked for."""
  return sum("create" in line for line in commands(cloud))


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
    # Names of the flags as in the synopsis of `gcloud compute tpus queued-resources create`.
    (["--network=n", "--subnetwork=s", "--internal_ips", "--service_account=a@p.iam.gserviceaccount.com",
      "--labels=team=moe,x=1"],
     "--node-id=try-1 --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --network=n --subnetwork=s "
     "--service-account=a@p.iam.gserviceaccount.com --labels=team=moe,x=1 --internal-ips"),
    (["--autodelete"], "--node-id=try-1 --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite "
     "--scopes=https://www.googleapis.com/auth/cloud-platform"),
])
def test_golden_create(capsys, flags, expected):
  create = [line for line in said(capsys, "up", *PLACE, "--dry_run", *flags) if " create " in line]
  head, _, tail = create[0].partition(" --metadata=")
  assert head == f"gcloud compute tpus queued-resources create try-1 --project=p --zone=us-west4-a {expected}"
  assert tail.startswith("moe-incarnation=TIME,moe-slices=") and tail.endswith(".sh --quiet")
  assert "moe-resource=projects/p/locations/us-west4-a/queuedResources/try-1 " in tail
  assert "--metadata-from-file=startup-script=" in tail


def test_flex_start_is_of_the_alpha_variant_and_is_bounded(capsys):
  create = [line for line in said(capsys, "up", *PLACE, "--dry_run", "--flex_start", "--max_hours=1.5", "--valid_until=2d")
            if " create " in line][0]
  assert create.startswith("gcloud alpha compute tpus queued-resources create try-1 ")
  assert " --provisioning-model=flex-start --max-run-duration=5400s --valid-until-duration=2d " in create
  assert ",moe-max-hours=1.5 " in create


def test_golden_dry_run_of_a_job(capsys):
  lines = said(capsys, "run", *PLACE, "--dry_run", "--", "--gin_file=configs/run/quickstart.gin", """--gin.Train.steps=5""")
  shape = [" ".join(shlex.split(line)[1:5]) for line in lines]
  # The job lies in the bucket before the VMs are asked for: they do not wait for this machine.
  assert shape == ["compute tpus queued-resources describe", shape[1], "storage cp - gs://b/jobs/try-1/token",
                   "storage cp - gs://b/jobs/try-1/job.json", "compute tpus queued-resources create"]
  assert shape[1].startswith("storage cp - gs://b/jobs/try-1/code-") and shape[1].endswith(".tar.gz")
  assert [" ".join(shlex.split(line)[1:6]) for line in said(capsys, "down", *PLACE, "--dry_run")] == [
      "compute tpus queued-resources delete try-1"]


@pytest.mark.parametrize("kind, slices, count", [
    ("v5litepod-16", 1, 4), ("v5litepod-1", 1, 1), ("v6e-64", 2, 32), ("v5p-128", 1, 16), ("v4-32", 1, 4), ("v6e-8", 2, 2),
    ("v5p-8", 1, 1)])
def test_hosts_of_a_type(kind, slices, count):
  assert launch_tpu_vm.hosts(launch_tpu_vm.parse(["up", *PLACE, f"--type={kind}", f"--num_slices={slices}"])) == count


# Topology, cores or chips in the name, chips, hosts: Google's tables for v5e, v6e and v5p, and xpk's for TPU7x.
@pytest.mark.parametrize("name, topology, chips, hosts, devices", [
    ("v5litepod-16", "4x4", 16, 4, 16), ("v6e-8", "2x4", 8, 1, 8), ("v6e-256", "16x16", 256, 64, 256),
    ("v5p-8", "2x2x1", 4, 1, 4), ("v5p-32", "2x2x4", 16, 4, 16), ("v5p-128", "4x4x4", 64, 16, 64),
    ("v5p-512", "4x8x8", 256, 64, 256), ("v5p-2048", "8x8x16", 1024, 256, 1024),
    ("v5p-12288", "16x16x24", 6144, 1536, 6144), ("tpu7x-128", "4x4x4", 64, 16, 128),
    ("tpu7x-4x4x8", "4x4x8", 128, 32, 256)])
def test_slices_of_the_tables(name, topology, chips, hosts, devices):
  one = tpu_types.parse(name)
  assert (one.topology, one.chips, one.hosts, one.devices) == (topology, chips, hosts, devices)


def test_every_run_config_names_a_slice_that_exists():
  """By its `# For`; the name of that slice gives its devices back."""
  from tools import compile_check

  chips = {generation.chip: name for name, generation in tpu_types.GENERATIONS.items()}
  found = 0
  for path in sorted((local_job.ROOT / "configs" / "run").glob("*.gin")):
    if re.search("^# For ", path.read_text(), re.MULTILINE):
      kind, _, shape = compile_check.topology_in(path)[0].partition(":")
      one = tpu_types.parse(f"{chips[kind]}-{shape}")
      assert tpu_types.with_devices(chips[kind], one.devices) == one.name, path
      found += 1
  assert found >= 14


GOOD = ["--type=v5litepod-4", "--setup=true", "--python=true", "--poll_seconds=0.01"]


@pytest.mark.parametrize("flags, words", [
    # of the launcher
    (["--type=v9-8"], "--type=v9-8 is none we know"), (["--name=Try_1"], "small letters"), (["--bucket=b"], "not gs://"),
    (["--bucket=gs://"], "not gs://"), (["--bucket=gs://b/*"], "not gs://"), (["--zone=us-west4"], "not a zone"),
    (["--env=A"], "not KEY=VALUE"), (["--num_slices=0"], "at least 1"), (["--", "--run_dir=x"], "give --run_dir before the --"),
    (["--", "--multihost"], "is set by the launcher"), (["--labels=Team=x"], "small letters"), (["--labels=a=b,"], "key=value"),
    (["--service_account=me"], "not the e-mail"), (["--run_dir=runs/x"], "on the VMs' own disks"),
    # money
    (["--valid_until=soon"], "--valid_until=soon is not a duration such as 6h"), (["--valid_until=0h"], "not a duration"),
    (["--max_hours=0"], "above 0"), (["--max_hours=nan"], "above 0"), (["--max_hours=inf"], "above 0"),
    (["--flex_start"], "needs --max_hours"), (["--flex_start", "--max_hours=200"], "at most 168"),
    (["--mode=ssh", "--autodelete"], "no agent"), (["--mode=ssh", "--num_slices=2"], "one slice"),
    # types
    (["--type=v5litepod-17"], "v5litepod-17 does not exist: v5litepod comes as v5litepod-1, v5litepod-4"),
    (["--type=v5p-100"], "v5p-64, v5p-128"), (["--type=v5e-16"], "Google calls this one v5litepod-16"),
    (["--type=tpu7x-128"], 'must use Google Kubernetes Engine.*--gke'), (["--type=v5p-4x4x4"], "write --type=v5p-128"),
    # the job
    (["--", "--gin_file=configs/run/quickstrat.gin"], "does not exist"),
    (["--", "--gin.Train.stepz=5"], "did you mean 'steps'"),
    (["--", "--steps=5"], "unknown argument"), (["--", "--resume=maybe"], "invalid choice: 'maybe'"),
    (["--", "--dry_run"], "trains nothing"), (["--", "--profile_steps=9:3"], "A < B"),
    (["--", "--gin.Router.top_k=99"], "top_k = 99"), (["--", "--gin.Model.vocab_size=-1"], "vocab_size"),
    # the pod
    (["--", "--gin_file=configs/run/olmoe_1b_7b_v5e_16.gin"],
     "has 16 devices, but --type=v5litepod-4 .* take --type=v5litepod-16"),
    (["--", "--gin.Mesh.data=3"], "has 3 devices"), (["--type=v5litepod-32"], "Data.batch_sequences"),
    (["--num_slices=2"], "Mesh.slice = 1, but --num_slices=2"),
    # what the VMs do not have
    (["--", "--gin.Data.tokenizer='/home/me/tokenizer.json'"], "path of this machine"),
    (["--", "--gin.Data.tokenizer='s3://x/tokenizer.json'"], "gs:// only"),
    (["--", "--init_from=runs/mine"], "path of this machine"),
    (["--", "--tls=a,b,c"], "path of this machine"),
])
def test_nothing_is_bought_for_a_mistake(cloud, flags, words):
  """One line, and not one call of gcloud before it."""
  at = flags.index("--") if "--" in flags else len(flags)
  with pytest.raises(UserError, match=words) as error:
    launch("run", *PLACE, *GOOD, *flags[:at], *flags[at:])
  assert "\n" not in str(error.value) and commands(cloud) == []


@pytest.mark.parametrize("text, words", [
    ('include "{root}/configs/run/quickstart.gin"', "path of this machine"), ("Train.steps = 5", "put it below")])
def test_a_config_that_does_not_travel_is_refused(cloud, tmp_path, text, words):
  path = tmp_path / "mine.gin"
  path.write_text(text.format(root=local_job.ROOT))
  with pytest.raises(UserError, match=words):
    launch("run", *PLACE, *GOOD, "--", f"--gin_file={path}")
  with pytest.raises(UserError, match="write --gin_file=configs/run/quickstart.gin"):
    launch("run", *PLACE, *GOOD, "--", f"--gin_file={local_job.ROOT}/configs/run/quickstart.gin")
  assert commands(cloud) == []


def test_a_shipped_config_may_not_lead_out_of_what_is_shipped(tmp_path):
  from tools import launch_preflight as preflight

  root, pod = tmp_path / "code", preflight.Pod(tpu_types.parse("v5litepod-4"), 1)
  (root / "configs").mkdir(parents=True)
  (tmp_path / "secret.gin").write_text("Train.steps = 5\n")
  (root / "configs" / "mine.gin").write_text('include "../../secret.gin"\n')
  with pytest.raises(UserError, match="mine.gin includes .*secret.gin, which does not travel"):
    preflight.check(["--gin_file=configs/mine.gin"], pod, preflight.Checkout(root, {"configs/mine.gin"}))


def test_a_linked_config_travels_as_a_file(tmp_path, monkeypatch):
  """The archive holds what the link leads to."""
  root = tmp_path / "code"
  for name in ("moe", "configs", "tools"):
    (root / name).mkdir(parents=True)
  (root / "moe" / "train.py").touch()
  (tmp_path / "elsewhere.gin").write_text("Train.steps = 5\n")
  (root / "configs" / "mine.gin").symlink_to(tmp_path / "elsewhere.gin")
  monkeypatch.setattr(launch_tpu_vm, "ROOT", root)
  monkeypatch.setattr(launch_tpu_vm, "SHIPPED", ("moe", "configs", "tools"))
  (tmp_path / "vm").mkdir()
  subprocess.run(["tar", "-xzf", "-"], input=launch_tpu_vm.archive(), cwd=tmp_path / "vm", check=True)
  arrived = tmp_path / "vm" / "configs" / "mine.gin"
  assert not arrived.is_symlink() and arrived.read_text() == "Train.steps = 5\n"


@pytest.mark.parametrize("name, slices, hosts, each", [
    ("v5litepod-1", 1, 1, 1), ("v5litepod-8", 1, 1, 8), ("v5litepod-16", 1, 4, 4), ("v6e-64", 2, 32, 4), ("v5p-32", 1, 4, 4),
    ("tpu7x-64", 1, 8, 8)])
def test_the_stand_in_for_a_pod(name, slices, hosts, each):
  """As many devices on every host as its VM has, each in a place of its own."""
  from tools import launch_preflight

  pod = launch_preflight.Pod(tpu_types.parse(name), slices)
  found = launch_preflight.devices(pod)
  of_host = collections.Counter(device.process_index for device in found)
  assert sorted(of_host) == list(range(hosts)) and set(of_host.values()) == {each}
  assert len({(d.slice_index, d.coords, d.core_on_chip) for d in found}) == pod.devices == len(found)


def domain(path: str) -> list[str]:
  return ["--gin.Data.domains=(@x/Domain(),)", "--gin.x/Domain.name='x'", f"--gin.x/Domain.path={path!r}"]


def test_data_must_be_where_the_vms_can_read_it(cloud, tmp_path):
  folder = small.write_corpus(tmp_path / "books")
  for path, words in [(str(folder), "path of this machine"), ("data/books", "path of this machine"), ("embedded:kjb", "kjb")]:
    with pytest.raises(UserError, match=words):
      launch("run", *PLACE, *GOOD, "--", *domain(path))
  assert commands(cloud) == []
  with pytest.raises(UserError, match="gs://b/books/manifest.json does not exist"):
    launch("run", *PLACE, *GOOD, "--", *domain("gs://b/books"))
  assert bought(cloud) == 0
  manifest = cloud / "buckets" / "b" / "books" / "manifest.json"
  manifest.parent.mkdir(parents=True)
  manifest.write_text("{}")
  assert launch("run", *PLACE, *GOOD, "--", *domain("gs://b/books")) == 0
  assert bought(cloud) == 1


def test_the_config_of_another_pod_is_said(cloud, capsys):
  assert launch("run", *PLACE, *GOOD, "--type=v6e-16", "--dry_run", "--", "--gin_file=configs/run/olmoe_1b_7b_v5e_16.gin") == 0
  assert "was made for v5e:4x4; this job runs on v6e:4x4" in capsys.readouterr().err
  assert launch("run", *PLACE, *GOOD, "--type=v5litepod-16", "--dry_run", "--",
                "--gin_file=configs/run/olmoe_1b_7b_v5e_16.gin") == 0
  assert "was made for" not in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------------- price


@pytest.mark.parametrize("flags, lines", [
    (["--max_hours=2"], ["16 chip(s) of v5e in us-west4, on demand: 1.20 USD an hour and chip, 19.20 USD an hour in all",
                         "at most 2 h of running VMs: 38.40 USD"]),
    ([], ["19.20 USD", "NO UPPER BOUND: the VMs are billed until somebody deletes them (a day is 461 USD)"]),
    (["--autodelete", "--num_slices=2"], ["38.40 USD an hour in all", "NO UPPER BOUND: the VMs are billed until the job ends"]),
    (["--spot", "--type=v5p-128", "--zone=us-east5-a"],
     ["64 chip(s) of v5p in us-east5, spot: 1.30 USD", "spot prices change"]),
    (["--type=v6e-8", "--zone=europe-west4-a"], ["2.97 USD an hour and chip, 23.76 USD"]),
    (["--zone=me-west1-a"], ["no price known; see https://cloud.google.com/tpu/pricing"]), (["--reserved"], ["no price known"]),
])
def test_the_price_is_said_first(capsys, flags, lines):
  launch("up", *PLACE, "--dry_run", *flags)
  out = capsys.readouterr().out
  assert all(line in out for line in lines), out
  assert out.index("price:") < out.index("+ gcloud")


def test_the_price_of_all_steps_is_said_where_the_config_has_an_estimate(capsys):
  """The steps of the run, by the compiler's seconds; not for another pod than the one that they were estimated for."""
  config = "configs/run/olmoe_1b_7b_v5e_16.gin"
  seconds = float(re.search(r"static estimate of a step ([\d.]+) s", (local_job.ROOT / config).read_text())[1])
  launch("run", *PLACE, "--dry_run", "--", f"--gin_file={config}", "--gin.Train.steps=100_000")
  hours = 100_000 * seconds / 3600
  assert f"about {hours:,.1f} h, {19.2 * hours:,.0f} USD" in capsys.readouterr().out
  launch("run", *PLACE, "--type=v6e-16", "--dry_run", "--", f"--gin_file={config}")
  assert "estimate in the config's head" not in capsys.readouterr().out


def test_the_list_of_prices_is_whole():
  """A date, a source, and no figure that is none: the source has 700 where it knows no price."""
  listed = json.loads(tpu_prices.PATH.read_text())
  assert re.fullmatch(r"20\d\d-\d\d-\d\d", listed["copied"]) and listed["source"] and listed["page"].startswith("https://")
  for table in (listed["on_demand"], listed["spot"]):
    assert set(table) == {g.chip for g in tpu_types.GENERATIONS.values() if g.image}
    assert all(0.1 < price < 10 for regions in table.values() for price in regions.values())
  assert all(listed["spot"][chip][region] < price for chip, regions in listed["on_demand"].items()
             for region, price in regions.items() if region in listed["spot"][chip])


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
  launch_tpu_vm._create(one, None)
  number = launch_tpu_vm._ship(one, launch_tpu_vm.archive())
  (cloud / "unavailable").touch()
  with pytest.raises(UserError, match="UNAVAILABLE"):
    one.state()
  with pytest.raises(UserError, match="UNAVAILABLE"):
    launch("down", *PLACE)
  threading.Timer(1.5, (cloud / "unavailable").unlink).start()
  assert launch_tpu_vm._stay(one, number, None) == 0
  assert bought(cloud) == 1 and "UNAVAILABLE" in capsys.readouterr().out


@pytest.mark.parametrize("value", ['"a b"', "it's", "$HOME `x`", 'x"y\'z'])
def test_quoting_survives_ssh(cloud, value, tmp_path):
  """The command travels through a shell on the other side; what arrives there is what was given here."""
  (cloud / "resources").mkdir(parents=True)
  fake_gcloud.CLOUD = cloud
  fake_gcloud.save("try-1", {"asked": 9, "state": "ACTIVE", "nodes": ["try-1"], "pids": [], "node_state": "READY"})
  show = tmp_path / "show"
  show.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" \"$KEPT\" > " + str(tmp_path / "arrived") + "\n")
  show.chmod(0o755)
  name = f"--gin.x/Domain.name={value!r}"
  flags = ["--gin.Data.domains=(@x/Domain(),)", name, "--gin.x/Domain.path='embedded:kjv'"]
  assert launch("run", *PLACE, "--mode=ssh", "--setup=true", f"--python={show}", f"--env=KEPT={value}", "--", *flags) == 0
  assert (tmp_path / "arrived").read_text().splitlines() == [
      "-m", "moe.train", "--multihost", "--run_dir=gs://b/jobs/try-1/run", *flags, value]


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


# ------------------------------------------------------------------------------------- who ends the bill, without the laptop


@pytest.fixture
def money(cloud, monkeypatch, tmp_path):
  """Flags of a job of two hosts whose trainer is a script of `trainer(text)`; the hosts look every 0.1 s."""
  monkeypatch.setenv("FAKE_POLL", "0.1")
  program = tmp_path / "trainer"

  def flags(trainer="exit 0", setup="true"):
    program.write_text(f"#!/bin/bash\n{trainer}\n")
    program.chmod(0o755)
    return ["run", *PLACE, "--type=v5p-16", f"--setup={setup}", f"--python={program}", "--poll_seconds=0.05"]

  return flags


def job_of(cloud) -> pathlib.Path:
  return cloud / "buckets" / "b" / "jobs" / "try-1"


def log_of(cloud, host) -> str:
  return "".join(path.read_text() for path in sorted((job_of(cloud) / "logs" / str(host)).glob("*.txt")))


def gone(cloud) -> bool:
  return not (cloud / "resources" / "try-1.json").exists()


def deletions(cloud) -> list[str]:
  path = cloud / "api.jsonl"
  return [url for verb, url in map(json.loads, path.read_text().splitlines()) if verb == "DELETE"] if path.exists() else []


@pytest.mark.parametrize("code", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_vms_delete_themselves_when_the_job_has_ended(cloud, money, code):
  """Well or badly; by host 0, with its service account's token and no gcloud of this machine."""
  assert launch(*money(f"sleep 0.$RANDOM; exit {code}"), "--autodelete") == 0
  wait_for(lambda: gone(cloud), 30)
  assert deletions(cloud) == ["/v2/projects/p/locations/us-west4-a/queuedResources/try-1?force=true"]
  assert not any("delete" in line for line in commands(cloud))
  states = [json.loads(path.read_text()) for path in job_of(cloud).glob("state/*/*.json")]
  assert sorted((state["host"], state["code"]) for state in states) == [(0, code), (1, code)]


@pytest.mark.slow
def test_vms_stay_without_autodelete(cloud, money):
  """The control of the test above."""
  assert launch(*money()) == 0
  wait_for(lambda: len(list(job_of(cloud).glob("state/*/*.json"))) == 2, 30)
  time.sleep(1)
  assert not gone(cloud) and deletions(cloud) == []


@pytest.mark.slow
def test_one_host_that_goes_on_keeps_the_vms(cloud, money, tmp_path):
  trainer = f'case "$*" in *,2,1*) while [ ! -e {tmp_path}/enough ]; do sleep 0.1; done;; esac'
  assert launch(*money(trainer), "--autodelete") == 0
  wait_for(lambda: list(job_of(cloud).glob("state/*/0.json")), 30)
  time.sleep(1)
  assert deletions(cloud) == []
  (tmp_path / "enough").touch()
  wait_for(lambda: gone(cloud), 30)


@pytest.mark.slow
def test_the_laptop_goes_away(cloud, money, tmp_path):
  """kill -9 while it waits for the VMs: the job runs, and the VMs delete themselves."""
  command = [sys.executable, "-m", "tools.launch_tpu_vm", *money(f"touch {tmp_path}/trained-$$"), "--follow", "--autodelete"]
  command[-3] = "--poll_seconds=0.5"
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=local_job.ROOT)
  for line in process.stdout:
    if "ACCEPTED" in line or "PROVISIONING" in line:
      break
  process.kill()
  process.wait()
  assert not list(tmp_path.glob("trained-*"))
  for _ in range(3):  # time goes by in the stand-in when it is asked
    subprocess.run(["gcloud", "compute", "tpus", "queued-resources", "describe", "try-1"], capture_output=True)
  wait_for(lambda: gone(cloud), 30)
  assert len(list(tmp_path.glob("trained-*"))) == 2 and bought(cloud) == 1


# Fails on the second host only: the first, which runs, must not wait for it for ever.
_FAILS_ON_HOST_1 = """case "$MOE_VM_METADATA" in *'number": "1"'*) echo no wheel for jax; exit 3;; esac"""


def test_a_failing_set_up_is_bounded_and_seen_and_ends_the_bill(cloud, money, capsys):
  code = launch(*money("trap 'exit 143' TERM; while true; do sleep 0.1; done", _FAILS_ON_HOST_1), "--autodelete", "--follow")
  out = capsys.readouterr().out
  assert code == 1 and "is over: set-up of host 1 failed: 5 tries; the set-up command ended with code 3" in out
  log = log_of(cloud, 1)
  assert log.count("no wheel for jax") == 5 and "try 5 of 5" in log and "no wheel for jax" in out
  wait_for(lambda: gone(cloud), 30)
  assert bought(cloud) == 1
  over = json.loads(next(job_of(cloud).glob("over/*.json")).read_text())
  assert over["host"] == 1 and over["code"] == 1
  launch("status", *PLACE)
  assert "over: set-up of host 1 failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_set_up_is_not_tried_for_ever_without_autodelete_either(cloud, money):
  assert launch(*money(setup="exit 7")) == 0
  wait_for(lambda: list(job_of(cloud).glob("over/*.json")), 30)
  wait_for(lambda: "billed, until `launch_tpu_vm down`" in log_of(cloud, 0) + log_of(cloud, 1), 10)
  time.sleep(1.5)
  tries = log_of(cloud, 0).count("set-up failed, try")
  time.sleep(1)
  assert not gone(cloud) and log_of(cloud, 0).count("set-up failed, try") == tries <= 5


def test_max_hours_saves_and_ends_the_bill(cloud, money, tmp_path, capsys):
  """The job is told in time; the launcher that stays does not make the VMs again."""
  trainer = f"trap 'touch {tmp_path}/saved-$$; exit 143' TERM; while true; do sleep 0.1; done"
  begin = time.time()
  assert launch(*money(trainer), "--max_hours=0.002", "--follow", "--retries=3") == 143
  wait_for(lambda: gone(cloud), 30)
  assert time.time() - begin > 4.8 and bought(cloud) == 1  # two thirds of 7.2 s
  assert len(list(tmp_path.glob("saved-*"))) == 2
  assert "is over: max_hours: 0.002 h are up" in capsys.readouterr().out


@pytest.mark.parametrize("setup, trainer", [
    ("sleep 1000", "exit 0"), ("true", "trap '' TERM; while true; do sleep 1; done")], ids=["set-up hangs", "ignores SIGTERM"])
@pytest.mark.slow
def test_max_hours_is_hard(cloud, money, setup, trainer):
  """Whatever the agent is waiting for."""
  assert launch(*money(trainer, setup), "--max_hours=0.0008") == 0
  wait_for(lambda: gone(cloud), 20)
  assert bought(cloud) == 1


@pytest.mark.slow
def test_vms_without_a_job_have_the_cap_too(cloud, money):
  """`up`, and nobody comes back."""
  assert launch("up", *PLACE, "--type=v5p-16", "--poll_seconds=0.05", "--max_hours=0.0006") == 0
  wait_for(lambda: gone(cloud), 20)


@pytest.mark.slow
def test_a_job_brings_the_cap_to_vms_that_are_there(cloud, money):
  assert launch("up", *PLACE, "--type=v5p-16", "--poll_seconds=0.05") == 0
  time.sleep(1)
  assert launch(*money("while true; do sleep 0.1; done"), "--max_hours=0.0006") == 0
  wait_for(lambda: gone(cloud), 20)
  assert bought(cloud) == 1


@pytest.mark.slow
def test_an_account_without_rights_is_told_early_and_the_host_powers_off(cloud, money, monkeypatch):
  (cloud).mkdir(exist_ok=True)
  (cloud / "forbidden").touch()
  monkeypatch.setenv("FAKE_POLL", "0.05")
  assert launch(*money(), "--autodelete") == 0
  wait_for(lambda: (cloud / "powered-off").exists(), 30)
  wait_for(lambda: "powering this host off" in log_of(cloud, 0), 10)
  log = log_of(cloud, 0)
  assert log.index("WARNING: this VM cannot read projects/p/") < log.index("ended with code 0")
  assert log.count("cannot be deleted (try") >= 5 and "roles/tpu.editor" in log


@pytest.mark.slow
def test_an_agent_that_is_killed_comes_back_and_leaves_no_second_job(cloud, money, tmp_path):
  """kill -9 (out of memory): the startup script starts it again, and it ends the command that it left behind first."""
  # On host 0 the first one kills its agent and goes on. Nobody reads its output then: bash would die of SIGPIPE.
  trainer = (f"exec > /dev/null 2>&1; case \"$*\" in *,2,0*) ;; *) exit 0;; esac; echo $$ >> {tmp_path}/started\n"
             f"trap 'echo $$ >> {tmp_path}/told; exit 143' TERM\n"
             f"if [ $(wc -l < {tmp_path}/started) = 1 ]; then sleep 0.5; kill -9 $PPID; while true; do sleep 0.1; done; fi")
  assert launch(*money(trainer), "--autodelete") == 0
  wait_for(lambda: gone(cloud), 40)
  started = (tmp_path / "started").read_text().split()
  assert len(started) == 2 and (tmp_path / "told").read_text().split()[0] == started[0]
  assert not vm_agent.alive(started[0])


def test_the_startup_script_passes_sigterm_on(tmp_path):
  """The machine goes down: the agent, a stand-in here, has time to end."""
  a = launch_tpu_vm.parse(["up", *PLACE])
  head, tail = re.split(r"<<'END_OF_AGENT'\n.*END_OF_AGENT\n", launch_tpu_vm.startup_script(a), flags=re.DOTALL)
  agent = ("import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('saved', sys.argv[1]), sys.exit(0)))\n"
           "print('up', flush=True)\ntime.sleep(60)\n")
  script = tmp_path / "startup.sh"
  script.write_text(f"{head}<<'END_OF_AGENT'\n{agent}END_OF_AGENT\n{tail}")
  assert subprocess.run(["bash", "-n", script]).returncode == 0
  process = subprocess.Popen(["bash", script], stdout=subprocess.PIPE, text=True, env={
      **os.environ, "MOE_VM_HOME": str(tmp_path), "MOE_VM_POLL_SECONDS": "0.1"})
  assert process.stdout.readline() == "up\n"
  process.terminate()
  assert process.communicate(timeout=20)[0] == "saved gs://b/jobs/try-1\n" and process.returncode == 0


def test_the_agent_runs_on_the_python_of_the_images():
  """Ubuntu 20.04 has 3.8; only the standard library."""
  text = pathlib.Path(vm_agent.__file__).read_text()
  tree = ast.parse(text, feature_version=(3, 8))
  imported = {name.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
  assert imported <= sys.stdlib_module_names and not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
  assert not re.search(r"\.removeprefix|\.removesuffix|dict\[|list\[|tuple\[", text)


@pytest.mark.parametrize("text, values", [
    ("", []), ('{"a": 1}', [{"a": 1}]), ('{"a": 1}{"b": 2}\n {"c": 3}\n', [{"a": 1}, {"b": 2}, {"c": 3}])])
def test_documents_one_after_the_other(text, values):
  assert vm_agent.several(text) == values


def test_an_agent_that_crashes_comes_back_and_then_gives_the_job_up(monkeypatch, tmp_path):
  """Without it nothing would end the bill."""
  kept, runs = [], []

  class Crashing:
    index, number, job = 0, "7", {}

    def __init__(self, root):
      pass

    def run(self):
      runs.append(1)
      if len(runs) < 7:
        raise RuntimeError("a mistake")

    def abandon(self):
      kept.append("killed")

    def _declare(self, why, code):
      kept.append(why)

  monkeypatch.setattr(vm_agent, "Agent", Crashing)
  monkeypatch.setattr(vm_agent, "POLL_SECONDS", 0.0)
  monkeypatch.setattr(vm_agent, "HOME", tmp_path)
  vm_agent.main("gs://b/jobs/try-1")
  assert len(runs) == 7 and kept.count("killed") == 6 and sum("failed 5 times" in why for why in kept) == 1


# ------------------------------------------------------------------------------------------------------------- whole lives


def job_flags(corpus) -> list[str]:
  # On the eight chips of a v4-16 as on the one CPU device of each of its hosts here.
  changes = {**local_job.MODEL, **corpus, "Mesh.data": -1, "Mesh.expert": 2, "Data.batch_sequences": 16,
             "Data.virtual_shards": 16, "Snapshot.group_hosts": 2, "Train.steps": 24, "Checkpoint.every_steps": 6}
  return ["--allow_unused", *(f"--gin.{key}={value}" for key, value in changes.items())]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = small.write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")
  return {"Data.domains": "(@tiny/Domain(),)", "tiny/Domain.name": '"tiny"', "tiny/Domain.path": f'"{folder}"'}


def run_job(cloud, name, run_dir, corpus, *, preempt_as=None) -> tuple[int, str]:
  """`run --retries=1` of two hosts, in a process of its own; preempted once after a checkpoint if asked. (code, output)."""
  place = [f"--name={name}", *PLACE[1:]]
  command = [sys.executable, "-m", "tools.launch_tpu_vm", "run", *place, "--type=v4-16", "--poll_seconds=0.5",
             "--setup=true", f"--python={sys.executable}", f"--run_dir={run_dir}", "--local_paths", "--retries=1",
             "--env=XLA_FLAGS=--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1", "--",
             *job_flags(corpus)]
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
  code, told = run_job(cloud, "calm", tmp_path / "calm", corpus)
  assert code == 0, told
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
           f"--run_dir={tmp_path}/run", "--local_paths", "--env=XLA_FLAGS=--xla_backend_optimization_level=0"]
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
