"""The TPU slices that Google rents out: names, sizes, shapes, hosts. No JAX.

Sizes are those of Google's pages on each generation (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, v4, tpu7x). A name counts
what its generation counts: chips (v5litepod-16, v6e-16) or TensorCores, two a chip (v5p-32, v4-32, and tpu7x-32 as xpk and
MaxText write it: 16 chips each).
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from moe.errors import UserError


class Generation(NamedTuple):
  chip: str  # a key of hardware.CHIPS
  image: str  # runtime version of its TPU VMs; "": the Cloud TPU API does not rent it out
  cores_in_name: int  # TensorCores a chip, where names count those
  devices: int  # JAX devices a chip
  max_cubes: int  # of 4x4x4 chips in one slice; 0: slices are flat, up to 16x16
  gke: str  # cloud.google.com/gke-tpu-accelerator
  machine: str  # machine types of GKE, without the number of chips


GENERATIONS = {
    "v4": Generation("v4", "tpu-ubuntu2204-base", 2, 1, 64, "tpu-v4-podslice", "ct4p-hightpu"),
    "v5litepod": Generation("v5e", "v2-alpha-tpuv5-lite", 1, 1, 0, "tpu-v5-lite-podslice", "ct5lp-hightpu"),
    "v5p": Generation("v5p", "v2-alpha-tpuv5", 2, 1, 96, "tpu-v5p-slice", "ct5p-hightpu"),
    "v6e": Generation("v6e", "v2-alpha-tpuv6e", 1, 1, 0, "tpu-v6e-slice", "ct6e-standard"),
    "tpu7x": Generation("tpu7x", "", 2, 2, 144, "tpu7x", "tpu7x-standard"),
}
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_BELOW_A_CUBE = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
_LONGEST = 256  # chips along one side


class Slice(NamedTuple):
  """One slice of a type."""

  name: str  # as Google's tools write it: v5litepod-16
  generation: Generation
  shape: tuple[int, ...]  # chips along x, y (, z)

  @property
  def chips(self) -> int:
    return math.prod(self.shape)

  @property
  def devices(self) -> int:
    """As JAX counts them: a chip of TPU7x is two."""
    return self.chips * self.generation.devices

  @property
  def chips_per_host(self) -> int:
    """Four; a flat slice of one chip has a smaller VM, one of eight a larger one."""
    return self.chips if self.chips in (1, 8) and not self.generation.max_cubes else 4

  @property
  def hosts(self) -> int:
    return self.chips // self.chips_per_host

  @property
  def topology(self) -> str:
    return "x".join(map(str, self.shape))


@functools.cache
def _shapes(generation: str) -> dict[int, tuple[int, ...]]:
  """Chips -> the most compact shape with so many, for every size that there is."""
  cubes = GENERATIONS[generation].max_cubes
  if not cubes:
    return _FLAT
  best = dict(_BELOW_A_CUBE)
  surface = lambda s: s[0] * s[1] + s[1] * s[2] + s[0] * s[2]
  for x in range(1, cubes + 1):
    for y in range(x, cubes // x + 1):
      for z in range(y, min(cubes // (x * y), _LONGEST // 4) + 1):
        shape = (4 * x, 4 * y, 4 * z)
        chips = math.prod(shape)
        if chips not in best or surface(shape) < surface(best[chips]):
          best[chips] = shape
  return best


def sizes(generation: str) -> list[int]:
  """The numbers that may stand after `v5litepod-`, ascending."""
  return sorted(chips * GENERATIONS[generation].cores_in_name for chips in _shapes(generation))


def parse(text: str) -> Slice:
  """`v5litepod-16`, or with its shape `v5p-4x4x16`.

  Raises:
    UserError: a generation or a size that there is not, with those nearest to it.
  """
  generation, _, size = text.partition("-")
  if generation not in GENERATIONS or not re.fullmatch(r"\d+(x\d+)*", size):
    raise UserError(f"--type={text} is none we know: GENERATION-SIZE with {', '.join(GENERATIONS)}, such as v5litepod-16, "
                    "v6e-8, v5p-128" + (f"; Google calls this one v5litepod-{size}" if generation in ("v5e", "v5lite") else ""))
  of = GENERATIONS[generation]
  if "x" in size:
    return _of_shape(text, generation, tuple(map(int, size.split("x"))))
  number = int(size)
  shape = _shapes(generation).get(number // of.cores_in_name) if number % of.cores_in_name == 0 else None
  if shape is None:
    raise UserError(f"--type={text} does not exist: {generation} comes as {_nearest(generation, number)}")
  return Slice(text, of, shape)


def _of_shape(text: str, generation: str, shape: tuple[int, ...]) -> Slice:
  of, chips = GENERATIONS[generation], math.prod(shape)
  whole_cubes = len(shape) == 3 and all(n > 0 and n % 4 == 0 and n <= _LONGEST for n in shape) and chips <= 64 * of.max_cubes
  if not whole_cubes and shape not in _shapes(generation).values():
    wanted = "sides that are multiples of 4, or 2x2x1, 2x2x2, 2x2x4, 2x4x4" if of.max_cubes else ", ".join(
        "x".join(map(str, s)) for s in _FLAT.values())
    raise UserError(f"--type={text} does not exist: a slice of {generation} has {wanted}"
                    + (f", and at most {64 * of.max_cubes:,} chips" if of.max_cubes else ""))
  return Slice(f"{generation}-{chips * of.cores_in_name}", of, shape)


def _nearest(generation: str, number: int) -> str:
  known = sizes(generation)
  if len(known) <= 10:
    return ", ".join(f"{generation}-{n}" for n in known)
  below, above = [n for n in known if n < number][-2:], [n for n in known if n > number][:2]
  return f"{', '.join(f'{generation}-{n}' for n in below + above)} and others, up to {generation}-{known[-1]}"


def with_devices(generation: str, devices: int) -> str:
  """The name of the slice with so many JAX devices; "" where there is none."""
  of = GENERATIONS[generation]
  chips = devices // of.devices
  return f"{generation}-{chips * of.cores_in_name}" if devices % of.devices == 0 and chips in _shapes(generation) else ""
