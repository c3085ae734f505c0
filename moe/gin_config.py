"""gin at the edge: files and flags in, one frozen `Run` out. Nothing else imports gin.

gin 0.5.0 is frozen upstream and lenient: it accepts wrong types, unused bindings and undefined macros, and reports
many mistakes without saying where. `resolve` is the strict layer round it. Every refusal is a `ConfigError` of one
line that names the flag, or the file and line, at fault.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import inspect
import os
import pathlib
import re
import tokenize
import typing

import gin
from gin import config as gin_internals
from gin import config_parser

from moe import config
from moe.config import ConfigError, did_you_mean

_CLASSES = {
    name: value for name, value in vars(config).items()
    if inspect.isclass(value) and dataclasses.is_dataclass(value)
}
for _class in _CLASSES.values():
  gin.external_configurable(_class, module="moe.config")

_HERE = pathlib.Path(__file__).resolve().parent
# In a checkout beside the package, installed within it: a folder `configs` beside an installed one is somebody else's.
CONFIGS = next(d for d in (_HERE.parent / "configs", _HERE / "configs") if (d / "base.gin").is_file())
QUICKSTART = CONFIGS / "run" / "quickstart.gin"  # what runs without --gin_file


_MACRO = "gin.macro"
_FLAGS = "flags"  # the source of every --gin.X=v


class _Binding(typing.NamedTuple):
  """One statement `Router.top_k = 2`."""

  key: tuple[str, str, str]  # gin's own: scope, selector, parameter; of a macro: name, gin.macro, value
  value: typing.Any  # as gin parsed it, references unresolved
  place: str  # t.gin:2, or the flag
  source: str  # the file, or _FLAGS
  included: bool  # its file was included by another

  @property
  def name(self) -> str:
    return _key_text(self.key)


@dataclasses.dataclass(frozen=True)
class Resolved:
  """A resolved run and the texts that are written beside it."""

  run: config.Run
  operative: str  # gin text that gives the same run again
  notes: tuple[str, ...]  # what is rarely meant, and bindings that nothing reads, where they were allowed
  bindings: tuple[_Binding, ...] = dataclasses.field(default=(), repr=False, compare=False)

  def located(self, error: ConfigError) -> str:
    """The message of an error that came up after the config was built, with the places of the fields that it names."""
    return _located(str(error), "", self.bindings)


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
      raise ConfigError(f"unknown argument {flag!r}" + _guessed_flag(flag, arguments)
                        + "; bindings are written --gin.Train.steps=100, see --help")
    if "=" not in flag:
      if i + 1 == len(rest):
        raise ConfigError(f"{flag} has no value; write {flag}=VALUE")
      i += 1
      flag = f"{flag}={rest[i]}"
    bindings.append(flag)
    i += 1
  return resolve(arguments.gin_file or [QUICKSTART], bindings, arguments.allow_unused)


def _guessed_flag(flag: str, arguments: argparse.Namespace) -> str:
  name, equals, value = flag.lstrip("-").partition("=")
  if name in _fields():
    return f"; did you mean --gin.{name}{equals}{value}?"
  return did_you_mean(name, vars(arguments)).replace("'", "--", 1).replace("'", "")


def resolve(files: typing.Sequence, flags: typing.Sequence[str] = (), allow_unused: bool = False) -> Resolved:
  """Parses gin files, then flags of the form `--gin.Class.field=value`, and builds the run once.

  A file is looked for where its name says; one that another file includes beside that file first, then in the working
  directory. `configs/...` that is in neither is among the shipped ones.

  Raises:
    ConfigError: one line with the flag or file:line at fault, and a remedy where one can be named.
  """
  gin.clear_config()  # unlocks it too
  bindings: list[_Binding] = []
  for path in files:
    _parse_file(find(path), bindings, ())
  for flag in flags:
    binding = flag.removeprefix("--gin.")
    name, _, value = binding.partition("=")
    _parse_text(f"{name} = {value}", _FLAGS, lambda line: f"flag --gin.{binding}", bindings, None, ())
  _check_references(bindings)
  gin.finalize()
  run = _build(bindings)
  notes = list(run.cautions)
  latest = _latest(bindings)
  unused = {key: binding for key, binding in latest.items() if not _was_used(key)}
  left_over = _left_over(bindings, unused)
  if left_over:
    notes.append("not used: " + ", ".join(_definitions(left_over)))
  refused = [f"{binding.place}: nothing reads {binding.name}{_guessed_name(binding, latest)}"
             for key, binding in unused.items() if key not in left_over]
  if refused and not allow_unused:
    raise ConfigError("; ".join(refused) + " (remove it, or pass --allow_unused)")
  return Resolved(run, gin.operative_config_str(max_line_length=116), (*notes, *refused), tuple(bindings))


def find(name: str | os.PathLike, folder: pathlib.Path | None = None, place: str = "") -> pathlib.Path:
  """The gin file of that name, see `resolve`.

  Args:
    folder: of the file that includes it.
    place: of the include statement.

  Raises:
    ConfigError: there is none.
  """
  asked = pathlib.Path(name).expanduser()
  candidates = [asked] if folder is None else [folder / asked, asked]
  if asked.parts[:1] == ("configs",):
    candidates.append(CONFIGS.joinpath(*asked.parts[1:]))
  found = next((path for path in candidates if path.exists() and not path.is_dir()), None)
  if found is not None:
    return pathlib.Path(os.path.normpath(found))
  # What lies beside the place that was asked for goes before the shipped file of the same name.
  known = {path.name: "configs/" + path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.gin")}
  known |= {path.name: str(asked.with_name(path.name)) for path in _files_beside(candidates[0])}
  hint = did_you_mean(asked.name, known)
  for short, whole in known.items():
    hint = hint.replace(f"'{short}'", f"'{whole}'")
  if str(name).startswith(("gs://", "s3://")):
    hint = "; gin files are read from disk: copy it here first"
  if not place:
    what = "is a folder, not a file" if str(name) and asked.is_dir() else "does not exist"
    raise ConfigError(f"gin file {str(name)!r} {what}{hint}")
  raise ConfigError(f"{place}: included file {str(name)!r} is neither in {folder} nor in the working directory"
                    + (", and no such file is shipped" if asked.parts[:1] == ("configs",) else "") + hint)


def _files_beside(path: pathlib.Path) -> list[pathlib.Path]:
  try:
    return sorted(path.parent.glob("*.gin"))
  except OSError:  # a folder that may not be read
    return []


def _parse_file(path: pathlib.Path, bindings: list[_Binding], including: tuple[pathlib.Path, ...]) -> None:
  if path.resolve() in including:
    raise ConfigError(f"gin file {path} includes itself")
  try:
    text = path.read_text(encoding="utf-8-sig")  # without the mark that Windows' editors put in front
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"gin file {path} cannot be read: {error}") from error
  _parse_text(text, str(path), lambda line: f"{path}:{line}", bindings, path.parent, including + (path.resolve(),))


def _parse_text(text, source, where, bindings, folder, including) -> None:
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
      _parse_file(find(statement.filename, folder, where(line)), bindings, including)
    elif isinstance(statement, config_parser.ImportStatement):
      raise ConfigError(f"{where(line)}: import is refused: configs name the dataclasses of moe/config.py only")
    elif isinstance(statement, config_parser.BindingStatement):
      key = _bind(statement, where(line))
      if key in seen:
        raise ConfigError(f"{where(line)}: {_key_text(key)} is bound twice in {source}, first on line {seen[key]}")
      seen[key] = line
      bindings.append(_Binding(key, statement.value, where(line), source, len(including) > 1))


def _bind(statement, place: str) -> tuple:
  """Binds one parameter or macro after checking names and type; returns gin's key (scope, selector, parameter)."""
  scope, selector, parameter, value, _ = statement
  if not parameter:  # a macro: NAME = value
    name = f"{scope}/{selector}" if scope else selector
    gin.bind_parameter((name, _MACRO, "value"), value)
    return (name, _MACRO, "value")
  cls = _CLASSES.get(selector.removeprefix("moe.config."))
  if cls is None:
    raise ConfigError(f"{place}: there is no configurable {selector!r}" + did_you_mean(selector, _CLASSES)
                      + f"; there are {', '.join(_CLASSES)}")
  fields = [f.name for f in dataclasses.fields(cls)]
  if parameter not in fields:
    elsewhere = [name for name in _fields() if name.endswith(f".{parameter}")]
    hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(parameter, fields)
    raise ConfigError(f"{place}: {selector} has no parameter {parameter!r}{hint}; it has {', '.join(fields)}")
  _check_type(cls, parameter, value, place)
  gin.bind_parameter((scope, selector, parameter), value)
  return (scope, f"moe.config.{cls.__name__}", parameter)


