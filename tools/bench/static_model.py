"""The static model of a kernel's time: cycles of its twin for each visit, counted bytes, the larger of both.

Not modelled: HBM contention, DMA queues, two cores sharing HBM, clock changes, instruction overlays, anything between chips.
"""

from __future__ import annotations

import numpy as np

from moe.kernels import plan
from tools.bench import static_programs
from tools.bench.static_compiler import core_of
from tools.bench.static_compiler import measure
from tools.bench.static_compiler import Report

# (mean, lowest, highest) of estimate / published, from --validate with tokamax 0.0.17, first nine shapes of each
# chip, jax 0.12.0.1, libtpu 0.0.50.1.
MODEL_ERROR = {"v5e": (0.912, 0.788, 0.983), "v5p": (0.977, 0.951, 0.988), "v6e": (0.905, 0.691, 1.293)}

# tokens, top_k, experts owned, experts, d_model, d_expert
SHAPES = {"deepseek": (8192, 8, 64, 64, 2048, 1408), "deepseek_small": (1024, 8, 64, 64, 2048, 1408),
          "mixtral": (8192, 2, 8, 8, 4096, 14336), "mixtral_half": (4096, 2, 8, 8, 4096, 14336)}


def _kernel_cycles(report: Report) -> int | None:
  values = [v for k, v in (report.cycles or {}).items() if k.startswith("custom-call")]
  return values[-1] if values else None


def twin_cycles(topology: str, twins: dict) -> dict[str, tuple[float, float] | str]:
  """name -> (cycles of a group, cycles besides), from profiles of 2 and 4 groups; or why there are none.

  Args:
    twins: name -> (module, factory, keyword arguments but `groups`).
  """
  programs = {f"{name}|{groups}": (where, factory, {**options, "groups": groups})
              for name, (where, factory, options) in twins.items() for groups in (2, 4)}
  reports, found = measure(topology, programs, "profile"), {}
  for name in twins:
    two, four = (reports[f"{name}|{groups}"] for groups in (2, 4))
    cycles = [_kernel_cycles(two), _kernel_cycles(four)]
    if None in cycles or cycles[1] <= cycles[0]:
      found[name] = two.problem or four.problem or f"no profile ({cycles})"
    else:
      group = (cycles[1] - cycles[0]) / 2
      found[name] = (group, max(cycles[0] - 2 * group, 0.0))
  return found


_WIDEST = 4096  # d_expert of a twin; beyond, the profiler wants more memory than a workstation has


def _cycles_of_kernels(topology: str, names, shape, blocks) -> dict[str, tuple[float, float] | str]:
  """`twin_cycles` of our kernels. An expert wider than `_WIDEST` is cut into blocks of columns that cost the same each, so
  its cycles are extrapolated from twins of two and of three blocks."""
  twins, ends = {}, {}
  for name in names:
    block = getattr(blocks, "contract" if name.startswith("combine") else
                    "gradient" if name.startswith("weight_gradient") else "hidden")
    ends[name] = (shape.d_expert,) if shape.d_expert <= _WIDEST else (2 * block, 3 * block)
    for width in ends[name]:
      twins[f"{name} {width}"] = ("tools.bench.static_programs", "kernel_twin",
                                  {"name": name, "shape": shape._replace(d_expert=width), "blocks": blocks})
  cycles, found = twin_cycles(topology, twins), {}
  for name in names:
    values = [cycles[f"{name} {width}"] for width in ends[name]]
    problem = next((v for v in values if isinstance(v, str)), None)
    if problem or len(values) == 1:
      found[name] = problem or values[0]
    else:
      share = (shape.d_expert - ends[name][0]) / (ends[name][1] - ends[name][0])
      found[name] = tuple(a + share * (b - a) for a, b in zip(*values))
  return found


def multinomial(rows: int, groups: int) -> list[int]:
  return np.random.default_rng(0).multinomial(rows, [1 / groups] * groups).tolist()


