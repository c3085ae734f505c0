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

Not modelled: HBM contention, DMA queues, two cores sharing HBM, clock changes, instruction overlays, anything between chips.
Needs libtpu (jax[tpu]), no TPU. Every program is compiled in a child process, because the compiler reads its flags once a
process and its profiler may abort.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import importlib
import importlib.util
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile

# Clock in GHz (v5e, v5p: peak over FLOPs a cycle; v6e, 7x assumed), HBM bytes/s of one core, bf16 FLOP/s of one core.
CHIPS = {"v5e": (1.503e9, 0.819e12, 197e12), "v5p": (1.751e9, 1.3825e12, 229.5e12), "v6e": (1.755e9, 1.64e12, 918e12),
         "tpu7x": (2.2e9, 3.69e12, 1153.5e12), "v4": (1.05e9, 0.614e12, 137.5e12)}
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:2x2x1"}

# (mean, lowest, highest) of estimate / published, from --validate with tokamax 0.0.17, first nine shapes of each
# chip, jax 0.12.0.1, libtpu 0.0.50.1.
MODEL_ERROR = {"v5e": (0.912, 0.788, 0.983), "v5p": (0.977, 0.951, 0.988), "v6e": (0.905, 0.691, 1.293)}

# tokens, top_k, experts owned, experts, d_model, d_expert
SHAPES = {"deepseek": (8192, 8, 64, 64, 2048, 1408), "deepseek_small": (1024, 8, 64, 64, 2048, 1408),
          "mixtral": (8192, 2, 8, 8, 4096, 14336), "mixtral_half": (4096, 2, 8, 8, 4096, 14336)}


def chip_of(topology: str) -> str:
  return topology.split(":")[0]


@dataclasses.dataclass
class Report:
  """What came back for one program; None where it does not apply or could not be had."""

  name: str
  problem: str = ""  # why it did not compile
  compile_seconds: float | None = None
  vmem_bytes: int | None = None
  hbm_peak_bytes: int | None = None
  code_bytes: int | None = None
  flops: float | None = None
  cycles: dict | None = None  # "kind operation" -> estimated cycles, by the compiler; kind: custom-call, copy or fusion
  around_bytes: int | None = None  # HBM traffic of all but custom calls and copies
  copy_bytes: int | None = None  # of copies, which change a layout
  bundles: int | None = None
  slots: dict | None = None  # unit -> share of its slots in use
  spills: int | None = None  # bundle slots that spill or fill registers


# ------------------------------------------------------------------------------------------------------------ child


def _child(request: dict) -> None:
  """Compiles the programs of a request one after the other and prints a JSON line for each."""
  import jax
  from jax.experimental import topologies
  from jax.sharding import NamedSharding, PartitionSpec

  from moe import config
  from moe import sharding

  devices = topologies.get_topology_desc(request["topology"], platform="tpu").devices[:1]
  mesh = sharding.make_mesh(config.Mesh(data=1), devices)
  jax.set_mesh(mesh)
  place = NamedSharding(mesh, PartitionSpec())
  for name, (where, factory, options) in request["programs"].items():
    report, folder = Report(name), request["dump"]
    try:
      function, arguments = getattr(_module(where), factory)(**options)
      arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
      before, begin = set(glob.glob(f"{folder}/*")), time.perf_counter()
      compiled = jax.jit(function).lower(*arguments).compile()
      report.compile_seconds = time.perf_counter() - begin
      _facts(report, compiled)
      if request["flag"] == "hlo":
        from tools.bench import static_layer
        report.around_bytes, report.copy_bytes = static_layer.hlo_bytes(compiled.as_text())
      _bundles(report, sorted(set(glob.glob(f"{folder}/*")) - before))
    except Exception as error:  # noqa: BLE001  the compiler's refusals have many types; the report carries the words
      report.problem = " ".join(str(error).split())[:400]
    print("REPORT " + json.dumps(dataclasses.asdict(report)), flush=True)


def _module(where: str):
  if not where.endswith(".py"):
    return importlib.import_module(where)
  spec = importlib.util.spec_from_file_location("spec_file", where)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def from_spec_file(path: str, name: str):
  """Program `name` of a file's make()."""
  return _module(path).make()[name]


