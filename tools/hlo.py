"""Reads a program compiled for TPU, as text: its collectives, a step-time model that walks the compiler's schedule, big arrays.

    program = parse(compiled.as_text())
    walk(program, chip, mesh_sizes) -> Walk(seconds, collectives, ...)

The model: a fusion takes the cycles that the compiler writes beside it; a kernel (custom call) the larger of its declared FLOPs
over the peak and of its bytes over the HBM's rate, with an efficiency, a grouped matmul longer for the tiles that two groups
share; a collective its bytes over the links that its axes of the mesh have in the torus. A loop counts its trips, a conditional
its cheaper branch (the overflow of the experts' exchange, for one, hardly ever runs). What starts and ends asynchronously runs
beside the instructions in between, one transfer at a time for each set of mesh axes; a SparseCore's begins where it is handed
its operands (`update`), not where its buffers are (`start`). A wait is charged to the transfers that are under way meanwhile.
Where the compiler says nothing of cycles, bytes over the HBM's rate. Nothing here has run on a TPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np

from moe.hardware import Chip
from moe.hardware import link_rate

KERNEL_EFFICIENCY = 0.85  # of declared FLOPs over the peak: the middle of tokamax's published timings of grouped matmuls

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
          "f16": 2,
          "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
_HOST = "host"
_GROUPED = ("ragged-dot", "gmm", "tgmm")  # grouped matmuls: XLA's, megablox's and tokamax's
_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")


# On v5e a transfer is a chain of fusions: its start, matmuls that it goes on beside, its end; each repeats the collective.
_START, _STEP, _DONE = "async-collective-start", "async_collective_fusion", "async-collective-done"
# Where an operation names what it wraps; the SparseCores' are called as one or the other by libtpu 0.0.50 and 0.0.51.
_CALLED = {"fusion": "calls", "async-start": "calls", "call-start": "to_apply", "custom-call-start": "called_computations"}


@dataclasses.dataclass
class Instruction:
  name: str
  shape: str  # as written: an array or a tuple of them
  operation: str
  operands: list[str]
  rest: str  # attributes

  @property
  def bytes(self) -> float:
    return size_of(self.shape)

  def called(self, attribute: str) -> str | None:
    found = re.search(attribute + r"=\{?%?([\w.\-]+)", self.rest)
    return found[1] if found else None

  @property
  def source(self) -> str:
    """The operation of the JAX program it comes from; an argument as state.params.layers."""
    begin = self.rest.find('op_name="')
    name = self.rest[begin + 9:self.rest.index('"', begin + 9)] if begin >= 0 else ""
    return re.sub(r"\[\\*'(\w+)\\*'\]", r".\1", name)


@dataclasses.dataclass
class Program:
  computations: dict[str, list[Instruction]]
  entry: str


@dataclasses.dataclass
class Collective:
  """One collective instruction, all its trips together."""

  kind: str
  axes: tuple[str, ...]
  bytes: float  # over the links of one device
  count: int
  asynchronous: bool
  seconds: float
  exposed: float  # seconds that nothing runs beside
  source: str


@dataclasses.dataclass
class Walk:
  """Seconds of a program by what they are spent on; `seconds` is not their sum, because they overlap."""

  seconds: float = 0.0
  compute: float = 0.0  # fusions and kernels
  memory: float = 0.0  # copies, and fusions that the compiler gives no cycles
  network: float = 0.0
  exposed: float = 0.0  # network with nothing beside it
  host: float = 0.0  # transfers to and from the host's memory
  host_exposed: float = 0.0
  unknown_trips: int = 0
  collectives: list[Collective] = dataclasses.field(default_factory=list)


def size_of(shape: str) -> float:
  """Bytes of all arrays in a shape."""
  total = 0.0
  for kind, dims in re.findall(r"\b([a-z]+\d*(?:e\d+m\d+(?:fn)?)?)\[([\d,]*)\]", shape):
    if kind in _BYTES:
      total += _BYTES[kind] * math.prod(map(int, filter(None, dims.split(","))))
  return total


def parse(text: str) -> Program:
  """Computations by name. An instruction starts with two blanks and a name; metadata of kernels may go on over lines."""
  computations: dict[str, list[Instruction]] = {}
  entry, current, pending = "", None, ""

  def flush():
    nonlocal pending
    if pending and current is not None:
      made = _instruction(pending)
      if made:
        current.append(made)
    pending = ""

  for line in text.splitlines():
    if line.startswith(("  %", "  ROOT %")):
      flush()
      pending = line
    elif line.startswith("%") or line.startswith("ENTRY"):
      flush()
      name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
      current = computations.setdefault(name, [])
      entry = name if line.startswith("ENTRY") else entry
    elif line.startswith("}"):
      flush()
    elif pending:
      pending += line
  flush()
  return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
  name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
  if rest.startswith("("):  # a tuple: up to its closing bracket
    end = _closing(rest, 0)
    shape, rest = rest[:end + 1], rest[end + 2:]
  else:
    shape, _, rest = rest.partition(" ")
  operation, bracket, rest = rest.partition("(")
  if not bracket:
    return None
  end = _closing(rest, 1)
  attributes = rest if operation == "constant" else rest[end + 1:]
  return Instruction(name.lstrip("%"), shape, operation, re.findall(r"%([\w.\-]+)", rest[:end]), attributes)


def _closing(text: str, depth: int) -> int:
  """Where the bracket closes that is `depth` deep at the start."""
  for at, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return at
  return len(text)


def trips(program: Program, loop: Instruction) -> int | None:
  """How often a loop runs: its condition compares a counter from 0 with a constant. None where it does not."""
  found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
  if found:
    return int(found[1])
  condition = program.computations.get(loop.called("condition") or "", [])
  limits = [int(c[1]) for i in condition if i.operation == "constant" and re.match(r"[su]32\[\]", i.shape)
            for c in [re.match(r"(\d+)\)", i.rest)] if c]
  return limits[0] if len(limits) == 1 else None


def group_of(rest: str, sizes: dict[str, int]) -> tuple[tuple[str, ...], int]:
  """(mesh axes, devices) that a collective spans; axes () where the group is no product of axes."""
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
  if named:  # not always by the names and axes of our mesh: axis_0 may be all of it
    listed = dict((k, int(v)) for k, v in re.findall(r"'([\w]+)'=(\d+)", named[1]))
    first = _members(listed, re.findall(r"'([\w]+)'", named[2]))
    return _axes_of(first, sizes), len(first)
  groups = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest)
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
  pairs = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", rest)
  first: list[int] = []
  if groups:
    first = [int(n) for n in groups[1].split("}")[0].strip("{").split(",") if n.strip()]
  elif iota:
    shape, dims = ([int(n) for n in g.split(",")] for g in (iota[1], iota[2]))
    order = [int(n) for n in iota[3].split(",")] if iota[3] else None
    first = np.arange(math.prod(dims)).reshape(dims).transpose(order).ravel()[:shape[-1]].tolist()
  elif pairs:  # the devices that the first one reaches
    ways = dict(tuple(map(int, p.split(","))) for p in re.findall(r"(\d+,\d+)", pairs[1]))
    at = next(iter(ways))
    while at not in first:
      first.append(at)
      at = ways.get(at, at)
  return _axes_of(first, sizes), len(first)


def _axes_of(members: list[int], sizes: dict[str, int]) -> tuple[str, ...]:
  offsets, names = {m - min(members) for m in members}, [a for a in sizes if sizes[a] > 1]
  chosen = (c for count in range(1, len(names) + 1) for c in itertools.combinations(names, count))
  return next((c for c in chosen if offsets == set(_members(sizes, c))), ())


def _members(sizes: dict[str, int], axes) -> list[int]:
  """The first device and those that it reaches along these axes of a mesh."""
  return np.arange(math.prod(sizes.values())).reshape(*sizes.values())[tuple(
      slice(None) if a in axes else 0 for a in sizes)].ravel().tolist()


def moved_bytes(kind: str, result: float, members: int, operand: float) -> float:
  """Bytes that one device sends, by the ring or direct algorithm."""
  share = (members - 1) / members if members else 0.0
  return {"all-gather": result * share, "reduce-scatter": operand * share, "all-reduce": 2 * operand * share,
          "collective-permute": operand}.get(kind, operand * share)


class _Walker:
  def __init__(self, program: Program, chip: Chip, mesh, filled: float = 1.0):
    self.program, self.chip, self.mesh, self.filled = program, chip, mesh, filled
    self.sizes: dict[str, int] = dict(getattr(mesh, "shape", mesh))
    self.rates: dict[tuple[str, ...], float] = {}
    self.cache: dict[str, Walk] = {}

  def walk(self, name: str) -> Walk:
    if name not in self.cache:
      self.cache[name] = self._walk(self.program.computations.get(name, []))
    return self.cache[name]

  def _walk(self, instructions: list[Instruction]) -> Walk:
    out, now = Walk(), 0.0
    queues: dict[tuple[str, ...], list[tuple[float, Collective]]] = {}  # axes -> (beginning, transfer), one at a time
    updated = {i.operands[0] for i in instructions if i.operation.endswith("-update") and i.operands}
    started: dict[str, Collective] = {}
    chain: dict[str, str] = {}  # what hands a transfer on that is under way -> the name that it started under
    shapes = {i.name: i for i in instructions}
    for i in instructions:
      kind = i.operation.removesuffix("-start").removesuffix("-done")
      inside = self._collective_within(i)
      if i.operation == "while":
        body, count = self.walk(i.called("body") or ""), trips(self.program, i)
        out.unknown_trips += count is None
        now += self._add(out, body, 1 if count is None else count)
      elif i.operation == "conditional":
        branches = [self.walk(b) for b in self._branches(i)]
        if branches:
          now += self._add(out, min(branches, key=lambda w: w.seconds), 1)
      elif i.operation == "call":
        now += self._add(out, self.walk(i.called("to_apply") or ""), 1)
      elif i.operation in ("call-update", "custom-call-update"):  # a transfer by the SparseCore gets its operands and begins
        if i.operands and i.operands[0] in started:
          started[i.name] = started.pop(i.operands[0])
          _enqueue(queues, started[i.name], now)
      elif i.operation.endswith("-done") or i.name.startswith(_DONE):
        source = i.operands[0] if i.operands else ""
        if i.name.startswith(_DONE):
          source = next((chain[o] for o in i.operands if chain.get(o) in started), "")
        if source in started:
          collective = started.pop(source)
          wait = _wait(queues, collective, now)
          if collective.kind == _HOST:
            out.host_exposed += wait
          else:
            out.exposed += wait
          now += wait
      elif i.operation.endswith("-start") and "S(5)" in i.shape:
        taken = _on_device(i.shape) / self.chip.host
        out.host += taken
        started[i.name] = Collective(_HOST, (_HOST,), 0.0, 1, True, taken, 0.0, i.source)
        _enqueue(queues, started[i.name], now)
      elif inside is not None or kind in _KINDS:
        kind = kind if kind in _KINDS else inside.operation.removesuffix("-start")
        collective = self._collective(i, kind, inside or i, shapes)
        if i.name.startswith(_START):
          chain[i.name] = i.name
        out.collectives.append(collective)
        out.network += collective.seconds
        if collective.asynchronous:
          started[i.name] = collective
          if i.name not in updated:  # else it begins with its update
            _enqueue(queues, collective, now)
        else:
          # A fusion around a collective computes too: the longer of both.
          cycles = _cycles(i) / self.chip.clock if inside is not None else 0.0
          collective.exposed = max(collective.seconds - cycles, 0.0)
          out.compute += cycles
          out.exposed += collective.exposed
          now += max(collective.seconds, cycles)
      elif i.operation == "get-tuple-element" and i.operands and i.operands[0] in chain:
        chain[i.name] = chain[i.operands[0]]
      elif i.operation not in _NOTHING and not i.operation.endswith("-start"):
        handed = next((chain[o] for o in i.operands if o in chain), None) if i.operation == "fusion" else None
        if handed:
          chain[i.name] = handed
        seconds, memory = self._operation(i, shapes)
        out.memory += seconds if memory else 0.0
        out.compute += 0.0 if memory else seconds
        now += seconds
    out.seconds = now
    return out

  def _add(self, out: Walk, part: Walk, count: int) -> float:
    for field in ("compute", "memory", "network", "exposed", "host", "host_exposed"):
      setattr(out, field, getattr(out, field) + count * getattr(part, field))
    out.unknown_trips += part.unknown_trips
    out.collectives += [dataclasses.replace(c, bytes=c.bytes * count, count=c.count * count, seconds=c.seconds * count,
                                            exposed=c.exposed * count) for c in part.collectives]
    return part.seconds * count

  def _branches(self, i: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
    if listed:
      return [n.strip().lstrip("%") for n in listed[1].split(",")]
    return [n for n in (i.called("true_computation"), i.called("false_computation")) if n]

  def _collective_within(self, i: Instruction) -> Instruction | None:
    """The collective that a fusion or an asynchronous call wraps."""
    attribute = _CALLED.get(i.operation)
    if i.operation == "fusion" and (i.called("calls") or "").startswith(_STEP):
      return None  # a matmul that a transfer goes on beside
    for inner in self.program.computations.get(attribute and i.called(attribute) or "", []):
      if inner.operation.removesuffix("-start") in _KINDS:
        return inner
    return None

  def _collective(self, i: Instruction, kind: str, inner: Instruction, shapes) -> Collective:
    axes, members = group_of(inner.rest, self.sizes)
    operand = sum(shapes[o].bytes for o in i.operands if o in shapes)
    result = i.bytes
    if i.name.startswith(_START):
      within = {p.name: p for p in self.program.computations[i.called("calls")]}
      moved = moved_bytes(kind, inner.bytes, members, sum(within[o].bytes for o in inner.operands if o in within))
      return Collective(kind, axes, moved, 1, True, moved / self._rate(axes), 0.0, inner.source or i.source)
    if i.operation in ("call-start", "custom-call-start"):  # the shapes stand within
      within = self.program.computations[i.called(_CALLED[i.operation])]
      operand = max(p.bytes for p in within if p.operation == "parameter")
      moved = moved_bytes(kind, inner.bytes, members, operand)
      return Collective(kind, axes, moved, 1, True, moved / self._rate(axes), 0.0, inner.source or i.source)
    if kind == "all-reduce" and "scatter" in (i.called("calls") or ""):  # a fusion that keeps its slice
      kind = "reduce-scatter"
    if i.operation.endswith("-start"):  # (operands, results, ...)
      result = max(result - operand, 0.0)
    if kind == "ragged-all-to-all" and i.operands:  # (rows, buffer, ...): no more than either holds
      operand = min((shapes[o].bytes for o in i.operands[:2] if o in shapes), default=result)
    moved = moved_bytes(kind, result, members, operand)
    seconds = moved / self._rate(axes)
    return Collective(kind, axes, moved, 1, i.operation.endswith("-start"), seconds, 0.0, inner.source or i.source)

  def _rate(self, axes: tuple[str, ...]) -> float:
    if axes not in self.rates:
      self.rates[axes] = rate(self.chip, self.mesh, axes)
    return self.rates[axes]

  def _operation(self, i: Instruction, shapes) -> tuple[float, bool]:
    """(seconds, whether it is memory traffic alone)."""
    moved = i.bytes + sum(shapes[o].bytes for o in i.operands if o in shapes)
    if i.operation == "custom-call":
      if "tpu_custom_call" not in i.rest:
        return 0.0, True
      flops = kernel_flops(i) * visited(i, self.filled if i.name.startswith(_GROUPED) else 1.0)
      work = flops / (self.chip.flops * KERNEL_EFFICIENCY)
      cycles = _cycles(i) / self.chip.clock
      return max(work, cycles if not flops else 0.0, moved / self.chip.hbm), False
    cycles = _cycles(i)
    if cycles:
      return cycles / self.chip.clock, i.operation == "copy"
    return (moved / self.chip.hbm, True) if moved > 1 << 20 and "S(1)" not in i.shape else (0.0, True)


def _enqueue(queues: dict, collective: Collective, now: float) -> None:
  queue = queues.setdefault(collective.axes, [])
  queue.append((max(now, queue[-1][0] + queue[-1][1].seconds) if queue else now, collective))


def _wait(queues: dict, collective: Collective, now: float) -> float:
  """Seconds until a transfer has ended, noted as exposed on it and on those that it waits for."""
  queue = queues[collective.axes]
  end = next(begin for begin, c in queue if c is collective) + collective.seconds
  for begin, c in queue:
    c.exposed += max(min(end, begin + c.seconds) - max(now, begin), 0.0)
  return max(end - now, 0.0)


def rate(chip: Chip, mesh, axes: tuple[str, ...]) -> float:
  """Bytes/s of a device over axes of a mesh (all of them where none is named), by the dimensions of the torus they lie along.

  Args:
    mesh: as in `walk`.
  """
  sizes = dict(getattr(mesh, "shape", mesh))
  if "slice" in axes:
    return chip.network
  if not hasattr(mesh, "devices"):
    return chip.links
  inner = [a for a in sizes if a != "slice"]

  def extents(along):
    group = mesh.devices[np.ix_(*(range(n) if a in along else [0] for a, n in sizes.items()))].ravel()
    return [len({d.coords[k] for d in group}) for k in range(3)]

  return link_rate(chip, extents(inner), extents(axes or inner))


def visited(i: Instruction, filled: float = 1.0) -> float:
  """Rows that a grouped matmul multiplies over the rows it is given, `filled` of which hold something: a tile is visited once
  for each group with rows in it. The kernel's table of visits is as long as the most there can be, tiles + groups - 1."""
  constraints = i.rest[i.rest.find("operand_layout_constraints={"):].split("}}")[0]
  visits = max(map(int, re.findall(r"\bs32\[(\d+)\]", constraints)), default=0)
  groups = next((int(n) for n in re.findall(r"\w+\[(\d+),\d+,\d+\]", i.shape + constraints)), 0)
  tiles = visits - groups + 1
  grouped = i.name.startswith(_GROUPED) and groups and tiles > 0
  return (filled * tiles + groups - 1) / tiles if grouped else filled


