"""TensorBoard, Weights & Biases and MLflow, each with its own library as the reader; and a run whose disk is full."""

import collections
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

from etils import epath
import pytest

from moe import boards
from moe import jsonl
from moe import metrics
from moe.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]

_RUN = """
import json, os, sys
from etils import epath
from moe import metrics
folder, start, end, killed, wanted = epath.Path(sys.argv[1]), *map(int, sys.argv[2:5]), json.loads(sys.argv[5])
(folder / "config.json").write_text(json.dumps({"train": {"steps": end}, "model": {"width": 64}}))
recorder = metrics.Recorder(folder, **{"tensorboard": False, **wanted})
for step in range(start, end):
  recorder.metrics("train", step, {"loss": 3.0 - step / 100, "tokens": 100, "nothing": float("nan"), "counts": [1, 2]})
  if (step + 1) % 10 == 0:
    recorder.metrics("eval/b/c ?", step + 1, {"bits_per_byte": 2.0})
if killed:
  recorder.flush()
  assert all(board.flush(60) for board in recorder._boards)
  os.kill(os.getpid(), 9)
recorder.close()
"""


def run(folder: pathlib.Path, start: int, end: int, killed: bool, environment=(), **wanted) -> None:
  """A process that records steps; `killed` once all is on the disk."""
  folder.mkdir(exist_ok=True)
  command = [sys.executable, "-c", _RUN, str(folder), str(start), str(end), str(int(killed)), json.dumps(wanted)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                        env={**os.environ, "PYTHONPATH": str(ROOT), **dict(environment)})
  assert done.returncode == (-9 if killed else 0), done.stderr
  assert "ALARM" not in done.stdout, done.stdout


def curve(folder: pathlib.Path, tag: str) -> list[int]:
  """The steps that TensorBoard shows."""
  from tensorboard.backend.event_processing import event_accumulator

  accumulator = event_accumulator.EventAccumulator(str(folder / "tb"))
  accumulator.Reload()
  return [event.step for event in accumulator.Scalars(tag)]


def test_tensorboard_draws_each_step_once_after_a_kill(tmp_path):
  """Killed at step 35, resumed from the checkpoint of step 20, whose evaluation came before it and is not repeated."""
  pytest.importorskip("tensorboard")
  run(tmp_path, 0, 35, killed=True, tensorboard=True)
  run(tmp_path, 20, 50, killed=False, tensorboard=True)
  assert curve(tmp_path, "train/loss") == list(range(50))
  assert curve(tmp_path, "eval/b/c ?/bits_per_byte") == [10, 20, 30, 40, 50]
  for _ in range(2):  # and again killed, twice, before it came to an evaluation
    run(tmp_path, 40, 44, killed=True, tensorboard=True)
  run(tmp_path, 40, 50, killed=False, tensorboard=True)
  assert curve(tmp_path, "train/loss") == list(range(50))
  assert curve(tmp_path, "eval/b/c ?/bits_per_byte") == [10, 20, 30, 40, 50]


def test_without_the_start_of_a_session_steps_are_drawn_twice(tmp_path, monkeypatch):
  """The negative control."""
  pytest.importorskip("tensorboard")
  for begin, end in ((0, 35), (20, 50)):
    sink = boards.TensorBoard(epath.Path(tmp_path), None)
    sink.write(collections.deque(boards.Scalars("train", step, 1e9 + step, {"loss": 1.0}) for step in range(begin, end)))
    sink.close()
  assert len(curve(tmp_path, "train/loss")) == 50 + 15


@pytest.mark.slow
def test_weights_and_biases_goes_on_in_the_same_record(tmp_path):
  pytest.importorskip("wandb")
  for start, end, killed in ((0, 35, True), (20, 50, False)):
    run(tmp_path, start, end, killed, {"WANDB_MODE": "offline"}, wandb="tests")
  kept = (tmp_path / "wandb_run_id.txt").read_text().strip()
  folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
  assert len(folders) == 2 and all(folder.name.endswith(f"-{kept}") for folder in folders)
  # wandb has no reader of its own files any more. Of the first process it holds the last 32 kB until the end.
  assert next(folders[1].glob("*.wandb")).read_bytes().count(b"train/loss") >= 30


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_record_and_has_each_step_once(tmp_path):
  mlflow = pytest.importorskip("mlflow")
  uri = (tmp_path / "server").as_uri()
  environment = {"MLFLOW_ALLOW_FILE_STORE": "true"}  # a store without a server, which mlflow-skinny has no other of
  folder = tmp_path / "run"
  run(folder, 0, 35, True, environment, mlflow=uri)
  run(folder, 20, 50, False, environment, mlflow=uri)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("moe").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params == {"train.steps": "35", "model.width": "64"}
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(50))
    scores = client.get_metric_history(found.info.run_id, "eval/b/c _/bits_per_byte")
    assert [metric.step for metric in scores] == [10, 20, 30, 40, 50]


