"""The knobs: `python -m tools.config show|diff|explain|list`

    show [flags of a run]         the resolved config, a line a field; --json
    diff A B                      what differs between two: gin files, runs or checkpoints
    explain NAME                  a field (Router.top_k) or a class (Router): type, default, meaning
    list [GLOB]                   all fields, such as 'Router.*' or '*coef'

Exit code 0: fine; 1: they differ; 2: there is no such thing.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import fnmatch
import inspect
import pathlib
import sys
from typing import NamedTuple

from etils import epath

from moe import config
from moe import gin_config
from moe import stored
from moe.errors import UserError
from tools import terminal


class Field(NamedTuple):
  name: str  # Router.top_k
  type: str
  default: str
  meaning: str  # its comment


def fields() -> dict[str, Field]:
  """Every field by name, from moe/config.py itself: its comments are the meaning."""
  meanings = config.meanings()
  found = {}
  for cls in vars(config).values():
    for field in dataclasses.fields(cls) if inspect.isclass(cls) and dataclasses.is_dataclass(cls) else ():
      name = f"{cls.__name__}.{field.name}"
      default = "(must be set)" if field.default is dataclasses.MISSING else _default(field)
      found[name] = Field(name, field.type, default, meanings[name])
  return found


def _default(field: dataclasses.Field) -> str:
  return f"{type(field.default).__name__}()" if dataclasses.is_dataclass(field.default) else repr(field.default)


def show(arguments, rest: list[str]) -> int:
  resolved = gin_config.from_arguments(arguments, rest)
  if arguments.json:
    terminal.as_json(config.to_dict(resolved.run))
  else:
    print("\n".join(terminal.flat(config.to_dict(resolved.run))))
  return terminal.FINE


def diff(arguments, rest: list[str]) -> int:
  lines = config.differences(*(_read(path) for path in (arguments.a, arguments.b)))
  if arguments.json:
    terminal.as_json(lines)
  else:
    print("\n".join(lines) or "no difference")
  return terminal.DIFFERS if lines else terminal.FINE


def _read(path: str) -> dict:
  """A gin file, resolved, or the config kept with a run or checkpoint."""
  if path.endswith(".gin"):
    return config.to_dict(gin_config.resolve([pathlib.Path(path)]).run)
  kept = epath.Path(path) / "config.json"
  if kept.exists():
    return config.to_dict(config.from_dict(config.Run, stored.read_json(kept)))
  found = stored.find(path).config
  if not found or "model" not in found:
    raise UserError(f"{path} is neither a .gin file nor a run or checkpoint with a config of ours")
  return config.to_dict(config.from_dict(config.Run, found))


def explain(arguments, rest: list[str]) -> int:
  known = fields()
  classes = {name.partition(".")[0] for name in known}
  if arguments.name in classes:
    chosen = [f for f in known.values() if f.name.startswith(arguments.name + ".")]
    text = inspect.cleandoc(getattr(config, arguments.name).__doc__ or "")
  elif arguments.name in known:
    chosen, text = [known[arguments.name]], ""
  else:
    names = [*known, *classes, *(n.partition(".")[2] for n in known)]
    near = difflib.get_close_matches(arguments.name, names, 1, 0.6)
    same = [n for n in known if n.partition(".")[2] in (arguments.name, *near)] or near
    raise UserError(f"there is no {arguments.name}" + (f"; did you mean {' or '.join(same[:3])}?" if same else ""))
  if arguments.json:
    terminal.as_json([field._asdict() for field in chosen])
    return terminal.FINE
  if text:
    print(text + "\n")
  for field in chosen:
    print(f"{field.name}: {field.type} = {field.default}" + (f"\n    {field.meaning}" if field.meaning else ""))
  if len(chosen) == 1:
    print(f"    set it: --gin.{chosen[0].name}=VALUE" + ("  (text in quotes within quotes: '\"x\"')"
                                                      if chosen[0].type == "str" else ""))
  return terminal.FINE


def list_fields(arguments, rest: list[str]) -> int:
  chosen = [f for f in fields().values() if fnmatch.fnmatch(f.name, arguments.glob)]
  if not chosen:
    raise UserError(f"no field matches {arguments.glob!r}")
  if arguments.json:
    terminal.as_json([field._asdict() for field in chosen])
  else:
    terminal.table(("name", "type", "default", "meaning"), chosen, left=("name", "type", "default", "meaning"))
  return terminal.FINE


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.config", description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  verbs = parser.add_subparsers(required=True, metavar="VERB")
  for name, function in (("show", show), ("diff", diff), ("explain", explain), ("list", list_fields)):
    made = verbs.add_parser(name, allow_abbrev=False)
    made.set_defaults(verb=function, name_of_verb=name)
    made.add_argument("--json", action="store_true")
    if name == "show":
      gin_config.add_arguments(made)
    elif name == "diff":
      made.add_argument("a")
      made.add_argument("b")
    elif name == "explain":
      made.add_argument("name")
    else:
      made.add_argument("glob", nargs="?", default="*")
  arguments, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
  if rest and arguments.name_of_verb != "show":
    raise UserError(f"unknown argument {rest[0]!r}")
  return arguments.verb(arguments, rest)


if __name__ == "__main__":
  terminal.run(main)
