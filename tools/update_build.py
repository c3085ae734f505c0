"""Writes BUILD from the imports of every file: `python -m tools.update_build`. A test keeps the two equal.

One target a file, dependencies as imported, so Bazel refuses a cycle between rooms, and a test that reaches for a
file its target does not name.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = ("moe", "tools", "tests")

# Import name -> name in requirements, where they differ.
_PACKAGES = {"gin": "gin_config", "orbax": "orbax_checkpoint", "pyarrow": None, "libtpu": None, "torch": None,
             "transformers": None, "lm_eval": None}
_DATA = {"moe_gin_config": ["configs/**/*.gin"], "moe_data_embedded": ["moe/data/corpora/*"],
         "tests_gin_config_test": ["tests/golden/*.txt"], "tests_hugging_face_test": ["tests/golden/hugging_face/**"],
         "tests_inspect_test": ["tests/golden/hugging_face/**"],
         "tools_compile_check": ["tools/published_steps.json"], "tools_tpu_prices": ["tools/tpu_prices.json"],
         "tests_build_file_test": ["BUILD", "requirements.txt", "moe/**/*.py", "tools/**/*.py", "tests/**/*.py"]}
_SLOW = {"tests_model_test", "tests_step_test", "tests_train_test", "tests_checkpoint_test", "tests_data_test",
         "tests_bench_test", "tests_faults_test", "tests_network_test"}  # and those that need libtpu

_HEAD = '''# Written by `python -m tools.update_build`; do not edit. pip is the normal way in, Bazel the layering check
# (tools/bazel_check.sh).
load("@rules_python//python:defs.bzl", "py_library", "py_test")

package(default_visibility = ["//visibility:public"])
'''


def files() -> list[pathlib.Path]:
  return sorted(p.relative_to(ROOT) for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def target(path: pathlib.Path) -> str:
  """moe/routing/gates.py -> moe_routing_gates; moe/routing/__init__.py -> moe_routing."""
  parts = path.with_suffix("").parts
  return "_".join(parts[:-1] if parts[-1] == "__init__" else parts)


def requirements() -> set[str]:
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  return {re.split(r"[\[ ;=<>!~]", line)[0].lower().replace("-", "_") for line in lines if line[:1].isalnum()}


def imported_names(path: pathlib.Path) -> set[str]:
  """Dotted names a file may import: modules, and `package.name` for each name imported from a package."""
  names = set()
  for node in ast.walk(ast.parse((ROOT / path).read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def dependencies(path: pathlib.Path) -> list[str]:
  """Labels of what a file imports: ours first, then packages."""
  ours, packages, known = {str(p): target(p) for p in files()}, set(), requirements()
  local = set()
  for name in imported_names(path):
    stem = name.replace(".", "/")
    for candidate in (f"{stem}.py", f"{stem}/__init__.py"):
      if candidate in ours:
        local.add(ours[candidate])
    top = name.split(".")[0]
    if top not in ROOMS and top not in sys.stdlib_module_names:
      package = _PACKAGES.get(top, top)
      if package in known:
        packages.add(f"@pypi//{package}")
  for parent in path.parents:  # a module needs the __init__ of its packages
    if str(parent / "__init__.py") in ours:
      local.add(ours[str(parent / "__init__.py")])
  if path.name.endswith("_test.py"):
    local.add("tests_conftest")
  local.discard(target(path))
  return [f":{name}" for name in sorted(local)] + sorted(packages)


def build_text() -> str:
  blocks = [_HEAD]
  for path in files():
    name, is_test = target(path), path.name.endswith("_test.py")
    lines = [f'    name = "{name}",', f'    srcs = ["{path}"],']
    if is_test:
      select = "'not slow and not tpu'"  # Bazel splits arguments as a shell does
      lines += [f'    args = ["{path}", "-n", "0", "-m", "{select}"],', '    main_module = "pytest",']
    if name in _DATA:
      lines.append(f"    data = glob({list(_DATA[name])!r}),".replace("'", '"'))
    deps = dependencies(path)
    if deps:
      lines += ["    deps = [", *(f'        "{dep}",' for dep in deps), "    ],"]
    if is_test:
      lines.append('    timeout = "long",')  # Bazel's own 5 minutes are near for the files that compile most
    if name in _SLOW or name.startswith("tests_tpu_"):
      lines.append('    tags = ["slow"],')
    blocks.append("\n".join([f"{'py_test' if is_test else 'py_library'}(", *lines, ")\n"]))
  return "\n".join(blocks)


if __name__ == "__main__":
  (ROOT / "BUILD").write_text(build_text())