def _check_type(cls, parameter: str, value, place: str) -> None:
  hint = typing.get_type_hints(cls)[parameter]
  wanted = typing.get_origin(hint) or hint
  for reference in gin_internals.iterate_references({"": {"": value}}):
    if not reference.evaluate:
      scope = f"{reference.config_key[0]}/" if reference.config_key[0] else ""
      raise ConfigError(f"{place}: {parameter} names a class; write @{scope}{reference.selector}() to build it")
  is_reference = isinstance(value, gin_internals.ConfigurableReference)
  if is_reference and value.config_key[1] in (_MACRO, "gin.constant"):
    return  # checked where the macro is bound, by the dataclass itself
  if wanted is tuple and (is_reference or isinstance(value, list)):
    raise ConfigError(f"{place}: {cls.__name__}.{parameter} is a tuple; write it in ( ), with a comma after one item")
  if is_reference:
    if dataclasses.is_dataclass(wanted) and not issubclass(value.configurable.wrapped, wanted):
      raise ConfigError(f"{place}: {cls.__name__}.{parameter} is a {wanted.__name__}, "
                        f"not a {value.configurable.wrapped.__name__}")
    return
  accepted = (int, float) if wanted is float else wanted
  if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
    raise ConfigError(f"{place}: {cls.__name__}.{parameter} wants {wanted.__name__}, got {value!r} "
                      f"({type(value).__name__})")


