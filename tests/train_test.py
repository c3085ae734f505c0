"""The program from outside: kill and resume, SIGTERM, wrong inputs. Every run is a process of its own."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

from etils import epath
import numpy as np
import pytest

from moe import gin_config
from moe import jsonl
from moe import run_dir as run_dir_lib
from tests import small

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = {
    "Train.steps": 24, "Train.log_every_steps": 1, "Train.eval_batches": 1, "Model.num_layers": 2, "Model.d_model": 32,
    "Attention.head_dim": 16, "Experts.d_expert": 32, "Data.batch_sequences": 8, "Data.sequence_tokens": 64,
    "Checkpoint.every_steps": 4, "Data.domains": "(@tiny/Domain(),)", "tiny/Domain.name": '"tiny"',
    "Optimizer.decay_tokens": 2000, "Optimizer.warmup_tokens": 2000, "Mesh.data": 1, "Train.eval_every_steps": 0,
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  """A few chapters, so that the evaluation at the end takes a second."""
  return small.write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", held_out=3)


def command(corpus, run_dir, *arguments, **changes):
  bindings = {**TINY, "tiny/Domain.path": f'"{corpus}"', **changes}
  return [sys.executable, "-m", "moe.train", f"--run_dir={run_dir}", "--allow_unused",
          *(f"--gin.{key}={value}" for key, value in bindings.items()), *arguments]


def environment():
  """As a user has it: the test process's own devices and flags do not count."""
  kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  return {**kept, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}


def finish(arguments, expected=0, timeout=300):
  done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
  assert done.returncode == expected, done.stdout[-2000:] + done.stderr[-4000:]
  return done


def losses(run_dir) -> dict[int, float]:
  """Loss by step; a step that stands twice must have the same value both times, to the bit."""
  found = {}
  for record in jsonl.read(pathlib.Path(run_dir) / "metrics.jsonl"):
    if record["kind"] == "train":
      assert found.setdefault(record["step"], record["loss"]) == record["loss"], record["step"]
  return found


def final_digests(run_dir, step=24):
  return json.loads((pathlib.Path(run_dir) / "checkpoints" / str(step) / "digests" / "metadata").read_text())


def wait_for_step(run_dir, step, process, timeout=180):
  deadline = time.time() + timeout
  while time.time() < deadline and process.poll() is None:
    path = pathlib.Path(run_dir) / "metrics.jsonl"
    if path.exists() and f'"kind": "train", "step": {step},' in path.read_text():
      return
    time.sleep(0.02)
  raise AssertionError(f"step {step} was not reached: {process.communicate()}")


@pytest.fixture(scope="session")
def straight(corpus, tmp_path_factory):
  """The run that nobody disturbs."""
  run_dir = tmp_path_factory.mktemp("straight")
  done = finish(command(corpus, run_dir))
  return run_dir, done.stdout


def test_the_run_directory_and_the_last_words(straight):
  run_dir, text = straight
  names = {path.name for path in run_dir.iterdir()}
  assert {"config.gin", "config.json", "command.txt", "env.json", "metrics.jsonl", "events.jsonl", "tb", "checkpoints",
          "report", "DONE"} <= names
  for part in ("first step after", "step 24/24", "bits/byte", "tok/s", "balance", "max/mean load", "dropped", "ETA",
               "gzip", "bzip2", "xz", "after the training text", "sample:", "report:"):
    assert part in text, part
  assert len(losses(run_dir)) == 24
  pictures = {path.name for path in (run_dir / "report").iterdir()}
  assert {"index.html", "curves.png", "load.png", "domains.png", "routing.png", "information.png", "goodput.png"} <= pictures
  assert gin_config.resolve([run_dir / "config.gin"]).run.train.steps == 24  # the operative config is a config
  values = list(losses(run_dir).values())
  assert np.mean(values[-4:]) < values[0] - 0.5


def test_routing_is_in_the_terminal_the_records_and_the_report(straight):
  run_dir, text = straight
  table = text[text.index("max/mean load  experts in use") :].splitlines()[1:3]
  assert [line.split()[0] for line in table] == ["0", "1"] and all(len(line.split()) == 6 for line in table)
  records = {record["kind"]: record for record in jsonl.read(run_dir / "metrics.jsonl")}
  train, score = records["train"], records["eval/tiny"]
  assert {"balance", "router_entropy", "top_k_weight", "router_z", "load_max", "dead_experts", "dropped"} <= train.keys()
  assert np.shape(score["expert_counts"]) == (2, 8) and np.shape(score["router_entropy"]) == (2,)
  for key in ("information_choices", "information_probabilities"):
    values = np.array(score[key])
    assert values.shape == (2, 2) and (values >= -1e-6).all()
    np.testing.assert_allclose(values, values.T, atol=1e-5)
  shown = jsonl.read_one(run_dir / "latest" / "examples" / "tiny.json")["examples"]
  assert len(shown) == 2 and len(shown[0]) == 8
  assert any(entry["tokens"] and entry["snippets"] for entry in shown[0])
  assert "What the experts read" in (run_dir / "report" / "index.html").read_text()


