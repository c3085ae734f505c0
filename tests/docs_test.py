"""Every command in README and docs/: the module is there, its flags are its flags, and the files and fields it names exist.

Nothing is run here; that is docs_run_test.
"""

import contextlib
import functools
import importlib
import inspect
import io
import pathlib
import re
import shlex
from unittest import mock

import pytest

from tools import config as config_tool

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_MADE_UP = ("runs/", "data/", "path/to", "small", "hf_model", "text", "/tmp", "gs://", "token", "roots", "index.html", "my-")


def commands() -> list[tuple[str, str]]:
  """(page, command) of every fenced line and table cell that begins with `python -m` or `bash tools/`."""
  found = []
  for page in PAGES:
    text = page.read_text().replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M))
    lines = [line.strip() for line in fenced.splitlines()]
    lines += re.findall(r"`((?:python -m|bash tools/)[^`]*)`", text.replace("\n", " "))
    found += [(page.name, re.sub(r"\s+#.*", "", line)) for line in lines
              if re.match(r"python -m (moe|tools)|bash tools/", line)]
  return sorted(set(found))


@functools.cache
def help_of(module: str, verb: str = "") -> str:
  """What `--help` prints; "" for a module that takes no flags."""
  if module == "moe.train":
    main = importlib.import_module("moe.command_line").parse
  else:
    loaded = importlib.import_module(module)
    if "ArgumentParser" not in inspect.getsource(loaded):
      return ""
    main = loaded.main
  said, arguments = io.StringIO(), [verb, "--help"] if verb else ["--help"]
  with contextlib.redirect_stdout(said), mock.patch("sys.argv", [module, *arguments]), pytest.raises(SystemExit):
    main(*([arguments] if inspect.signature(main).parameters else []))
  return said.getvalue()


def problems(command: str) -> list[str]:
  words = shlex.split(command.replace("...", "").replace("[", "").replace("]", ""))
  if words[0] == "bash":
    return [] if (ROOT / words[1]).exists() else [f"{words[1]} does not exist"]
  module, rest = words[2], words[3:]
  if not (ROOT / (module.replace(".", "/") + ".py")).exists():
    return [f"{module} does not exist"]
  if module == "moe.stored":
    return []
  train = rest[rest.index("--") + 1 :] if "--" in rest else []
  rest = rest[: rest.index("--")] if "--" in rest else rest
  verb = rest[0] if module in ("tools.inspect_checkpoint", "tools.config") and rest else ""
  known, found = help_of(module, verb), []
  for word, text in [(w, known) for w in rest] + [(w, help_of("moe.train")) for w in train]:
    flag = word.partition("=")[0]
    if flag.startswith("--gin."):
      field = flag.removeprefix("--gin.")
      if field not in config_tool.fields():
        found.append(f"{field} is no field")
    elif flag.startswith("--") and not re.search(rf"{flag}\b", text):
      found.append(f"{module} {verb} has no {flag}")
    for path in re.findall(r"[\w./]+\.gin\b", word):
      if not path.startswith(_MADE_UP) and not (ROOT / path).exists() and "X" not in path and not path.startswith("RUN"):
        found.append(f"{path} does not exist")
  return found


@pytest.mark.parametrize("page, command", commands())
def test_command(page, command):
  assert problems(command) == []


def test_there_are_commands_and_a_wrong_one_shows():
  assert len(commands()) > 60
  assert problems("python -m tools.nothing") and problems("python -m tools.report runs/x --nothing")
  assert problems("python -m moe.train --gin.Router.topk=1") and problems("python -m moe.train --gin_file=configs/none.gin")
  assert problems("python -m tools.inspect_checkpoint ls runs/x --rtol=1") == ["tools.inspect_checkpoint ls has no --rtol"]
