"""What a person sees while a program runs: lines that stay, a live line on a terminal, and how far a long piece of work is.

Printing cannot end or hold up a program. Output goes to the descriptor in a thread of its own, in the encoding it has, with
characters it lacks replaced; a full disk, a closed pipe or a terminal that is gone costs what was to be printed alone.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich import console as rich_console
from rich import progress as rich_progress
from rich import text as rich_text

from moe import outlet

_QUEUE_LINES = 10_000  # that may wait for an output that takes nothing
_LAST_WORDS_SECONDS = 5.0  # that the end of a program waits for its output
_SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline; a sample may hold any of them


def prepare_streams() -> None:
  """Makes stdout print any text, and keeps descriptors 0 to 2 from being given to files. Call it first in a program.

  A program started with `>&-` has no descriptor 1: the next file that it opens would get it, and with it what C++ prints.
  """
  descriptor = os.open(os.devnull, os.O_RDWR)
  while descriptor <= 2:
    descriptor = os.open(os.devnull, os.O_RDWR)
  os.close(descriptor)
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


def printable(text: str) -> str:
  """Control characters as `\\x1b`: text that a model wrote must not move the cursor or change colours.

  >>> printable("a\\tb\\x1b[2J")
  'a\\tb\\\\x1b[2J'
  """
  return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


# --------------------------------------------------------------------------------------------------------- status lines


class Field(NamedTuple):
  """A part of a status line."""

  text: str  # where there is room
  short: str  # where there is little
  rank: int  # those of the highest rank are left out first


def status_line(fields: Sequence[Field], width: int | None = None) -> str:
  """The fields in order, so that they fit into `width` columns: first shorter, then without the less important ones.

  >>> fields = [Field("step 7/9", "7/9", 0), Field("loss 2.3456", "loss 2.346", 1), Field("MFU 40%", "40%", 2)]
  >>> [status_line(fields, width) for width in (None, 19, 14, 5)]
  ['step 7/9  loss 2.3456  MFU 40%', '7/9 loss 2.346 40%', '7/9 loss 2.346', '7/9']
  """
  line = "  ".join(field.text for field in fields)
  if width is None or len(line) <= width:
    return line
  by_rank = sorted(fields, key=lambda field: field.rank)
  for count in range(len(fields), 1, -1):
    kept = by_rank[:count]
    line = "  ".join(field.text for field in fields if field in kept)
    if count < len(fields) and len(line) <= width:
      return line
    line = " ".join(field.short for field in fields if field in kept)
    if len(line) <= width:
      return line
  return by_rank[0].short[:width]


# ------------------------------------------------------------------------------------------------------------- progress


class Work:
  """How far a piece of work is. Only these attributes are changed by whoever does it: that cannot block."""

  def __init__(self, what: str, total: float | None = None, done: float = 0, unit: str = ""):
    """`unit`: `B` for bytes."""
    self.what, self.total, self.done, self.unit = what, total, done, unit
    self.start, self.first_done = time.monotonic(), done

  def advance(self, count: float = 1) -> None:
    self.done += count

  def line(self) -> str:
    """`read: 120 of 1,000 files, 12%, 0:30, 3:40 left`."""
    elapsed = time.monotonic() - self.start
    gained = self.done - self.first_done
    unit = f" {'MB' if self.unit == 'B' else self.unit}" if self.unit else ""
    parts = []
    if self.total:
      parts += [f"{self._amount(self.done)} of {self._amount(self.total)}{unit}", f"{self.done / self.total:.0%}"]
    elif self.done:
      parts.append(f"{self._amount(self.done)}{unit}")
    parts.append(duration(elapsed))
    if self.total and gained > 0:
      parts.append(f"{duration(max(self.total - self.done, 0) * elapsed / gained)} left")
    return f"{self.what}: {', '.join(parts)}"

  def _amount(self, value: float) -> str:
    return f"{value / 1e6:,.1f}" if self.unit == "B" else f"{value:,.0f}"


class _Bar(rich_progress.Progress):
  """Draws a `Work`, which it reads four times a second."""

  def __init__(self, work: Work, console: rich_console.Console):
    amount = rich_progress.DownloadColumn() if work.unit == "B" else rich_progress.MofNCompleteColumn()
    columns = [rich_progress.SpinnerColumn("line"), rich_progress.TextColumn("{task.description}", markup=False)]
    columns += [rich_progress.BarColumn(), amount] if work.total else []
    columns += [rich_progress.TimeElapsedColumn()]
    columns += [rich_progress.TimeRemainingColumn()] if work.total else []
    self._work = work
    # Redirected streams would be written by whoever prints to them, under the lock of a console that may be stuck.
    super().__init__(*columns, console=console, refresh_per_second=4, transient=True, redirect_stdout=False,
                     redirect_stderr=False, get_time=time.monotonic)
    self.add_task(work.what, total=work.total, completed=work.done)
    self.tasks[0].start_time = work.start  # a bar that comes back after another one goes on counting

  def get_renderables(self):
    for task in self.task_ids:  # none yet while rich sets itself up
      self.update(task, description=self._work.what, completed=self._work.done, total=self._work.total)
    yield from super().get_renderables()


@contextlib.contextmanager
def _lines(work: Work, say: Callable[[str], None], seconds: float = _SECONDS_BETWEEN_LINES) -> Iterator[None]:
  """Says where the work is every so many seconds; nothing of work that is short."""
  over = threading.Event()

  def report() -> None:
    while not over.wait(seconds):
      say(work.line())

  thread = threading.Thread(target=report, daemon=True, name="progress")
  thread.start()
  try:
    yield
  finally:
    over.set()


@contextlib.contextmanager
def progress(what: str, total: float | None = None, unit: str = "", seconds: float = _SECONDS_BETWEEN_LINES) -> Iterator[Work]:
  """For tools: shows on stderr how far the work is: live on a terminal, elsewhere a line every ten seconds.

  Args:
    total: how much there is to do; None: unknown.
    unit: what is counted, such as `documents`; `B` for bytes.
    seconds: between two lines.

  Example:
    with progress("read", len(files), "files") as work:
      for file in files:
        read(file)
        work.advance()
  """
  work, output = Work(what, total, unit=unit), _Output("stderr")
  console = rich_console.Console(file=output, highlight=False)
  if _is_live(console, output):
    with _Bar(work, console):
      yield work
  else:
    with _lines(work, lambda line: output.write(line + "\n"), seconds):
      yield work


# -------------------------------------------------------------------------------------------------------- output streams


class _Output:
  """A stream for rich that raises nothing: what could not be written is gone, and `failure` says why.

  Bytes go to the descriptor itself: a thread that was stuck in a write of Python's own buffer would hold its lock, and the
  interpreter aborts at its end when it cannot have it; text left in that buffer is written there too, and costs the exit
  code.
  """

  def __init__(self, name: str):
    """`name`: stdout or stderr, looked up at each write as `print` does."""
    self._name = name
    self.failure: OSError | None = None

  @property
  def _stream(self):
    return getattr(sys, self._name)

  @property
  def encoding(self) -> str:
    return getattr(self._stream, "encoding", None) or "utf-8"

  def isatty(self) -> bool:
    try:
      return self._stream.isatty()
    except (AttributeError, ValueError):  # none, or closed
      return False

  def fileno(self) -> int:
    return self._stream.fileno()

  def write(self, text: str) -> int:
    if self._stream is None:
      return len(text)
    encoded = text.encode(self.encoding, "replace")
    try:
      self._stream.flush()  # what others printed comes first
      try:
        descriptor = self.fileno()
      except (AttributeError, OSError, ValueError):  # a stream that is no file, as in a notebook or a test
        self._stream.write(encoded.decode(self.encoding))
        self._stream.flush()
      else:
        _write_all(descriptor, encoded)
    except (OSError, ValueError) as error:
      self.failure = error if isinstance(error, OSError) else OSError(str(error))
    return len(text)

  def flush(self) -> None:
    pass

  def give_up(self) -> None:
    """What others printed and Python still holds goes nowhere: written at the end of the program, it would cost the exit
    code, or never return."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def _write_all(descriptor: int, data: bytes) -> None:
  while data:
    try:
      data = data[os.write(descriptor, data) :]
    except BlockingIOError:  # some parents hand down pipes that do not block
      select.select([], [descriptor], [])


