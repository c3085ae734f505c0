"""Whatever happens behind an outlet, whoever puts something into it goes on: blocked, raising, slow and recovering writers."""

import collections
import threading
import time

import pytest

from moe import outlet

_QUICK = {"pauses": (0.02, 0.05), "patience_seconds": 0.2}


class Writer:
  """Keeps what it is given; does what `behave` says first. The outlet makes a new sink of it after a failure."""

  def __init__(self, behave=lambda item: None):
    self.behave, self.written, self.opened, self.closed = behave, [], 0, 0

  def open(self):
    self.opened += 1
    return self

  def write(self, items: collections.deque) -> None:
    while items:
      self.behave(items[0])
      self.written.append(items[0])
      items.popleft()

  def close(self) -> None:
    self.closed += 1


def until(condition, seconds=10.0) -> None:
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.005)


def raising(error: BaseException):
  def behave(_):
    raise error

  return behave


def test_everything_is_written_in_order_when_all_is_well():
  writer, news = Writer(), []
  out = outlet.Outlet("it", writer.open, on_news=news.append)
  for item in range(1000):
    out.put(item)
  assert out.flush(10.0)
  assert writer.written == list(range(1000))
  out.close()
  out.close()
  assert (writer.opened, writer.closed, news, out.lost) == (1, 1, [], 0)


def test_a_write_that_never_returns_holds_nobody():
  """As a mount whose server is gone: told once, nothing waits for it, and the end comes."""
  forever = threading.Event()
  writer, news = Writer(lambda _: forever.wait()), []
  out = outlet.Outlet("it", writer.open, on_news=news.append, capacity=100, **_QUICK)
  out.put(0)
  until(lambda: out._busy_since)
  begin = time.monotonic()
  for item in range(1, 5000):
    out.put(item)
  assert time.monotonic() - begin < 0.2
  time.sleep(0.25)
  out.put(5000)
  begin = time.monotonic()
  assert not out.flush(5.0)
  out.close(0.1)
  assert time.monotonic() - begin < 0.5
  assert [item.over for item in news] == [False, True]
  assert "too slow" in news[0].message and "no answer" in news[1].message
  assert out.lost == 5001  # the one that is under way too: nobody knows
  forever.set()


def test_it_goes_on_when_a_stuck_writer_answers():
  gate, news = threading.Event(), []
  writer = Writer(lambda _: gate.wait())
  out = outlet.Outlet("it", writer.open, on_news=news.append, **_QUICK)
  out.put(0)
  time.sleep(0.3)
  out.put(1)
  assert [item.message for item in news] == ["it cannot be written: no answer; the run goes on"]
  gate.set()
  until(lambda: len(news) == 2)
  assert news[1].message == "it is written again, nothing is lost"
  assert writer.written == [0, 1]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(116, "Stale file handle"), ValueError("x"),
                                   SystemExit(1), KeyboardInterrupt(), MemoryError()], ids=lambda error: type(error).__name__)
def test_what_a_writer_raises_is_told_once_and_tried_again(error):
  writer, news = Writer(raising(error)), []
  out = outlet.Outlet("it", writer.open, on_news=news.append, **_QUICK)
  for item in range(10):
    out.put(item)
    time.sleep(0.02)
  assert len(news) == 1 and (str(error) or type(error).__name__) in news[0].message
  assert not out.flush(5.0)
  writer.behave = lambda item: None
  until(lambda: len(news) == 2)
  assert writer.written == list(range(10)) and out.lost == 0
  assert writer.opened == writer.closed + 1 > 2  # a new sink for each try


def test_what_cannot_be_opened_is_tried_again():
  writer, tries = Writer(), []

  def open_sink():
    tries.append(0)
    if len(tries) < 3:
      raise ImportError("no such package")
    return writer

  out = outlet.Outlet("it", open_sink, **_QUICK)
  out.put(1)
  until(lambda: writer.written == [1])


def test_what_waits_is_bounded_and_the_newest_stays():
  gate, news = threading.Event(), []
  writer = Writer(lambda _: gate.wait())
  out = outlet.Outlet("it", writer.open, on_news=news.append, capacity=100, weigh=len, **_QUICK)
  out.put("x" * 10)
  until(lambda: out._busy_since)
  for item in range(1000):
    out.put(f"{item:010}")
  assert len(out._waiting) == 10 and out._weight == 100
  out.put("x" * 101)  # larger than all that may wait
  assert not out._waiting and out._weight == 0
  out.put(f"{1000:010}")
  gate.set()
  until(lambda: len(news) == 2)
  assert writer.written == ["x" * 10, f"{1000:010}"] and out.lost == 1001
  assert news[1] == outlet.News("it", "it is written again, 1001 records are lost", 1001, True)
  out.close()
  assert news[2].message == "it: 1001 records of this run are lost (earlier in the run)"


def test_an_item_that_always_fails_does_not_hold_the_others():
  def behave(item):
    if item % 10 == 3:
      raise TypeError(f"{item} is no number")

  writer, news = Writer(behave), []
  out = outlet.Outlet("it", writer.open, on_news=news.append, tries=3, **_QUICK)
  for item in range(100):
    out.put(item)
    assert out.flush(0.0) in (True, False)
    time.sleep(0.002)
  until(lambda: out.lost == 10)
  out.close()
  assert writer.written == [item for item in range(100) if item % 10 != 3]
  assert len(news) <= 2 * 4 + 1  # of ten troubles the first, second, fourth and eighth are told


def test_only_the_newest_of_a_key_is_written():
  gate, writer = threading.Event(), Writer(lambda _: gate.wait())
  out = outlet.Outlet("it", writer.open)
  out.put("first")
  until(lambda: out._busy_since)
  for item in range(50):
    out.put(("a", item), key="a")
    out.put(("b", item), key="b")
  gate.set()
  assert out.flush(10.0)
  assert writer.written == ["first", ("a", 49), ("b", 49)] and out.lost == 0


def test_all_are_closed_within_one_time():
  """Four that do not answer take as long as one; what has an answer is written."""
  forever, news = threading.Event(), []
  stuck = [outlet.Outlet(str(i), Writer(lambda _: forever.wait()).open, on_news=news.append) for i in range(4)]
  writer = Writer()
  fine = outlet.Outlet("fine", writer.open, on_news=news.append)
  for out in [*stuck, fine]:
    out.put(0)
  begin = time.monotonic()
  outlet.close_all([*stuck, fine], 0.5)
  assert time.monotonic() - begin < 0.8
  assert writer.written == [0] and [item.lost for item in news] == [1] * 4
  forever.set()


def test_the_end_gives_what_waits_one_more_try():
  """A disk that is freed just before the end."""
  writer = Writer(raising(OSError(28, "No space left on device")))
  out = outlet.Outlet("it", writer.open, pauses=(60.0, 60.0))
  out.put(0)
  until(lambda: writer.closed)
  writer.behave = lambda item: None
  out.put(1)
  out.close(5.0)
  assert writer.written == [0, 1] and out.lost == 0


def test_a_put_after_the_end_is_counted_and_harmless():
  writer = Writer()
  out = outlet.Outlet("it", writer.open)
  out.close()
  out.put(0)
  assert writer.written == [] and out.lost == 1


def test_a_direct_writer_would_hold_training():
  """The negative control: the same stuck writer without an outlet."""
  forever = threading.Event()
  thread = threading.Thread(target=Writer(lambda _: forever.wait()).write, args=(collections.deque([0]),), daemon=True)
  thread.start()
  thread.join(0.3)
  assert thread.is_alive()
  forever.set()
