"""TensorBoard, Weights & Biases and MLflow: sinks of an `outlet.Outlet` that draw the scalars of a run.

`metrics.jsonl` is the source of truth; a board is a view of it, and may lack what could not be written. A resumed run goes on
in the record that it had: the id of a board's record lies in the run's directory.
"""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from moe import jsonl
from moe import outlet
from moe.config import ConfigError

_MLFLOW_BATCH = 1000  # metrics in one request, MLflow's own bound; of parameters it is 100
_MLFLOW_PARAMETERS = 100
_WANDB_SECONDS = 15.0
_FILES = itertools.count()  # event files of this process


class Scalars(NamedTuple):
  """The finite scalars of one record."""

  kind: str
  step: int
  time: float  # seconds since the epoch
  values: dict[str, float]

  @classmethod
  def of(cls, record: dict[str, Any]) -> Scalars:
    values = {key: float(value) for key, value in record.items()
              if key not in ("kind", "step", "time") and isinstance(value, (int, float)) and math.isfinite(value)}
    return cls(record["kind"], record["step"], record["time"], values)


def check(wandb: str = "", mlflow: str = "") -> None:
  """Raises ConfigError: a board was asked for whose package is not installed."""
  for name, wanted, package in (("wandb", wandb, "wandb"), ("mlflow", mlflow, "mlflow-skinny")):
    if wanted and importlib.util.find_spec(name) is None:
      raise ConfigError(f"Observers.{name} = {wanted!r}, but {name} is not installed: pip install {package}")


def outlets(run_dir: epath.Path, first: Scalars, on_news: Callable[[outlet.News], None], *, tensorboard: bool = True,
            wandb: str = "", mlflow: str = "") -> list[outlet.Outlet]:
  """One for each board that is wanted.

  Args:
    first: of the record with which this process begins.
    tensorboard: event files in `<run_dir>/tb`; none where that is on an object store.
    wandb: the project; "" for none.
    mlflow: the tracking URI; "" for none.
  """
  made = []
  if tensorboard and jsonl.is_local(run_dir):
    # What the first sink hides of an earlier process, the sink of a later try must not hide of this one.
    purges = iter([first])
    made.append(outlet.Outlet("TensorBoard", lambda: TensorBoard(run_dir, next(purges, None)), on_news=on_news, tries=5))
  if wandb:
    made.append(outlet.Outlet("Weights & Biases", lambda: WeightsAndBiases(run_dir, wandb), on_news=on_news, tries=5))
  if mlflow:
    made.append(outlet.Outlet("MLflow", lambda: MLflow(run_dir, mlflow), on_news=on_news, tries=5))
  return made


class TensorBoard:
  """Event files, written in the thread of the outlet: tensorboardX's own thread dies of a full disk without a word, and
  then its queue of ten holds whoever writes for ever."""

  def __init__(self, run_dir: epath.Path, first: Scalars | None):
    """`first`: what an earlier process wrote of this step and later ones is hidden; None: nothing is."""
    from tensorboardX import event_file_writer  # takes seconds where torch is installed
    from tensorboardX.proto import event_pb2, summary_pb2

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    folder = os.path.join(run_dir, "tb")
    os.makedirs(folder, exist_ok=True)
    # Two files of one second and one process have names of their own, else the second empties the first.
    suffix = f".{os.getpid()}.{next(_FILES)}"
    self._writer = event_file_writer.EventsWriter(os.path.join(folder, "events"), suffix)
    self._is_fresh = True  # nothing is in the file yet
    if first is not None:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._writer.write_event(self._event(step=first.step, session_log=start))
      for scalars in _scores_at(run_dir, first):
        self._add(scalars)

  def _add(self, scalars: Scalars) -> None:
    values = [self._summary.Value(tag=f"{scalars.kind}/{key}", simple_value=value) for key, value in scalars.values.items()]
    event = self._event(wall_time=scalars.time, step=scalars.step, summary=self._summary(value=values))
    self._writer.write_event(event)

  def write(self, items: collections.deque) -> None:
    for item in items:
      self._add(item)
    self._writer.flush()
    self._is_fresh = False
    items.clear()

  def close(self) -> None:
    try:
      self._writer.close()
    finally:
      if self._is_fresh:  # a full disk: else every try would leave an empty file
        os.unlink(self._writer._file_name)


