"""Chooses `Experts.overlap_degree`: the schedule model of FSMoE (arXiv 2501.10714, sections 3.3 to 3.5) for one MoE layer.

    python -m tools.overlap --gin_file=configs/run/qwen3_30b_a3b_v5p_16.gin      # from the vendor's link and matmul rates
    python -m tools.overlap --gin_file=... --compile                  # and what the compiled schedules hide at each degree

A layer cut into r chunks issues, between slow links: dispatch 1..r, a piece of the gradients' reduction, combine 1..r; between
near ones: all-gather 1..r, reduce-scatter 1..r; and the experts' matmuls. An operation on a chunk takes alpha + n / r x beta
(seconds; `fit` finds both from timings). `seconds` is the closed form, `simulate` plays the schedule, in FSMoE's order or with
combines and reduce-scatters as early as they can be. Nothing here has been timed on a TPU.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import NamedTuple

import numpy as np

from moe.terminal import progress
from tools import terminal

DEGREES = (1, 2, 4, 8)


class Line(NamedTuple):
  """alpha + n x beta seconds for n units of work."""

  alpha: float
  beta: float

  def of(self, n: float) -> float:
    return self.alpha + n * self.beta if n else 0.0


def fit(sizes, seconds) -> tuple[Line, float]:
  """(the line of least squares, r^2) through timings.

  Raises:
    ValueError: fewer than two different sizes.
  """
  sizes, seconds = np.asarray(sizes, float), np.asarray(seconds, float)
  if len(set(sizes)) < 2:
    raise ValueError(f"fit needs timings of two sizes or more, got {sorted(set(sizes))}")
  beta, alpha = np.polyfit(sizes, seconds, 1)
  left = seconds - (alpha + beta * sizes)
  spread = np.sum((seconds - seconds.mean()) ** 2)
  return Line(float(alpha), float(beta)), float(1 - np.sum(left**2) / spread) if spread else 1.0


@dataclasses.dataclass(frozen=True)
class Layer:
  """One MoE layer on one device: the work of the whole layer and the cost of its four operations."""

  a2a: Line
  gather: Line
  scatter: Line
  expert: Line
  n_a2a: float  # of one direction
  n_gather: float
  n_scatter: float
  n_expert: float

  def chunk(self, degree: int) -> tuple[float, float, float, float]:
    """Seconds of one chunk's (all-to-all, all-gather, reduce-scatter, experts)."""
    pairs = ((self.a2a, self.n_a2a), (self.gather, self.n_gather), (self.scatter, self.n_scatter), (self.expert, self.n_expert))
    return tuple(line.of(n / degree) for line, n in pairs)

  def backward(self) -> Layer:
    """The same for the backward pass, which has twice the experts' matmuls."""
    return dataclasses.replace(self, expert=Line(2 * self.expert.alpha, 2 * self.expert.beta))


def seconds(layer: Layer, degree: int, reduction: float = 0.0) -> float:
  """The largest of FSMoE's four cases: bound by the slow links, by the experts, by the slow links and one chunk of the near
  ones, by the near links.

  Args:
    reduction: seconds of the gradients' reduction that share the slow links.
  """
  a, g, s, e = layer.chunk(degree)
  r = degree
  return max(2 * r * a + reduction, 2 * a + g + s + r * e, 2 * r * a + g + s, 2 * a + r * (g + s))


def simulate(layer: Layer, degree: int, reduction: float = 0.0, early: bool = False) -> float:
  """Plays the schedule on three streams, each in order.

  Args:
    early: chunk i's reduce-scatter and combine are issued after the all-gather and dispatch of chunk i + 1, not after all.
  """
  a, g, s, e = layer.chunk(degree)
  chunks = range(degree)
  if early:
    slow = [("D", 0)] + [step for i in chunks for step in ((("D", i + 1),) if i + 1 < degree else (("R", 0),)) + (("C", i),)]
    near = [("G", 0)] + [step for i in chunks for step in ((("G", i + 1),) if i + 1 < degree else ()) + (("S", i),)]
  else:
    slow = [("D", i) for i in chunks] + [("R", 0)] + [("C", i) for i in chunks]
    near = [("G", i) for i in chunks] + [("S", i) for i in chunks]
  streams = [slow, near, [("E", i) for i in chunks]]
  takes = {"D": a, "C": a, "R": reduction, "G": g, "S": s, "E": e}
  after = {"G": "D", "E": "G", "S": "E", "C": "S"}
  ends: dict[tuple[str, int], float] = {}
  free = [0.0] * 3
  while any(streams):
    for at, stream in enumerate(streams):
      while stream:
        kind, i = stream[0]
        needed = (after[kind], i) if kind in after else None
        if needed and needed not in ends:
          break
        free[at] = ends[kind, i] = max(free[at], ends[needed] if needed else 0.0) + takes[kind]
        stream.pop(0)
  return max(ends.values())


def best_degree(layer: Layer, reduction: float = 0.0, most: int = 8, allowed=None) -> int:
  """The degree of least `seconds`, the smallest of equals; among 1..most, or among `allowed`."""
  return min(allowed or range(1, most + 1), key=lambda r: (seconds(layer, r, reduction), r))


def partition(layers: list[Layer], gradients: list[float], reduce: Line, dense: list[float], most: int = 8) -> list[float]:
  """How much of the pending gradients each layer's backward pass takes beside its experts (FSMoE section 3.5, step 1).

  Args:
    layers: in the order of the backward pass.
    gradients: units of gradient that exist after each layer.
    reduce: cost of reducing them.
    dense: seconds beside the MoE part of each layer that hide a reduction.

  Returns:
    units for each layer; what is left over (sum of gradients less these) is reduced at the end.
  """
  pending, taken = 0.0, []
  for layer, new, hidden in zip(layers, gradients, dense):
    degree = best_degree(layer, most=most)
    slack = seconds(layer, degree) - 2 * degree * layer.chunk(degree)[0] + hidden
    room = (slack - reduce.alpha) / reduce.beta if slack > reduce.alpha else 0.0
    taken.append(min(pending, room))
    pending += new - taken[-1]
  return taken