def _latest(bindings: typing.Iterable[_Binding]) -> dict[tuple, _Binding]:
  """Those in force, by key, in their order: what comes later wins."""
  latest = {}
  for binding in bindings:
    latest.pop(binding.key, None)
    latest[binding.key] = binding
  return latest


def _references(value) -> list[tuple[str, str]]:
  """(scope, selector) of everything that a value builds or reads; of a macro its name and gin.macro."""
  return [reference.config_key for reference in gin_internals.iterate_references({"": {"": value}})]


def _reached(value, latest: dict[tuple, _Binding]) -> set[tuple[str, str]]:
  """The macros that a value reads, by way of others too."""
  reached, waiting = set(), [value]
  while waiting:
    for target in _references(waiting.pop()):
      if target[1] == _MACRO and target not in reached and (*target, "value") in latest:
        reached.add(target)
        waiting.append(latest[*target, "value"].value)
  return reached


def _check_references(bindings: list[_Binding]) -> None:
  """Refuses macros that nobody defines and REQUIRED values that nobody sets."""
  latest = _latest(bindings)
  defined = {key[0] for key in latest if key[1] == _MACRO}
  for binding in latest.values():
    if _is_required(binding.value):
      raise ConfigError(f"{binding.place}: {binding.name} is required but not set; pass --gin.{binding.name}=VALUE")
    for scope, selector in _references(binding.value):
      if selector == _MACRO and scope not in defined:
        raise ConfigError(f"{binding.place}: macro %{scope} is not defined" + did_you_mean(scope, defined))
    if binding.key[:2] in _reached(binding.value, latest):
      raise ConfigError(f"{binding.place}: {binding.name} comes back to itself; give it a value")


def _build(bindings: list[_Binding]) -> config.Run:
  try:
    return gin.get_configurable("moe.config.Run")()
  except (ConfigError, TypeError) as error:
    message, *calls = str(error).strip().splitlines()  # gin appends lines of its own
    scoped = re.search(r"in scope '([^']*)'", calls[0]) if calls else None
    scope = scoped[1] if scoped else ""
    if isinstance(error, ConfigError):
      raise ConfigError(_located(message, scope, bindings)) from error
    missing = re.search(r"(\w+)\.__init__\(\) missing \d+ required keyword-only arguments?: (.*)", message)
    if not missing:
      raise
    raise ConfigError(_lacking(missing[1], re.findall(r"'(\w+)'", missing[2]), scope, bindings)) from error


