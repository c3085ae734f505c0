"""Which kernel computes the experts, with which blocks: by name, by an autotune cache, else by the static model.

The static model knows no time, only what decides it: a choice must fit vector memory, and among those that fit the least
HBM traffic wins, then the fewest grid steps. It is printed with the config (`describe`) and can be forced by
`Experts.backend`. A cache written on a device (`python -m tools.bench.autotune`) goes before the model.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe import hardware
from moe.kernels import fused_experts
from moe.kernels import quantize
from moe.kernels import visits as visits_lib
from moe.kernels.fused_experts import Blocks

_SPARE = 4 << 20  # bytes of vector memory for what the compiler spills

# Of one block of weight_gradient, whose whole product is unrolled: 2048 x 1408 compile in seconds, 4096 x 2048 in two minutes.
_GRADIENT_ELEMENTS = 3 << 20

# Chips for which the static estimate of time is close enough to what was published (tools/bench/tpu_static --validate) to
# prefer the fused kernels unasked; elsewhere XLA's own is the default.
_TRUSTED = ("v5e", "v5p")

# Vector memory of one core, bytes: jax.experimental.pallas.tpu.get_tpu_info.
VECTOR_MEMORY = {"v4": 16 << 20, "v5e": 128 << 20, "v5p": 64 << 20, "v6e": 128 << 20, "tpu7x": 64 << 20,
                 "cpu": 128 << 20}  # interpreted
_CHIPS = {**hardware.TPU_KINDS, "cpu": "cpu"}


class Shape(NamedTuple):
  """The experts' block as one device sees it."""

  tokens: int  # T, all tokens of the devices that share an expert axis
  top_k: int
  num_experts: int  # E owned
  total_experts: int
  d_model: int
  d_expert: int
  swiglu: bool = True
  dtype: str = "bfloat16"

  @property
  def mean_rows(self) -> int:
    """Rows of an expert when the load is even."""
    return max(-(-self.tokens * self.top_k // self.total_experts), 1)


class Choice(NamedTuple):
  backend: str
  blocks: Blocks | None  # of the fused kernels
  reason: str


def choose(name: str, shape: Shape, device_kind: str) -> Choice:
  """The backend for a name of `Experts.backend`, on a kind of device (`jax.Device.device_kind`; "cpu" on CPU).

  Raises:
    ValueError: `fused` or `tokamax` is asked for and cannot be had; the message says why.
  """
  cached = None if name != "auto" else _cached(shape, device_kind)
  if cached:
    name, why = cached, "autotuned on such a device"
  elif name != "auto":
    why = "by name"
  elif device_kind == "cpu":
    return Choice("loop", None, "CPU")
  elif _CHIPS.get(device_kind) not in _TRUSTED:
    return Choice("ragged_dot", None, f"default of {device_kind}")
  else:
    name, why = "fused", "static model"
  if name == "tokamax" and (device_kind not in _CHIPS or device_kind == "cpu" or not importlib.util.find_spec("tokamax")):
    raise ValueError("Experts.backend = 'tokamax' needs a TPU and the tokamax package (Python >= 3.12; pip install tokamax); "
                     f"the device is {device_kind}. Use 'ragged_dot' or 'auto'")
  if name != "fused":
    return Choice(name, None, why)
  blocks, problem = fit(shape, VECTOR_MEMORY.get(_CHIPS.get(device_kind), 0))
  if blocks is not None:
    return Choice("fused", blocks, why)
  if why == "by name":
    raise ValueError(f"Experts.backend = 'fused' cannot be had on {device_kind}: {problem}; use 'ragged_dot' or 'auto'")
  return Choice("ragged_dot", None, problem)


def describe(choice: Choice) -> str:
  if choice.blocks is None:
    return f"{choice.backend} ({choice.reason})"
  fields = ", ".join(f"{k} {v}" for k, v in choice.blocks._asdict().items() if k != "vmem_bytes")
  return f"{choice.backend} ({choice.reason}): {fields}"


@functools.lru_cache(maxsize=256)
def fit(shape: Shape, vector_memory: int) -> tuple[Blocks | None, str]:
  """(blocks that fit, '') or (None, reason): each kernel's by least traffic for evenly loaded experts."""
  problem = fused_experts.supports(shape.d_model, shape.d_expert, jnp.dtype(shape.dtype))
  if problem:
    return None, problem
  options = [o for o in map(functools.partial(_fit_tile, shape, vector_memory), _tile_options(shape)) if o is not None]
  if not options:
    return None, (f"the tokens of one device ({shape.tokens} of width {shape.d_model}) do not fit {vector_memory >> 20} MiB "
                  "of vector memory; smaller micro-batches would")
  return min(options)[-1], ""


def _tile_options(shape: Shape) -> list[int]:
  """Tiles that hold nearly every expert's rows at once (mean + 2 deviations of a multinomial), and parts of that."""
  most = shape.mean_rows + int(2 * shape.mean_rows**0.5)
  return sorted({-(-most // parts // 128) * 128 for parts in (1, 2, 4, 8)}, reverse=True)


def _fit_tile(shape: Shape, vector_memory: int, tile: int):
  """(traffic, steps, blocks) with the best blocks for each kernel, or None."""
  columns = [128 * n for n in range(1, shape.d_expert // 128 + 1) if shape.d_expert % (128 * n) == 0]
  gradients = [n for n in columns if n * shape.d_model <= _GRADIENT_ELEMENTS] or columns[:1]
  widths = [256 * n for n in range(1, shape.d_model // 256 + 1) if shape.d_model % (256 * n) == 0]
  base = Blocks(tile, columns[0], columns[0], widths[0], columns[0], vmem_bytes=vector_memory - (2 << 20))
  searches = ((("hidden",), ("hidden", "hidden_gradient"), itertools.product(columns)),
              (("contract", "width"), ("combine", "combine_gradient"), itertools.product(columns, widths)),
              (("gradient", "gradient_buffers"), ("weight_gradient",), itertools.product(gradients, (2, 1))))
  total = 0
  for fields, kernels, values in searches:
    found = []
    for value in values:
      blocks = base._replace(**dict(zip(fields, value)))
      counted = traffic(shape, blocks, kernels=kernels)
      spare = _SPARE + (fused_experts.transposed_bytes(tile, shape.d_model) if fields[0] == "gradient" else 0)
      if max(counted.vmem.values()) + spare <= vector_memory:
        found.append((sum(counted.bytes.values()), tuple(-v for v in value), blocks))
    if not found:
      return None
    moved, _, base = min(found)
    total += moved
  return total, -tile, base


KERNELS = ("hidden", "combine", "hidden_gradient", "combine_gradient", "weight_gradient")


def traffic(shape: Shape, blocks: Blocks, sizes=None, kernels=KERNELS, residuals: bool = True,
            forward_weights: str = "") -> visits_lib.Counted:
  """Counts what the kernels move for these group sizes (default: even ones). Nothing runs."""
  if sizes is None:
    sizes = [min(shape.mean_rows, shape.tokens)] * shape.num_experts
  counted, spec = visits_lib.Counted(sizes, blocks.tile_rows), jax.ShapeDtypeStruct
  num, tile, experts = counted.num_tiles, blocks.tile_rows, shape.num_experts
  token, scale = spec((num, 1, tile), jnp.int32), spec((num, 1, tile), jnp.float32)
  tokens = -(-shape.tokens // 128) * 128
  packed = spec((tokens + 1, shape.d_model // 256, 128), jnp.uint32)
  into = spec((experts, shape.d_model, shape.d_expert), jnp.bfloat16)
  down = spec((experts, shape.d_expert, shape.d_model), jnp.bfloat16)
  rows = spec((num * tile, shape.d_expert), jnp.bfloat16)
  small = lambda w: quantize.Quantized(spec(w.shape, forward_weights), spec((experts, 1, w.shape[2]), jnp.float32))
  forward_into, forward_down = (small(into), small(down)) if forward_weights else (into, down)
  parts, activation = (2, "swiglu") if shape.swiglu else (1, "gelu")
  if "hidden" in kernels:
    fused_experts.hidden(counted, packed, token, (forward_into,) * parts, activation=activation, blocks=blocks,
                         residuals=residuals)
  if "combine" in kernels:
    fused_experts.combine(counted, [(rows, forward_down)], token, scale, tokens, transposed=False, blocks=blocks)
  if "hidden_gradient" in kernels:
    fused_experts.hidden_gradient(counted, packed, token, scale, down, (rows,) * parts, activation=activation, blocks=blocks)
  if "combine_gradient" in kernels:
    fused_experts.combine(counted, [(rows, into)] * parts, token, None, tokens, transposed=True, blocks=blocks)
  if "weight_gradient" in kernels:
    for transposed in (True,) + (False,) * parts:
      fused_experts.weight_gradient(counted, packed, token, rows, experts, transposed=transposed, blocks=blocks)
  return counted


# ------------------------------------------------------------------------------------------------------------- cache


def cache_path() -> pathlib.Path:
  return hardware.cache_folder() / "kernels.json"


def cache_key(shape: Shape, device_kind: str) -> str:
  return f"{device_kind} jax {jax.__version__} {tuple(shape)}"


def _cached(shape: Shape, device_kind: str) -> str | None:
  """The backend an autotuning on such a device found quickest; a cache that cannot be read counts as none."""
  try:
    return json.loads(cache_path().read_text()).get(cache_key(shape, device_kind), {}).get("backend")
  except (OSError, ValueError, AttributeError):
    return None


def remember(shape: Shape, device_kind: str, backend: str, seconds: dict[str, float]) -> None:
  """Writes an autotuned choice, atomically."""
  path = cache_path()
  try:
    entries = json.loads(path.read_text())
  except (OSError, ValueError):
    entries = {}
  entries[cache_key(shape, device_kind)] = {"backend": backend, "seconds": seconds}
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(f".{os.getpid()}")
  temporary.write_text(json.dumps(entries, indent=1, sort_keys=True))
  temporary.replace(path)
