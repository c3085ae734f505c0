"""Every command in README and docs/ is run, in a folder with a small trained run, data and a Hugging Face model.

What a machine without a TPU, a cloud or hours of time cannot do has a stand-in: `python -m tests.docs_run_test` lists them.
"""

import gzip
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from tests import docs_test
from tests import small
from tests import train_test

pytestmark = pytest.mark.slow
ROOT = docs_test.ROOT
# pattern of a command -> what replaces it, and why; the first that fits. None: not run here.
STAND_INS = [
    (r"bash tools/dev\.sh", None, "makes environments: README's two commands and the legs are CI's"),
    (r"python -m pytest|softplus|masked", None, "run where its diff is applied (test_a_worked_example)"),
    (r"tools\.(compile_check|overlap|soak|bench\.\w+|experiments\.\w+)", "help", "minutes to hours, a compiler or a device"),
    (r"tools\.lm_harness", "help", "needs lm-eval: lm_harness_test, in the parity leg"),
    (r"tools\.launch_tpu_vm", "--dry_run", "a cloud: launch_test runs whole jobs with a stand-in for gcloud"),
    (r"moe\.train .*--help", "", ""),
    (r"moe\.train", "--dry_run", "minutes: train_test trains; flags of other hosts are left out"),
    (r"--watch", "without --watch", "serves until Control-C: report_test"),
    (r"--live", "without --live", "needs a job under way: faults_test"),
]
_OF_HOSTS = ("--supervise", "--multihost", "--token_file", "--run_dir")


def stand_in(command: str) -> tuple[list[str] | None, str]:
  """(what is run in its place, why)."""
  plain = re.sub(r"\[[^\]]*--[^\]]*\]|\s\.\.\.(?=\s|$)", "", command)
  for name, value in {"RUN/checkpoints/STEP": "runs/mine/checkpoints/240", "RUN_DIR": "runs/mine"}.items():
    plain = plain.replace(name, value)
  words = shlex.split(plain)
  for pattern, instead, why in STAND_INS:
    if not re.search(pattern, plain):
      continue
    if instead is None:
      return None, why
    if instead == "help":
      takes_flags = docs_test.help_of(words[2])
      return (words[:3] + ["--help"] if takes_flags else ["python", "-c", f"import {words[2]}"]), why
    if instead.startswith("without "):
      return [w for w in words if w != instead.removeprefix("without ")], why
    if words[2] == "moe.train" and instead:
      words = [w for w in words if not w.startswith(_OF_HOSTS)]
    if instead and instead not in words:
      words.insert(words.index("--") if "--" in words else len(words), instead)
    return words, why
  return words, ""


@pytest.fixture(scope="session")
def place(tmp_path_factory):
  """A checkout with what the pages speak of: runs, data, texts, a model of Hugging Face."""
  folder = tmp_path_factory.mktemp("docs") / "checkout"
  folder.mkdir()
  corpus = small.write_corpus(folder / "data" / "books", held_out=3)
  shutil.copytree(corpus, folder / "data" / "web")
  train_test.finish(train_test.command(corpus, folder / "runs" / "mine", **{
      "Train.steps": 240, "Checkpoint.every_steps": 100, "Checkpoint.keep_last": 3, "Model.num_layers": 4,
      "Train.log_every_steps": 20}))
  shutil.copytree(folder / "runs" / "mine", folder / "runs" / "other")
  run(["python", "-m", "tools.export_hf", "runs/mine", "--out=path/to/hf_model"], folder)
  (folder / "texts").mkdir()
  for i in range(30):
    (folder / "texts" / f"{i}.txt").write_text(f"Text number {i}.\n" * 20)
  (folder / "crawl-0.jsonl").write_text("".join(f'{{"content": "Page {i} of the crawl."}}\n' for i in range(60)))
  make_mixed(folder)
  run(["python", "-m", "tools.import_hf", "path/to/hf_model", "--out=runs/imported"], folder)
  run(["python", "-m", "tools.inspect_checkpoint", "convert", "runs/mine", "--out=small", "--params_only"], folder)
  return folder