@pytest.mark.slow
def test_collapsed_routing_raises_an_alarm(corpus, tmp_path):
  """A router of zeros, never updated: every token takes the first two experts."""
  done = finish(command(corpus, tmp_path, **{"InitStd.router": 0.0, "Optimizer.learning_rate": 0.0, "Train.steps": 12,
                                             "Experts.capacity_factor": 1.0, "Experts.drop_policy": '"random"'}))
  assert done.stdout.count("ALARM routing has collapsed in layer 0, layer 1") == 1
  assert "WARNING: Experts.drop_policy = 'random' lets later tokens decide" in done.stdout
  assert "sample:" not in done.stdout  # such a model cannot be sampled token by token


def test_kill_at_a_random_step_and_resume_is_bit_equal(corpus, straight, tmp_path):
  step = int(np.random.default_rng(os.getpid()).integers(5, 20))
  process = subprocess.Popen(command(corpus, tmp_path), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
  wait_for_step(tmp_path, step, process)
  # Saves run in the background: before the first is whole there is nothing that --resume=must could take.
  while not any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir()) and process.poll() is None:
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not (tmp_path / "DONE").exists()
  done = finish(command(corpus, tmp_path, "--resume=must"))
  assert "every leaf equal to what was saved" in done.stdout, f"killed at step {step}"
  assert losses(tmp_path) == losses(straight[0]), f"killed at step {step}"
  assert final_digests(tmp_path)["leaves"] == final_digests(straight[0])["leaves"]
  assert final_digests(tmp_path)["sides"]["data"] == final_digests(straight[0])["sides"]["data"]


def test_a_finished_run_is_not_done_again(corpus, straight):
  before = {path: path.stat().st_mtime for path in straight[0].rglob("*")}
  done = finish(command(corpus, straight[0]))
  assert done.stdout.startswith("done: ") and "report/index.html" in done.stdout
  assert {path: path.stat().st_mtime for path in straight[0].rglob("*")} == before


def test_a_run_in_use_is_refused(corpus, tmp_path):
  with run_dir_lib.Owner(epath.Path(tmp_path)):
    refused(2, "config error", f"in use by process {os.getpid()}", arguments=command(corpus, tmp_path))
  assert {path.name for path in tmp_path.iterdir()} == {".owner"}  # nothing of another's was touched


@pytest.mark.slow
@pytest.mark.parametrize("number, code, said", [(signal.SIGTERM, 143, "preempted: SIGTERM: saved at step"),
                                                (signal.SIGINT, 130, "stopped: Ctrl-C: saved at step")])
def test_a_signal_saves_and_exits(corpus, straight, tmp_path, number, code, said):
  process = subprocess.Popen(command(corpus, tmp_path), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
  wait_for_step(tmp_path, 6, process)
  process.send_signal(number)
  out, err = process.communicate(timeout=120)
  assert process.returncode == code, err
  assert said in err and err.count("\n") == 1
  at = int((tmp_path / "PREEMPTED").read_text())
  assert at in {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} and at % 4 != 0 or at >= 7
  finish(command(corpus, tmp_path))
  assert losses(tmp_path) == losses(straight[0])
  assert final_digests(tmp_path)["leaves"] == final_digests(straight[0])["leaves"]
  assert not (tmp_path / "PREEMPTED").exists()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 3])
def test_a_signal_within_an_evaluation_is_acted_on(tmp_path, steps):
  """The evaluation after step 2, or the last one, of a split that takes minutes."""
  text = {"Train.steps": steps, "Train.eval_every_steps": 2, "Train.eval_batches": 100_000, "Data.sequence_tokens": 32,
          "Data.batch_sequences": 2}
  process = subprocess.Popen(command("embedded:kjv", tmp_path, **text), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
  wait_for_step(tmp_path, 1, process)
  time.sleep(10)  # for the program of the evaluation
  process.send_signal(signal.SIGTERM)
  begin = time.monotonic()
  out, err = process.communicate(timeout=120)
  assert process.returncode == 143 and "saved at step 2" in err, out + err
  assert time.monotonic() - begin < 30
  assert "eval at step" not in out
  assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]


