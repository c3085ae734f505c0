"""What the machine can do: peak FLOP/s for MFU, and memory pages on Linux CPUs."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import pathlib
import platform
import re
import sys
import tempfile
import time
from typing import NamedTuple

from moe import config

_IMPORTED = time.time()


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of a TPU as JAX sees it (TPU7x: one of a chip's two halves), from the vendor's pages."""

  clock: float  # Hz, that goes with the compiler's cycle counts; of v6e and TPU7x assumed
  flops: float  # bfloat16 FLOP/s
  hbm: float  # bytes/s
  links: float  # bytes/s of all its links together, one way
  hbm_bytes: int  # that the compiler hands out
  network: float  # bytes/s of its share of the data-centre network
  host: float  # bytes/s to and from the host's memory; assumed
  cores: int = 1  # TensorCores
  torus: int = 3  # dimensions; a link each way in each of them


CHIPS = {
    "v4": Chip(1.05e9, 275e12, 1.228e12, 300e9, 32 << 30, 3.1e9, 16e9, 2),
    "v5e": Chip(1.503e9, 197e12, 0.819e12, 200e9, int(15.75 * 2**30), 3.1e9, 16e9, torus=2),
    "v5p": Chip(1.751e9, 459e12, 2.765e12, 600e9, int(95.74 * 2**30), 6.25e9, 16e9, 2),
    "v6e": Chip(1.755e9, 918e12, 1.64e12, 400e9, int(31.24 * 2**30), 12.5e9, 32e9, torus=2),
    "tpu7x": Chip(2.2e9, 1153.5e12, 3.69e12, 300e9, int(94.75 * 2**30), 6.25e9, 32e9),
}


class Topology(NamedTuple):
  """One slice of a pod."""

  kind: str  # a key of CHIPS
  shape: tuple[int, ...]  # chips along x, y, z

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]


def topology(name: str) -> Topology:
  """`v5p:4x4x4` taken apart.

  Raises:
    config.ConfigError: a topology of no known chip, or no topology at all.
  """
  parts = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
  if not parts or parts[1] not in CHIPS:
    raise config.ConfigError(f"topology {name} is of no known chip; known: {', '.join(CHIPS)}, as in v5p:4x4x4")
  return Topology(parts[1], tuple(int(n) for n in parts[2].split("x")))


def rings(chip: Chip, shape) -> tuple[bool, ...]:
  """Which dimensions of a slice close in a ring: those of 16 chips on v5e and v6e, all of whole cubes of 4x4x4 elsewhere."""
  return tuple(n == 16 for n in shape) if chip.torus == 2 else (all(n % 4 == 0 for n in shape),) * len(shape)


def link_rate(chip: Chip, shape, spans=None) -> float:
  """Bytes/s that a device sends over the links it has in a slice: two for each dimension that closes in a ring, one for each
  that is a line, none for a dimension of one chip.

  Args:
    shape: chips of the slice along x, y, z, or less than three of them.
    spans: chips that a group of devices has along each; default: the whole slice.
  """
  links = sum(0 if span == 1 else 2 if ring and span == n else 1
              for n, ring, span in zip(shape, rings(chip, shape), spans or shape))
  return chip.links * (links / (2 * chip.torus) or 1)  # within a chip: no link, so none that holds up


# What JAX calls them.
TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
             "TPU v6e": "v6e", "TPU7x": "tpu7x"}
# Peak bfloat16 FLOP/s without sparsity, NVIDIA's data sheets.
_GPU_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}


_SPARSE_CORE_COLLECTIVES = {
    **{f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
       for kind in ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "nd_reduce_scatter", "all_reduce")},
    "xla_tpu_use_tc_device_shape_on_sc": "true", "xla_sc_disable_megacore_partitioning": "true",
    # No matmul in pieces, one for each part of a gathered weight, with float32 sums in HBM between them: the gather is hidden
    # anyway.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "100000"}