def test_a_board_whose_package_is_lacking_is_refused_before_anything_is_written(tmp_path, monkeypatch):
  for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"Observers.{name} = 'x', but {name} is not installed: pip install {package}$"):
      metrics.Recorder(epath.Path(tmp_path), **{name: "x"})
  assert not list(tmp_path.iterdir())


def test_a_board_that_is_broken_costs_the_board_alone(tmp_path, monkeypatch):
  """Its library raises at every call; another never returns."""
  forever = threading.Event()

  class Stuck:
    def __init__(self, *_):
      forever.wait()

  class Broken:
    def __init__(self, *_):
      raise RuntimeError("their server has moved")

  monkeypatch.setattr(boards, "check", lambda *_: None)
  monkeypatch.setattr(boards, "WeightsAndBiases", Stuck)
  monkeypatch.setattr(boards, "MLflow", Broken)
  monkeypatch.setattr(metrics, "_CLOSE_SECONDS", 0.5)
  recorder = metrics.Recorder(epath.Path(tmp_path), wandb="x", mlflow="y")
  begin = time.monotonic()
  for step in range(100):
    recorder.metrics("train", step, {"loss": 1.0})
  recorder.flush()
  recorder.close()
  assert time.monotonic() - begin < 5
  assert [record["step"] for record in jsonl.read(tmp_path / "metrics.jsonl")] == list(range(100))
  alarms = [record["message"] for record in jsonl.read(tmp_path / "events.jsonl")]
  assert any("MLflow cannot be written: RuntimeError: their server has moved" in message for message in alarms)
  assert any("Weights & Biases: 100 records of this run are lost (no answer)" in message for message in alarms)
  assert not any("TensorBoard" in message for message in alarms)
  forever.set()


# A file may have 8 kB, then 100 MB: what a full disk does, without a disk. Python ignores the signal and gets EFBIG.
_FULL = """
import json, resource, sys, time
from etils import epath
from moe import metrics
recorder = metrics.Recorder(epath.Path(sys.argv[1]))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
slowest = 0.0
for step in range(3000):
  if step == 20:
    time.sleep(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
  if step == 2000:
    time.sleep(1)
    if sys.argv[2] == "freed":
      resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 20, hard))
  begin = time.monotonic()
  recorder.metrics("train", step, {"loss": 2.0, **{f"figure_{i}": i / 3 for i in range(10)}})
  recorder.data("examples/x", step, examples=["x" * 9000])
  if step % 100 == 0:
    recorder.flush()
  slowest = max(slowest, time.monotonic() - begin)
begin = time.monotonic()
recorder.close()
print(json.dumps({"slowest": slowest, "end": time.monotonic() - begin}))
"""


@pytest.mark.parametrize("then", ["freed", "full to the end"])
def test_a_full_disk_neither_stops_nor_holds_a_run(tmp_path, then):
  done = subprocess.run([sys.executable, "-c", _FULL, str(tmp_path), then], capture_output=True, text=True, timeout=100,
                        env={**os.environ, "PYTHONPATH": str(ROOT)})
  assert done.returncode == 0, done.stderr
  said = done.stdout.splitlines()
  times = json.loads(said[-1])
  assert times["slowest"] < 3 and times["end"] < 12, times
  alarms = [line for line in said if line.startswith("ALARM metrics.jsonl")]
  assert "File too large" in alarms[0] and len(alarms) == (1 if then == "freed" else 2)
  steps = [record["step"] for record in jsonl.read(tmp_path / "metrics.jsonl")]
  if then == "freed":
    assert steps == list(range(3000))  # they waited in memory
    assert "metrics.jsonl is written again, nothing is lost" in done.stdout
    assert any("TensorBoard cannot be written" in record["message"] for record in jsonl.read(tmp_path / "events.jsonl"))
    assert jsonl.read_one(tmp_path / "latest" / "examples" / "x.json")["step"] == 2999
    pytest.importorskip("tensorboard")
    assert curve(tmp_path, "train/loss")[-1] == 2999
  else:
    assert 20 < len(steps) < 100 and f"metrics.jsonl: {3000 - len(steps)} records" not in alarms[0]
    assert "records of this run are lost ([Errno 27] File too large)" in alarms[1]
