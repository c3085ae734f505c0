"""What a person sees; and that no output, or none at all, can end or hold up a program: real processes with broken streams."""

import doctest
import io
import os
import pathlib
import pty
import re
import subprocess
import sys
import threading
import time

import pytest

from moe import metrics
from moe import terminal

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Records, says and alarms like a run, prints like main, and writes how far it came.
_RUN = r"""
import pathlib, sys, time
from etils import epath
from moe import metrics, terminal
terminal.prepare_streams()
print("a plain line \u00fc", end="")
recorder = metrics.Recorder(epath.Path(sys.argv[1]), tensorboard=False)
recorder.terminal.say("model \u00e4 \u4e2d \ud800 \U0001f600")
with recorder.terminal.waiting("compiling"):
  pass
for step in range(200):
  recorder.metrics("train", step, {"loss": 2.0})
  recorder.terminal.status([terminal.Field(f"step {step}", f"{step}", 0), terminal.Field("loss " + "x" * 500, "loss 2", 1)],
                           step, 200)
recorder.alarm("loss is \u221e")
recorder.terminal.say("sample:\n\x1b[2J\x07\r" + "".join(map(chr, range(256))))
recorder.close()
recorder.terminal.say("report: the end")
pathlib.Path(sys.argv[1], "DONE").write_text("done")
"""


def run(tmp_path, redirect="", environment=(), timeout=60) -> subprocess.CompletedProcess:
  """The program above through bash, whose exit code is the program's."""
  (tmp_path / "run").mkdir(exist_ok=True)
  (tmp_path / "program.py").write_text(_RUN)
  command = f"{sys.executable} program.py run {redirect}"
  return subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, timeout=timeout,
                        env={**os.environ, "PYTHONUNBUFFERED": "", "PYTHONPATH": str(ROOT), **dict(environment)})