def complain(text: str) -> None:
  """Prints a line to stderr, where there is one: an error that cannot be printed must not change the exit code."""
  _Output("stderr").write(text + "\n")


# ------------------------------------------------------------------------------------------------- the terminal of a run


def _is_live(console: rich_console.Console, output: _Output) -> bool:
  """Whether lines can be drawn over. Not what rich says, which FORCE_COLOR in a CI's log makes a terminal."""
  return output.isatty() and not console.is_dumb_terminal


class Terminal:
  """A run's terminal: lines that stay, and under them a live line where there is a terminal. Any thread may call it."""

  NAME = "the terminal"  # in news

  def __init__(self, active: bool = True, on_news: Callable[[outlet.News], None] = lambda news: None):
    """
    Args:
      active: False on all hosts but the first, which then print nothing.
      on_news: told when the output cannot be written, and when it can again.
    """
    self._active = active
    self._closed = False
    self._training: Work | None = None
    self._output = _Output("stdout")
    console = rich_console.Console(file=self._output, highlight=False, soft_wrap=True)
    self._is_live = active and _is_live(console, self._output)
    if active:
      screen = _Screen(console, self._output, self._is_live)
      self._outlet = outlet.Outlet(self.NAME, lambda: screen, on_news=on_news, capacity=_QUEUE_LINES)

  def status(self, fields: Sequence[Field] | str, done: int | None = None, total: int | None = None) -> None:
    """Prints a status line, on a terminal as much of it as fits.

    With `done` and `total` steps a terminal has a bar under it, until `close`.
    """
    if self._is_live and total:
      if self._training is None:
        self._training = Work("training", total, done)
        self._do("enter", self._training)
      self._training.done = done
    self._do("status", fields)

  def say(self, line: str) -> None:
    """Prints text that stays."""
    self._do("say", line)

  def alarm(self, message: str) -> None:
    self._do("alarm", message)

  @contextlib.contextmanager
  def waiting(self, what: str) -> Iterator[None]:
    """While something is waited for: a spinner with the seconds on a terminal, else one line."""
    if not self._is_live:
      self.say(f"{what} ...")
      yield
      return
    with self._shown(Work(what)):
      yield

  @contextlib.contextmanager
  def progress(self, what: str, total: float | None = None, unit: str = "") -> Iterator[Work]:
    """Shows how far the work is: a bar on a terminal, else a line every ten seconds. `advance` the yielded work."""
    work = Work(what, total, unit=unit)
    with self._shown(work) if self._is_live else _lines(work, self.say):
      yield work

  def close(self) -> None:
    """Ends the live line and waits, not for long, until all is printed. Lines may follow; each of them is waited for.

    An output that takes nothing is given up.
    """
    if self._active and not self._closed:
      self._closed = True
      self._outlet.put(("end", None))
      if not self._outlet.flush(_LAST_WORDS_SECONDS):
        self._outlet.close(1.0)
        self._output.give_up()

  @contextlib.contextmanager
  def _shown(self, work: Work) -> Iterator[None]:
    self._do("enter", work)
    try:
      yield
    finally:
      self._do("leave", work)

  def _do(self, action: str, value: Any) -> None:
    if self._active:
      self._outlet.put((action, value))
      if self._closed:
        self._outlet.flush(_LAST_WORDS_SECONDS)


