"""What the TPU compiler says of a kernel or a jitted function, without a TPU: static estimates, never TPU speed.

    python -m tools.bench.tpu_static                                     # our kernels, compiled, v5e and v5p
    python -m tools.bench.tpu_static --kernel=hidden --topology=v6e:1x1 --shape=mixtral
    python -m tools.bench.tpu_static --layer                             # a MoE layer, ours beside XLA's ragged dot
    python -m tools.bench.tpu_static --spec=FILE.py                      # make() -> {name: (function, arguments)}
    python -m tools.bench.tpu_static --validate=TOKAMAX_WHEEL_OR_FOLDER  # the model against published TPU timings

Each line: compiled or why not, seconds to compile, vector memory, HBM, bytes of code, bundles and how full their slots are,
spills, and for kernels with a twin the estimated time: the larger of the profiled cycles of the twin x what is visited, and
the exactly counted bytes over the HBM's rate. The error beside it is that of the same model on published timings of the
plain grouped matmul (`--validate` measures it again). v6e and TPU7x are too far off to compare anything closer than 1.5x.

What is not modelled: static_model.py. Needs libtpu (jax[tpu]), no TPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import statistics
import sys
import zipfile

from moe.hardware import CHIPS
from moe.kernels import plan
from tools.bench import static_layer
from tools.bench import static_programs
from tools.bench.static_compiler import chip_of
from tools.bench.static_compiler import measure
from tools.bench.static_compiler import module
from tools.bench.static_compiler import Report
from tools.bench.static_compiler import TOPOLOGIES
from tools.bench.static_model import error_of
from tools.bench.static_model import kernel_estimates
from tools.bench.static_model import multinomial
from tools.bench.static_model import plain_estimate
from tools.bench.static_model import SHAPES


def published(source: str, chip: str) -> list[dict]:
  """Forward entries of tokamax's Mosaic kernel for a chip: shapes, tiles, group sizes, seconds."""
  name = {"v5e": "tpu_v5_lite", "v5p": "tpu_v5", "v6e": "tpu_v6_lite", "tpu7x": "tpu7x"}[chip]
  inner = f"tokamax/data/autotuning/{name}/pallas_mosaic_tpu_ragged_dot.json"
  path = pathlib.Path(source)
  if path.suffix == ".whl":
    with zipfile.ZipFile(path) as wheel:
      entries = json.loads(wheel.read(inner))
  else:
    entries = json.loads((path / inner).read_text())
  rows = []
  for key, configs in entries.items():
    key = json.loads(key)
    dims = key["ragged_dot_dimension_numbers"]
    plain = dims["dot_dimension_numbers"][0] == [[1], [1]] and dims["lhs_ragged_dimensions"] == [0]
    bf16 = isinstance(key["lhs"], str) and isinstance(key["rhs"], str)  # quantised operands are dicts
    if not (bf16 and plain and dims["rhs_group_dimensions"] == [0] and configs) or key["return_residuals"]:
      continue
    config, timing = next(iter(configs.items()))
    config = json.loads(config)
    m, k = map(int, re.findall(r"\d+", key["lhs"].split("[")[1]))
    g, _, n = map(int, re.findall(r"\d+", key["rhs"].split("[")[1]))
    # Where only their number is published they were drawn at random; multinomial ones visit as many tiles.
    sizes = key["group_sizes"] if isinstance(key["group_sizes"], list) else multinomial(m, g)
    rows.append({"m": m, "k": k, "n": n, "g": g, "sizes": sizes, "tile": [config["tile_m"], config["tile_k"], config["tile_n"]],
                 "seconds": min(timing["evaluation_times_ms"]) / 1e3})
  return rows


def validate(source: str, chips, limit: int) -> dict:
  """Prints estimate over published for each chip, and returns {chip: ratios}."""
  result = {}
  for chip in chips:
    entries = published(source, chip)[:limit]
    ratios = []
    print(f"{chip}: static estimate over published time of tokamax's plain grouped matmul (v1)")
    for entry, seconds in zip(entries, plain_estimate(TOPOLOGIES[chip], entries)):
      what = f"  {entry['m']},{entry['k']},{entry['n']},{entry['g']} tile {','.join(map(str, entry['tile']))}"
      if isinstance(seconds, str):
        print(f"{what}: none, {seconds[:100]}")
        continue
      ratios.append(seconds / entry["seconds"])
      print(f"{what}: {seconds * 1e3:.3f} over {entry['seconds'] * 1e3:.3f} ms = {ratios[-1]:.3f}", flush=True)
    if ratios:
      spread = statistics.stdev(ratios) / statistics.mean(ratios) if len(ratios) > 1 else math.nan
      print(f"  {len(ratios)} shapes: mean {statistics.mean(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}, "
            f"spread {spread:.1%}")
    result[chip] = ratios
  return result


# ----------------------------------------------------------------------------------------------------------- output


def _megabytes(value) -> str:
  return "-" if value is None else f"{value / 2**20:.1f}"


