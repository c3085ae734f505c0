"""Step records and where they go: JSONL always, the boards, the terminal. Host only.

`metrics.jsonl` is the source of truth: one record a step or evaluation; after a resume a step may stand twice, and the
later record counts. `events.jsonl` holds what happened: start, restore, save, skip, alarm, end.

A record of every step has scalars. What has a number for each expert is large (58 layers of 256 experts: 100 kB a step), so
that its records are bounded, whatever the length of the run:

* kind `load`: the selections of every expert, summed over a window of steps, see `Window` and `LoadWindows`;
* kind `eval/<domain>`: arrays [L, E] and [L, L] in the first evaluation of such a window, scalars in the others;
* `latest/<kind>.json`, overwritten: the last evaluation and what the experts read in it (`examples/<domain>`), whole, and
  the window that was not complete at the last checkpoint, where a killed run goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import urllib.parse
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from moe import boards
from moe import jsonl
from moe import outlet
from moe import terminal
from moe.errors import storage_errors
from moe.terminal import duration


# Windows get wider as the run gets longer, so that their number grows with the logarithm of the steps alone. They do not
# depend on how many steps a run shall have: a run that goes on for longer keeps its windows.
_SINGLE_STEPS = 512  # the first steps have a window each: a short run loses no detail
_WINDOWS_PER_DOUBLING = 64  # 994 windows in 100,000 steps, 1,211 in a million
_SCORES_PER_DOUBLING = 16  # evaluations of a domain with arrays: at most 73 in 100,000 steps where one comes every 500
_DIGITS = 6  # of the floats in arrays

_FLUSH_SECONDS = 2.0
_CLOSE_SECONDS, _STORE_CLOSE_SECONDS = 10.0, 60.0  # that the end of a run waits for its writers


def window_start(step: int, per_doubling: int) -> int:
  """The first step of the window that a step is in: `per_doubling` (a power of 2) of them from any step to its double.

  >>> [window_start(step, 4) for step in (5, 8, 9, 10, 16, 23)]
  [5, 8, 8, 10, 16, 20]
  """
  width = 1 << max(step.bit_length() - per_doubling.bit_length(), 0)
  return step - step % width


def score_window(step: int) -> int:
  """The first step of the window of which one evaluation keeps its arrays among the records."""
  return window_start(step, _SCORES_PER_DOUBLING)


def load_window(step: int) -> int:
  """The first step of the window over which the load is summed."""
  return step if step <= _SINGLE_STEPS else window_start(step, _WINDOWS_PER_DOUBLING)


class Window(NamedTuple):
  """The selections of every expert in steps `first_step` to `last_step`, both included."""

  first_step: int
  last_step: int
  counts: np.ndarray  # [L, E], sums

  @property
  def steps(self) -> int:
    return self.last_step - self.first_step + 1

  def record(self) -> dict[str, Any]:
    return {"kind": "load", "step": self.last_step, "time": round(time.time(), 3), "first_step": self.first_step,
            "expert_counts": self.counts.tolist()}

  @classmethod
  def from_record(cls, record: dict[str, Any] | None) -> Window | None:
    """None where the record is none of a window."""
    try:
      window = cls(int(record["first_step"]), int(record["step"]), np.array(record["expert_counts"], np.int64))
    except (TypeError, KeyError, ValueError):
      return None
    return window if window.counts.ndim == 2 and window.steps > 0 else None


class LoadWindows:
  """Sums the counts of successive steps over windows."""

  def __init__(self):
    self.open_window: Window | None = None

  def resume(self, step: int, left_open: Window | None) -> None:
    """Takes over what an earlier process had of the window that `step`, where this one begins, is in.

    A window before that one is among the records: it was complete before the earlier process came to `step`.
    """
    if left_open and left_open.first_step < step and load_window(left_open.first_step) == load_window(step):
      self.open_window = left_open

  def push(self, step: int, counts) -> list[Window]:
    """Adds a step's counts [L, E]; returns the windows that are complete now.

    A step that does not follow the last one ends the open window as it is: the run went back, or records are lacking.
    """
    counts = np.asarray(counts, np.int64)
    complete = []
    before = self.open_window
    if before and (step != before.last_step + 1 or before.counts.shape != counts.shape):
      complete.append(before)
      before = None
    self.open_window = Window(before.first_step, step, before.counts + counts) if before else Window(step, step, counts)
    if load_window(step + 1) == step + 1:
      complete.append(self.open_window)
      self.open_window = None
    return complete


def append_window(windows: list[Window], window: Window) -> None:
  """Adds the next window of a file to those before, so that each step is in one: what a resume repeated counts in `window`.

  Of a window whose end is repeated the part of the counts stays that goes with the steps before.
  """
  while windows and windows[-1].first_step >= window.first_step:
    windows.pop()
  if windows and windows[-1].last_step >= window.first_step:
    whole = windows.pop()
    cut = whole._replace(last_step=window.first_step - 1)
    windows.append(cut._replace(counts=whole.counts * (cut.steps / whole.steps)))
  windows.append(window)


def latest_path(run_dir: epath.Path, kind: str) -> epath.Path:
  """Where the last record of a kind is that has one file, overwritten."""
  group, _, name = kind.partition("/")
  file_name = f"{urllib.parse.quote(name, safe='').replace('%', '=')}.json"  # a domain may be called anything
  return run_dir / "latest" / group / file_name if name else run_dir / "latest" / f"{group}.json"


class Recorder:
  """All writers of a run. Nothing that happens to one of them stops or holds up training: it raises an alarm and goes on.

  Each has a thread of its own, see `outlet.Outlet`. Records wait in memory while the disk does not take them.
  """

  def __init__(self, run_dir: epath.Path, active: bool = True, *, tensorboard: bool = True, wandb: str = "", mlflow: str = ""):
    """
    Args:
      active: False on all hosts but the first, which then write nothing.
      tensorboard: event files in `<run_dir>/tb`.
      wandb: project of Weights & Biases; "" for none.
      mlflow: tracking URI of MLflow; "" for none.

    Raises:
      ConfigError: the package of a board is not installed.
    """
    boards.check(wandb, mlflow)
    self._active = active
    self.terminal = terminal.Terminal(active, self._on_news)
    if active:
      self._run_dir = run_dir
      self._wanted_boards = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}
      self._boards: list[outlet.Outlet] | None = None  # from the first record on, whose step they begin with
      self._loads: LoadWindows | None = None  # from the first step on, whose record may be read then
      self._array_windows: dict[str, int] = {}  # of the last record with arrays, by kind
      self._events = jsonl.open_outlet(run_dir / "events.jsonl", self._on_news)
      self._metrics = jsonl.open_outlet(run_dir / "metrics.jsonl", self._on_news)

  def metrics(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """Writes one record {"kind", "step", **values}; scalars also go to the boards.

    Arrays become lists. Kind `train` takes every step in turn, and its `expert_counts` [L, E] are summed over a window. Other
    kinds have arrays of two axes and more once in a window, and always in `latest/`.
    """
    if not self._active:
      return
    stamp = {"kind": kind, "step": step, "time": round(time.time(), 3)}
    values = dict(values)
    counts = values.pop("expert_counts", None) if kind == "train" else None
    plain = {key: _plain(value) for key, value in values.items()}
    large = {key for key, value in values.items() if np.ndim(value) > 1}
    left_out = set()
    if large:
      self._replace(kind, {**stamp, **plain})
      window = score_window(step)
      left_out = large if self._array_windows.get(kind) == window else set()
      self._array_windows[kind] = window
    self._metrics.put(json.dumps({**stamp, **{key: value for key, value in plain.items() if key not in left_out}}))
    if counts is not None:
      self._add_load(step, counts)
    scalars = boards.Scalars.of({**stamp, **plain})
    if self._boards is None:
      self._boards = boards.outlets(self._run_dir, scalars, self._on_news, **self._wanted_boards)
    for board in self._boards:
      board.put(scalars)

  def data(self, kind: str, step: int, **fields: Any) -> None:
    """Writes one record of plain JSON values of any size, in place of the last one of its kind: `latest/<kind>.json`."""
    if self._active:
      self._replace(kind, {"kind": kind, "step": step, "time": round(time.time(), 3), **fields})

  def event(self, name: str, **fields: Any) -> None:
    if self._active:
      self._events.put(json.dumps({"event": name, "time": round(time.time(), 3), **fields}, default=str))

  def flush(self) -> None:
    """Before a checkpoint, whose step is where a killed run goes on: the records up to it should be there too.

    Waits a moment for a disk, not for a store, and for nothing that is in trouble.
    """
    if self._active:
      if self._loads and self._loads.open_window:
        # Not among the records: with a short time between checkpoints they would be many.
        self._replace("load", self._loads.open_window.record())
      seconds = _FLUSH_SECONDS if jsonl.is_local(self._run_dir) else 0.0
      self._metrics.flush(seconds)
      self._events.flush(seconds)

  def alarm(self, message: str, **fields: Any) -> None:
    """An event a person should see."""
    self.terminal.alarm(message)
    self.event("alarm", message=message, **fields)

  def close(self) -> None:
    """Writes what waits, for as long as `_CLOSE_SECONDS` at most. Once; again it does nothing."""
    if self._active:
      if self._loads and self._loads.open_window:
        self._metrics.put(json.dumps(self._loads.open_window.record()))
      seconds = _CLOSE_SECONDS if jsonl.is_local(self._run_dir) else _STORE_CLOSE_SECONDS
      self.terminal.close()
      # The events go last: they tell what the others lost.
      outlet.close_all([self._metrics, *(self._boards or [])], seconds)
      self._active = False
      self._events.close(seconds)

  def _on_news(self, news: outlet.News) -> None:
    """Of an observer, in its thread or in training's."""
    is_bad = bool(news.lost) or not news.over
    self.event("alarm" if is_bad else "observer", message=news.message, observer=news.outlet, lost=news.lost)
    if news.outlet == self.terminal.NAME:  # which cannot say it, and is the thread that would wait for it
      return
    if is_bad:
      self.terminal.alarm(news.message)
    else:
      self.terminal.say(news.message)

  def _add_load(self, step: int, counts) -> None:
    if self._loads is None:
      self._loads = LoadWindows()
      self._loads.resume(step, self._left_open())
    for window in self._loads.push(step, counts):
      self._metrics.put(json.dumps(window.record()))

  def _left_open(self) -> Window | None:
    """The window that was open at the last checkpoint of an earlier process."""
    try:
      return Window.from_record(jsonl.read_one(latest_path(self._run_dir, "load")))
    except storage_errors() as error:
      self.terminal.alarm(f"the expert load before this start could not be read: {error}")
      return None

  def _replace(self, kind: str, record: dict[str, Any]) -> None:
    """One that still waits is superseded: evaluations of a store that is away do not pile up."""
    path = latest_path(self._run_dir, kind)
    self._metrics.put(jsonl.Replacement(path, json.dumps(record)), key=str(path))