class _Screen:
  """The sink of a terminal's outlet; the only one that touches rich."""

  def __init__(self, console: rich_console.Console, output: _Output, is_live: bool):
    self._console, self._output, self._is_live = console, output, is_live
    self._works: list[Work] = []  # the last is shown
    self._bar: _Bar | None = None

  def write(self, items: collections.deque) -> None:
    while items:
      action, value = items[0]
      getattr(self, f"_{action}")(value)
      failure, self._output.failure = self._output.failure, None
      if failure:
        raise failure
      items.popleft()

  def close(self) -> None:
    pass

  def _say(self, text: str) -> None:
    self._console.print(rich_text.Text(printable(text)))

  def _alarm(self, text: str) -> None:
    self._console.print(rich_text.Text(f"ALARM {printable(text)}", style="bold red"))

  def _status(self, fields: Sequence[Field] | str) -> None:
    width = self._console.width if self._is_live else None
    line = fields if isinstance(fields, str) else status_line(fields, width)
    if self._is_live:
      self._console.print(rich_text.Text(line, no_wrap=True, overflow="ellipsis"), soft_wrap=False)
    else:
      self._say(line)

  def _enter(self, work: Work) -> None:
    if work not in self._works:  # a try that failed put it there
      self._works.append(work)
    self._show_last()

  def _leave(self, work: Work) -> None:
    if work in self._works:
      self._works.remove(work)
    self._show_last()

  def _end(self, _) -> None:
    self._works.clear()
    self._show_last()

  def _show_last(self) -> None:
    if self._bar is not None:
      self._bar.stop()
      self._bar = None
    if self._works:
      self._bar = _Bar(self._works[-1], self._console)
      self._bar.start()


def duration(seconds: float) -> str:
  """1:02:03, or 2:03 below an hour.

  >>> duration(3723), duration(float("nan"))
  ('1:02:03', '?')
  """
  if not math.isfinite(seconds):
    return "?"
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