def _lacking(cls: str, names: list[str], scope: str, bindings: list[_Binding]) -> str:
  """What to say of fields without a default that nobody sets."""
  latest, selector = _latest(bindings), f"moe.config.{cls}"
  prefix = f"{scope}/" if scope else ""
  users = [binding.place for binding in latest.values() if (scope, selector) in _references(binding.value)]
  place = f"{users[-1]}: " if users and scope else ""
  hint = did_you_mean(scope, {key[0] for key in latest if key[1] == selector and key[0] != scope}) if scope else ""
  return (f"{place}{', '.join(f'{prefix}{cls}.{name}' for name in names)} must be set{hint}; pass "
          f"--gin.{prefix}{cls}.{names[0]}=VALUE or bind it in a gin file")


def _located(message: str, scope: str, bindings: typing.Iterable[_Binding]) -> str:
  """The message with the places where the fields that it names were bound: the latest in front, for it is the one that made
  the others wrong.

  Args:
    message: names fields as `Class.field`, further ones of the same class as `field = `.
    scope: in which the class was built.
    bindings: all of them; a field that none binds has its default, and no place.
  """
  latest = _latest(bindings)
  order = {key: i for i, key in enumerate(latest)}
  cls, named = "", {}
  for owner, field, alone in re.findall(r"\b([A-Z]\w*)\.(\w+)|\b([a-z]\w*)(?= = )", message):
    cls = owner or cls
    binding = _in_scope(latest, scope, cls, field or alone)
    if binding:
      named[binding.key] = binding
  if not named:  # `Mesh {...}: sizes are positive`
    cls = re.match(r"\w*", message)[0]
    of_class = [binding for key, binding in latest.items() if key[1] == f"moe.config.{cls}"]
    named = {binding.key: binding for binding in of_class[-1:]}
  if not named:
    return message
  places = {binding.name: _place_of_value(binding, latest) for binding in sorted(named.values(), key=lambda b: order[b.key])}
  _, first = places.popitem()
  others = ", ".join(f"{name}: {place}" for name, place in places.items())
  return f"{first}: {message}" + (f" ({others})" if others else "")


def _in_scope(latest: dict[tuple, _Binding], scope: str, cls: str, field: str) -> _Binding | None:
  """The binding that gin reads: that of the innermost scope."""
  parts = scope.split("/") if scope else []
  keys = [("/".join(parts[:n]), f"moe.config.{cls}", field) for n in range(len(parts), -1, -1)]
  return next((latest[key] for key in keys if key in latest), None)


def _place_of_value(binding: _Binding, latest: dict[tuple, _Binding]) -> str:
  """Where it is bound and, where the value is a macro, where that is."""
  macros = [latest[name, _MACRO, "value"] for name, selector in _references(binding.value) if selector == _MACRO]
  return binding.place + "".join(f" (%{macro.key[0]}, {_place_of_value(macro, latest)})" for macro in macros)


# ------------------------------------------------------------------------------------------------------ unused bindings
#
# A binding that nothing reads is a mistake: a scope or a macro is misspelt (names of classes and fields are checked), or it
# belongs to something that the run does not have. Two kinds are none, and are what a file of shared definitions is for.


