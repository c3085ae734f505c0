"""The small tools: config, doctor, completion, and the look they share."""

import json
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

from moe import command_line
from moe import config as config_lib
from moe import gin_config
from moe import hardware
from moe.errors import UserError
from tools import completion
from tools import config
from tools import doctor
from tools import terminal

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICK = ROOT / "configs" / "run" / "quickstart.gin"


def test_every_field_is_listed_with_its_default():
  known = config.fields()
  found = {f"{cls.__name__}.{name}" for cls in vars(config_lib).values() if hasattr(cls, "__dataclass_fields__")
           for name in cls.__dataclass_fields__}
  assert set(known) == found
  assert known["Router.top_k"].default == "2" and "experts of a token" in known["Router.top_k"].meaning
  assert known["Model.vocab_size"].default == "(must be set)"


def test_config_shows_explains_and_differs(capsys):
  assert config.main(["show", "--gin.Train.steps=7", "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["train"]["steps"] == 7
  assert config.main(["diff", str(QUICK), str(QUICK)]) == 0
  assert config.main(["diff", str(QUICK), str(QUICK.with_name("quickstart_long.gin"))]) == 1
  assert "train.steps: 550 -> 3500" in capsys.readouterr().out
  assert config.main(["explain", "Rope"]) == 0
  assert "Rope.theta: float" in capsys.readouterr().out
  assert config.main(["list", "*.top_k", "--json"]) == 0
  assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["Router.top_k"]


@pytest.mark.parametrize("argv, words", [
    (["explain", "topk"], "did you mean Router.top_k"), (["list", "nothing*"], "no field matches"),
    (["diff", "/none", str(QUICK)], "does not exist"), (["diff", "a.gin", str(QUICK)], "a.gin"),
    (["show", "--gin.Router.topk=3"], "top_k"), (["explain", "Router", "--more"], "unknown argument")])
def test_config_mistakes_are_one_line(argv, words):
  with pytest.raises((UserError, SystemExit), match=words):
    config.main(argv)


def test_doctor_finds_this_machine_fit(tmp_path, capsys):
  code = doctor.main([f"--run_dir={tmp_path}", "--json"])
  found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
  assert code == int(any(row["state"] == "wrong" for row in found.values()))
  for what in ("python", "jax", "devices", "jax.distributed", "write test", "memfd"):
    assert found[what]["state"] == "ok", found[what]
  assert not list(tmp_path.iterdir())


def test_doctor_counts_devices_as_training_makes_them(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  count = hardware.cpu_devices(config_lib.Mesh(data=-1))
  assert doctor.devices().told.startswith(f"{count} x cpu")
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")  # which training leaves alone, too
  assert doctor.devices().told.startswith("3 x cpu")


def test_doctor_names_what_only_some_things_need(monkeypatch):
  def version(name):
    if name == "gcsfs":
      return "1.0"
    raise doctor.importlib.metadata.PackageNotFoundError

  monkeypatch.setattr(doctor.importlib.metadata, "version", version)
  found = {row.what: row for row in doctor.optional_packages()}
  assert found["gcsfs"] == ("gcsfs", "ok", "1.0, for gs://", "")
  assert found["libtpu"].state == "absent" and "tools.compile_check" in found["libtpu"].told
  assert "pip install 'jax[tpu]'" in found["libtpu"].told and "pip install 'pyarrow'" in found["pyarrow"].told
  assert {"torch", "pyarrow", "gcsfs", "libtpu"} <= found.keys() and "moe-pretrain" not in str(found)


def test_help_of_training_shows_the_values_of_the_quickstart(capsys):
  with pytest.raises(SystemExit):
    command_line.parse(["--help"])
  said = capsys.readouterr().out
  run = gin_config.resolve([gin_config.QUICKSTART]).run
  assert f"--gin.Train.steps={run.train.steps} " in said and f"--gin.Router.top_k={run.model.router.top_k} " in said
  assert "--gin.Router.gate='\"softmax\"'" in said and "softmax | noisy | sigmoid" in said
  shown = [word.removeprefix("--gin.") for word in said.split() if word.startswith("--gin.")]
  flags = [f"--gin.{word}".replace("'\"", "'").replace("\"'", "'") for word in shown]  # as a shell hands them on
  resolved = gin_config.resolve([gin_config.QUICKSTART], flags)
  assert len(shown) > 25 and resolved.run == run  # what it shows are the values, in words that a shell takes


def test_doctor_finds_what_is_wrong(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  assert doctor.writing(str(tmp_path / "file" / "run")).state == "wrong"
  monkeypatch.setattr(doctor, "_DEVICES", "raise RuntimeError('no chips today')")
  assert doctor.devices().state == "wrong" and "no chips today" in doctor.devices().told
  monkeypatch.setattr(doctor, "_DEVICES", "import time; time.sleep(9)")
  assert "did not answer" in doctor.devices(0.2).told
  monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.0.1")
  assert {f.state for f in doctor.packages()} == {"wrong"}
  lock = tmp_path / "lock"
  lock.touch()
  monkeypatch.setattr(doctor, "_LOCK", lock)
  assert "nobody holds it" in doctor.libtpu_lock().told
  with open(lock):
    assert f"held by process {os.getpid()}" in doctor.libtpu_lock().told


@pytest.mark.parametrize("version, bounds, fits", [
    ("0.12.8", ">=0.12.8", True), ("0.13.0", "<0.13", False), ("0.12.10", ">=0.12.8", True), ("2.0", "==2.0", True),
    ("1.9", ">=1.10", False)])
def test_bounds_of_versions(version, bounds, fits):
  assert doctor._fits(version, bounds) is fits


def test_tables_are_plain_where_there_is_no_terminal(capsys):
  terminal.table(("name", "count"), [("a", 1000), ("long", 2)])
  assert capsys.readouterr().out == "name  count\na     1,000\nlong      2\n"
  terminal.as_json({"x": float("nan"), "y": (1, 2)})
  assert json.loads(capsys.readouterr().out) == {"x": None, "y": [1, 2]}
  assert terminal.bars([0, 0.5, 1, float("nan")], 1.0) == " ▄█!"


def test_a_mistake_is_one_line_and_a_closed_pipe_is_none():
  tool = [sys.executable, "-m", "tools.config"]
  done = subprocess.run([*tool, "explain", "nothing"], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 2 and done.stdout == "" and done.stderr == "error: there is no nothing\n"
  done = subprocess.run(f"{sys.executable} -m tools.config list | head -1", shell=True, capture_output=True, text=True,
                        cwd=ROOT)
  assert done.stderr == ""


# ------------------------------------------------------------------------------------------------------------ completion


def test_bash_completes(tmp_path):
  pytest.importorskip("shtab")
  assert completion.main(["bash", f"--out={tmp_path}"]) == 0
  script = r'''
    complete_line() {
      source "$FOLDER/$1"
      COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
      function=$(complete -p "$1" | sed 's/.*-F \([^ ]*\) .*/\1/')
      "$function" "$1" "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD - 1))]}"
      echo "${COMPREPLY[@]}"
    }
    complete_line moe-config ex
    complete_line moe-train --gin.Router.top_k
    complete_line moe-train --resume ""
    complete_line moe-inspect-checkpoint ls --fil
  '''
  done = subprocess.run(["bash", "-c", script], env={**os.environ, "FOLDER": str(tmp_path)}, capture_output=True, text=True)
  assert done.stdout.splitlines() == ["explain", "--gin.Router.top_k", "auto never must", "--filter"], done.stderr


def test_every_installed_command_is_completed():
  scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
  assert {f"moe-{name}" for name in completion.COMMANDS} == set(scripts)