def kernel_flops(i: Instruction) -> float:
  """FLOPs of a kernel: those it declares, else by its name and shapes (megablox and splash declare none); 0 if unknown."""
  declared = re.search(r'cost_estimate":\{"flops":"(\d+)"', i.rest)
  if declared:
    return float(declared[1])
  begin = i.rest.find("operand_layout_constraints={")
  dims = [list(map(int, d.split(","))) for d in re.findall(r"\[([\d,]+)\]", i.rest[begin:i.rest.find("}}", begin)])]
  result = [list(map(int, d.split(","))) for d in re.findall(r"\[([\d,]+)\]", i.shape)]
  flat, cubes = [d for d in dims if len(d) == 2], [d for d in dims if len(d) == 3]
  if i.name.startswith("gmm") and flat and cubes:  # [m, k] x [g, k, n]
    return 2.0 * math.prod(flat[0]) * cubes[-1][-1] * cubes[-1][-2] / flat[0][1]
  if i.name.startswith("tgmm") and flat and len(result[0]) == 3:  # [k, m] x [m, n] -> [g, k, n]
    _, k, n = result[0]
    return 2.0 * math.prod(flat[0]) / k * k * n
  heads = [d for d in dims if len(d) == 4]
  if i.name.startswith("splash") and len(heads) >= 3:  # causal: half of the products
    (b, h, s, d), (_, _, t, _), (_, _, _, dv) = heads[:3]
    products = 2 * d + 2 * dv if "dkv" in i.name else 2 * d + dv if "dq" in i.name else d + dv
    if "dkv" in i.name and any(len(r) == 5 for r in result):  # the queries' gradient too, in parts: the fused backward pass
      products += d
    return float(b * h * s * t * products)
  return 0.0


