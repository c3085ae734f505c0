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


def test_tokens_and_gaps():
  records = [{"step": s, "tokens": 10, "time": 100.0 + s + (9000 if s > 5 else 0)} for s in range(10)]
  np.testing.assert_allclose(report._tokens(records, np.array([0, 4, 9])), [10, 50, 100])
  hours = report._hours(records)
  assert np.isnan(hours[6]) and np.isfinite(np.delete(hours, 6)).all()


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
