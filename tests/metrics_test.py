"""Records: files of JSON lines that anything may have cut, and the bounded records of a long run with many experts."""

import collections
import functools
import itertools
import json
import threading
import time
import tracemalloc

from etils import epath
import numpy as np
import pytest

from moe import jsonl
from moe import metrics
from moe import outlet
from moe import report

SELECTIONS = 600  # in each layer and step
START = 1100  # steps from here on have windows of 16
_LAYERS, _EXPERTS = 2, 4


@functools.cache
def counts_of(step: int) -> np.ndarray:
  """[L, E] of a step, the same whenever it is done; a layer has SELECTIONS of them."""
  return np.random.default_rng(step).multinomial(SELECTIONS, np.full(_EXPERTS, 1 / _EXPERTS), _LAYERS)


def record_steps(run_dir, begin: int, end: int, saves=(), close=False) -> metrics.Recorder:
  """As the training loop does; without `close` as one that is killed after step `end - 1`. `saves`: steps done when saved."""
  recorder = metrics.Recorder(epath.Path(run_dir), tensorboard=False)
  for step in range(begin, end):
    recorder.metrics("train", step, {"loss": np.float32(2), "tokens": 100, "expert_counts": counts_of(step)})
    if step + 1 in saves:
      recorder.flush()
  recorder.close() if close else recorder._metrics.flush(10)
  return recorder


def bounds(windows) -> list[tuple[int, int]]:
  return [(window.first_step, window.last_step) for window in windows]


def total(windows) -> np.ndarray:
  return np.sum([window.counts for window in windows], 0)


