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

from moe import metrics
from moe import report
from moe.errors import UserError
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
  assert told == {"images": 3, "loaded": 3, "wide": False}
  assert "CONSOLE" not in done.stderr
