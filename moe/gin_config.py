"""gin at the edge: files and flags in, one frozen `Run` out. Nothing else imports gin.

gin 0.5.0 is frozen upstream and lenient: it accepts wrong types, unused bindings and undefined macros, and reports
many mistakes without saying where. `resolve` is the strict layer round it. Every refusal is a `ConfigError` of one
line that names the flag, or the file and line, at fault.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import pathlib
import re
import tokenize
import typing

import gin
from gin import config as gin_internals
from gin import config_parser

from moe import config
from moe.config import ConfigError

_CLASSES = {
    name: value for name, value in vars(config).items()
    if inspect.isclass(value) and dataclasses.is_dataclass(value)
}
for _class in _CLASSES.values():
  gin.external_configurable(_class, module="moe.config")

_HERE = pathlib.Path(__file__).resolve().parent
CONFIGS = next(d for d in (_HERE.parent / "configs", _HERE / "configs") if d.is_dir())


@dataclasses.dataclass(frozen=True)
class Resolved:
  """A resolved run and the texts that are written beside it."""

  run: config.Run
  operative: str  # gin text that gives the same run again
  notes: tuple[str, ...]  # unused bindings, where they were allowed


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that every gin-launched program shares. `--gin.X=v` arrives as an unknown flag."""
  parser.add_argument("--gin_file", action="append", default=[], metavar="FILE",
                      help="gin file; repeat for several, later ones win (default: configs/run/quickstart.gin)")
  parser.add_argument("--allow_unused", action="store_true", help="accept bindings that nothing reads")


def from_arguments(arguments: argparse.Namespace, rest: list[str]) -> Resolved:
  """Resolves the flags of `add_arguments` and the `--gin.X=v` flags that argparse left over.

  Raises:
    ConfigError: for an unknown flag and for everything `resolve` refuses.
  """
  bindings, i = [], 0
  while i < len(rest):
    flag = rest[i]
    if not flag.startswith("--gin."):
      raise ConfigError(f"unknown argument {flag!r}; bindings are written --gin.Train.steps=100, see --help")
    if "=" not in flag:
      if i + 1 == len(rest):
        raise ConfigError(f"{flag} has no value; write {flag}=VALUE")
      i += 1
      flag = f"{flag}={rest[i]}"
    bindings.append(flag)
    i += 1
  return resolve(arguments.gin_file or [CONFIGS / "run" / "quickstart.gin"], bindings, arguments.allow_unused)


def resolve(files: typing.Sequence, flags: typing.Sequence[str] = (), allow_unused: bool = False) -> Resolved:
  """Parses gin files, then flags of the form `--gin.Class.field=value`, and builds the run once.

  Raises:
    ConfigError: one line with the flag or file:line at fault, and a remedy where one can be named.
  """
  gin.clear_config()  # unlocks it too
  origins: dict[tuple, str] = {}
  for path in files:
    _parse_file(pathlib.Path(path), origins, ())
  for flag in flags:
    binding = flag.removeprefix("--gin.")
    name, _, value = binding.partition("=")
    _parse_text(f"{name} = {value}", f"flag --gin.{binding}", lambda line: f"flag --gin.{binding}", origins, None, ())
  _check_references(origins)
  gin.finalize()
  run = _build()
  unused = sorted(f"{origin}: nothing reads {_key_text(key)}" for key, origin in origins.items() if not _was_used(key))
  if unused and not allow_unused:
    raise ConfigError("; ".join(unused) + " (remove it, or pass --allow_unused)")
  return Resolved(run, gin.operative_config_str(max_line_length=116), tuple(unused))


def _parse_file(path: pathlib.Path, origins: dict, including: tuple[pathlib.Path, ...]) -> None:
  shown = str(path)
  if not path.is_file() and path.parts[:1] == ("configs",):  # an installation has them in its own folder
    path = CONFIGS.joinpath(*path.parts[1:])
  if not path.is_file():
    folder = path.parent if path.parent.is_dir() else CONFIGS
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.gin"))]
    raise ConfigError(f"gin file {shown} does not exist" + _did_you_mean(path.name, names))
  if path.resolve() in including:
    raise ConfigError(f"gin file {shown} includes itself")
  try:
    text = path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"gin file {shown} cannot be read: {error}") from error
  _parse_text(text, shown, lambda line: f"{shown}:{line}", origins, path.parent, including + (path.resolve(),))


def _parse_text(text, source, where, origins, folder, including) -> None:
  """Applies every statement of `text`; `where(line)` names its place in an error."""
  parser = config_parser.ConfigParser(text, gin_internals.ParserDelegate())
  seen: dict[tuple, int] = {}
  line = 1
  while True:
    try:
      statement = next(parser)
    except StopIteration:
      return
    except (SyntaxError, tokenize.TokenError, ValueError, IndentationError, RuntimeError) as error:
      raise ConfigError(f"{_place(where, error, line)}: {_explain_syntax(error, text)}") from error
    if statement is None:
      return
    line = statement.location.line_num
    if isinstance(statement, config_parser.IncludeStatement):
      if folder is None:
        raise ConfigError(f"{where(line)}: include works in files only; use --gin_file")
      _parse_file(folder / statement.filename, origins, including)
    elif isinstance(statement, config_parser.ImportStatement):
      raise ConfigError(f"{where(line)}: import is refused: configs name the dataclasses of moe/config.py only")
    elif isinstance(statement, config_parser.BindingStatement):
      key = _bind(statement, where(line))
      if key in seen:
        raise ConfigError(f"{where(line)}: {_key_text(key)} is bound twice in {source}, first on line {seen[key]}")
      seen[key] = line
      origins[key] = where(line)