def _on_device(shape: str) -> float:
  """Bytes of the largest array in a tuple that is not in the host's memory: what a transfer to or from there moves."""
  arrays = re.findall(r"[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?", shape)
  return max((size_of(a) for a in arrays if "S(5)" not in a), default=0.0)


def _cycles(i: Instruction) -> int:
  at = i.rest.find('"estimated_cycles":"')
  if at < 0:
    return 0
  value = int(i.rest[at + 20:i.rest.index('"', at + 20)])
  return value if value < 1 << 50 else 0  # the compiler's word for "unknown" is near 2^63


def walk(program: Program, chip: Chip, mesh, filled: float = 1.0) -> Walk:
  """The step-time model on a whole program.

  Args:
    mesh: of the program's devices; or mesh axis -> length alone, in their order, and then all links serve every axis.
    filled: share of the rows of ragged matmuls that hold something; they declare FLOPs for all, and compute these.
  """
  return _Walker(program, chip, mesh, filled).walk(program.entry)


def reached(program: Program) -> list[str]:
  """Computations that run as control flow (not fused ones), the entry first."""
  found, waiting = [], [program.entry]
  while waiting:
    name = waiting.pop()
    if name in found or name not in program.computations:
      continue
    found.append(name)
    for i in program.computations[name]:
      if i.operation in ("while", "conditional", "call"):
        names = re.findall(r"%([\w.\-]+)", i.rest[:i.rest.find("metadata")])
        waiting += [n for n in names if n in program.computations]
  return found


