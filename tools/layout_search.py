"""All legal layouts of a run on a pod, ranked by a closed form; the best are then compiled (`compile_check --search`).

A layout is a factorisation of the devices over data, fsdp, expert, context and tensor, a remat policy, a number of
micro-batches and an overlap degree; the model, the batch of a step and the length of a sequence stay. The closed form is rough
on purpose: it sorts hundreds of layouts in a second, and the compiler then says what it was worth (both ranks are printed).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import NamedTuple

from jax.sharding import AbstractMesh

from moe import config
from moe import hardware
from moe import sharding
from moe import sizes as sizes_lib
from moe.kernels.grouped_matmul import tile_rows
from moe.terminal import progress

AXES = ("data", "fsdp", "expert", "context", "tensor")
REMATS = ("none", "attention", "offload", "full")
EFFICIENCY = 0.7  # of a step's matmuls over the peak, as in compiled steps
# Reads and writes of the routed rows in a pass over a layer, where the experts are on one device and through an exchange:
# counted in the compiled steps of Mixtral, and of Qwen3 and Demons 15B.
ROW_PASSES, EXCHANGE_PASSES = 28, 50
HIDDEN = 0.5  # of the weights' transfers: what the compiler put beside other work in most compiled steps


class Layout(NamedTuple):
  mesh: tuple[int, ...]  # of AXES
  remat: str
  micro_batches: int
  overlap_degree: int

  def __str__(self):
    mesh = " ".join(f"{axis} {n}" for axis, n in zip(AXES, self.mesh) if n > 1) or "one device"
    return f"{mesh}, remat {self.remat}, {self.micro_batches} micro-batches, degree {self.overlap_degree}"


class Estimate(NamedTuple):
  """Of one device and one step."""

  hbm: float  # bytes at the peak
  seconds: float
  compute: float
  network: float  # seconds that nothing hides


def applied(run: config.Run, layout: Layout, slices: int = 1) -> config.Run:
  """The run with a layout.

  Raises:
    config.ConfigError: its sizes do not go with the layout.
  """
  mesh = config.Mesh(slice=slices, **dict(zip(AXES, layout.mesh)))
  experts = dataclasses.replace(run.model.experts, overlap_degree=layout.overlap_degree)
  run = dataclasses.replace(run, mesh=mesh, model=dataclasses.replace(run.model, remat=layout.remat, experts=experts),
                            train=dataclasses.replace(run.train, micro_batches=layout.micro_batches))
  sharding.check_run(run, AbstractMesh(tuple(getattr(mesh, a) for a in sharding.AXES), sharding.AXES))
  return run


def layouts(run: config.Run, devices: int, slices: int = 1) -> list[Layout]:
  """Every legal layout on `devices` devices of one slice."""
  return [layout for layout, _ in _legal(run, devices, slices)]


def _legal(run: config.Run, devices: int, slices: int):
  """(layout, the run with it) of every legal one."""
  for mesh in _factorisations(devices, len(AXES)):
    degrees = (1, 2, 4) if mesh[AXES.index("expert")] > 1 else (1,)
    for remat, micro, degree in itertools.product(REMATS, (1, 2, 4, 8), degrees):
      layout = Layout(mesh, remat, micro, degree)
      try:
        yield layout, applied(run, layout, slices)
      except config.ConfigError:
        continue


def _factorisations(n: int, count: int):
  if count == 1:
    yield (n,)
    return
  for first in (d for d in range(1, n + 1) if n % d == 0):
    for rest in _factorisations(n // first, count - 1):
      yield (first, *rest)


def estimate(run: config.Run, chip: hardware.Chip) -> Estimate:
  """The closed form.

  Memory: parameters, two moments and a gradient in float32 as they are split; the weights of two layers gathered and one
  layer's gradient in the compute dtype; what remat keeps of each layer; what one layer holds at once. Time: matmuls at
  `EFFICIENCY` of the peak, the experts' with the tiles that two of them share; the traffic between them, of the gathered
  weights and of the optimizer; what is not hidden of the weights' transfers; the experts' exchange less what the other chunks
  hide; reductions between copies and all that goes over tensor and context, which nothing hides.

  Args:
    chip: with the links it has in this slice (`hardware.link_rate`).
  """
  m, mesh, s = run.model, run.mesh, sizes_lib.sizes(run.model)
  a, e, top_k = m.attention, m.experts, m.router.top_k
  batch = mesh.slice * mesh.data * mesh.fsdp * mesh.expert
  micro = run.train.micro_batches
  tokens = run.tokens_per_step / (batch * mesh.context * micro)  # of a device in a micro-batch
  gathered = mesh.fsdp * mesh.context
  dense, routed = (s.total - s.routed) / mesh.tensor, s.routed / (mesh.expert * mesh.tensor)  # of a device, once gathered
  own = (dense / mesh.expert + routed) / gathered
  copies = mesh.slice * mesh.data
  optimizer = 8 * own * (1 - run.optimizer.offload) / (copies if run.optimizer.zero1 else 1)

  widths = (a.num_heads * (a.qk_dim + 2 * a.v_dim) + 2 * a.kv_heads * a.qk_dim) / mesh.tensor
  rows = top_k * (e.buffer_factor if mesh.expert > 1 else 1.0)
  hidden = e.d_expert / mesh.tensor
  inside = widths + 6 * m.d_model + rows * (2 * m.d_model + 3 * hidden)  # elements of a token in one layer
  # Without remat twice what is counted here stays (masks, float32 sums, both sides of a conversion): RMoE's compiled layouts.
  kept = {"none": 2.1 * inside, "attention": 2 * m.d_model + a.num_heads * a.v_dim / mesh.tensor,
          "full": m.d_model, "offload": 0}
  layer = (dense - m.vocab_size * m.d_model * 2 / mesh.tensor + routed) / m.num_layers
  held = 2 * tokens * (m.num_layers * kept[m.remat] + 1.5 * inside / (e.overlap_degree if mesh.expert > 1 else 1))
  if m.remat == "none":
    held += 2 * layer * m.num_layers  # gathered weights are residuals, too
  hbm = 8 * own + optimizer + 2 * 3 * layer + held + (4 * own if micro > 1 else 0)

  forward = sizes_lib.flops_per_token(m, run.data.sequence_tokens) / 3 * tokens / mesh.tensor
  again = {"none": 0.0, "attention": 0.7, "offload": 1.0, "full": 1.0}[m.remat]
  groups, routed_rows = e.num_experts / mesh.expert, tokens * top_k / e.overlap_degree  # of one grouped matmul
  shared = max(groups - 1, 0) * tile_rows(routed_rows, groups) / routed_rows  # rows for nothing, over those that count
  forward += shared * 2 * s.routed_active / mesh.tensor * tokens
  compute = forward * (3 + again) / (chip.flops * EFFICIENCY)
  # Reads and writes: what is between the matmuls twice, the rows on their way to the experts and back often.
  passes = 2 + again
  moved = EXCHANGE_PASSES if mesh.expert > 1 else ROW_PASSES
  traffic = 2 * (2 * (widths + 6 * m.d_model + 3 * rows * hidden) + moved * rows * m.d_model) * m.num_layers * tokens
  compute += passes * traffic / chip.hbm
  # Gathered weights are written and read in every pass and read once more for the gradient, which is written and read.
  compute += 2 * (2 * passes + 3) * (dense + routed) / chip.hbm
  away = lambda n: (n - 1) / n
  weights = (2 + 1) * 2 * (dense * away(gathered * mesh.expert) + routed * away(gathered)) / chip.links
  # There and back, the gradients of both, and there again: the gates meet the rows at the experts.
  exchanged = (4 + again) * m.num_moe_layers * 2 * tokens * top_k * m.d_model * away(mesh.expert) / chip.links
  tensor = passes * m.num_layers * 2 * tokens * m.d_model * 4 * away(mesh.tensor) / chip.links
  tensor += passes * m.num_moe_layers * 2 * 2 * tokens * top_k * m.d_model * away(mesh.tensor) / chip.links
  keys = a.kv_heads * (a.qk_dim + a.v_dim) / mesh.tensor
  context = passes * m.num_layers * 2 * tokens * keys * (mesh.context - 1) / chip.links
  exposed = exchanged / e.overlap_degree + tensor + context
  reduced = 2 * 4 * own * (away(mesh.data) / chip.links + away(mesh.slice) / chip.network)
  launches = micro * m.num_layers * e.overlap_degree * 40e-6
  update = (7 * 4 * own + (micro > 1) * micro * 3 * 4 * own) / chip.hbm  # state read and written; the sum of the gradients
  seconds = micro * (compute + max((1 - HIDDEN) * weights, weights - compute) + exposed) + update + reduced + launches
  return Estimate(hbm, seconds, micro * compute + update, seconds - micro * compute - update)


def ranked(run: config.Run, devices: int, slices: int, chip: hardware.Chip) -> list[tuple[Layout, Estimate]]:
  """All legal layouts: those that fit by the closed form first, the quickest first."""
  found = [(layout, estimate(changed, chip)) for layout, changed in _legal(run, devices, slices)]
  return sorted(found, key=lambda item: (item[1].hbm > chip.hbm_bytes, item[1].seconds, item[1].hbm))


def search(run: config.Run, topology: str, slices: int, devices: int, check, seconds: float, count: int = 8) -> list[dict]:
  """Compiles the best of the closed form until `count` of them fit, as many as begin within `seconds`; no more than two of one
  mesh, whose neighbours would only differ in remat. What a compiled program needs over the closed form's memory is held against
  the other layouts of its remat, and those are passed over that would not fit either.

  Args:
    devices: in one slice.
    check: (run, topology, slices) -> the report of `compile_check`.

  Returns:
    A row for each compiled layout: its place by the closed form and by the compiled program, and both of their figures; the
    programs that do not fit come last.
  """
  begin, rows, pod = time.monotonic(), [], hardware.topology(topology)
  chip = dataclasses.replace(pod.chip, links=hardware.link_rate(pod.chip, pod.shape))
  found, needs, meshes = ranked(run, devices, slices, chip), {}, {}
  for layout, value in found:
    if time.monotonic() - begin > seconds or sum(row["fits"] for row in rows) == count:
      break
    if meshes.get(layout.mesh, 0) == 2 or value.hbm * needs.get(layout.remat, 0.0) > chip.hbm_bytes:
      continue
    with progress(f"layout {len(rows) + 1}: compiles {layout}"):  # minutes each
      result = check(applied(run, layout, slices), topology, slices)
    peak = result["hbm"]["peak_bytes"]
    if peak:
      needs[layout.remat] = peak / value.hbm
    meshes[layout.mesh] = meshes.get(layout.mesh, 0) + result["fits"]
    rows.append({"layout": str(layout), **layout._asdict(), "place": len(rows) + 1, "of": len(found), "fits": result["fits"],
                 "estimated": {"hbm_bytes": value.hbm, "seconds": value.seconds},
                 "compiled": {"hbm_bytes": peak,
                              "seconds": result["step_seconds"]["predicted"] if result["fits"] else math.inf},
                 "compile_seconds": result["compile_seconds"]})
  order = sorted(range(len(rows)), key=lambda i: rows[i]["compiled"]["seconds"])
  for compiled_place, i in enumerate(order, 1):
    rows[i]["compiled_place"] = compiled_place
  return rows


def rank_correlation(rows: list[dict]) -> float:
  """Spearman's, of the places of those that fit; nan for fewer than two."""
  fitting = sorted((r for r in rows if r["fits"]), key=lambda r: r["place"])
  n, after = len(fitting), sorted(fitting, key=lambda r: r["compiled_place"])
  return 1 - 6 * sum((i - after.index(r)) ** 2 for i, r in enumerate(fitting)) / (n * (n**2 - 1)) if n > 1 else math.nan


def text(rows: list[dict]) -> str:
  """For people, by the compiled program."""
  if not rows:
    return "  no legal layout"
  lines = [f"  {rows[0]['of']} legal layouts; {len(rows)} of the best by the closed form, compiled (static, nothing ran):",
           "  compiled  closed form   compiled s  GB      closed form s  GB      layout"]
  for row in sorted(rows, key=lambda r: r["compiled_place"]):
    c, e = row["compiled"], row["estimated"]
    what = f"{c['seconds']:8.3f}" if row["fits"] else "no room "
    size = f"{c['hbm_bytes'] / 1e9:6.2f}" if c["hbm_bytes"] else "     ?"
    lines.append(f"  {row['compiled_place']:8d}  {row['place']:11d}   {what}  {size}      {e['seconds']:11.3f}  "
                 f"{e['hbm_bytes'] / 1e9:6.2f}  {row['layout']}")
  lines.append(f"  rank correlation of the two: {rank_correlation(rows):.2f}")
  return "\n".join(lines)