def print_compile_table(topology: str, reports: dict[str, Report]) -> None:
  print(f"{topology}: compiled, not run")
  print(f"  {'program':24s} {'sec':>5s} {'VMEM MiB':>8s} {'HBM MiB':>8s} {'code KiB':>8s} {'bundles':>7s} {'spills':>6s}  "
        "slots in use")
  for name, r in reports.items():
    if r.problem:
      print(f"  {name:24s} does not compile: {r.problem}")
      continue
    slots = " ".join(f"{unit} {r.slots[unit]:.0%}" for unit in ("MXU", "VALU", "VLOAD", "VSTORE") if unit in (r.slots or {}))
    print(f"  {name:24s} {r.compile_seconds:5.1f} {_megabytes(r.vmem_bytes):>8s} {_megabytes(r.hbm_peak_bytes):>8s} "
          f"{(r.code_bytes or 0) / 1024:8.0f} {r.bundles or 0:7d} {r.spills or 0:6d}  {slots}")


def print_kernels(topology: str, shape_name: str, names, as_json: bool) -> None:
  shape, chip = plan.Shape(*SHAPES[shape_name]), chip_of(topology)
  blocks, problem = plan.fit(shape, plan.VECTOR_MEMORY[chip])
  if blocks is None:
    print(f"{topology}, {shape_name}: {problem}")
    return
  where = "tools.bench.static_programs"
  reports = measure(topology, {n: (where, "kernel", {"name": n, "shape": shape, "blocks": blocks}) for n in names}, "bundles")
  rows = kernel_estimates(topology, shape, blocks, names)
  if as_json:
    print(json.dumps({"topology": topology, "shape": shape_name, "blocks": blocks._asdict(), "estimates": rows,
                      "compiled": {k: dataclasses.asdict(r) for k, r in reports.items()}}))
    return
  print(f"{shape_name}: {shape.tokens} tokens, top {shape.top_k}, {shape.num_experts} experts, {shape.d_model} x "
        f"{shape.d_expert}; " + plan.describe(plan.Choice("fused", blocks, "fit")))
  print_compile_table(topology, reports)
  print(f"  static estimate, {error_of(chip)}; loads multinomial, seed 0")
  print(f"  {'kernel':24s} {'visits':>6s} {'rows':>6s} {'HBM MB':>7s} {'cycles ms':>9s} {'HBM ms':>7s} {'FLOP ms':>7s}")
  for row in rows:
    cycles = f"{row['cycle_seconds'] * 1e3:9.3f}" if "cycle_seconds" in row else "     none"
    print(f"  {row['kernel']:24s} {row['visits']:6d} {row['rows']:6.3f} {row['bytes'] / 1e6:7.0f} {cycles} "
          f"{row['hbm_seconds'] * 1e3:7.3f} {row['flop_seconds'] * 1e3:7.3f} {row.get('problem', '')[:80]}")


def print_layer(topology: str, shape_name: str, as_json: bool) -> None:
  result = static_layer.compare(topology, shape_name)
  print(json.dumps(result) if as_json else static_layer.table(result), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", action="append", help="such as v5e:1x1 (default: v5e:1x1 and v5p:1x1x1)")
  parser.add_argument("--shape", action="append", choices=SHAPES, help="default: deepseek")
  parser.add_argument("--kernel", action="append", help="default: all of ours")
  parser.add_argument("--layer", action="store_true", help="the whole MoE layer beside library compositions")
  parser.add_argument("--spec", metavar="FILE.py", help="compile the programs of its make()")
  parser.add_argument("--validate", metavar="TOKAMAX", help="wheel, or folder that holds tokamax/")
  parser.add_argument("--limit", type=int, default=9, help="shapes a chip for --validate")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args()
  if importlib.util.find_spec("libtpu") is None:
    sys.exit("tpu_static needs libtpu: pip install 'jax[tpu]' (Python >= 3.12 for the pinned pair); nothing was estimated")
  wanted = arguments.topology or [TOPOLOGIES["v5e"], TOPOLOGIES["v5p"]]
  unknown = [t for t in wanted if chip_of(t) not in CHIPS]
  if unknown:
    sys.exit(f"--topology={unknown[0]} is of no known chip; known: {', '.join(CHIPS)}")
  if arguments.validate:
    chips = [chip_of(t) for t in arguments.topology] if arguments.topology else ["v5p", "v5e", "v6e"]
    result = validate(arguments.validate, chips, arguments.limit)
    if arguments.json:
      print(json.dumps(result))
    return
  for topology in wanted:
    if arguments.spec:
      names = module(arguments.spec).make()
      reports = measure(topology, {n: ("tools.bench.static_compiler", "from_spec_file", {"path": arguments.spec, "name": n})
                                   for n in names}, "bundles")
      if arguments.json:
        print(json.dumps({k: dataclasses.asdict(r) for k, r in reports.items()}))
      else:
        print_compile_table(topology, reports)
      continue
    for shape in arguments.shape or ["deepseek"]:
      if arguments.layer:
        print_layer(topology, shape, arguments.json)
      else:
        print_kernels(topology, shape, arguments.kernel or static_programs.KERNELS, arguments.json)


if __name__ == "__main__":
  main()