def _scores_at(run_dir: epath.Path, first: Scalars) -> list[Scalars]:
  """The evaluations that an earlier process did before the checkpoint of which `first` is the next step.

  They have the number of that step, and are not repeated.
  """
  before = (record for record in jsonl.read_end(run_dir / "metrics.jsonl")
            if record.get("step") == first.step and record.get("time", first.time) < first.time)
  by_kind = {record["kind"]: record for record in before if str(record.get("kind")).startswith("eval/")}
  return list(map(Scalars.of, by_kind.values()))


def _kept_id(run_dir: epath.Path, board: str, make: Callable[[], str]) -> tuple[str, bool]:
  """(the id of the board's record of this run, whether it was made now)."""
  path = run_dir / f"{board}_run_id.txt"
  if path.exists() and (kept := path.read_text().strip()):
    return kept, False
  made = make()
  path.write_text(made + "\n")
  return made, True


def _config(run_dir: epath.Path) -> dict:
  path = run_dir / "config.json"
  return json.loads(path.read_text()) if path.exists() else {}


class WeightsAndBiases:
  """A run of wandb, online or as $WANDB_MODE says.

  Steps that a resume repeats are dropped by wandb: they are the same to the bit.
  """

  def __init__(self, run_dir: epath.Path, project: str):
    import wandb

    run_id, _ = _kept_id(run_dir, "wandb", lambda: uuid.uuid4().hex[:16])
    folder = str(run_dir) if jsonl.is_local(run_dir) else tempfile.mkdtemp(prefix="moe-wandb-")
    # It shall neither print nor redirect stdout; and its hook at the end of the process waits no longer than this for a
    # network that is gone, where it would 90 seconds for the start and for ever for the rest. `wandb sync` sends that later.
    settings = wandb.Settings(console="off", silent=True, init_timeout=_WANDB_SECONDS, finish_timeout=_WANDB_SECONDS)
    self._run = wandb.init(project=project, id=run_id, resume="allow", name=run_dir.name, dir=folder,
                           config=_config(run_dir), settings=settings)

  def write(self, items: collections.deque) -> None:
    while items:
      item = items[0]
      self._run.log({f"{item.kind}/{key}": value for key, value in item.values.items()}, step=item.step)
      items.popleft()

  def close(self) -> None:
    self._run.finish()


class MLflow:
  """A run on an MLflow server, of the experiment $MLFLOW_EXPERIMENT_NAME, or `moe`."""

  def __init__(self, run_dir: epath.Path, uri: str):
    import mlflow
    from mlflow import entities

    self._entities = entities
    self._client = mlflow.MlflowClient(tracking_uri=uri)
    self._run_id, is_new = _kept_id(run_dir, "mlflow", lambda: self._make_run(run_dir.name))
    if is_new:
      parameters = [entities.Param(key, str(value)[:500]) for key, value in _flat(_config(run_dir))]
      for start in range(0, len(parameters), _MLFLOW_PARAMETERS):
        self._client.log_batch(self._run_id, params=parameters[start : start + _MLFLOW_PARAMETERS])
    else:
      self._client.update_run(self._run_id, status="RUNNING")
    self._last_steps: dict[str, int] = {}  # by kind, of what the server has from an earlier process

  def _make_run(self, name: str) -> str:
    experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "moe")
    experiment = self._client.get_experiment_by_name(experiment_name)
    experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(experiment_name)
    return self._client.create_run(experiment_id, run_name=name).info.run_id

  def write(self, items: collections.deque) -> None:
    while items:
      metrics, count = [], 0
      for item in items:
        found = self._metrics(item)
        if count and len(metrics) + len(found) > _MLFLOW_BATCH:
          break
        metrics += found
        count += 1
      for start in range(0, len(metrics), _MLFLOW_BATCH):
        self._client.log_batch(self._run_id, metrics=metrics[start : start + _MLFLOW_BATCH])
      for _ in range(count):
        items.popleft()

  def _metrics(self, item: Scalars) -> list:
    """None for a step that the server has: a resume repeats it to the bit, and MLflow would draw it twice."""
    names = {key: re.sub(r"[^\w\-./ ]", "_", f"{item.kind}/{key}") for key in item.values}
    if names and item.kind not in self._last_steps:
      history = self._client.get_metric_history(self._run_id, next(iter(names.values())))
      self._last_steps[item.kind] = max((metric.step for metric in history), default=-1)
    if item.step <= self._last_steps.get(item.kind, -1):
      return []
    stamp = int(item.time * 1000)
    return [self._entities.Metric(names[key], value, stamp, item.step) for key, value in item.values.items()]

  def close(self) -> None:
    self._client.set_terminated(self._run_id)


def _flat(values: dict, prefix: str = ""):
  for key, value in values.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value