def _bind(statement, place: str) -> tuple:
  """Binds one parameter or macro after checking names and type; returns gin's key (scope, selector, parameter)."""
  scope, selector, parameter, value, _ = statement
  if not parameter:  # a macro: NAME = value
    name = f"{scope}/{selector}" if scope else selector
    gin.bind_parameter((name, "gin.macro", "value"), value)
    return (name, "gin.macro", "value")
  cls = _CLASSES.get(selector.removeprefix("moe.config."))
  if cls is None:
    raise ConfigError(f"{place}: there is no configurable {selector!r}" + _did_you_mean(selector, _CLASSES)
                      + f"; there are {', '.join(_CLASSES)}")
  fields = [f.name for f in dataclasses.fields(cls)]
  if parameter not in fields:
    raise ConfigError(f"{place}: {selector} has no parameter {parameter!r}" + _did_you_mean(parameter, fields)
                      + f"; it has {', '.join(fields)}")
  _check_type(cls, parameter, value, place)
  gin.bind_parameter((scope, selector, parameter), value)
  return (scope, f"moe.config.{cls.__name__}", parameter)


def _check_type(cls, parameter: str, value, place: str) -> None:
  hint = typing.get_type_hints(cls)[parameter]
  wanted = typing.get_origin(hint) or hint
  if isinstance(value, gin_internals.ConfigurableReference):
    if value.config_key[1] in ("gin.macro", "gin.constant"):
      return  # checked where the macro is bound, by the dataclass itself
    if not value.evaluate:
      raise ConfigError(f"{place}: {parameter} names a class; write @{value.selector}() to build it")
    if dataclasses.is_dataclass(wanted) and not issubclass(value.configurable.wrapped, wanted):
      raise ConfigError(f"{place}: {cls.__name__}.{parameter} is a {wanted.__name__}, "
                        f"not a {value.configurable.wrapped.__name__}")
    return
  accepted = (int, float) if wanted is float else wanted
  if wanted is tuple and isinstance(value, list):
    raise ConfigError(f"{place}: {cls.__name__}.{parameter} is a tuple; write it in ( ), with a comma after one item")
  if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
    raise ConfigError(f"{place}: {cls.__name__}.{parameter} wants {wanted.__name__}, got {value!r} "
                      f"({type(value).__name__})")


def _check_references(origins: dict) -> None:
  """Refuses macros that nobody defines and REQUIRED values that nobody sets."""
  defined = {key[0] for key in origins if key[1] == "gin.macro"}
  for key, origin in origins.items():
    value = gin_internals._CONFIG[key[:2]].get(key[2])
    if _is_required(value):
      raise ConfigError(f"{origin}: {_key_text(key)} is required but not set; pass --gin.{_key_text(key)}=VALUE")
    for reference in gin_internals.iterate_references({key[:2]: {key[2]: value}}):
      scope, selector = reference.config_key
      if selector == "gin.macro" and scope not in defined:
        raise ConfigError(f"{origin}: macro %{scope} is not defined" + _did_you_mean(scope, defined))


def _build() -> config.Run:
  try:
    return gin.get_configurable("moe.config.Run")()
  except ConfigError as error:  # gin appends its own lines to the message
    raise ConfigError(_first_line(error)) from error
  except TypeError as error:
    missing = re.search(r"(\w+)\.__init__\(\) missing \d+ required keyword-only arguments?: (.*)", str(error))
    if not missing:
      raise
    cls, names = missing.group(1), re.findall(r"'(\w+)'", missing.group(2))
    shown = ", ".join(f"{cls}.{name}" for name in names)
    raise ConfigError(f"{shown} must be set; pass --gin.{cls}.{names[0]}=VALUE or bind it in a gin file") from error


def _is_required(value) -> bool:
  return value is gin.REQUIRED or (isinstance(value, gin_internals.ConfigurableReference)
                                   and value.config_key == ("gin.REQUIRED", "gin.constant"))


def _was_used(key: tuple) -> bool:
  scope, selector, parameter = key
  return parameter in gin_internals._OPERATIVE_CONFIG.get((scope, selector), {})


def _key_text(key: tuple) -> str:
  scope, selector, parameter = key
  if selector == "gin.macro":
    return f"macro {scope}"
  name = f"{selector.removeprefix('moe.config.')}.{parameter}"
  return f"{scope}/{name}" if scope else name


def _did_you_mean(name: str, candidates) -> str:
  close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
  return f"; did you mean {close[0]!r}?" if close else ""


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0]


def _place(where, error: Exception, line: int) -> str:
  found = getattr(error, "lineno", None)
  if found is None:
    numbers = re.search(r"line (\d+)", str(error)) or re.search(r"\((\d+), \d+\)", str(error))
    found = int(numbers.group(1)) if numbers else line
  return where(found)


def _explain_syntax(error: Exception, text: str) -> str:
  message = _first_line(error)
  if isinstance(error, tokenize.TokenError) or "EOF in multi-line" in message or "unterminated" in message:
    return "a quote or bracket is not closed"
  if "malformed node" in message or "Unable to parse value" in message:
    return ("the value cannot be read; a string needs quotes (in a shell: --gin.Class.field='\"text\"'); "
            "True and False are capitalised")
  unknown = re.search(r"No configurable matching (?:reference )?'?@?([\w./]+)", message)
  if unknown or "Could not find" in message:
    name = unknown.group(1) if unknown else message
    return f"there is no configurable {name!r}" + _did_you_mean(name.split("/")[-1], _CLASSES)
  if "Expected newline" in message:
    return "text after the value; gin has no arithmetic, write the result"
  return f"not valid gin: {message}"
