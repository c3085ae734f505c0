"""A thread and a bounded queue before whatever a run is written to, so that no writer can stop, slow or fail training.

A disk may be full, a mount may never answer, a library may raise: `Outlet.put` returns at once all the same. What waits is
bounded, what is dropped is counted, and a person hears of it once when it begins and once when it is over.
"""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, Protocol

_PAUSES = (0.5, 30.0)  # seconds between tries: the first, and the longest after doublings
_PATIENCE = 20.0  # seconds without an answer after which a write counts as stuck


class Sink(Protocol):
  """Where the items of an outlet go. It is made, called and closed in the outlet's thread alone."""

  def write(self, items: collections.deque) -> None:
    """Takes from the left what it has written. It may raise anything; what is still in `items` is tried again."""

  def close(self) -> None:
    """Also after a failed write."""


class News(NamedTuple):
  """What a person should know of an outlet."""

  outlet: str
  message: str
  lost: int  # items since the start
  over: bool  # the trouble has ended


class Outlet:
  """Hands items to a sink in a thread of its own.

  A sink that raised is closed, and a new one is made for the next try.
  """

  def __init__(self, name: str, open_sink: Callable[[], Sink], *, on_news: Callable[[News], None] = lambda news: None,
               capacity: int = 10_000, weigh: Callable[[Any], int] = lambda item: 1, tries: int | None = None,
               linger_seconds: float = 0.0, patience_seconds: float = _PATIENCE, pauses: tuple[float, float] = _PAUSES):
    """
    Args:
      name: what a person calls it, such as `TensorBoard`.
      open_sink: makes the sink, in the thread.
      on_news: told of the beginning and the end of a trouble, in the outlet's thread or in that of a caller.
      capacity: the most that may wait, in units of `weigh`; beyond it the oldest are dropped. As much again may be with the
        sink.
      tries: how often one item is tried before it is dropped; None: for ever.
      linger_seconds: how long items wait to be written together.
      patience_seconds: how long a write may take before a person hears of it.
    """
    self.name = name
    self._open_sink, self._on_news = open_sink, on_news
    self._capacity, self._weigh, self._tries = capacity, weigh, tries
    self._linger, self._patience, self._pauses = linger_seconds, patience_seconds, pauses
    self._changed = threading.Condition()  # guards all below
    self._waiting: dict[Hashable, Any] = {}  # in order of arrival
    self._weight = 0  # of what waits
    self._numbers = itertools.count()  # keys of items that have none
    self._put = self._settled = 0  # items so far, and those of them that are written, dropped or superseded
    self._lost = 0
    self._trouble: str | None = None  # None: all is well
    self._troubles = 0
    self._busy_since: float | None = None  # since when the sink has been at work
    self._urgent = self._closing = self._abandoned = False
    self._thread = threading.Thread(target=self._run, daemon=True, name=f"outlet {name}")
    self._thread.start()

  @property
  def lost(self) -> int:
    """Items that were dropped so far."""
    return self._lost

  def put(self, item: Any, key: Hashable = None) -> None:
    """Returns at once and raises nothing. An item with a `key` takes the place of one with that key that still waits."""
    with self._changed:
      self._put += 1
      if self._closing:
        self._drop(1)
        return
      key = next(self._numbers) if key is None else ("given", key)
      self._remove(key)
      self._waiting[key] = item
      self._weight += self._weigh(item)
      before = self._lost
      while self._weight > self._capacity:
        self._remove(next(iter(self._waiting)))
        self._lost += 1
      news = self._begin_trouble("it is too slow") if self._lost > before else None
      news = self._stuck() or news
      self._changed.notify_all()
    self._tell(news)

  def flush(self, seconds: float) -> bool:
    """Waits until all that was put before is written, at most so long, and not at all while there is trouble.

    Returns:
      whether it is written
    """
    with self._changed:
      goal = self._put
      self._urgent = True
      self._changed.notify_all()
      news = self._stuck()
      if self._trouble is None:
        self._changed.wait_for(lambda: self._settled >= goal or self._trouble or not self._thread.is_alive(), seconds)
      done = self._settled >= goal
    self._tell(news)
    return done

  def begin_close(self) -> None:
    """Takes no more items; what waits is tried once more."""
    with self._changed:
      self._closing = True
      self._changed.notify_all()

  def close(self, seconds: float = 10.0) -> None:
    """Waits until all is written or given up, at most so long, and tells what was lost since the start. Once; then nothing."""
    self.begin_close()
    self._thread.join(seconds)
    with self._changed:
      if self._abandoned:
        return
      self._abandoned = True
      self._drop(self._put - self._settled)
      news = None
      if self._lost:
        reason = self._trouble or ("no answer" if self._thread.is_alive() else "earlier in the run")
        news = News(self.name, f"{self.name}: {self._lost} records of this run are lost ({reason})", self._lost, True)
    self._tell(news)

  # ------------------------------------------------------------------------------------------- with self._changed held

  def _remove(self, key: Hashable) -> None:
    if key in self._waiting:
      self._weight -= self._weigh(self._waiting.pop(key))
      self._settled += 1

  def _drop(self, count: int) -> None:
    self._settled += count
    self._lost += count

  def _stuck(self) -> News | None:
    if self._busy_since is None or time.monotonic() - self._busy_since < self._patience:
      return None
    return self._begin_trouble("no answer")

  def _begin_trouble(self, reason: str) -> News | None:
    if self._trouble is not None:
      self._trouble = reason
      return None
    self._trouble = reason
    self._troubles += 1
    if not self._is_told():
      return None
    return News(self.name, f"{self.name} cannot be written: {reason}; the run goes on", self._lost, False)

  def _end_trouble(self) -> News | None:
    if self._trouble is None or self._weight > self._capacity // 2:
      return None
    self._trouble = None
    if not self._is_told():
      return None
    loss = f"{self._lost} records are lost" if self._lost else "nothing is lost"
    return News(self.name, f"{self.name} is written again, {loss}", self._lost, True)

  def _is_told(self) -> bool:
    """The first, second, fourth, eighth ... trouble: one that comes and goes at every step must not fill the terminal."""
    return self._troubles & (self._troubles - 1) == 0

  # ----------------------------------------------------------------------------------------------------- without it held

  def _tell(self, news: News | None) -> None:
    if news:
      self._on_news(news)

  def _tell_from_thread(self, news: News | None) -> None:
    if not self._abandoned:  # else what was lost is told, and the one who listened may be gone
      self._tell(news)

  # ------------------------------------------------------------------------------------------------------ in the thread

  def _run(self) -> None:
    sink, batch, failures, pause = None, collections.deque(), 0, self._pauses[0]
    while batch or self._take(batch):
      count, error = len(batch), None
      with self._changed:
        self._busy_since = time.monotonic()
        is_last_try = self._closing
      try:
        if sink is None:
          sink = self._open_sink()
        sink.write(batch)
      except BaseException as caught:  # of whatever library: nobody else would hear of it
        error = caught
      if error:
        _close_quietly(sink)
        sink = None
      with self._changed:
        self._busy_since = None
        self._settled += count - len(batch)
        if not error:
          failures, pause = 0, self._pauses[0]
          news = self._end_trouble()
        else:
          failures = 1 if len(batch) < count else failures + 1  # of the item that is first now
          news = self._begin_trouble(_one_line(error))
          if batch and self._tries and failures >= self._tries:
            batch.popleft()
            self._drop(1)
            failures = 0
        self._changed.notify_all()
      self._tell_from_thread(news)
      if error:
        if is_last_try:
          break
        with self._changed:
          self._changed.wait_for(lambda: self._closing, pause)
        pause = min(2 * pause, self._pauses[1])
    _close_quietly(sink)

  def _take(self, batch: collections.deque) -> bool:
    """Moves all that waits into `batch`, when there is something; False at the end."""
    with self._changed:
      self._changed.wait_for(lambda: self._waiting or self._closing)
      if self._linger:
        self._changed.wait_for(lambda: self._urgent or self._closing, self._linger)
      self._urgent = False
      batch.extend(self._waiting.values())
      self._waiting.clear()
      self._weight = 0
    return bool(batch)


def close_all(outlets: Iterable[Outlet], seconds: float = 10.0) -> None:
  """Closes them beside each other: all of them together take at most so long."""
  outlets = list(outlets)
  deadline = time.monotonic() + seconds
  for outlet in outlets:
    outlet.begin_close()
  for outlet in outlets:
    outlet.close(max(deadline - time.monotonic(), 0.0))


def _close_quietly(sink: Sink | None) -> None:
  """A sink that failed fails again at its end, and was told of."""
  try:
    if sink is not None:
      sink.close()
  except BaseException:
    pass


def _one_line(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return (text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}")[:300]