def largest(program: Program, count: int = 12) -> list[tuple[float, str, str]]:
  """(bytes, shape, operation of the JAX program) of the largest arrays in HBM, one of each shape and source."""
  seen: dict[tuple[str, str], float] = {}
  for name in reached(program):
    for i in program.computations[name]:
      if i.operation in _NOTHING and i.operation != "parameter" or i.operation in ("while", "conditional"):
        continue
      if i.operation.endswith(("-start", "-update")):
        continue
      if i.operation == "parameter" and name != program.entry:
        continue
      for shape in re.findall(r"[a-z]+\d*\[[\d,]*\]\{[^}]*\}", i.shape):
        if "S(1)" not in shape and "S(5)" not in shape:
          seen[shape.split("{")[0], i.source] = size_of(shape)
  return [(size, *key) for key, size in sorted(seen.items(), key=lambda item: -item[1])[:count]]


def stacked_bytes(program: Program, layers: int, unroll: int = 1) -> float:
  """Bytes of what the forward loop over layers leaves for the backward one: arrays written a turn of `unroll` layers at a
  time."""
  found, stacks = {}, ((layers,), (layers // unroll, unroll))
  for name in reached(program):
    for i in program.computations[name]:
      if "jvp(" in i.source and "transpose(" not in i.source and "dynamic_update_slice" in i.source and i.operation == "fusion":
        for shape in re.findall(r"[a-z]+\d*\[[\d,]*\]\{[^}]*\}", i.shape):
          dims = tuple(map(int, re.findall(r"\d+", shape.split("[")[1].split("]")[0])))
          if (dims[:1] in stacks or dims[:2] in stacks) and "S(1)" not in shape:
            found[i.name, shape] = size_of(shape)
  return sum(found.values())


def summary(collectives: list[Collective]) -> list[dict]:
  """One row for each kind and set of axes, largest first."""
  rows: dict[tuple, dict] = {}
  for c in collectives:
    row = rows.setdefault((c.kind, c.axes), {"kind": c.kind, "axes": list(c.axes), "bytes": 0.0, "count": 0, "seconds": 0.0,
                                             "exposed_seconds": 0.0, "asynchronous_bytes": 0.0})
    row["bytes"] += c.bytes
    row["count"] += c.count
    row["seconds"] += c.seconds
    row["exposed_seconds"] += c.exposed
    row["asynchronous_bytes"] += c.bytes * c.asynchronous
  for row in rows.values():
    row["asynchronous_share"] = row.pop("asynchronous_bytes") / row["bytes"] if row["bytes"] else 0.0
  return sorted(rows.values(), key=lambda r: -r["bytes"])


def overlapped_share(collectives: list[Collective]) -> float:
  """Share of the collectives' bytes that move beside other work, by the model."""
  total = sum(c.bytes for c in collectives)
  return sum(c.bytes * (1 - c.exposed / c.seconds) for c in collectives if c.seconds) / total if total else 1.0
