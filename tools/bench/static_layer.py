"""A MoE layer beside library compositions: counted HBM bytes and the static estimate, forward and with the gradient.

Ours and XLA's are the layer of the model (`moe.experts.apply_experts`, routed already) with backend `fused` and `ragged_dot`:
the program is compiled for the chip; what XLA makes of the operations around the matmuls is costed by the compiler's own
cycles, the matmuls by their static twins. XLA writes transposed copies of the weights for the gradient of the rows; the
megablox rows are spared them, because its kernel transposes by itself, and differ by the tile: the one we compute, or its
default, which tokamax's version 1 shares with its body (left out for hidden widths over 4096, where its profile takes many
minutes). The transposed grouped matmul of a library's weight gradient has no twin: it counts at the chip's full rate over the
rows it visits, which flatters the libraries. tokamax's version 2 cannot be profiled (scalars from memory decide its DMA), so
its row is a lower bound: each of its matmuls at the chip's full rate over the useful rows, every operand and result moved once.
"""

from __future__ import annotations

from moe.kernels import grouped_matmul
from moe.kernels import plan
from tools.bench import static_model
from tools.bench.static_compiler import chip_of
from tools.bench.static_compiler import core_of
from tools.bench.static_compiler import measure

_MODULE = "tools.bench.static_programs"
_CUBE = "megablox, tokamax v1: 128"