def kernel_estimates(topology: str, shape, blocks, names) -> list[dict]:
  """Exact counts and the static estimate of our kernels, for multinomial loads."""
  shape = plan.Shape(*shape)
  clock, bandwidth, peak = core_of(topology)
  sizes = multinomial(shape.tokens * shape.top_k * shape.num_experts // shape.total_experts, shape.num_experts)
  cycles = _cycles_of_kernels(topology, names, shape, blocks)
  rows = []
  for name in names:
    family = "weight_gradient" if name.startswith("weight_gradient") else name.replace("_forward", "").replace("_int8", "")
    forward = name in ("hidden_forward", "hidden_int8")
    counted = plan.traffic(shape, blocks, sizes, kernels=(family,), residuals=not forward,
                           forward_weights="int8" if name.endswith("_int8") else "")
    moved = sum(counted.bytes.values()) / (3 if family == "weight_gradient" else 1)
    flops = 2 * sum(sizes) * shape.d_model * shape.d_expert * static_programs.MATMULS.get(name, 1)
    row = {"kernel": name, "visits": counted.visits, "rows": counted.computed_rows / max(sum(sizes), 1), "bytes": moved,
           "flop_seconds": flops / peak, "hbm_seconds": moved / bandwidth}
    if isinstance(cycles[name], str):
      row["problem"] = cycles[name]
    else:
      twin = static_programs.twin_rows(name, shape, blocks)
      in_twin = twin * static_programs.visits_of(shape.mean_rows, twin)
      row["cycle_seconds"] = (cycles[name][0] * counted.computed_rows / in_twin + cycles[name][1]) / clock
      row["seconds"] = max(row["cycle_seconds"], row["hbm_seconds"])
    rows.append(row)
  return rows


def pack_bytes(shape) -> int:
  """XLA reads a token array and writes it packed for the kernels."""
  return 2 * shape[0] * shape[4] * 2


def layer_floor(shape, gradient: bool) -> int:
  """Bytes of the fused design when every operand and result of its kernels moves exactly once, without padding."""
  tokens, top_k, owned, total, width, hidden = shape[:6]
  rows, matrix = tokens * top_k * owned // total, owned * width * hidden
  x, h = tokens * width, rows * hidden
  forward = pack_bytes(shape) // 2 + (x + 2 * matrix + (3 if gradient else 1) * h) + (h + matrix + x)
  if not gradient:
    return 2 * forward
  backward = pack_bytes(shape) // 2 + (x + matrix + 5 * h) + (2 * h + 2 * matrix + x) + 3 * (x + h + matrix)
  return 2 * (forward + backward)


def plain_visits(sizes, tile_rows: int) -> int:
  """Tiles that a grouped matmul over unaligned rows visits: one tile counts for each group with rows in it."""
  visits, start = 0, 0
  for size in sizes:
    if size:
      visits += (start + size - 1) // tile_rows - start // tile_rows + 1
    start += size
  return visits


def plain_bytes(sizes, k: int, n: int, tile) -> int:
  """HBM bytes of the plain grouped matmul: rows for every block of n, a group's matrix once for each of its visits if k is
  split and once in all if not, results once for every visit but those that continue a tile."""
  tm, tk, tn = tile
  blocks, visits = -(-n // tn), plain_visits(sizes, tm)
  matrices = visits if tk < k else sum(1 for s in sizes if s)
  return 2 * (blocks * visits * tm * k + matrices * k * n + visits * tm * n)


def plain_estimate(topology: str, shapes: list[dict]) -> list[float | str]:
  """Static seconds of the plain grouped matmul for each {sizes, k, n, tile}."""
  clock, bandwidth, _ = core_of(topology)
  twins = {str(i): ("tools.bench.static_programs", "grouped_matmul_twin",
                    {"rows_per_group": sum(s["sizes"]) // len(s["sizes"]), "k": s["k"], "n": s["n"], "tile": s["tile"]})
           for i, s in enumerate(shapes)}
  cycles, seconds = twin_cycles(topology, twins), []
  for i, s in enumerate(shapes):
    if isinstance(cycles[str(i)], str):
      seconds.append(cycles[str(i)])
      continue
    tm, _, tn = s["tile"]
    per_group = min(max(sum(s["sizes"]) // len(s["sizes"]) // tm, 1), 4)
    visit = cycles[str(i)][0] / per_group
    seconds.append(max(visit * plain_visits(s["sizes"], tm) * -(-s["n"] // tn) / clock,
                       plain_bytes(s["sizes"], s["k"], s["n"], s["tile"]) / bandwidth))
  return seconds


def error_of(chip: str) -> str:
  if chip not in MODEL_ERROR:
    return "error unknown"
  mean, low, high = MODEL_ERROR[chip]
  return f"estimate/published {mean:.2f} ({low:.2f} to {high:.2f})"