def _left_over(bindings: list[_Binding], unused: dict[tuple, _Binding]) -> dict[tuple, _Binding]:
  """Of the bindings that nothing reads those that are no mistake.

  1. What read them was overridden by a later file or flag: `Data.domains` with two of the four domains of an included file.
  2. An included file defines more than this run takes: a macro, or all that an object of a scope must have.

  And what these refer to themselves.
  """
  order = {id(binding): i for i, binding in enumerate(bindings)}
  latest = _latest(bindings)
  found: dict[tuple, _Binding] = {}
  for old in bindings:
    new = latest[old.key]
    for target in _references(old.value) if new is not old else ():
      for key, binding in unused.items():
        earlier = order[id(binding)] < order[id(new)] and binding.source != new.source
        if earlier and _reads(target, key):
          found[key] = binding
  found |= {key: binding for key, binding in unused.items() if binding.included and _is_definition(key, latest)}
  waiting = collections.deque(found.values())
  while waiting:
    user = waiting.popleft()
    for target in _references(user.value):
      for key, binding in unused.items():
        if key not in found and _reads(target, key) and (binding.included or binding.source == user.source):
          found[key] = binding
          waiting.append(binding)
  return found


def _reads(target: tuple[str, str], key: tuple) -> bool:
  """Whether a reference to `target` reads the binding `key`, by itself or through what it builds in its scope."""
  if _MACRO in (target[1], key[1]):
    return target == key[:2]
  return bool(key[0]) and f"{target[0]}/".startswith(f"{key[0]}/")


def _is_definition(key: tuple, latest: dict[tuple, _Binding]) -> bool:
  """Whether a binding of an included file belongs to something that could be taken as it is. A lone `pyhton/Domain.weight` does
  not; nor does a macro with the name of a field, such as `steps`."""
  scope, selector, parameter = key
  if selector == _MACRO:
    return not any(name.endswith(f".{scope}") for name in _fields())
  if not scope:  # a default that every scope overrides
    return any(of == selector and parameter in read for (_, of), read in gin_internals._OPERATIVE_CONFIG.items())
  required = [field.name for field in dataclasses.fields(_CLASSES[selector.removeprefix("moe.config.")])
              if field.default is dataclasses.MISSING]
  set_here = [name for name in required if (binding := latest.get((scope, selector, name))) and binding.included]
  return bool(required) and set_here == required


def _definitions(left_over: dict[tuple, _Binding]) -> list[str]:
  """`python/Domain (embedded.gin:8)` for each object, and `%NAME` for each macro, in their order."""
  places: dict[str, str] = {}
  for (scope, selector, _), binding in left_over.items():
    name = f"%{scope}" if selector == _MACRO else binding.name.rpartition(".")[0]
    places.setdefault(name, binding.place)
  return [f"{name} ({place})" for name, place in places.items()]


def _guessed_name(binding: _Binding, latest: dict[tuple, _Binding]) -> str:
  """A guess what an unused binding was meant to be."""
  scope, selector, parameter = binding.key
  if selector == _MACRO:
    fields = [name for name in _fields() if name.partition(".")[2] == scope]
    read = {key[0] for key in latest if key[1] == _MACRO and _was_used(key)}
    return f"; did you mean {' or '.join(fields)}?" if fields else did_you_mean(scope, read)
  read = {of for of, name in gin_internals._OPERATIVE_CONFIG if name == selector}
  if scope in read:
    return ""
  guess = did_you_mean(scope, read) if scope else ""
  return guess or f", for nothing builds @{f'{scope}/' if scope else ''}{selector.removeprefix('moe.config.')}()"


def _fields() -> list[str]:
  """`Train.steps`, of all classes."""
  return [f"{cls.__name__}.{field.name}" for cls in _CLASSES.values() for field in dataclasses.fields(cls)]


def _is_required(value) -> bool:
  return value is gin.REQUIRED or (isinstance(value, gin_internals.ConfigurableReference)
                                   and value.config_key == ("gin.REQUIRED", "gin.constant"))


def _was_used(key: tuple) -> bool:
  scope, selector, parameter = key
  return parameter in gin_internals._OPERATIVE_CONFIG.get((scope, selector), {})


def _key_text(key: tuple) -> str:
  scope, selector, parameter = key
  if selector == _MACRO:
    return f"macro {scope}"
  name = f"{selector.removeprefix('moe.config.')}.{parameter}"
  return f"{scope}/{name}" if scope else name


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
    return f"there is no configurable {name!r}" + did_you_mean(name.split("/")[-1], _CLASSES)
  if "Expected newline" in message:
    return "text after the value; gin has no arithmetic, write the result"
  return f"not valid gin: {message}"