def assert_each_step_once(windows) -> None:
  """No overlap, and as many selections as the steps have: exact where nothing was cut, else to the rounding of float32."""
  for before, after in itertools.pairwise(bounds(windows)):
    assert before[1] < after[0]
  for window in windows:
    np.testing.assert_allclose(window.counts.sum(-1), SELECTIONS * window.steps, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------- JSON lines


def test_damaged_lines_are_passed_over(tmp_path):
  lines = [b'{"step": 0}', b'{"step": 1, "loss": NaN}', b'{"text": "\xff\xfe"}', b"\0" * 50, b"", b"17", b'{"step": 2}']
  lines.append(b'{"step')
  (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
  records = list(jsonl.read(tmp_path / "a.jsonl"))
  assert [record["step"] for record in records] == [0, 1, 2] and np.isnan(records[1]["loss"])
  assert list(jsonl.read(tmp_path / "none" / "a.jsonl")) == []


def append(path, *records) -> None:
  items = collections.deque(map(json.dumps, records))
  jsonl.sink(epath.Path(path)).write(items)
  assert not items


def test_a_line_that_a_kill_cut_is_ended(tmp_path):
  path = tmp_path / "a.jsonl"
  for whole in (b"", b'{"step": 0}\n', b'{"step": 0}\n{"st', b'{"step": 0}\n' + b'{"st' * 3000):
    path.write_bytes(whole)
    append(path, {"step": 1})
    append(path, {"step": 2}, {"step": 3})
    assert [record["step"] for record in jsonl.read(path)] == [0, 1, 2, 3][not whole :], whole[:30]
    assert b"\n\n" not in path.read_bytes()  # a whole line is not ended once more


class Disk:
  """Files that take `room` bytes; the write that fills it up takes a part, as on a real disk."""

  def __init__(self, monkeypatch, room: float):
    self.room, self.fails_at_close = room, False
    disk, real = self, open

    class File:
      def __init__(self, *arguments, **keywords):
        self._file = real(*arguments, **keywords)

      def __getattr__(self, name):
        return getattr(self._file, name)

      def write(self, data):
        if disk.room < 1:
          raise OSError(28, "No space left on device")
        count = self._file.write(data[: int(min(disk.room, 1e9))])
        disk.room -= count
        return count

      def close(self):
        self._file.close()
        if disk.fails_at_close:
          raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(jsonl, "open", File, raising=False)


def test_a_full_disk_costs_no_record(tmp_path, monkeypatch):
  """Wherever in a line it is full: the rest waits, and goes when there is room."""
  path = tmp_path / "a.jsonl"
  for room in (0, 5, 11, 12, 17, 30, 46):
    path.unlink(missing_ok=True)
    disk = Disk(monkeypatch, room)
    sink, items = jsonl.sink(epath.Path(path)), collections.deque(json.dumps({"step": step}) for step in range(4))
    for _ in range(2):  # a second try does not fill the file with copies
      with pytest.raises(OSError, match="No space"):
        sink.write(items)
    disk.room = 1e9
    sink.write(items)
    assert [record["step"] for record in jsonl.read(path)] == [0, 1, 2, 3]


def test_what_a_quota_refuses_when_the_file_is_closed_is_written_again(tmp_path, monkeypatch):
  disk = Disk(monkeypatch, 1e9)
  disk.fails_at_close = True
  items = collections.deque(['{"step": 0}', '{"step": 1}'])
  with pytest.raises(OSError, match="quota"):
    jsonl.sink(epath.Path(tmp_path / "a.jsonl")).write(items)
  assert list(items) == ['{"step": 0}', '{"step": 1}']


def test_a_lost_store_loses_no_record_and_holds_nobody(tmp_path, monkeypatch):
  """Parts, as on an object store. A try that failed goes again under its name with its content: it may have come through."""
  path, away, tried = epath.Path(tmp_path / "a.jsonl"), threading.Event(), []
  real = type(path).write_text
  away.set()

  def write_text(self, text):
    tried.append((self.name, text))
    if away.is_set():
      time.sleep(0.3)
      raise ConnectionError("no route to the store")
    return real(self, text)

  monkeypatch.setattr(type(path), "write_text", write_text)
  sink, news = jsonl.StoreSink(path), []
  records = outlet.Outlet("metrics.jsonl", lambda: sink, on_news=news.append, linger_seconds=0.05, pauses=(0.05, 0.1))
  latest = tmp_path / "latest.json"
  begin = time.monotonic()
  for step in range(20):
    records.put(json.dumps({"step": step}))
    records.put(jsonl.Replacement(epath.Path(latest), json.dumps({"step": step})), key="latest")
    time.sleep(0.02)
  assert time.monotonic() - begin < 1.5
  assert len(set(tried)) == 1
  away.clear()
  records.close()
  assert [record["step"] for record in jsonl.read(path)] == list(range(20))
  assert jsonl.read_one(latest) == {"step": 19}
  assert sum(name == "latest.json" for name, _ in tried) <= 2  # those between were superseded
  assert [item.over for item in news] == [False, True] and "ConnectionError" not in news[1].message and not records.lost


def test_the_end_of_a_file_is_read_alone(tmp_path):
  path = tmp_path / "a.jsonl"
  append(path, *({"step": step} for step in range(10_000)))
  assert [record["step"] for record in jsonl.read_end(path, 100)] == [9994, 9995, 9996, 9997, 9998, 9999]
  assert len(list(jsonl.read_end(path, 1 << 30))) == 10_000
  assert list(jsonl.read_end(tmp_path / "none.jsonl")) == []


def test_a_folder_with_brackets(tmp_path):
  folder = tmp_path / "lr[0.1]"
  folder.mkdir()
  (folder / f"a-{7:020}.jsonl").write_text('{"step": 1}\n')
  (folder / "a.jsonl").write_text('{"step": 0}\n')
  assert [record["step"] for record in jsonl.read(folder / "a.jsonl")] == [0, 1]


def test_reading_and_writing_hold_a_line_at_a_time(tmp_path):
  """The file has 20 MB, a line 100 kB."""
  path = epath.Path(tmp_path / "a.jsonl")
  path.write_text((json.dumps({"text": "x" * 100_000}) + "\n") * 200)
  tracemalloc.start()
  try:
    assert sum(1 for _ in jsonl.read(path)) == 200
    append(path, {"step": 1})
    assert tracemalloc.get_traced_memory()[1] < 2e6
  finally:
    tracemalloc.stop()


def test_a_file_of_one_record_is_replaced_whole(tmp_path):
  path = epath.Path(tmp_path / "latest" / "a.json")
  assert jsonl.read_one(path) is None
  sink = jsonl.sink(epath.Path(tmp_path / "a.jsonl"))
  for size in (1000, 10):
    sink.write(collections.deque([jsonl.Replacement(path, json.dumps({"text": "x" * size}))]))
    assert jsonl.read_one(path) == {"text": "x" * size}
  assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]
  path.write_text('{"text": "x')
  assert jsonl.read_one(path) is None


# -------------------------------------------------------------------------------------------------------- load windows


def test_windows_are_few_and_a_function_of_the_step():
  windows = metrics.LoadWindows()
  complete = [window for step in range(70_000) for window in windows.push(step, np.ones((1, 1)))]
  last = windows.open_window
  assert bounds(complete)[:512] == [(step, step) for step in range(512)]  # a short run loses nothing
  assert len(complete) < 512 + 64 * np.log2(70_000 / 512) + 1
  assert max(window.steps / window.first_step for window in complete[512:]) <= 1 / 64
  assert [window.counts.item() for window in complete] == [window.steps for window in complete]
  assert sum(window.steps for window in [*complete, last]) == 70_000
  # One that begins in the middle of a window has the same windows from the next one on.
  late = metrics.LoadWindows()
  ends = [window.last_step for step in range(40_001, 60_000) for window in late.push(step, np.ones((1, 1)))]
  assert ends == [end for _, end in bounds(complete) if 40_001 <= end < 60_000]


@pytest.mark.parametrize("start, stop, resumed", [
    (1100, 1200, 1200), (1100, 1203, 1203), (1100, 1203, 1201), (1100, 1290, 1205), (1100, 1290, 1216), (600, 700, 691),
    (200, 300, 290)], ids=["at the save", "within", "in the window", "windows later", "save at an end", "narrow", "single"])
def test_a_kill_and_a_resume_leave_the_windows_of_an_undisturbed_run(tmp_path, start, stop, resumed):
  """The killed process had saved at the step that the next one resumes."""
  straight, killed = tmp_path / "straight", tmp_path / "killed"
  for folder in (straight, killed):
    folder.mkdir()
  record_steps(straight, start, stop + 100, close=True)
  record_steps(killed, start, stop, saves=(start + 40, resumed))
  record_steps(killed, resumed, stop + 100, close=True)
  want, got = report.read(straight).loads, report.read(killed).loads
  assert bounds(got) == bounds(want) and want[-1].last_step == stop + 99
  for a, b in zip(want, got):
    np.testing.assert_array_equal(a.counts, b.counts)
  np.testing.assert_array_equal(total(got), sum(map(counts_of, range(start, stop + 100))))


def test_two_kills_before_the_next_save(tmp_path):
  record_steps(tmp_path, START, 1210, saves=(1205,))
  record_steps(tmp_path, 1205, 1260)
  record_steps(tmp_path, 1205, 1300, close=True)
  np.testing.assert_array_equal(total(report.read(tmp_path).loads), sum(map(counts_of, range(START, 1300))))


@pytest.mark.parametrize("stop, saves, resumed, missing", [
    (1290, (1250,), 1205, 0), (1290, (1210,), 1285, 5), (1290, (), 1205, 0), (1290, (1288,), 1286, 0), (1203, (), 1203, 3),
    (1290, (1210,), 1195, 0), (1290, (1210,), START, 0), (1290, (1203,), 1210, 7), (1209, (1203,), 1206, 3)])
def test_a_resume_elsewhere_counts_no_step_twice(tmp_path, stop, saves, resumed, missing):
  """From an older checkpoint, or from a host's memory, at whose step no save wrote the open window.

  `missing`: steps of that window which the killed process had in memory alone; the windows tell that they are lacking.
  """
  record_steps(tmp_path, START, stop, saves)
  record_steps(tmp_path, resumed, 1400, close=True)
  windows = report.read(tmp_path).loads
  assert_each_step_once(windows)
  assert windows[0].first_step == START and windows[-1].last_step == 1399
  assert sum(window.steps for window in windows) == 1400 - START - missing


def test_repeats_would_be_counted_twice(tmp_path):
  """The negative control: the records of a resume do overlap."""
  record_steps(tmp_path, START, 1290, saves=(1250,))
  record_steps(tmp_path, 1205, 1400, close=True)
  records = jsonl.read(tmp_path / "metrics.jsonl")
  recorded = [metrics.Window.from_record(record) for record in records if record["kind"] == "load"]
  assert sum(window.steps for window in recorded) > 1400 - START + 50
  with pytest.raises(AssertionError):
    assert_each_step_once(sorted(recorded, key=lambda window: window.first_step))


def test_a_stop_and_a_run_that_goes_on_for_longer(tmp_path):
  record_steps(tmp_path, START, 1205, saves=(1205,), close=True)
  assert report.read(tmp_path).loads[-1].last_step == 1204
  record_steps(tmp_path, 1205, 1300, close=True)
  np.testing.assert_array_equal(total(report.read(tmp_path).loads), sum(map(counts_of, range(START, 1300))))


def test_a_live_run_shows_the_window_that_is_open(tmp_path):
  record_steps(tmp_path, START, 1205, saves=(1203,))
  assert report.read(tmp_path).loads[-1].last_step == 1202


def test_a_step_that_is_repeated_in_one_process(tmp_path):
  recorder = record_steps(tmp_path, START, 1210)
  for step in range(1204, 1300):
    recorder.metrics("train", step, {"loss": 2.0, "tokens": 100, "expert_counts": counts_of(step)})
  recorder.close()
  windows = report.read(tmp_path).loads
  assert_each_step_once(windows)
  assert sum(window.steps for window in windows) == 1300 - START


def test_a_damaged_open_window_is_done_without(tmp_path):
  record_steps(tmp_path, START, 1205, saves=(1205,))
  for text in ("{", "{}", '{"expert_counts": [[1], [1, 2]], "step": 1, "first_step": 0, "time": 1}'):
    (tmp_path / "latest" / "load.json").write_text(text)
    assert report.read(tmp_path).loads[-1].last_step == 1199
  record_steps(tmp_path, 1205, 1300, close=True)
  assert sum(window.steps for window in report.read(tmp_path).loads) == 1295 - START


# ------------------------------------------------------------------------------------------------- older runs, and bounds


def older(run_dir, steps, shape=(_LAYERS, _EXPERTS)):
  """Appends to a run that has the counts in the record of every step."""
  with open(run_dir / "metrics.jsonl", "a") as file:
    for at, step in enumerate(steps):
      counts = counts_of(step) if shape == (_LAYERS, _EXPERTS) else np.full(shape, 123456)
      record = {"kind": "train", "step": step, "time": 1.6e9 + at, "loss": 2.0, "tokens": 100, "expert_counts": counts.tolist()}
      file.write(json.dumps(record) + "\n")


def test_older_runs_have_the_same_windows(tmp_path):
  (tmp_path / "new").mkdir()
  record_steps(tmp_path / "new", 400, 1100, close=True)
  older(tmp_path, range(400, 1100))
  want, got = report.read(tmp_path / "new").loads, report.read(tmp_path).loads
  assert bounds(want) == bounds(got)
  np.testing.assert_array_equal(np.stack([window.counts for window in want]), np.stack([window.counts for window in got]))


def test_an_older_run_goes_on_as_a_new_one(tmp_path):
  older(tmp_path, [*range(900, 1100), *range(1050, 1230)])
  record_steps(tmp_path, 1220, 1400, close=True)
  records = report.read(tmp_path)
  assert_each_step_once(records.loads)
  assert sum(window.steps for window in records.loads) == 500
  assert records.train.steps.tolist() == list(range(900, 1400))


def test_a_report_of_an_older_run_holds_windows_and_columns_alone(tmp_path):
  """256 steps of 1,024 experts in all: 10 MB as Python's numbers, two windows."""
  older(tmp_path, range(8192, 8192 + 256), shape=(8, 128))
  tracemalloc.start()
  try:
    records = report.read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
  finally:
    tracemalloc.stop()
  assert records.loads[-1].counts.shape == (8, 128) and len(records.loads) == 2


def test_a_step_takes_no_more_for_more_experts(tmp_path):
  """After the first steps a record of 1,024 experts comes once in 16 steps and more, and the open one is overwritten."""
  recorder = metrics.Recorder(epath.Path(tmp_path), tensorboard=False)
  values = {"loss": 2.0, "expert_counts": np.full((8, 128), 123456)}
  for step in range(2048, 2048 + 640):
    recorder.metrics("train", step, values)
    recorder.flush()
  recorder.close()
  records = list(jsonl.read(tmp_path / "metrics.jsonl"))
  assert sum("expert_counts" in record for record in records) == 640 // 32
  assert {key for record in records if record["kind"] == "train" for key in record} == {"kind", "step", "time", "loss"}
  np.testing.assert_array_equal(values["expert_counts"], 123456)  # the caller's own


def test_evaluations_of_a_long_run_are_bounded_and_the_last_is_whole(tmp_path):
  recorder = metrics.Recorder(epath.Path(tmp_path), tensorboard=False)
  recorder.metrics("train", 0, {"loss": 2.0, "tokens": 100, "expert_counts": counts_of(0)})
  steps = range(1000, 60_001, 1000)
  kept = len({metrics.score_window(step) for step in steps})
  assert kept == 46
  for step in steps:
    matrices = {f"information_{of}": np.full((2, 2), 1 / 3) + step for of in ("choices", "probabilities")}
    for name in ("a", "b/c ?"):
      score = {"bits_per_byte": 1 / 3, "expert_counts": counts_of(step), "router_z": np.ones(2) / 3, **matrices}
      recorder.metrics(f"eval/{name}", step, score)
      recorder.data(f"examples/{name}", step, examples=[[{"tokens": [[f"at {step}", 0.5]], "snippets": []}]])
  recorder.close()
  scores = [record for record in jsonl.read(tmp_path / "metrics.jsonl") if record["kind"] == "eval/a"]
  assert [record["step"] for record in scores] == list(steps)
  assert all(record["bits_per_byte"] == 1 / 3 and record["router_z"] == [0.333333] * 2 for record in scores)
  for key in ("expert_counts", "information_choices"):
    assert sum(key in record for record in scores) == kept
  assert "examples" not in (tmp_path / "metrics.jsonl").read_text()
  records = report.read(tmp_path)
  for name in ("a", "b/c ?"):
    assert records.latest[f"eval/{name}"]["expert_counts"] == counts_of(60_000).tolist()
    assert records.latest[f"examples/{name}"]["examples"][0][0]["tokens"] == [["at 60000", 0.5]]
    assert len(records.scores[name]) == kept
  assert "at 60000" in report._examples(records)


def test_of_an_older_run_as_many_evaluations_are_held(tmp_path):
  with open(tmp_path / "metrics.jsonl", "w") as file:
    file.write(json.dumps({"kind": "train", "step": 0, "time": 1.0, "loss": None, "tokens": 100}) + "\n")
    for step in range(500, 100_001, 500):
      record = {"kind": "eval/a", "step": step, "time": 1.0, "bits_per_byte": 1.0, "expert_counts": counts_of(step).tolist()}
      file.write(json.dumps(record) + "\n")
  records = report.read(tmp_path)
  assert len(records.scores["a"]) == 73 and records.latest["eval/a"]["step"] == 100_000