def compare(topology: str, shape_name: str) -> dict:
  """{"rows": [{name, gradient, bytes, seconds, ...}], "floor": {...}} of one shape on one chip."""
  shape, chip = plan.Shape(*static_model.SHAPES[shape_name]), chip_of(topology)
  clock, bandwidth, peak = core_of(topology)
  sizes = static_model.multinomial(shape.tokens * shape.top_k, shape.num_experts)
  blocks, problem = plan.fit(shape, plan.VECTOR_MEMORY[chip])
  programs = {f"{backend}|{gradient:d}": (_MODULE, "layer", {"shape": shape, "backend": backend, "gradient": gradient})
              for backend in (("fused",) if blocks else ()) + ("ragged_dot",) for gradient in (False, True)}
  around = {}
  for name, report in measure(topology, programs, "hlo").items():
    if report.problem:
      raise RuntimeError(f"{name} does not compile for {topology}: {report.problem}")
    fusions, copies = (sum(v for k, v in report.cycles.items() if k.startswith(kind)) / clock for kind in ("fusion", "copy"))
    around[name] = (fusions, report.around_bytes, copies, report.copy_bytes)

  rows = []
  if blocks:
    kernels = {row["kernel"]: row for row in static_model.kernel_estimates(
        topology, shape, blocks, ("hidden_forward", "hidden", "combine", "hidden_gradient", "combine_gradient",
                                  "weight_gradient", "weight_gradient_down"))}
    lost = [f"{k}: {row['problem']}" for k, row in kernels.items() if "problem" in row]
    forward = ("hidden_forward", "combine")
    both = ("hidden", "combine", "hidden_gradient", "combine_gradient", "weight_gradient", "weight_gradient",
            "weight_gradient_down")
    for gradient, names in ((False, forward), (True, both)):
      fusions, around_bytes, copies, copy_bytes = around[f"fused|{gradient:d}"]
      seconds, moved = fusions + copies, around_bytes + copy_bytes
      rows.append({"name": "ours", "gradient": gradient, "around_seconds": seconds, "visits": kernels["combine"]["visits"],
                   "bytes": moved + sum(kernels[n]["bytes"] for n in names), "lost": lost,
                   "seconds": seconds + sum(kernels[n].get("seconds", float("nan")) for n in names)})

  wide, narrow = (shape.d_model, shape.d_expert), (shape.d_expert, shape.d_model)
  scoped = grouped_matmul.SCOPED.get({"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}.get(chip, ""), 16 << 20)
  rows_total, matrix = sum(sizes), shape.num_experts * shape.d_model * shape.d_expert
  once = 2 * (rows_total * (shape.d_model + shape.d_expert) + matrix)  # bytes of a grouped matmul, each array moved once
  computed = [grouped_matmul.tiling(rows_total, k, n, shape.num_experts, scoped) for k, n in (wide, narrow)]
  tiles = {"XLA ragged dot": computed, "megablox, computed tile": computed, _CUBE: [(128, 128, 128)] * 2}
  if shape.d_expert > 4096:
    tiles.pop(_CUBE)
  for name, (tile_in, tile_out) in tiles.items():
    matmuls = [{"sizes": sizes, "k": k, "n": n, "tile": list(tile)} for (k, n), tile in ((wide, tile_in), (narrow, tile_out))]
    estimates = static_model.plain_estimate(topology, matmuls)
    if any(isinstance(e, str) for e in estimates):
      rows.append({"name": name, "gradient": False, "problem": next(e for e in estimates if isinstance(e, str))})
      continue
    moved = [static_model.plain_bytes(sizes, m["k"], m["n"], m["tile"]) for m in matmuls]
    visited = static_model.plain_visits(sizes, tile_in[0]) * tile_in[0]
    weight_seconds = max(2 * visited * shape.d_model * shape.d_expert / peak, once / bandwidth)
    for gradient in (False, True):
      seconds, around_bytes, copies, copy_bytes = around[f"ragged_dot|{gradient:d}"]
      if name == "XLA ragged dot":
        seconds, around_bytes = seconds + copies, around_bytes + copy_bytes
      into, out = (3, 3) if gradient else (2, 1)  # the gradient of the rows: one more into, two more out
      rows.append({"name": name, "gradient": gradient, "around_seconds": seconds,
                   "visits": static_model.plain_visits(sizes, tile_in[0]),
                   "bytes": around_bytes + into * moved[0] + out * moved[1] + 3 * once * gradient,
                   "seconds": seconds + into * estimates[0] + out * estimates[1] + 3 * weight_seconds * gradient})
  least = max(2 * rows_total * shape.d_model * shape.d_expert / peak, once / bandwidth)
  for gradient in (False, True):
    seconds, around_bytes, *_ = around[f"ragged_dot|{gradient:d}"]
    count = 9 if gradient else 3
    rows.append({"name": "tokamax v2, at the least", "gradient": gradient, "around_seconds": seconds, "visits": None,
                 "bytes": around_bytes + count * once, "seconds": seconds + count * least})
  floor = {str(gradient): static_model.layer_floor(shape, gradient) for gradient in (False, True)}
  return {"topology": topology, "shape": shape_name, "floor": floor, "rows": rows, "problem": problem,
          "flop_seconds": 6 * rows_total * shape.d_model * shape.d_expert / peak}


def table(result: dict) -> str:
  chip = chip_of(result["topology"])
  lines = [f"{result['topology']}, {result['shape']}: the MoE layer, static estimate ({static_model.error_of(chip)}); matmuls "
           f"alone at the chip's peak {result['flop_seconds'] * 1e3:.2f} ms forward"]
  if result["problem"]:
    lines.append(f"  ours: {result['problem']}")
  for gradient in (False, True):
    floor = result["floor"][str(gradient)]
    lines.append(f"  {'forward and gradient' if gradient else 'forward'}; floor of the fused design {floor / 1e9:.2f} GB")
    for row in result["rows"]:
      if "problem" in row and not gradient:
        lines.append(f"    {row['name']:26s} none: {row['problem'][:100]}")
      elif row["gradient"] == gradient and "seconds" in row:
        visits = f"{row['visits']:4d} visits" if row["visits"] else " " * 11
        lines.append(f"    {row['name']:26s} {visits}  {row['bytes'] / 1e9:6.2f} GB ({row['bytes'] / floor:.2f} of the floor)  "
                     f"{row['seconds'] * 1e3:7.2f} ms, of which around the matmuls {row['around_seconds'] * 1e3:.2f}"
                     + (f"  without {'; '.join(row['lost'])[:120]}" if row.get("lost") else ""))
  return "\n".join(lines)
