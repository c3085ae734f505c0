"""A run directory has one owner, a name of its own, and keeps what each start was."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from etils import epath
import pytest

from moe import config
from moe import gin_config
from moe import run_dir
from moe.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOLD = "import sys, time; from moe import run_dir; from etils import epath; owner = run_dir.Owner(epath.Path(sys.argv[1])); " \
       "print('held', flush=True); time.sleep(600)"


def test_two_jobs_of_one_second_get_directories_of_their_own(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(time, "strftime", lambda *_: "runs/20260101-000000")
  names = [run_dir.choose(None).name for _ in range(3)]
  assert names == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]


def test_a_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert run_dir.choose("~/mine") == epath.Path(tmp_path / "mine")
  assert not pathlib.Path("~").exists()


@pytest.mark.parametrize("name", ["a[1]/run", "what?", "all*"])
def test_a_name_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
  with pytest.raises(ConfigError, match="no checkpoint can be saved there"):
    run_dir.choose(str(tmp_path / name))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, place):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="cannot be made") as caught:
    run_dir.choose(str(tmp_path / ("file" if place == "a file" else "file/run")))
  assert "\n" not in str(caught.value)


def test_several_hosts_need_a_name():
  with pytest.raises(ConfigError, match="4 hosts needs --run_dir"):
    run_dir.choose(None, hosts=4)


# -------------------------------------------------------------------------------------------------------------- owner


def test_a_second_owner_is_refused_until_the_first_is_killed(tmp_path):
  first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert first.stdout.readline() == "held\n"
  with pytest.raises(ConfigError, match=f"in use by process {first.pid} on .*--run_dir"):
    run_dir.Owner(epath.Path(tmp_path))
  first.send_signal(signal.SIGKILL)
  first.wait()
  run_dir.Owner(epath.Path(tmp_path)).release()


def test_a_released_directory_can_be_taken_again(tmp_path):
  with run_dir.Owner(epath.Path(tmp_path)):
    with pytest.raises(ConfigError):
      run_dir.Owner(epath.Path(tmp_path))
  with run_dir.Owner(epath.Path(tmp_path)):
    pass


class Store:
  """A path on an object store, with what is in it: as much of epath.Path as a lease needs."""

  def __init__(self, objects: dict, name: str = "gs://bucket/run"):
    self.objects, self.name = objects, name

  def __str__(self):
    return self.name

  def __truediv__(self, part):
    return Store(self.objects, f"{self.name}/{part}")

  def read_text(self):
    if self.name not in self.objects:
      raise FileNotFoundError(self.name)
    return self.objects[self.name]

  def write_text(self, text):
    self.objects[self.name] = text

  def unlink(self, missing_ok=False):
    self.objects.pop(self.name, None)


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(run_dir, "_BEAT_SECONDS", 0.05)
  monkeypatch.setattr(run_dir, "_SETTLE_SECONDS", 0.01)


LEASE = "gs://bucket/run/owner.json"


def test_a_lease_that_shows_signs_of_life_is_respected(quick):
  store = Store({})
  with run_dir.Owner(store):
    held = json.loads(store.objects[LEASE])
    assert held["pid"] == os.getpid()
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
      run_dir.Owner(store, say=lambda _: None)
  assert LEASE not in store.objects


def test_a_lease_without_a_sign_of_life_is_taken_over(quick):
  said = []
  store = Store({LEASE: json.dumps({"host": "elsewhere", "pid": 7, "since": "yesterday", "beat": 3})})
  with run_dir.Owner(store, said.append):
    assert json.loads(store.objects[LEASE])["pid"] == os.getpid()
  assert "process 7 on elsewhere" in said[0]


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_at_once(monkeypatch):
  monkeypatch.setattr(run_dir, "_SETTLE_SECONDS", 0.01)
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  lease = {"host": os.uname().nodename, "pid": gone.pid, "since": "now", "beat": 3}
  begin = time.monotonic()
  owner = run_dir.Owner(Store({LEASE: json.dumps(lease)}))
  assert time.monotonic() - begin < 2
  monkeypatch.setattr(run_dir, "_BEAT_SECONDS", 0.01)  # of the end, which waits for the thread
  owner.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}'])
def test_a_damaged_lease_stops_nobody(quick, text):
  run_dir.Owner(Store({LEASE: text})).release()


# ------------------------------------------------------------------------------------------------------------- starts


def test_every_start_is_kept_and_the_newest_has_the_plain_name(tmp_path):
  for text in ("first", "second"):
    run_dir.keep_start(epath.Path(tmp_path), {"config.gin": text})
  assert (tmp_path / "config.gin").read_text() == "second"
  assert [(tmp_path / "starts" / number / "config.gin").read_text() for number in ("0001", "0002")] == ["first", "second"]


@pytest.fixture
def finished_run(tmp_path):
  run = gin_config.resolve([gin_config.CONFIGS / "run" / "quickstart.gin"]).run
  (tmp_path / "DONE").write_text(f"{run.train.steps}\n")
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict(run)))
  return tmp_path, run.train.steps


def test_a_finished_run_is_said_to_be_done(finished_run):
  path, steps = finished_run
  said = run_dir.finished([f"--run_dir={path}"])
  assert f"has all {steps} steps" in said and str(path / "report" / "index.html") in said


@pytest.mark.parametrize("flag", ["--again", "--dry_run", "--print_config", "--resume=never", "--gin.Train.steps=7",
                                  "--gin.Train.seed=5", "--gin.Train.stepss=7"])
def test_a_finished_run_with_something_to_do_goes_on(finished_run, flag):
  path, _ = finished_run
  assert run_dir.finished([f"--run_dir={path}", flag]) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "null"])
def test_a_damaged_description_is_not_taken_for_done(finished_run, damage):
  path, _ = finished_run
  (path / "config.json").write_text(damage)
  assert run_dir.finished([f"--run_dir={path}"]) is None