def make_mixed(folder) -> None:
  """What docs/your_data.md speaks of: a folder of files of several kinds, the domain and tokenizer of it, and its config."""
  texts = [f"Note {i}: {'words of a note, ' * (i % 9 + 1)}" for i in range(200)]
  records = [json.dumps({"text": text}) for text in texts]
  for name in ("mixed", "more"):
    (folder / name).mkdir()
  for i, text in enumerate(texts[:50]):
    (folder / "mixed" / f"{i}.txt").write_text(text)
  (folder / "mixed" / "forum.jsonl.gz").write_bytes(gzip.compress("\n".join(records[50:100]).encode()))
  (folder / "mixed" / "notes.json").write_text(f"[{','.join(records[100:150])}]")
  parquet.write_table(pyarrow.table({"text": texts[150:]}), folder / "mixed" / "pages.parquet")
  (folder / "more" / "a.txt.gz").write_bytes(gzip.compress(texts[0].encode()))
  page = (ROOT / "docs" / "your_data.md").read_text()
  (folder / "data" / "notes.gin").write_text(re.search(r"```\n(include.*?)```", page, re.S)[1])
  build = ["python", "-m", "tools.build_data"]
  run([*build, "--domain=notes", "--output=data/notes", "--held_out=0.05", "mixed"], folder)
  run([*build, "--train_tokenizer=data/notes.json", "--vocab_size=1024", "data/notes"], folder)


def environment() -> dict[str, str]:
  """A user's, without what this pytest keeps in it."""
  return {name: value for name, value in train_test.environment().items() if not name.startswith(("PYTEST", "MOE_TURN"))}


def run(words, folder) -> str:
  """What it prints; `diff` may say that there are differences."""
  done = subprocess.run([sys.executable, *words[1:]], cwd=folder, text=True, capture_output=True, timeout=300,
                        env={**environment(), "PYTHONPATH": str(ROOT), "HOME": str(folder),
                             "MOE_CACHE": os.environ.get("MOE_CACHE", str(pathlib.Path.home() / ".cache" / "moe"))})
  assert done.returncode in (0, 1 if "diff" in words else 0), f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
  return done.stdout


def executed() -> list[str]:
  """What is run of all pages, each once."""
  return sorted({shlex.join(words) for _, command in docs_test.commands() if (words := stand_in(command)[0])})


@pytest.mark.parametrize("command", executed())
def test_command(place, tmp_path, command):
  """In a copy of its own, without what it is about to write."""
  words = shlex.split(command)
  copy = shutil.copytree(place, tmp_path / "checkout", ignore=shutil.ignore_patterns("xla"))
  (copy / "configs").symlink_to(ROOT / "configs")
  for word in words:
    made = re.match(r"--(?:out|output|write_tasks)=(.+)", word)
    if made:
      shutil.rmtree(copy / made[1], ignore_errors=True)
  assert run(words, copy) or "-c" in words


@pytest.mark.parametrize("page", ["new_router", "new_kernel"])
def test_a_worked_example(page, tmp_path):
  """The page's diff is applied to a copy of the code, and its commands are run there; without the diff they fail."""
  text = (ROOT / "docs" / f"{page}.md").read_text()
  example = re.split(r"\n## ", text[text.index("## An example") + 3 :])[0]
  for part in ("moe", "configs", "tools", "tests"):
    shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(ROOT / "pyproject.toml", tmp_path)
  lines = [line for line in example.splitlines() if re.match(r"python -m (pytest|moe\.train)", line)]
  assert len(lines) >= 2

  def codes():
    return [subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, timeout=600, capture_output=True,
                           env={**environment(), "PYTHONPATH": str(tmp_path)}).returncode for line in lines]

  assert all(code for line, code in zip(lines, codes()) if "softplus" in line or "masked" in line)
  diff = re.search(r"^```diff\n(.*?)^```", example, re.S | re.M)[1]
  subprocess.run(["git", "apply"], input=diff, text=True, cwd=tmp_path, check=True)
  assert codes() == [0] * len(lines)


def main() -> None:
  for page, command in docs_test.commands():
    words, why = stand_in(command)
    if why:
      print(f"{page}: {command}\n    {'not run' if words is None else shlex.join(words)}: {why}")


if __name__ == "__main__":
  main()