@pytest.mark.slow
def test_a_domain_without_validation_documents_is_left_out(tmp_path):
  folder = small.write_corpus(tmp_path / "all_of_it", held_out=0)
  done = finish(command(folder, tmp_path / "run", "--dry_run"))
  assert "note: domain 'tiny' has no validation documents" in done.stdout
  assert "epochs" in done.stdout
  done = finish(command(folder, tmp_path / "run", **{"Train.steps": 6}))
  assert "note: domain 'tiny' has no validation documents" in done.stdout and (tmp_path / "run" / "DONE").exists()


@pytest.mark.slow
def test_a_schedule_that_changed_is_said_at_the_resume(corpus, straight, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(straight[0], folder)
  wsd = {"Optimizer.schedule": '"wsd"', "Optimizer.decay_tokens": 2000}
  done = finish(command(corpus, folder, **wsd, **{"Train.steps": 26}))
  assert "note: the learning rate of step 24 was to be" in done.stdout and "train.steps: 24 -> 26" in done.stdout
  assert [path.name for path in sorted((folder / "starts").iterdir())] == ["0001", "0002"]


@pytest.mark.slow
def test_eight_devices_resumed_on_four(corpus, tmp_path):
  """The rest of the run differs from the undisturbed one by float reassociation only.

  Bound: reductions over 8 or 4 shards of float32 differ by about 1e-7 a sum; ten AdamW steps, whose update is the sign
  of small gradients at first, amplify that. A thousand times that is far below the effect of one different batch,
  which the last assertion shows.
  """
  whole, parted = tmp_path / "whole", tmp_path / "parted"
  finish(command(corpus, whole, **{"Mesh.data": 2, "Mesh.fsdp": 2, "Mesh.expert": 2}))
  shutil.copytree(whole, parted)
  for path in (parted / "checkpoints").iterdir():
    if int(path.name) > 20:
      shutil.rmtree(path)
  (parted / "metrics.jsonl").unlink()
  done = finish(command(corpus, parted, "--resume=must", **{"Mesh.data": 2, "Mesh.fsdp": 1, "Mesh.expert": 2}))
  assert "resumed at step 20" in done.stdout and "on 4 cpu device(s)" in done.stdout
  want, got = losses(whole), losses(parted)
  assert set(got) == {20, 21, 22, 23}
  for step, loss in got.items():
    assert abs(loss - want[step]) < 1e-4, step
  assert abs(want[21] - want[20]) > 1e-3


@pytest.mark.slow
def test_two_hosts_equal_one(corpus, tmp_path):
  """Two processes of four devices, joined over loopback, against one process of eight: the same batches, and losses up
  to the order of float32 sums. Then the run is resumed by one host."""
  mesh = {"Mesh.data": 4, "Mesh.fsdp": 2, "Train.steps": 8}
  finish(command(corpus, tmp_path / "one", **mesh))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  hosts = [subprocess.Popen(command(corpus, tmp_path / "two", f"--multihost=127.0.0.1:{port},2,{i}", **mesh), cwd=ROOT,
                            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in (0, 1)]
  texts = [host.communicate(timeout=280)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0], texts[0][-3000:] + texts[1][-3000:]
  assert "2 host(s)" in texts[0]
  want, got = losses(tmp_path / "one"), losses(tmp_path / "two")
  assert set(got) == set(want) == set(range(8))
  assert max(abs(want[step] - got[step]) for step in want) < 1e-5
  sides = [final_digests(tmp_path / name, 8)["sides"]["data"] for name in ("one", "two")]
  assert sides[0] == sides[1]  # the position of the data, to the bit
  shutil.rmtree(tmp_path / "two" / "checkpoints" / "8")
  (tmp_path / "two" / "metrics.jsonl").unlink()
  assert "resumed at step 4" in finish(command(corpus, tmp_path / "two", "--resume=must", **mesh)).stdout
  assert max(abs(want[step] - loss) for step, loss in losses(tmp_path / "two").items()) < 1e-5


@pytest.mark.slow
def test_init_from_takes_parameters_only(corpus, straight, tmp_path):
  done = finish(command(corpus, tmp_path, f"--init_from={straight[0]}", **{"Train.steps": 2}))
  assert "parameters from" in done.stdout
  assert losses(tmp_path)[0] < losses(straight[0])[0] - 0.5  # starts where the other ended, at step 0


@pytest.mark.slow
def test_evaluation_of_all_checkpoints(straight):
  done = finish([sys.executable, "-m", "tools.evaluate", str(straight[0]), "--series", "--limit=1", "--json"])
  rows = json.loads(done.stdout)["checkpoints"]
  assert [row["step"] for row in rows] == sorted(row["step"] for row in rows) and len(rows) > 1
  assert all(row["tokens_seen"] == row["step"] * 8 * 64 and row["domains"]["tiny"]["bits_per_byte"] > 0 for row in rows)


@pytest.mark.slow
def test_profile(corpus, tmp_path):
  finish(command(corpus, tmp_path, "--profile_steps=1:3", **{"Train.steps": 4}))
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


# ------------------------------------------------------------------------------------------------------ wrong inputs


def refused(code, *parts, arguments):
  done = finish(arguments, expected=code)
  assert done.stderr.count("\n") == 1, done.stderr
  for part in parts:
    assert part in done.stderr, done.stderr


@pytest.mark.parametrize("code, parts, arguments, changes", [
    (2, ["config error", "x.gin' does not exist"], ["--gin_file=configs/run/x.gin"], {}),
    (2, ["has no parameter 'top_q'", "did you mean 'top_k'?"], ["--gin.Router.top_q=2"], {}),
    (2, ["Train.steps wants int, got 'ten'"], ["--gin.Train.steps='ten'"], {}),
    (2, ["Router.top_k = 9 exceeds Experts.num_experts = 8"], ["--gin.Router.top_k=9"], {}),
    (2, ["= 8 is not divisible by the mesh's data = 3"], [], {"Mesh.data": 3}),
    (2, ["unknown argument '--steps=3'"], ["--steps=3"], {}),
    (2, ["259 ids but Model.vocab_size = 100"], [], {"Model.vocab_size": 100}),
    (2, ["--profile_steps=5:2 is not A:B"], ["--profile_steps=5:2"], {}),
    (3, ["data error", "nowhere is not a data directory"], [], {"tiny/Domain.path": '"nowhere"'}),
    (4, ["checkpoint error", "--resume=must, but"], ["--resume=must"], {}),
    (4, ["holds no checkpoint"], ["--init_from=nowhere"], {}),
    (2, ["has [ in it, and no checkpoint can be saved there"], ["--run_dir=a[1]"], {}),
])
def test_wrong_inputs_are_one_line(corpus, tmp_path, code, parts, arguments, changes):
  refused(code, *parts, arguments=command(corpus, tmp_path / "run", *arguments, **changes))


def test_truncated_data_is_one_line(corpus, tmp_path):
  folder = tmp_path / "data"
  shutil.copytree(corpus, folder)
  file = next(folder.glob("train-*"))
  file.write_bytes(file.read_bytes()[:-1000])
  refused(3, "data error", "truncated", arguments=command(folder, tmp_path / "run"))


@pytest.mark.slow
def test_another_model_on_resume_is_one_line(corpus, straight, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(straight[0], folder)
  before = {name: (folder / name).read_text() for name in ("config.gin", "config.json", "command.txt", "env.json")}
  refused(4, "holds another model: vocab_size: 384 -> 512",
          arguments=command(corpus, folder, **{"Model.vocab_size": 512}))
  assert {name: (folder / name).read_text() for name in before} == before  # a config that never ran is none of the run's
  refused(4, "with other arrays: model.num_layers: 2 -> 3",
          arguments=command(corpus, tmp_path / "new", f"--init_from={folder}", "--dry_run", **{"Model.num_layers": 3}))
  refused(4, "--resume=never, but", arguments=command(corpus, folder, "--resume=never"))


@pytest.mark.slow
def test_diverged_run_is_one_line(corpus, tmp_path):
  refused(5, "numerics error", "20 steps in a row up to step",
          arguments=command(corpus, tmp_path, **{"InitStd.weight": 1e30}))


def test_print_config_dry_run_and_help(corpus, tmp_path):
  text = finish(command(corpus, tmp_path / "run", "--print_config")).stdout
  assert "Train.steps = 24" in text
  assert "dry run: config, mesh and data are fine" in finish(command(corpus, tmp_path / "run", "--dry_run")).stdout
  assert not (tmp_path / "run").exists()
  assert "--gin.Router.top_k" in finish([sys.executable, "-m", "moe.train", "--help"]).stdout


@pytest.mark.slow
def test_full_disk_does_not_end_the_run(corpus, tmp_path):
  """Checkpoints on a file system of 4 MB that fills up in the middle: the alarm is on the terminal and in the events."""
  disk = tmp_path / "run" / "checkpoints"
  disk.mkdir(parents=True)
  if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]).returncode:
    pytest.skip("mounting a small file system needs root")
  try:
    done = finish(command(corpus, tmp_path / "run", **{"Checkpoint.keep_last": 20}), expected=4)
    assert "all 24 steps are done, but the last checkpoint could not be saved" in done.stderr
    assert not (tmp_path / "run" / "DONE").exists()
    assert "ALARM a checkpoint could not be saved" in done.stdout or "could not be saved" in done.stdout
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert any(e["event"] == "alarm" for e in events) and len(losses(tmp_path / "run")) == 24
    assert (disk / "4" / "state").exists()
  finally:
    subprocess.run(["umount", "-l", str(disk)], check=True)
