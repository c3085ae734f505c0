"""What can be wrong with a job, found on this machine before anything is bought: its flags, config, mesh, pod and paths."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import math
import os
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from moe import command_line
from moe import config
from moe import gin_config
from moe.config import ConfigError
from moe.errors import UserError
from tools import tpu_types

# Flags with which the job would train nothing.
_TRAINS_NOTHING = ("--dry_run", "--print_config", "--help", "-h")
_INCLUDE = re.compile(r"""^\s*include\s+(['"])(.+?)\1""", re.MULTILINE)


class Checkout(NamedTuple):
  """The code that travels to the VMs, or lies in the image."""

  root: pathlib.Path
  shipped: Collection[str]  # names of its files, below the root

  def has(self, path: str) -> bool:
    """Whether a path, as the job will read it in its folder, is a file or a folder of the code."""
    name = os.path.normpath(path)
    return name in self.shipped or any(file.startswith(f"{name}/") for file in self.shipped)


class Pod(NamedTuple):
  """Where the job is to run."""

  slice: tpu_types.Slice
  slices: int
  local_paths: bool = False  # the VMs have these paths too: a mounted bucket or disk

  @property
  def devices(self) -> int:
    return self.slice.devices * self.slices

  def __str__(self) -> str:
    count = f"{self.slices} x " if self.slices > 1 else ""
    return f"--type={self.slice.name} ({count}{self.slice.chips} chips, {count}{self.slice.devices} devices)"


class Checked(NamedTuple):
  run: config.Run
  gin_files: tuple[str, ...]
  notes: tuple[str, ...]
  step_seconds: float | None  # by the compiler's estimate in the config's head, where that is for this pod


def check(train: list[str], pod: Pod, checkout: Checkout) -> Checked:
  """Everything about a job that this machine can know.

  Args:
    train: the flags of moe.train.

  Raises:
    UserError: one line with what is wrong and the way out.
  """
  arguments, rest = _flags(train)
  for name in arguments.gin_file:
    _check_gin_file(name, checkout)
  with contextlib.chdir(checkout.root):  # where the job will look for them
    resolved = gin_config.from_arguments(arguments, rest)
  run = resolved.run
  _check_paths(run, arguments, pod, checkout)
  _check_mesh(run, pod)
  of_pod = _pod_notes(arguments.gin_file, pod, checkout)
  notes = dict.fromkeys([*resolved.notes, *_open(run, pod), *of_pod])
  estimate = None if of_pod else _step_seconds(arguments.gin_file, checkout.root)
  return Checked(run, tuple(arguments.gin_file), tuple(notes), estimate)


def topology_named(gin_files: Collection[str], root: pathlib.Path) -> tuple[str, int] | None:
  """(topology, slices) of the line `# For v5p:4x4x4, 2 slices` in the last gin file that has one; None where none has."""
  from tools import compile_check  # imports JAX, which `status` and `logs` need not wait for

  for name in reversed(list(gin_files)):
    with contextlib.suppress(ConfigError, OSError):
      return compile_check.topology_in(root / name)
  return None


def _step_seconds(gin_files: Collection[str], root: pathlib.Path) -> float | None:
  """`# static estimate of a step 1.17 s` in the last gin file that has one (tools/compile_check.py writes it)."""
  texts = ((root / name).read_text(errors="replace") for name in reversed(list(gin_files)) if (root / name).is_file())
  found = filter(None, (re.search(r"^# static estimate of a step ([\d.]+) s", text, re.MULTILINE) for text in texts))
  match = next(found, None)
  return float(match[1]) if match else None


# ------------------------------------------------------------------------------------------------------------------ flags


def _flags(train: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """The trainer's own parser; its usage message becomes one line."""
  for flag in train:
    if flag in _TRAINS_NOTHING:
      raise UserError(f"{flag} after the -- makes a job that trains nothing; leave it out, or give --dry_run before the --")
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      arguments, rest = command_line.parse(train)
  except SystemExit as error:
    raise UserError(f"flags after the --: {said.getvalue().strip().splitlines()[-1]}") from error
  command_line.profile_window(arguments.profile_steps)
  return arguments, rest


# ------------------------------------------------------------------------------------------------------------------ files


def _check_gin_file(name: str, checkout: Checkout) -> None:
  """Refuses a gin file that the job would not find, though this machine has it. One that is nowhere is gin_config's to say."""
  if not os.path.isabs(name) and os.path.normpath(name) in checkout.shipped:
    for file in _with_includes(checkout.root / name):
      if os.path.relpath(file, checkout.root) not in checkout.shipped:
        raise UserError(f"{name} includes {file}, which does not travel to the VMs; put it below {checkout.root / 'configs'}")
    return
  path = pathlib.Path(name).expanduser()
  if path.is_file() or os.path.isabs(name):
    inside = path.resolve().is_relative_to(checkout.root.resolve())
    known = str(path.resolve().relative_to(checkout.root.resolve())) if inside else ""
    way_out = f"write --gin_file={known}" if known in checkout.shipped else f"put it below {checkout.root / 'configs'}"
    raise UserError(f"--gin_file={name} is a path of this machine, and the VMs get the code's own files only; {way_out}")


def _with_includes(path: pathlib.Path, seen: tuple[pathlib.Path, ...] = ()) -> Iterator[pathlib.Path]:
  """A gin file and those that it includes beside it; the ones that do not exist are left to the parser."""
  path = pathlib.Path(os.path.normpath(path.absolute()))  # a link travels as the file that it leads to
  if path in seen or not path.is_file():
    return
  yield path
  for match in _INCLUDE.finditer(path.read_text(errors="replace")):
    asked = pathlib.Path(match[2]).expanduser()
    yield from _with_includes(path.parent / asked, (*seen, path))


def _check_paths(run: config.Run, arguments: argparse.Namespace, pod: Pod, checkout: Checkout) -> None:
  """Refuses what the VMs cannot read: a path of this machine does not exist there."""
  named = [(f"Domain.path = {domain.path!r} ({domain.name})", domain.path) for domain in run.data.domains]
  if run.data.tokenizer != "byte":
    named.append((f"Data.tokenizer = {run.data.tokenizer!r}", run.data.tokenizer))
  named += [(f"--init_from={arguments.init_from}", arguments.init_from)] if arguments.init_from else []
  named += [(f"--tls names {path}", path) for path in command_line.tls(arguments.tls) if path]
  for what, path in named:
    if path.startswith("embedded:"):
      continue
    if "://" in path and not path.startswith("gs://"):
      raise UserError(f"{what}: the VMs have a client for gs:// only; copy it to your bucket")
    elif not path.startswith("gs://") and not pod.local_paths and not (checkout.has(path) and not os.path.isabs(path)):
      raise UserError(f"{what} is a path of this machine, which the VMs do not have: `gcloud storage cp -r {path} gs://...`, "
                      "and name that; or --local_paths, where the VMs mount it")


def remote_paths(run: config.Run) -> list[str]:
  """Objects that must exist in a bucket before the job starts: a domain's manifest, a tokenizer."""
  paths = [f"{domain.path.rstrip('/')}/manifest.json" for domain in run.data.domains if domain.path.startswith("gs://")]
  return paths + ([run.data.tokenizer] if run.data.tokenizer.startswith("gs://") else [])


# -------------------------------------------------------------------------------------------------------- mesh and pod


def _check_mesh(run: config.Run, pod: Pod) -> None:
  """Refuses a mesh that does not cover the pod, and sizes that do not divide by the mesh."""
  sizes = dataclasses.asdict(run.mesh)
  named = math.prod(n for n in sizes.values() if n > 0)
  rest, remainder = divmod(pod.devices, named)
  free = [axis for axis, n in sizes.items() if n == -1]
  if remainder or (rest != 1 and not free):
    mesh = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n != 1) or "of one device"
    raise ConfigError(f"Mesh {mesh} {'needs a multiple of' if free else 'has'} {named} devices, but {pod} has {pod.devices}; "
                      f"{_way_out(named, free, pod)}")
  sizes |= {axis: rest for axis in free}
  if sizes["slice"] != pod.slices:
    raise ConfigError(f"Mesh.slice = {sizes['slice']}, but --num_slices={pod.slices}; set one of them to the other")


@dataclasses.dataclass(frozen=True)
class _Device:
  """What the mesh of a pod is made of, where the pod is not: a device as JAX shows it on a TPU VM."""

  id: int
  process_index: int
  coords: tuple[int, int, int]
  core_on_chip: int
  slice_index: int
  device_kind: str
  platform: str = "tpu"
  client: None = None


def devices(pod: Pod) -> list[_Device]:
  """All devices of the pod, host by host in blocks of 2 x 2 chips, as they are wired."""
  from moe import hardware

  of = pod.slice
  kind = next(name for name, chip in hardware.TPU_KINDS.items() if chip == of.generation.chip)
  shape = (*of.shape, 1)[:3]
  block = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[of.chips_per_host]
  across = [n // b for n, b in zip(shape, block)]
  found = []
  for number in range(pod.slices):
    for z, y, x in itertools.product(*map(range, reversed(shape))):
      hx, hy, hz = (at // size for at, size in zip((x, y, z), block))
      host = number * of.hosts + (hz * across[1] + hy) * across[0] + hx
      found += [_Device(len(found) + core, host, (x, y, z), core, number, kind) for core in range(of.generation.devices)]
  return found


def _open(run: config.Run, pod: Pod) -> list[str]:
  """The trainer's own look at what it will need, on a stand-in for the pod: mesh, hosts, and data that is here too. Notes."""
  from moe import preflight  # these import JAX, which takes seconds
  from moe import sharding

  try:
    mesh = sharding.make_mesh(run.mesh, devices(pod))
  except NotImplementedError as error:  # of JAX, where the axes cannot be laid on the torus
    raise ConfigError(f"Mesh {run.mesh} cannot be laid on {pod}: {error}") from error
  sharding.check_run(run, mesh)
  everywhere = run.data.tokenizer == "byte" and all(domain.path.startswith("embedded:") for domain in run.data.domains)
  if not everywhere:
    return []
  inputs = preflight.open_inputs(run, mesh)
  return [*inputs.notes, *preflight.repeats(preflight.domains(run, inputs.tokenizer))]


def _way_out(named: int, free: list[str], pod: Pod) -> str:
  generation = pod.slice.name.partition("-")[0]
  fitting = tpu_types.with_devices(generation, named // pod.slices) if named % pod.slices == 0 and not free else ""
  return (f"take --type={fitting}" if fitting else "change an axis") + ", or set one axis to -1 (the rest)"


def _pod_notes(gin_files: list[str], pod: Pod, checkout: Checkout) -> list[str]:
  named = topology_named(gin_files, checkout.root)
  here = f"{pod.slice.generation.chip}:{pod.slice.topology}"
  if named is None or (named[0].partition(":")[0] == pod.slice.generation.chip and named[1] == pod.slices
                       and math.prod(map(int, named[0].partition(":")[2].split("x"))) == pod.slice.chips):
    return []
  slices = f", {named[1]} slices" if named[1] > 1 else ""
  return [f"{' '.join(gin_files)} was made for {named[0]}{slices}; this job runs on {here}"
          + (f", {pod.slices} slices" if pod.slices > 1 else "")
          + ": whether it fits the memory there, tools.compile_check says"]
