"""Compiles programs for a TPU topology without a TPU, and reads what the compiler says of them.

Every program is compiled in a child process (`python -m tools.bench.static_compiler`, a request on its standard input), because
the compiler reads its flags once a process and its profiler may abort.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib
import importlib.util
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

from moe import hardware

_CHILD_KIB = 4 << 20  # resident memory after which the next program gets another process

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:2x2x1"}


def chip_of(topology: str) -> str:
  return hardware.topology(topology).kind


def core_of(topology: str) -> tuple[float, float, float]:
  """(clock, bytes/s of HBM, bfloat16 FLOP/s) of one TensorCore."""
  chip = hardware.topology(topology).chip
  return chip.clock, chip.hbm / chip.cores, chip.flops / chip.cores


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
      function, arguments = getattr(module(where), factory)(**options)
      arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
      before, begin = set(glob.glob(f"{folder}/*")), time.perf_counter()
      compiled = jax.jit(function).lower(*arguments).compile()
      report.compile_seconds = time.perf_counter() - begin
      _facts(report, compiled)
      if request["flag"] == "hlo":
        report.around_bytes, report.copy_bytes = hlo_bytes(compiled.as_text())
      _bundles(report, sorted(set(glob.glob(f"{folder}/*")) - before))
    except Exception as error:  # noqa: BLE001  the compiler's refusals have many types; the report carries the words
      report.problem = " ".join(str(error).split())[:400]
    print("REPORT " + json.dumps(dataclasses.asdict(report)), flush=True)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > _CHILD_KIB:  # the profiler keeps what it unrolled
      return


def module(where: str):
  """A module by its name, or by its file."""
  if not where.endswith(".py"):
    return importlib.import_module(where)
  spec = importlib.util.spec_from_file_location("spec_file", where)
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found


def from_spec_file(path: str, name: str):
  """Program `name` of a file's make()."""
  return module(path).make()[name]


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
    before = len(waiting)
    with tempfile.TemporaryDirectory() as folder:
      arguments = {"bundles": f"--xla_jf_dump_to={folder}", "profile": f"--xla_jf_dump_static_llo_profile_to={folder}"}
      environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
                     "LIBTPU_INIT_ARGS": arguments.get(flag, "")}
      dump = folder if flag == "bundles" else "/nonexistent"
      request = {"topology": topology, "programs": waiting, "flag": flag, "dump": dump}
      child = subprocess.run([sys.executable, "-m", "tools.bench.static_compiler"], input=json.dumps(request),
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
    elif len(waiting) == before:
      raise RuntimeError(f"no report for {', '.join(waiting)}: {child.stderr[-500:]}")
  return reports


def hlo_bytes(text: str) -> tuple[int, int]:
  """HBM bytes of a compiled program's operations but its custom calls: (all but copies, copies). What each reads and writes,
  gathers by what they yield; values that the compiler keeps in vector memory, S(1), count nothing."""
  entry = text[text.index("\nENTRY "):]
  sizes, total, copies = {}, 0, 0
  for line in entry.splitlines():
    found = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line)
    if not found:
      continue
    name, shapes, operation, rest = found.groups()
    sizes[name] = sum(_size(*shape) for shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", shapes))
    if operation in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "custom-call", "after-all"):
      continue
    operands = {o: sizes[o] for o in re.findall(r"%([\w.\-]+)", rest) if o in sizes and o != name}
    read = sum(operands.values())
    if "gather" in name and operands:  # rows of the largest operand, as many as come out
      read += sizes[name] - max(operands.values())
    if operation == "copy":
      copies += sizes[name] + read
    else:
      total += sizes[name] + read
  return total, copies


def _size(kind: str, dims: str, layout: str) -> int:
  bits = re.search(r"\d+$", kind)
  if layout and "S(1)" in layout:
    return 0
  count = 1
  for dim in filter(None, dims.split(",")):
    count *= int(dim)
  return count * (int(bits[0]) if bits else 8) // 8


if __name__ == "__main__":
  _child(json.load(sys.stdin))
