"""The report: one run, several over each other, live, and in a real browser."""

import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from moe import config
from moe import metrics
from moe import report
from moe import sizes
from moe.errors import UserError
from tests import small
from tools import report as tool

ROOT = pathlib.Path(__file__).resolve().parents[1]


def made(folder: pathlib.Path, steps=120, rate=1.0, domains=("kjv", "python")) -> pathlib.Path:
  """A run's records, by formula."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  with open(folder / "metrics.jsonl", "w") as out:
    for step in range(steps):
      loss = 2 + 3 * np.exp(-rate * step / 30)
      counts = (rng.dirichlet(np.ones(4), 2) * 1000).astype(int).tolist()
      record = {"kind": "train", "step": step, "time": 1e9 + 2.0 * step, "loss": None if step == 50 else loss, "tokens": 1000,
                "balance": 1.1, "load_max": 1.5, "dead_experts": 0, "dropped": 0.0, "router_entropy": 1.2, "top_k_weight": 0.5,
                "router_z": 1.0, "skipped_steps": 0, "gradient_norm": loss / 3, "learning_rate": 1e-3, "expert_counts": counts}
      out.write(json.dumps(record) + "\n")
      if step % 10 == 9:
        out.write(json.dumps({"kind": "speed", "step": step, "time": 1e9 + 2.0 * step, "tokens_per_second": 500.0, "mfu": 0.4,
                              "seconds_per_step": 2.0, "goodput/step": 2.0 * step, "goodput/save": 9.0}) + "\n")
      if step % 40 == 39:
        for name in domains:
          out.write(json.dumps({"kind": f"eval/{name}", "step": step, "time": 1e9, "bits_per_byte": loss / 2,
                                "expert_counts": counts}) + "\n")
  (folder / "config.json").write_text(json.dumps({"train": {"steps": steps, "seed": 0}, "model": {"d_model": 64}}))
  return folder


def test_one_run(tmp_path):
  page = report.write(made(tmp_path / "a")).read_text()
  for text in ("Training and evaluation", "Expert load over time", "Where the time went", "kjv, validation", "120,000"):
    assert text in page
  assert {"curves.png", "load.png", "goodput.png", "routing.png"} <= {p.name for p in (tmp_path / "a" / "report").iterdir()}


def test_several_runs_and_what_differs(tmp_path):
  a, b = made(tmp_path / "a"), made(tmp_path / "b", steps=80, rate=2.0, domains=("kjv",))
  assert tool.main([str(a), str(b), f"--out={tmp_path}/out"]) == 0
  page = (tmp_path / "out" / "index.html").read_text()
  rows = dict(re.findall(r"<tr><th>(train[^<]*)</th><td>([^<]*)</td><td>[^<]*</td>", page))
  assert rows["train.steps"] == "120" and "train.seed" not in rows
  assert "<td>80</td></tr>" in page and "python, validation" in page
  assert "configs are equal" in report.compare([a, a / ".." / "a"], tmp_path / "same").read_text()


def test_the_page_needs_no_network(tmp_path):
  assert tool.main([str(made(tmp_path / "a")), f"--out={tmp_path}/elsewhere"]) == 0
  page = (tmp_path / "elsewhere" / "index.html").read_text()
  assert not re.findall(r"(?:src|href)=(?!'data:)", page)


def tables(train: list[dict], speed: list[dict] = ()) -> report.Records:
  """Of records in memory."""
  builders = {"train": report._TableBuilder(), **({"speed": report._TableBuilder()} if speed else {})}
  for kind, builder in builders.items():
    for record in {"train": train, "speed": speed}[kind]:
      builder.add(record)
  return report.Records({kind: builder.table() for kind, builder in builders.items()}, [], {}, {})


def test_tokens_and_gaps():
  records = tables([{"step": s, "tokens": 10, "time": 100.0 + s + (9000 if s > 5 else 0)} for s in range(10)])
  np.testing.assert_allclose(report._tokens(records, np.array([0, 4, 9])), [10, 50, 100])
  hours = report._hours(records)
  assert np.isnan(hours[6]) and np.isfinite(np.delete(hours, 6)).all()


def test_each_step_has_a_time_of_its_own():
  """The loop writes ten steps at once. A stop of an hour is in the middle, and the end is not timed yet."""
  written = [10.0 * (step // 10 + 1) + (3600 if step >= 50 else 0) + 0.001 * (step % 10) for step in range(95)]
  train = [{"step": step, "tokens": 10, "time": at} for step, at in enumerate(written)]
  speed = [{"step": step, "time": written[step], "seconds_per_step": 1.0} for step in range(9, 90, 10)]
  assert len(np.unique(np.round(written[:50]))) == 5  # as they are, ten steps share a place
  hours = report._hours(tables(train, speed))
  assert np.isnan(hours[50]) and np.isfinite(np.delete(hours, 50)).all()
  np.testing.assert_allclose(np.diff(hours[:50]) * 3600, 1.0, atol=1e-3)
  np.testing.assert_allclose(np.diff(hours[51:90]) * 3600, 1.0, atol=1e-3)
  assert (np.diff(hours[89:]) > 0).all()


def test_hours_do_not_turn_back_or_count_a_pause():
  """A window whose steps were timed longer than they took, and a stop of an hour."""
  written = [10.0 * (step // 10 + 1) + (3600 if step >= 50 else 0) for step in range(90)]
  train = [{"step": step, "tokens": 10, "time": at} for step, at in enumerate(written)]
  speed = [{"step": step, "time": written[step], "seconds_per_step": 1.5} for step in range(9, 90, 10)]
  hours = report._hours(tables(train, speed))
  assert (np.diff(hours[np.isfinite(hours)]) >= 0).all()
  assert np.nanmax(hours) * 3600 < 100


def append(folder: pathlib.Path, name: str, *records: dict) -> None:
  with open(folder / name, "a") as out:
    out.writelines(json.dumps(record) + "\n" for record in records)


def test_where_the_time_went_is_of_all_processes_with_the_final_evaluation(tmp_path):
  """Two processes: one that ended with an evaluation, and one that went on from there and is killed."""
  run = made(tmp_path / "a", steps=20)  # speed records at steps 9 and 19: 18 s and 38 s of steps, 9 s of saves
  ended = {"event": "end", "time": 1e9 + 45, "goodput": {"step": 38.0, "save": 9.0, "evaluate": 77.0}}
  append(run, "events.jsonl", {"event": "start", "time": 1e9}, ended, {"event": "start", "time": 1e9 + 50})
  append(run, "metrics.jsonl", {"kind": "train", "step": 29, "time": 1e9 + 70, "loss": 2.0, "tokens": 1000},
         {"kind": "speed", "step": 29, "time": 1e9 + 70, "goodput/step": 20.0, "goodput/restore": 3.0, "goodput/nan": None})
  assert report.read(run).goodput == {"step": 58.0, "save": 9.0, "evaluate": 77.0, "restore": 3.0}
  append(run, "events.jsonl", {"event": "end", "time": 1e9 + 90, "goodput": {"step": 20.0, "restore": 3.0, "evaluate": 50.0}})
  assert report.read(run).goodput == {"step": 58.0, "save": 9.0, "evaluate": 127.0, "restore": 3.0}
  assert report.read(made(tmp_path / "b", steps=5)).goodput == {}


@pytest.fixture
def undrawn(monkeypatch):
  """Pages without their pictures, which take seconds."""
  monkeypatch.setattr(report, "_save", lambda folder, figures: folder.mkdir(exist_ok=True) or "")
  yield
  report.plt.close("all")


def test_what_the_page_says_of_a_run(tmp_path, undrawn):
  run = made(tmp_path / "a")
  environment = {"devices": ["TPU_0(process=0,(0,0,0,0))", "TPU_1(process=0,(1,0,0,0))"], "hosts": 2,
                 "commit": "0123456789abcdef", "jax": "9.9.9", "parameters": 1234567, "active_parameters": 234567}
  (run / "env.json").write_text(json.dumps(environment))
  append(run, "events.jsonl", {"event": "start", "time": 1e9}, *(
      {"event": "alarm", "time": 1e9 + i, "message": f"step {i} skipped: loss {i}.5 <b>"} for i in range(7)),
      {"event": "alarm", "time": 1e9, "message": "routing has collapsed"}, {"event": "start", "time": 1e9 + 60})
  page = report.write(run).read_text()
  for fact in ("2001-09-09 01:46 UTC", "0123456789ab<", "2 TPU, 2 host(s)", "9.9.9", "1,234,567", "234,567"):
    assert fact in page
  rows = re.findall(r"<tr><td>(\d+)</td><td>[^<]*</td><td>[^<]*</td><td>([^/]*)</td></tr>", page)
  assert rows == [("7", "step 6 skipped: loss 6.5 &lt;b&gt;"), ("1", "routing has collapsed")]
  assert "<th>starts</th><td>2</td>" in page and "<th>alarms</th><td>8</td>" in page


def test_many_kinds_of_alarms_are_bounded(tmp_path):
  append(tmp_path, "events.jsonl", *({"event": "alarm", "time": 1.0, "message": "x" * i} for i in range(500)))
  events = report.read_events(tmp_path)
  assert len(events.alarms) == report._ALARMS
  assert report.read_events(tmp_path / "none") == report.Events(0, [], [])


def test_damaged_records_spoil_no_page(tmp_path, undrawn):
  run = made(tmp_path / "a")
  append(run, "events.jsonl", {"event": "alarm"}, {"event": "alarm", "time": "soon", "message": None}, {"event": 7},
         {"event": "end", "time": None, "goodput": {"step": "much", "save": 1.0}}, {"event": "end", "goodput": 3})
  append(run, "metrics.jsonl", {"kind": "speed", "step": 500, "time": None}, {"kind": "speed", "step": 501, "goodput/x": "y"})
  (run / "env.json").write_text('{"devices": [')
  (run / "config.json").write_text("[1, 2]")
  assert "1970-01-01" in report.write(run).read_text()
  assert report.compare([run, made(tmp_path / "b")], tmp_path / "out").exists()


def test_parameters_are_counted_from_the_config_where_the_run_did_not_write_them():
  model = config.to_dict(small.run())["model"]
  total = sizes.sizes(small.run().model).total
  assert report._parameters({"model": model}, {})["parameters"] == f"{total:,}"
  assert report._parameters({"model": {**model, "new_field": 1}}, {}) == {} == report._parameters(None, {})


@pytest.mark.parametrize("device, shown", [("TFRT_CPU_0", False), ("TPU_0(process=0,(0,0,0,0))", True)])
def test_a_share_of_the_peak_is_not_shown_of_a_cpu(tmp_path, device, shown):
  run = made(tmp_path / "a")
  (run / "env.json").write_text(json.dumps({"devices": [device]}))
  records = report.read(run)
  description = report._description(run, records, report.read_events(run))
  figure = report._draw_curves({"a": records}, {"a": description})
  labels = [text.get_text() for axis in figure.axes if axis.get_legend() for text in axis.get_legend().get_texts()]
  assert any("MFU 40.0%" in label for label in labels) == shown
  report.plt.close(figure)


def test_labels_at_the_ends_of_curves_do_not_overlap():
  figure, axis = report.plt.subplots()
  axis.set_ylim(0, 10)
  heights = {"a": 5.0, "b": 5.01, "c": 9.99, "d": 10.0, "e": float("nan"), "f": 0.0}
  report._label_ends(axis, [(height, text, "C0") for text, height in heights.items()])
  places = {text.get_text(): text.xyann[1] for text in axis.texts}
  assert list(places) == ["f", "a", "b", "c", "d"]  # from below, as the values
  heights = list(places.values())
  assert min(np.diff(heights)) >= report._LABEL_GAP - 1e-9 and 0 <= heights[0] and heights[-1] <= 1
  assert abs(places["a"] - 0.5) < 0.01
  report.plt.close(figure)


def test_each_domain_has_a_colour_of_its_own(tmp_path):
  records = report.read(made(tmp_path / "a", domains=("one", "two", "three")))
  figure, axis = report.plt.subplots()
  report._draw_validation(axis, {"a": records})
  assert len({line.get_color() for line in axis.lines}) == 3
  report.plt.close(figure)


def sweep(tmp_path, values, seeds=(0,), field="lr"):
  """(records, configs) of runs that differ in a field, and in their seeds."""
  runs, configs = {}, {}
  for number, value in enumerate(values):
    for seed in seeds:
      name = f"{number}-{seed}"
      runs[name] = report.read(made(tmp_path / name, steps=41, rate=1.0 + number + 0.1 * seed))
      configs[name] = report._flat({"optimizer": {field: value}, "train": {"seed": seed}})
  return runs, configs


def test_the_swept_value_against_the_last_score(tmp_path):
  figure = report._draw_sweep(*sweep(tmp_path, [1e-3, 1e-4, 1e-2], seeds=(0, 1)))
  (axis,) = figure.axes
  assert axis.get_xlabel() == "optimizer.lr" and axis.get_xscale() == "log"
  mean = axis.lines[0]
  assert mean.get_xdata().tolist() == [1e-4, 1e-3, 1e-2]
  points = [line.get_ydata() for line in axis.lines[1:4]]
  assert all(len(point) == 2 for point in points)
  np.testing.assert_allclose(mean.get_ydata(), [np.mean(point) for point in points])
  report.plt.close(figure)


def test_a_sweep_of_names_and_runs_that_are_no_sweep(tmp_path):
  runs, configs = sweep(tmp_path, ["softmax", "sigmoid", None], field="gate")
  figure = report._draw_sweep(runs, configs)
  assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["None", "sigmoid", "softmax"]
  report.plt.close(figure)
  other = {name: {**fields, "model.width": str(i)} for i, (name, fields) in enumerate(configs.items())}
  assert report._draw_sweep(runs, other) is None
  assert report._draw_sweep(runs, {name: {} for name in runs}) is None
  lists = {name: {"data.shares": json.dumps([i, 1])} for i, name in enumerate(runs)}
  assert report._draw_sweep(runs, lists).axes[0].get_xlabel() == "data.shares"
  report.plt.close("all")


def test_tokens_by_domain_where_they_are_recorded():
  figure = report._draw_domain_tokens(tables([{"step": s, "time": 1.0 * s, "domain_tokens/a": 1e6, "domain_tokens/b": 5e5}
                                              for s in range(4)]))
  assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[1, 2, 3, 4], [0.5, 1, 1.5, 2]]
  report.plt.close(figure)
  assert report._draw_domain_tokens(tables([{"step": 0, "time": 0.0}])) is None


def test_the_load_is_of_a_tenth_of_the_steps(monkeypatch):
  """Windows of other widths that lie in it, weighed by what they count; and what is lacking is taken from beside."""
  windows = [metrics.Window(first, last, np.full((1, 2), (last + 1 - first) * [1, 3][first >= 90]))
             for first, last in [(0, 9), (10, 49), (90, 91), (92, 99)]]
  assert report._windows(windows, 90, 100) == windows[2:]
  assert report._windows(windows, 60, 70) == windows[2:3]
  drawn = []
  monkeypatch.setattr(report, "_heat", lambda axis, values, title, top: drawn.append(title) or axis.imshow(values))
  report._draw_load(report.Records({}, windows, {}, {}))
  assert drawn == ["steps 0-9", "steps 10-49", "steps 90-91", "steps 90-99"]


def test_examples_of_many_experts_are_of_some_layers():
  entry = {"tokens": [["<a", 0.5]], "snippets": []}
  records = tables([{"step": 0, "time": 0.0}])
  records.tables["eval/x"] = records.tables["train"]
  for layers, experts, shown in ((2, 4, 2), (3, 5000, 1), (58, 256, 8), (59, 0, 59)):
    record = {"kind": "examples/x", "step": 0, "time": float(layers), "examples": [[entry] * experts] * layers}
    report._keep_latest(records.latest, record)
    text = report._examples(records)
    assert text.count("<summary>") == shown and text.count("&lt;a") == shown * experts
    assert (f"{layers - shown} more layers" in text) == (shown < layers)


def test_no_picture_fails_a_run_that_is_done(tmp_path, monkeypatch):
  run = made(tmp_path / "a")

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(report, "_save", full)
  assert report.write_at_the_end(run) == (
      f"no report (OSError: [Errno 28] No space left on device); python -m tools.report {run} draws it")
  report.plt.close("all")


def test_mistakes_are_one_line(tmp_path):
  with pytest.raises(UserError, match="no training records"):
    tool.main([str(tmp_path / "none")])


@pytest.mark.slow
def test_watch_serves_what_is_new(tmp_path):
  run = made(tmp_path / "a", steps=60)
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  process = subprocess.Popen([sys.executable, "-m", "tools.report", str(run), "--watch", f"--port={port}", "--seconds=1"],
                             cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    assert f"http://127.0.0.1:{port}/" in process.stdout.readline()

    def page() -> str:
      return urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read().decode()

    assert "http-equiv=refresh" in page() and "<td>60</td>" in page()
    lines = made(tmp_path / "b", steps=70)
    shutil.copy(lines / "metrics.jsonl", run / "metrics.jsonl")
    deadline = time.monotonic() + 60
    while "<td>70</td>" not in page():
      assert time.monotonic() < deadline
      time.sleep(0.2)
  finally:
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_shows_it(tmp_path):
  """Headless chromium: every picture is loaded, nothing is wider than the page, no error in the console."""
  browser = shutil.which("chromium")
  if browser is None:
    pytest.skip("chromium is not installed")
  page = report.compare([made(tmp_path / "a"), made(tmp_path / "b", steps=80)], tmp_path / "out")
  probe = page.with_name("probe.html")
  probe.write_text(page.read_text().replace("</html>", """<script>addEventListener('load', () => {
    const images = [...document.images]
    document.title = JSON.stringify({images: images.length, loaded: images.filter(i => i.naturalWidth > 100).length,
                                     wide: document.documentElement.scrollWidth > innerWidth})})</script></html>"""))
  done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600",
                         "--virtual-time-budget=5000", "--enable-logging=stderr", "--dump-dom", f"file://{probe}"],
                        capture_output=True, text=True, timeout=120)
  told = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
  assert told == {"images": 5, "loaded": 5, "wide": False}
  assert "CONSOLE" not in done.stderr
