"""BUILD says what the files import: one target each, dependencies as they are, layers in the order of DESIGN."""

import pathlib

from tools import update_build

ROOT = pathlib.Path(update_build.__file__).parents[1]

# The rooms, lowest first: a file imports only from rooms before its own (or from its own folder).
ORDER = ["moe/__init__.py", "moe/errors.py", "moe/config.py", "moe/gin_config.py", "moe/command_line.py", "moe/hardware.py",
         "moe/run_dir.py", "moe/sizes.py", "moe/outlet.py", "moe/jsonl.py", "moe/boards.py", "moe/terminal.py",
         "moe/metrics.py",
         "moe/sharding.py", "moe/kernels/", "moe/routing/", "moe/layers.py", "moe/data/", "moe/exchange.py", "moe/hooks.py",
         "moe/experts.py", "moe/model.py",
         "moe/schedules.py", "moe/optimizer.py", "moe/step.py", "moe/stored.py", "moe/hugging_face.py",
         "moe/hugging_face_files.py", "moe/checkpoint.py", "moe/preflight.py",
         "moe/snapshot/", "moe/evaluate.py", "moe/generate.py",
         "moe/report.py", "moe/train.py", "moe/commands.py", "tools/", "tests/"]


def room(path: pathlib.Path) -> int:
  return next(i for i, prefix in enumerate(ORDER) if str(path).startswith(prefix))


def targets() -> dict[str, dict]:
  """Runs BUILD, which is valid Python, with functions that note their arguments."""
  found = {}

  def note(**arguments):
    assert arguments["name"] not in found
    found[arguments["name"]] = arguments

  exec((ROOT / "BUILD").read_text(), {"load": lambda *_: None, "package": lambda **_: None, "glob": lambda patterns: patterns,
                                      "py_library": note, "py_test": note})
  return found


def test_build_is_what_the_imports_say():
  assert (ROOT / "BUILD").read_text() == update_build.build_text(), "run python -m tools.update_build"


def test_every_file_has_one_target():
  sources = [source for arguments in targets().values() for source in arguments["srcs"]]
  assert sorted(sources) == sorted(str(path) for path in update_build.files())


def test_a_missing_dependency_would_be_seen():
  """The negative control: the comparison above is over real imports."""
  deps = update_build.dependencies(pathlib.Path("moe/step.py"))
  assert {":moe_model", ":moe_optimizer", ":moe_sharding", "@pypi//jax", "@pypi//optax"} <= set(deps)
  assert ":moe_train" not in deps


def test_files_import_only_from_rooms_above():
  by_target = {update_build.target(path): path for path in update_build.files()}
  for path in update_build.files():
    for dep in update_build.dependencies(path):
      if dep.startswith(":") and room(path) < room(by_target[dep[1:]]):
        raise AssertionError(f"{path} imports {by_target[dep[1:]]}, a later room")


def test_flax_and_gin_have_one_room_each():
  for path in update_build.files():
    names = {name.split(".")[0] for name in update_build.imported_names(path)}
    if path.parts[0] != "tests":
      assert "flax" not in names or str(path) == "moe/model.py"
      assert "gin" not in names or str(path) == "moe/gin_config.py"