def _facts(report: Report, compiled) -> None:
  memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text()
  report.hbm_peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  report.code_bytes = memory.generated_code_size_in_bytes
  report.flops = cost.get("flops")
  used = re.findall(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', text)
  report.vmem_bytes = max(map(int, used), default=None)
  cycles = {}
  for line in text.splitlines():
    found = re.search(r"%([\w.\-]+) = .*\"estimated_cycles\":\"(\d+)\"", line)
    if found and int(found[2]) < 1 << 62:
      kind = next((k for k in ("custom-call", "copy") if f" {k}(" in line), "fusion")
      cycles[f"{kind} {found[1]}"] = int(found[2])
  report.cycles = cycles


def _bundles(report: Report, files) -> None:
  """Sums the static utilisation files of a dump over all operations but the compiler's own program frame."""
  totals, capacity, count = {}, {}, 0
  for path in files:
    if "final_hlo-static-per-bundle-utilization" in path and "late-" not in path and "TLP" not in path:
      lines = pathlib.Path(path).read_text().splitlines()
      units = [u.strip() for u in lines[1].split(",")]
      capacity = dict(zip(units, map(int, lines[2].split())))
      for line in lines[4:]:
        values = line.split()
        if len(values) == len(units):
          count += 1
          for unit, value in zip(units, values):
            totals[unit] = totals.get(unit, 0) + int(value)
  if count:
    report.bundles = count
    report.spills = totals.get("VLOAD:FILL", 0) + totals.get("VSTORE:SPILL", 0)
    report.slots = {unit: totals[unit] / (count * capacity[unit]) for unit in totals if capacity.get(unit)}


def measure(topology: str, programs: dict, flag: str = "") -> dict[str, Report]:
  """Compiles programs for a topology, in child processes.

  Args:
    programs: name -> (module or file, factory, keyword arguments that JSON can carry).
    flag: "" | "bundles" | "profile": which of the compiler's dumps to read, one a process; "hlo": count its traffic.
  """
  waiting, reports = dict(programs), {}
  while waiting:
    with tempfile.TemporaryDirectory() as folder:
      arguments = {"bundles": f"--xla_jf_dump_to={folder}", "profile": f"--xla_jf_dump_static_llo_profile_to={folder}"}
      environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
                     "LIBTPU_INIT_ARGS": arguments.get(flag, "")}
      dump = folder if flag == "bundles" else "/nonexistent"
      request = {"topology": topology, "programs": waiting, "flag": flag, "dump": dump}
      child = subprocess.run([sys.executable, "-m", "tools.bench.tpu_static", "--child"], input=json.dumps(request),
                             capture_output=True, text=True, env=environment)
    for line in child.stdout.splitlines():
      if line.startswith("REPORT "):
        report = Report(**json.loads(line[7:]))
        reports[report.name] = report
        waiting.pop(report.name, None)
    if waiting and child.returncode:  # it died on the first one left
      name = next(iter(waiting))
      why = re.findall(r"Check failed: (.{0,200})", child.stderr) or child.stderr.strip().splitlines()[-1:]
      reports[name] = Report(name, problem=f"the compiler aborted: {why[0] if why else child.returncode}")
      waiting.pop(name)
    elif waiting:
      raise RuntimeError(f"no report for {', '.join(waiting)}: {child.stderr[-500:]}")
  return reports


# -------------------------------------------------------------------------------------------------------- estimates


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


def multinomial(rows: int, groups: int) -> list[int]:
  import numpy as np
  return np.random.default_rng(0).multinomial(rows, [1 / groups] * groups).tolist()


def kernel_estimates(topology: str, shape, blocks, names) -> list[dict]:
  """Exact counts and the static estimate of our kernels, for multinomial loads."""
  from moe.kernels import plan
  from tools.bench import static_programs

  shape, chip = plan.Shape(*shape), chip_of(topology)
  clock, bandwidth, peak = CHIPS[chip]
  sizes = multinomial(shape.tokens * shape.top_k * shape.num_experts // shape.total_experts, shape.num_experts)
  module = "tools.bench.static_programs"
  cycles = twin_cycles(topology, {n: (module, "kernel_twin", {"name": n, "shape": shape, "blocks": blocks}) for n in names})
  rows = []
  for name in names:
    family = "weight_gradient" if name.startswith("weight_gradient") else name.replace("_forward", "")
    counted = plan.traffic(shape, blocks, sizes, kernels=(family,), residuals=name != "hidden_forward")
    moved = sum(counted.bytes.values()) / (3 if family == "weight_gradient" else 1)
    flops = 2 * sum(sizes) * shape.d_model * shape.d_expert * static_programs.MATMULS.get(name, 1)
    row = {"kernel": name, "visits": counted.visits, "rows": counted.computed_rows / max(sum(sizes), 1), "bytes": moved,
           "flop_seconds": flops / peak, "hbm_seconds": moved / bandwidth}
    if isinstance(cycles[name], str):
      row["problem"] = cycles[name]
    else:
      twin = static_programs.twin_rows(name, shape, blocks)
      in_twin = twin * max(round(shape.mean_rows / twin), 1)
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


# ------------------------------------------------------------------------------------------------------- validation


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
  clock, bandwidth, _ = CHIPS[chip_of(topology)]
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


def error_of(chip: str) -> str:
  if chip not in MODEL_ERROR:
    return "error unknown"
  mean, low, high = MODEL_ERROR[chip]
  return f"estimate/published {mean:.2f} ({low:.2f} to {high:.2f})"


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
  from moe.kernels import plan

  shape, chip = plan.Shape(*SHAPES[shape_name]), chip_of(topology)
  blocks, problem = plan.fit(shape, plan.VECTOR_MEMORY[chip])
  if blocks is None:
    print(f"{topology}, {shape_name}: {problem}")
    return
  module = "tools.bench.static_programs"
  reports = measure(topology, {n: (module, "kernel", {"name": n, "shape": shape, "blocks": blocks}) for n in names}, "bundles")
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
  from tools.bench import static_layer
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
  parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    _child(json.load(sys.stdin))
    return
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
      names = _module(arguments.spec).make()
      reports = measure(topology, {n: ("tools.bench.tpu_static", "from_spec_file", {"path": arguments.spec, "name": n})
                                   for n in names}, "bundles")
      if arguments.json:
        print(json.dumps({k: dataclasses.asdict(r) for k, r in reports.items()}))
      else:
        print_compile_table(topology, reports)
      continue
    from tools.bench import static_programs
    for shape in arguments.shape or ["deepseek"]:
      if arguments.layer:
        print_layer(topology, shape, arguments.json)
      else:
        print_kernels(topology, shape, arguments.kernel or static_programs.KERNELS, arguments.json)


if __name__ == "__main__":
  main()
