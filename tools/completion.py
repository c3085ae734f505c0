"""Shell completion of the installed commands: `moe-completion bash` writes a file for each. Library: shtab.

Flags, verbs, choices, file names, and --gin.CLASS.FIELD where a config is taken. Open a new shell afterwards. zsh: the folder
must be in fpath (`fpath=(~/.local/share/zsh/site-functions $fpath)` before `compinit` in ~/.zshrc).
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
from unittest import mock

from moe.errors import UserError
from tools import config as config_tool
from tools import terminal

FOLDERS = {"bash": ("~/.local/share/bash-completion/completions", "{}"), "zsh": ("~/.local/share/zsh/site-functions", "_{}"),
           "fish": ("~/.config/fish/completions", "{}.fish")}
COMMANDS = ("train", "evaluate", "sample", "report", "expert-cache", "build-data", "inspect-checkpoint", "import-hf",
            "export-hf", "lm-harness", "compile-check", "snapshot-status", "plan-snapshots", "doctor", "config", "completion")


class _Made(Exception):
  """Carries a finished parser out of the program that was to use it."""


def parser_of(command: str) -> argparse.ArgumentParser:
  """The parser of an installed command, with its bindings as flags."""

  def stop(parser, *_):
    raise _Made(parser)

  name = command.replace("-", "_")
  main = importlib.import_module("moe.command_line").parse if name == "train" else importlib.import_module(f"tools.{name}").main
  try:
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
      main([])
  except _Made as made:
    parser = made.args[0]
  parser.prog = f"moe-{command}"
  _prepare(parser)
  return parser


def _prepare(parser: argparse.ArgumentParser) -> None:
  import shtab

  for action in list(parser._actions):
    if isinstance(action, argparse._SubParsersAction):
      for part in action.choices.values():
        _prepare(part)
    elif action.nargs != 0 and action.type is None and not action.choices:
      action.complete = shtab.FILE
    if action.dest == "gin_file":
      for name, field in config_tool.fields().items():
        parser.add_argument(f"--gin.{name}", metavar="VALUE", help=field.meaning.replace("%", "%%") or None)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.completion", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("shell", choices=tuple(FOLDERS))
  parser.add_argument("--out", metavar="DIR", help="where to (default: the shell's own folder below the home directory)")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args(argv)
  try:
    import shtab
  except ImportError as error:
    raise UserError("completion needs shtab; pip install shtab") from error
  default, name = FOLDERS[arguments.shell]
  folder = pathlib.Path(arguments.out or default).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  for command in COMMANDS:
    (folder / name.format(f"moe-{command}")).write_text(shtab.complete(parser_of(command), arguments.shell))
  told = {"folder": str(folder), "commands": [f"moe-{command}" for command in COMMANDS]}
  terminal.as_json(told) if arguments.json else print(f"{len(COMMANDS)} commands, in {folder}; open a new shell")
  return terminal.FINE


if __name__ == "__main__":
  terminal.run(main)
