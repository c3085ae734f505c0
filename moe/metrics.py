"""Step records and where they go: JSONL always, TensorBoard, the terminal. Host only.

`metrics.jsonl` is the source of truth: one record a logged step or evaluation; after a resume a step may stand twice,
and the later record counts. `events.jsonl` holds what happened: start, restore, save, skip, alarm, end.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import Any

from etils import epath
import numpy as np
from rich import console as rich_console
from rich import live as rich_live
from rich import text as rich_text

from moe import jsonl


class Recorder:
  """All writers of a run. A full disk or a lost bucket must not stop training: it raises an alarm and goes on."""

  def __init__(self, run_dir: epath.Path, active: bool = True):
    """`active`: False on all hosts but the first, which then write nothing."""
    self._active = active
    if active:
      import tensorboardX  # takes seconds where torch is installed, and a recovery waits for them

      self._metrics = jsonl.Writer(run_dir / "metrics.jsonl")
      self._events = jsonl.Writer(run_dir / "events.jsonl")
      self._board = tensorboardX.SummaryWriter(str(run_dir / "tb")) if "://" not in str(run_dir) else None
    self.terminal = Terminal(active)

  def metrics(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """Writes one record {"kind", "step", **values}; arrays become lists, scalars also go to TensorBoard."""
    if not self._active:
      return
    plain = {key: np.asarray(value).tolist() for key, value in values.items()}
    with self._guarded():
      self._metrics.write({"kind": kind, "step": step, "time": round(time.time(), 3), **plain})
      for key, value in plain.items():
        if self._board and isinstance(value, (int, float)) and math.isfinite(value):
          self._board.add_scalar(f"{kind}/{key}", value, step)

  def data(self, kind: str, step: int, **fields: Any) -> None:
    """Writes one record of plain JSON values to the metrics file alone."""
    if self._active:
      with self._guarded():
        self._metrics.write({"kind": kind, "step": step, "time": round(time.time(), 3), **fields})

  def event(self, name: str, **fields: Any) -> None:
    if self._active:
      with self._guarded():
        self._events.write({"event": name, "time": round(time.time(), 3), **fields})

  def flush(self) -> None:
    """Before a checkpoint, whose step is where a killed run goes on: the records up to it should be there too."""
    if self._active:
      self._metrics.flush()
      self._events.flush()

  def alarm(self, message: str, **fields: Any) -> None:
    """An event a person should see."""
    self.terminal.alarm(message)
    self.event("alarm", message=message, **fields)

  def close(self) -> None:
    """Once; again it does nothing."""
    if self._active:
      self._active = False
      for writer in (self._metrics, self._events, self._board):
        with self._guarded():
          if writer:
            writer.close()
    self.terminal.close()

  @contextlib.contextmanager
  def _guarded(self):
    try:
      yield
    except OSError as error:
      self.terminal.alarm(f"records could not be written: {error}")


class Terminal:
  """A live status line on a terminal; plain lines elsewhere."""

  def __init__(self, active: bool = True):
    self._active = active
    self._console = rich_console.Console(highlight=False, soft_wrap=True)
    self._live = None

  def status(self, line: str) -> None:
    """Replaces the status line; where there is no terminal, prints it."""
    if not self._active:
      return
    if not self._console.is_terminal:
      self.say(line)
      return
    if self._live is None:
      self._live = rich_live.Live(console=self._console, refresh_per_second=4, transient=False)
      self._live.start()
    self._live.update(rich_text.Text(line, no_wrap=True, overflow="ellipsis"))

  def say(self, line: str) -> None:
    """Prints a line that stays."""
    if self._active:
      self._console.print(rich_text.Text(line))
      sys.stdout.flush()

  def alarm(self, message: str) -> None:
    if self._active:
      self._console.print(rich_text.Text(f"ALARM {message}", style="bold red"))
      sys.stdout.flush()

  def close(self) -> None:
    if self._live is not None:
      self._live.stop()
      self._live = None


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


def duration(seconds: float) -> str:
  """1:02:03, or 2:03 below an hour.

  >>> duration(3723)
  '1:02:03'
  """
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