def _plain(value) -> Any:
  """Numbers and lists of numbers, as JSON has them."""
  array = np.asarray(value)
  if array.ndim and array.dtype.kind == "f":
    array = np.array([float(f"{number:.{_DIGITS}g}") for number in array.flat]).reshape(array.shape)
  return array.tolist()


def status_fields(step: int, steps: int, values: dict[str, float], seconds_left: float) -> list[terminal.Field]:
  """The parts of a training status line, for `Terminal.status`. At 80 columns the first eight of them by rank fit.

  Args:
    step: steps done; `steps`: of so many.
    values: of a `train` and a `speed` record, with `bits_per_byte`; what is lacking is left out, as is `mfu` where a chip
      has no peak to speak of.
  """
  rate = values.get("tokens_per_second", math.nan)
  forms = {  # in the order of the line: the key, where there is room, where there is little, rank
      "loss": ("loss {:.4f}", "loss {:.3f}", 1),
      "bits_per_byte": ("{:.3f} bits/byte", "{:.3f} b/B", 8),
      "learning_rate": ("rate {:.2e}", "lr {:.0e}", 4),
      "gradient_norm": ("gradient {:.3g}", "g {:.2g}", 5),
      "balance": ("balance {:.3f}", "bal {:.2f}", 9),
      "load_max": ("max/mean load {:.2f}", "load {:.1f}", 6),
      "dropped": ("dropped {:.2%}", "drop {:.0%}", 7),
      "tokens_per_second": ("{:,.0f} tok/s", f"{_short(rate)} tok/s", 3),
      "mfu": ("MFU {:.1%}", "MFU {:.0%}", 10),
  }
  fields = [terminal.Field(f"step {step}/{steps}", f"{step}/{steps}", 0)]
  for key, (text, short, rank) in forms.items():
    if key in values:
      fields.append(terminal.Field(text.format(values[key]), short.format(values[key]), rank))
  left = f"ETA {duration(seconds_left)}"
  return [*fields, terminal.Field(left, left, 2)]


def _short(number: float) -> str:
  """123, 12k, 1.2M."""
  for factor, letter in ((1e6, "M"), (1e3, "k")):
    if number >= factor:
      scaled = number / factor
      return f"{scaled:.1f}{letter}" if scaled < 10 else f"{scaled:.0f}{letter}"
  return f"{number:.0f}"


class Goodput:
  """Where the wall time went: seconds by activity."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._start = time.monotonic()

  @contextlib.contextmanager
  def measure(self, activity: str):
    begin = time.monotonic()
    try:
      yield
    finally:
      self.seconds[activity] = self.seconds.get(activity, 0.0) + time.monotonic() - begin

  @property
  def elapsed_seconds(self) -> float:
    return time.monotonic() - self._start

  def table(self) -> dict[str, float]:
    """Seconds by activity, with the rest as `other`."""
    known = {name: round(value, 3) for name, value in self.seconds.items()}
    return {**known, "other": round(max(self.elapsed_seconds - sum(self.seconds.values()), 0.0), 3)}