# ---------------------------------------------------------------------------------------------------------- program


def from_topology(run, mesh, chip) -> Layer:
  """A layer of a run on a pod, from the vendor's rates: bytes over the links of an axis, FLOPs at 0.85 of the peak, 5 us a
  transfer; each chunk reads the experts' matrices again, and multiplies again what two experts share of a tile."""
  from moe import experts
  from moe import sharding
  from moe.kernels import grouped_matmul
  from tools import hlo
  m = run.model
  tokens = run.data.batch_sequences // run.train.micro_batches * run.data.sequence_tokens
  own = tokens // (sharding.parts("batch", mesh) * sharding.parts("part", mesh))
  lay = experts.layout(mesh, run.data.batch_sequences // run.train.micro_batches, run.data.sequence_tokens, m.router.top_k,
                       m.experts)
  selections, width, tensor = own * m.router.top_k, 2 * m.d_model, mesh.shape["tensor"]
  link, start = 1 / hlo.rate(chip, mesh, ("expert",)), 5e-6
  away = (lay.members - 1) / lay.members
  matrices, owned = 3 if m.activation == "swiglu" else 2, m.experts.num_experts // lay.members
  of_row = 2 * m.d_model * m.experts.d_expert * matrices  # FLOPs; an expert's matrices have as many bytes
  choice = experts.kernel_choice(run, mesh)
  tile = choice.blocks.tile_rows if choice.blocks else grouped_matmul.tile_rows(selections, owned)
  multiply = chip.flops * hlo.KERNEL_EFFICIENCY
  again = (owned - 1) * tile * of_row / tensor / multiply + owned * of_row / tensor / chip.hbm
  near = Line(start, 1 / hlo.rate(chip, mesh, ("tensor",))) if tensor > 1 else Line(0.0, 0.0)
  moved = selections * width * (tensor - 1)
  return Layer(Line(start, link), near, near, Line(start + again, 1 / multiply),
               selections * width * away, moved, moved, selections * of_row)


def main(argv: list[str] | None = None) -> int:
  import jax

  from moe import config
  from moe import gin_config
  from moe import hardware
  from moe import sharding
  from tools import compile_check
  parser = argparse.ArgumentParser(prog="python -m tools.overlap", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  gin_config.add_arguments(parser)
  parser.add_argument("--topology", help="default: the one the run config names")
  parser.add_argument("--compile", action="store_true", help="compile the step at each degree and read its schedule")
  arguments, rest = parser.parse_known_args(argv)
  run = gin_config.from_arguments(arguments, rest).run
  topology, slices = compile_check.pod(arguments.gin_file, arguments.topology)
  compile_check.must_have_libtpu()
  try:
    devices = compile_check.devices_of(topology, slices)
  except (jax.errors.JaxRuntimeError, ValueError) as error:  # a slice that no pod has
    raise config.ConfigError(f"{topology}: {' '.join(str(error).split())[:300]}") from error
  mesh = sharding.make_mesh(dataclasses.replace(run.mesh, slice=slices), devices)
  layer = from_topology(run, mesh, hardware.topology(topology).chip)
  print(f"{topology}: one MoE layer, static estimate in ms (not timed): closed form, FSMoE's order played, early order played")
  for name, part in (("forward", layer), ("backward", layer.backward())):
    for r in DEGREES:
      times = (seconds(part, r), simulate(part, r), simulate(part, r, early=True))
      print(f"  {name:8s} r = {r}: " + "  ".join(f"{t * 1e3:8.3f}" for t in times))
    print(f"  {name:8s} best of {DEGREES}: {best_degree(part, allowed=DEGREES)}")
  if arguments.compile:
    print("the step compiled at each degree: static estimate, s; experts' exchange exposed of all of it, ms; peak HBM, GB")
    steps = {}
    for r in DEGREES:
      with progress(f"compiles the step with r = {r}"):
        step = steps[r] = scheduled(run, topology, slices, r)
      exposed, exchange = step["exposed"] * 1e3, step["exchange"] * 1e3
      print(f"  r = {r}: {step['seconds']:7.3f}  {exposed:7.1f} of {exchange:7.1f}  {step['hbm'] / 1e9:6.2f}", flush=True)
    chosen = min(DEGREES, key=lambda r: (seconds(layer, r) + seconds(layer.backward(), r), r))
    best = min(steps, key=lambda r: steps[r]["seconds"])
    print(f"  the model's choice for both passes: {chosen}; the best compiled: {best}, {steps[best]['seconds']:.3f} s, against "
          f"{steps[chosen]['seconds']:.3f} s at the choice")
  return 0


def scheduled(run, topology: str, slices: int, degree: int) -> dict[str, float]:
  """What the compiled step at an overlap degree comes to: seconds, and seconds of the experts' exchange, all and exposed."""
  from tools import compile_check
  experts = dataclasses.replace(run.model.experts, overlap_degree=degree, backward_degree=0)
  run = dataclasses.replace(run, model=dataclasses.replace(run.model, experts=experts))
  result = compile_check.check(run, topology, slices)
  rows = [row for row in result["collectives"] if row["kind"] == "ragged-all-to-all"]
  return {"seconds": result["step_seconds"]["predicted"], "exchange": sum(row["seconds"] for row in rows),
          "exposed": sum(row["exposed_seconds"] for row in rows), "hbm": result["hbm"]["peak_bytes"]}


if __name__ == "__main__":
  terminal.run(main)
