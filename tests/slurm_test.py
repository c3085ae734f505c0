"""The batch script of docs/slurm_and_gpus.md: read by bash and shellcheck, run with stand-ins for Slurm, and JAX's own look at
Slurm's environment."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from moe import command_line
from moe import train

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "slurm_and_gpus.md"


def script() -> str:
  return re.search(r"^```bash\n(.*?)^```", PAGE.read_text(), re.S | re.M)[1]


def shellcheck(text: str) -> subprocess.CompletedProcess:
  program = pathlib.Path(sys.executable).with_name("shellcheck")
  return subprocess.run([program, "--shell=bash", "--severity=style", "-"], input=text, text=True, capture_output=True)


def test_bash_and_shellcheck_read_it():
  text = script()
  assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
  done = shellcheck(text)
  assert done.returncode == 0, done.stdout


def test_a_worse_script_is_found():
  """The control."""
  assert shellcheck(script().replace('"$SLURM_JOB_ID"', "$SLURM_JOB_ID")).returncode == 1
  assert subprocess.run(["bash", "-n"], input=script().replace("\nfi\n", "\n"), text=True, capture_output=True).returncode != 0


def run_script(tmp_path, code: int, **environment) -> tuple[int, list[str]]:
  """(exit code, what srun and scontrol were told): `srun` ends with the code."""
  for name in ("srun", "scontrol"):
    ends = code if name == "srun" else 0
    (tmp_path / name).write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >> {tmp_path}/told\nexit {ends}\n')
    (tmp_path / name).chmod(0o755)
  done = subprocess.run(["bash", "-s", "--", "--gin_file=a b.gin"], input=script(), text=True, cwd=tmp_path, env={
      "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environment})
  return done.returncode, (tmp_path / "told").read_text().splitlines()


@pytest.mark.parametrize("code, restarts, requeued", [
    (train.PREEMPTED, "0", True), (train.PREEMPTED, "99", True), (train.PREEMPTED, "100", False), (train.OK, "0", False),
    (train.USAGE, "0", False), (train.DATA, "0", False), (1, "0", False)])
def test_it_is_requeued_after_a_save_only(tmp_path, code, restarts, requeued):
  ended, told = run_script(tmp_path, code, SLURM_RESTART_COUNT=restarts)
  assert ended == code and ("scontrol requeue 7" in told) == requeued


def test_the_run_directory_is_that_of_the_job(tmp_path):
  """The same for every start: Slurm keeps the number of a job that is requeued."""
  first = run_script(tmp_path, train.PREEMPTED)[1][0]
  again = run_script(tmp_path, train.OK, SLURM_RESTART_COUNT="1")[1][-1]
  assert first == again and f"--run_dir={tmp_path}/runs/slurm-7 --gin_file=a b.gin" in first
  flags = re.search(r"-m moe.train (.*) --gin_file", first)[1].split()
  arguments, rest = command_line.parse(flags)
  assert arguments.multihost == "auto" and command_line.hosts(arguments.multihost) == () and rest == []


def test_every_sbatch_line_is_a_flag_of_sbatch():
  """Of its manual page (slurm.schedmd.com/sbatch.html), with the form of its values."""
  forms = {"job-name": r"\w+", "nodes": r"\d+", "ntasks-per-node": r"\d+", "gpus-per-node": r"\d+", "cpus-per-task": r"\d+",
           "time": r"\d+:\d\d:\d\d", "requeue": "", "open-mode": "append|truncate", "signal": r"([BR]+:)?TERM@\d+"}
  lines = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script(), re.M)
  assert len(lines) == script().count("#SBATCH") and all(re.fullmatch(forms[name], value) for name, value in lines)


def test_jax_finds_the_processes_in_slurms_environment(monkeypatch):
  """What `--multihost` rests on: process 11 of 16, the fourth GPU of the second node."""
  from jax._src.clusters import slurm_cluster

  values = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_NTASKS": "16", "SLURM_PROCID": "11",
            "SLURM_LOCALID": "3", "SLURM_STEP_NUM_NODES": "2"}
  for name, value in values.items():
    monkeypatch.setenv(name, value)
  cluster = slurm_cluster.SlurmCluster
  assert cluster.is_env_present() and cluster.get_process_count() == 16 and cluster.get_process_id() == 11
  assert cluster.get_local_process_id() == 3
  assert cluster.get_coordinator_address(timeout_secs=None, override_coordinator_port=None).startswith("node003:")