def assert_all_was_done(tmp_path, done: subprocess.CompletedProcess) -> str:
  """The events' text."""
  assert done.returncode == 0, done.stderr.decode()
  assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr, done.stderr.decode()
  assert (tmp_path / "run" / "DONE").exists()
  assert (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n") == 200
  return (tmp_path / "run" / "events.jsonl").read_text()


def test_all_is_printed_in_order_where_it_can_be(tmp_path):
  done = run(tmp_path, environment={"PYTHONIOENCODING": "utf-8"})
  events = assert_all_was_done(tmp_path, done)
  lines = done.stdout.decode().splitlines()
  assert lines[0] == "a plain line ümodel ä 中 ? 😀" and lines[1] == "compiling ..." and lines[-1] == "report: the end"
  assert [line[:6] for line in lines if line.startswith("step ")] == [f"step {step}"[:6] for step in range(200)]
  assert lines[2] == "step 0  loss " + "x" * 500  # whole where nothing is cut off
  assert "ALARM loss is ∞" in lines and b"\x1b" not in done.stdout and b"\\x1b[2J\\x07\\x0d" in done.stdout
  assert "observer" not in events


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_encoding_lacks_are_replaced(tmp_path, encoding):
  done = run(tmp_path, environment={"PYTHONIOENCODING": encoding})
  assert_all_was_done(tmp_path, done)
  text = done.stdout.decode(encoding)
  assert ("model ä ? ? ?" if encoding == "latin-1" else "model ? ? ? ?") in text and "ALARM loss is ?" in text


def test_stdout_on_a_full_disk(tmp_path):
  events = assert_all_was_done(tmp_path, run(tmp_path, "> /dev/full"))
  assert "the terminal cannot be written: [Errno 28] No space left on device" in events
  assert re.search(r'"the terminal: \d\d\d records of this run are lost', events)


def test_a_closed_pipe_and_no_stdout_at_all(tmp_path):
  done = run(tmp_path, "| true")
  assert "the terminal cannot be written: [Errno 32] Broken pipe" in assert_all_was_done(tmp_path, done)
  done = run(tmp_path, "| head -n 1")
  assert done.stdout.decode().startswith("a plain line")
  assert_all_was_done(tmp_path, done) if (tmp_path / "run" / "metrics.jsonl").unlink() else None
  (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)
  assert_all_was_done(tmp_path, run(tmp_path, ">&-"))
  (tmp_path / "run" / "metrics.jsonl").unlink()
  assert_all_was_done(tmp_path, run(tmp_path, ">&- 2>&- <&-"))


def test_a_reader_that_does_not_read(tmp_path):
  """As a pager at its first page: 100 kB do not fit into the pipe. Neither the steps nor the end wait for it."""
  reading, writing = os.pipe()
  (tmp_path / "run").mkdir()
  (tmp_path / "program.py").write_text("from moe import terminal; terminal._LAST_WORDS_SECONDS = 0.3\n" + _RUN)
  begin = time.monotonic()
  process = subprocess.Popen([sys.executable, "program.py", "run"], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
  _, error = process.communicate(timeout=60)
  assert process.returncode == 0 and error == b"", error
  assert time.monotonic() - begin < 20
  assert (tmp_path / "run" / "DONE").exists()
  os.close(reading)
  os.close(writing)


def on_a_terminal(tmp_path, columns: int, program: str = _RUN, stop: bytes | None = None) -> tuple[int, str]:
  """(exit code, what a terminal of so many columns received). `stop`: text at which the terminal goes away."""
  (tmp_path / "run").mkdir(exist_ok=True)
  (tmp_path / "program.py").write_text(program)
  ours, theirs = pty.openpty()
  environment = {**os.environ, "PYTHONUNBUFFERED": "", "PYTHONPATH": str(ROOT), "TERM": "xterm-256color",
                 "COLUMNS": str(columns), "LINES": "24"}
  process = subprocess.Popen([sys.executable, "program.py", "run"], cwd=tmp_path, stdin=theirs, stdout=theirs,
                             stderr=theirs, env=environment, start_new_session=True)
  os.close(theirs)
  received = io.BytesIO()
  try:
    while chunk := os.read(ours, 65536):
      received.write(chunk)
      if stop and stop in received.getvalue():
        os.close(ours)
        break
  except OSError:  # the other end is closed
    pass
  code = process.wait(60)
  text = received.getvalue().decode(errors="replace")
  assert "Traceback" not in text, text
  return code, text


def test_lines_of_a_terminal_fit_and_stay(tmp_path):
  code, text = on_a_terminal(tmp_path, 60)
  assert code == 0
  assert "training" in text and "200" in text  # the live line, while there is one
  plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")]
  assert [line for line in plain if re.fullmatch(r"\d+ loss 2 *", line)] and not any("xxx" in line for line in plain)
  shown = [int(match[1]) for line in plain if (match := re.match(r"(\d+) loss 2", line))]
  assert shown == list(range(200))  # each on a line of its own
  assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor is shown again


def test_a_terminal_that_goes_away(tmp_path):
  """The hang-up signal aside, as after `disown`: what is printed then fails with EIO."""
  program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + _RUN.replace(
      "recorder.alarm(", "time.sleep(1); recorder.alarm(")
  code, _ = on_a_terminal(tmp_path, 80, program, stop=b"compiling")
  assert code == 0 and (tmp_path / "run" / "DONE").exists()
  assert "the terminal cannot be written: [Errno 5]" in (tmp_path / "run" / "events.jsonl").read_text()


# ----------------------------------------------------------------------------------------------------------- status lines

_VALUES = {"loss": 2.34567, "bits_per_byte": 3.1234, "learning_rate": 2.9e-4, "gradient_norm": 0.5234, "balance": 1.0123,
           "load_max": 1.3212, "dropped": 0.0123, "tokens_per_second": 123456.7, "mfu": 0.41}


def test_the_examples_of_the_docstrings():
  assert doctest.testmod(terminal).attempted == 4 and doctest.testmod(terminal).failed == 0


def test_eighty_columns_keep_what_matters():
  fields = metrics.status_fields(12345, 100000, _VALUES, 3723)
  assert terminal.status_line(fields) == (
      "step 12345/100000  loss 2.3457  3.123 bits/byte  rate 2.90e-04  gradient 0.523  balance 1.012  max/mean load 1.32  "
      "dropped 1.23%  123,457 tok/s  MFU 41.0%  ETA 1:02:03")
  assert terminal.status_line(fields, 80) == (
      "12345/100000 loss 2.346 lr 3e-04 g 0.52 load 1.3 drop 1% 123k tok/s ETA 1:02:03")
  assert terminal.status_line(fields, 40) == "12345/100000 loss 2.346 ETA 1:02:03"
  assert terminal.status_line(fields, 20) == "12345/100000"
  for width in range(1, 200):
    assert len(terminal.status_line(fields, width)) <= width
  lengths = [len(terminal.status_line(fields, width)) for width in range(60, 200)]
  assert max(lengths) == len(terminal.status_line(fields))


def test_what_is_lacking_or_not_finite_is_no_trouble():
  fields = metrics.status_fields(1, 2, {"loss": float("nan"), "tokens_per_second": float("inf"), "gradient_norm": 1e30}, 1e9)
  assert terminal.status_line(fields) == "step 1/2  loss nan  gradient 1e+30  inf tok/s  ETA 277777:46:40"
  assert "MFU" not in terminal.status_line(metrics.status_fields(1, 2, {"loss": 1.0}, float("nan")))


# --------------------------------------------------------------------------------------------------------------- progress


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
  with terminal.progress("read", 4, "files", seconds=0.05) as work:
    for _ in range(4):
      time.sleep(0.06)
      work.advance()
  lines = capsys.readouterr().err.splitlines()
  assert 2 <= len(lines) <= 5
  assert re.fullmatch("read: 2 of 4 files, 50%, 0:00, 0:00 left", lines[2]), lines
  with terminal.progress("quick", seconds=5):
    pass
  assert capsys.readouterr().err == ""


def test_progress_counts_the_rest_from_where_it_began():
  work = terminal.Work("bytes", 3e9, 1e9, unit="B")
  work.start -= 100
  work.advance(1e9)
  assert work.line() == "bytes: 2,000.0 of 3,000.0 MB, 67%, 1:40, 1:40 left"


def test_progress_of_a_tool_whose_stderr_is_gone(tmp_path):
  program = ("import time\nfrom moe import terminal\nwith terminal.progress('x', 3, seconds=0.05) as work:\n"
             "  for _ in range(3):\n    time.sleep(0.1)\n    work.advance()\nprint('fine')\n")
  for redirect in ("2> /dev/full", "2>&-"):
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c \"$PROGRAM\" {redirect}"], capture_output=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "PROGRAM": program})
    assert done.returncode == 0 and done.stdout == b"fine\n"


def test_an_error_that_cannot_be_printed_leaves_the_exit_code():
  program = "import sys; from moe import terminal; terminal.complain('preempted: \u00fc'); sys.exit(143)"
  for redirect in ("2> /dev/full", "2>&-", ""):
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c \"$PROGRAM\" {redirect}"], capture_output=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "PROGRAM": program, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (143, b"" if redirect else b"preempted: ?\n")


def test_a_bar_on_a_terminal(tmp_path):
  program = """
import time
from moe import terminal
with terminal.progress("reading", 20, "files") as work:
  for _ in range(20):
    time.sleep(0.03)
    work.advance()
"""
  code, text = on_a_terminal(tmp_path, 80, program)
  assert code == 0 and "reading" in text and re.search(r"\d+/20", text)


def test_a_stuck_output_does_not_hold_a_thread_that_says_something():
  """The negative control of the reader that does not read: a plain print does wait."""
  reading, writing = os.pipe()
  with os.fdopen(writing, "w", buffering=1) as stream:
    thread = threading.Thread(target=lambda: print("x" * 200_000, file=stream), daemon=True)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    while thread.is_alive():
      os.read(reading, 1 << 20)
  os.close(reading)