def compiler_options(device_kind: str) -> dict[str, str]:
  """Options of the compiler for a train step.

  On the TPUs with SparseCores these move the collectives there, beside the matmuls; by default the compiler leaves nearly all
  of them synchronous (tests/tpu_compile_test.py, v5p and v6e), and for Mixtral on 64 chips of v6e turned the experts'
  reduce-scatters into all-reduces of twice the bytes. TPU7x takes them too (MT-NLG 530B, compiled; its all-reduces stay
  synchronous).
  """
  return dict(_SPARSE_CORE_COLLECTIVES) if TPU_KINDS.get(device_kind) in ("v5p", "v6e", "tpu7x") else {}


def peak_flops(devices) -> tuple[float, str]:
  """(FLOP/s of all the devices together, where the figure comes from).

  For CPUs it is the best of a few float32 2048-cubed matmuls on all devices at once, measured now; there MFU is the
  share of that. Unknown accelerators give nan.
  """
  kind = devices[0].device_kind
  if devices[0].platform == "cpu":
    return measured_matmul_flops(devices), "measured float32 matmul"
  peak = CHIPS[TPU_KINDS[kind]].flops if kind in TPU_KINDS else _GPU_FLOPS.get(kind, float("nan"))
  return peak * len(devices), f"{kind}, vendor's peak"


def measured_matmul_flops(devices, size: int = 2048, repeats: int = 3) -> float:
  """Best FLOP/s of float32 matmuls of `size` cubed, one on each device at a time."""
  import jax  # not at the top: use_huge_pages comes before imports that take seconds
  import numpy as np

  operands = [jax.device_put(np.ones((size, size), np.float32), device) for device in devices]
  multiply = jax.jit(lambda x: x @ x)
  jax.block_until_ready([multiply(x) for x in operands])
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready([multiply(x) for x in operands])
    seconds.append(time.perf_counter() - begin)
  return len(operands) * 2 * size**3 / min(seconds)


def cpu_devices(mesh: config.Mesh) -> int:
  """How many devices JAX should make of this machine's CPU: as many as the mesh names, and where it says -1 one a core.

  XLA:CPU runs loops and batched matmuls on one thread, so two devices of one core each are about 1.4 times as fast as
  one device of two. A power of two, at most 8, so that batches divide.
  """
  named = math.prod(size for size in dataclasses.astuple(mesh) if size > 0)
  if -1 not in dataclasses.astuple(mesh):
    return named
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return named * 2 ** min(max(int(math.log2(max(cores / named, 1))), 0), 3)


def use_huge_pages() -> None:
  """Starts this program again with glibc's huge pages, unless they are decided already.

  XLA:CPU takes its temporary buffers from malloc and gives them back every step; with 4 KiB pages a third of a small
  model's step is page faults. The tunable is read at process start only, hence the second start. Linux with glibc
  only; no effect on accelerators.
  """
  if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
    return
  environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def cache_folder() -> pathlib.Path:
  """What may be made again: $MOE_CACHE, else ~/.cache/moe; without a home, a folder of this user among the temporary ones."""
  if "MOE_CACHE" in os.environ:
    return pathlib.Path(os.environ["MOE_CACHE"]).expanduser()
  try:
    return pathlib.Path.home() / ".cache" / "moe"
  except RuntimeError:  # no HOME, and nobody of this number among the users
    return pathlib.Path(tempfile.gettempdir()) / f"moe-{os.getuid()}"


def use_compile_cache() -> str | None:
  """Keeps compiled programs in $MOE_COMPILE_CACHE, else in xla/ of the cache folder; returns what to say where it cannot."""
  import jax

  folder = pathlib.Path(os.environ.get("MOE_COMPILE_CACHE", cache_folder() / "xla")).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except OSError as error:
    return (f"compiled programs are not kept: {folder} cannot be written ({error.strerror}); set MOE_CACHE to a folder that "
            "can, and the next start compiles less")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  return None


def process_start() -> float:
  """When this process was started, in seconds since the epoch; imports count for whoever waits."""
  try:
    return os.stat(f"/proc/{os.getpid()}").st_ctime
  except OSError:
    return _IMPORTED
