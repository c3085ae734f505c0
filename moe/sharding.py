"""Mesh axes, named once, and the table from logical axes to mesh axes.

    slice    data parallel between slices, over the data-centre network
    stage    pipeline stages; reserved, 1 for now
    data     data parallel
    fsdp     data parallel with the parameters split
    expert   splits the experts; outside them data parallel, with the parameters split as by fsdp
    context  parts of each sequence; parameters are split over it too
    tensor   heads, hidden widths, the vocabulary; and tokens on their way to the experts

`jax.set_mesh` is the only way a mesh reaches the model; under the older `with mesh:` constraints vanish silently.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe import config

AXES = ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("slice", "data", "fsdp", "expert")

# Logical axis of a parameter or an activation -> mesh axis (or axes, or None: not split).
TABLE = {
    "batch": BATCH_AXES,
    "sequence": "context",
    "part": ("context", "tensor"),  # of a sequence, on its way to the experts
    "width": None,  # D of an activation
    "embed": ("fsdp", "expert", "context"),  # D of a parameter
    "expert_embed": ("fsdp", "context"),  # D of the experts' first matrices
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "latent": None,  # low-rank widths of latent attention, where they are written
    "rank": ("fsdp", "context"),  # and where they are read
    "hidden": "tensor",  # F
    "inner": ("tensor", "fsdp", "context"),  # F of the experts' second matrix
    "experts": "expert",  # E
    "router": None,  # E of the router matrix
    "vocab": "tensor",
    "layer": None,
}


def make_mesh(sizes: config.Mesh, devices=None) -> jax.sharding.Mesh:
  """A mesh with the axes of `AXES` over the given devices (default: all); works for topology devices too.

  On TPU the axes follow the coordinates of the chips, `tensor` on the nearest; slices are told apart by `slice_index`.
  Elsewhere the devices are taken in their order.

  Raises:
    config.ConfigError: the sizes do not multiply to the number of devices, or `slice` is not the number of slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = [getattr(sizes, axis) for axis in AXES]
  if -1 in shape:
    known = -math.prod(shape)
    shape[shape.index(-1)] = len(devices) // known if known <= len(devices) else 0
  if math.prod(shape) != len(devices):
    wanted = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape) if size != 1) or "of one device"
    raise config.ConfigError(f"Mesh {wanted} does not cover the {len(devices)} devices there are; change the sizes "
                             "(one may be -1)")
  if devices[0].platform == "tpu":
    grid = _tpu_grid(shape, devices)
  else:
    grid = np.array(devices).reshape(shape)
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _tpu_grid(shape: list[int], devices) -> np.ndarray:
  slices = len({getattr(d, "slice_index", None) for d in devices})
  if shape[0] != slices:
    raise config.ConfigError(f"Mesh.slice = {shape[0]}, but the devices are of {slices} slice(s); set it to {slices}")
  # Splitting a physical axis between two mesh axes is allowed: expert=8 on a 4 x 4 torus has no other way.
  if slices > 1:
    within, between = [1, *shape[1:]], [slices] + [1] * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def spec(*logical: str | None) -> PartitionSpec:
  """PartitionSpec of an array with these logical axes.

  Raises:
    KeyError: a name that is not in `TABLE`.
    ValueError: two axes of one array would land on the same mesh axis.
  """
  unknown = [name for name in logical if name is not None and name not in TABLE]
  if unknown:
    raise KeyError(f"logical axis {unknown[0]!r} has no rule in sharding.TABLE; known: {', '.join(TABLE)}")
  parts = [TABLE[name] if name is not None else None for name in logical]
  used = [axis for part in parts if part for axis in ((part,) if isinstance(part, str) else part)]
  if len(set(used)) < len(used):
    raise ValueError(f"logical axes {logical} collide on mesh axes {used}")
  return PartitionSpec(*parts)


def over_replicas(split: PartitionSpec, shape: tuple[int, ...], mesh) -> PartitionSpec:
  """`split` with the batch axes that do not split the array yet (along which there are equal copies) added where they divide.

  A middle axis is tried first: a reduce-scatter along the last one, where the lanes are, compiles to an all-reduce on TPU.
  """
  parts = [() if p is None else (p,) if isinstance(p, str) else tuple(p) for p in (*split, *[None] * (len(shape) - len(split)))]
  used = {axis for part in parts for axis in part}
  order = [*range(1, len(shape) - 1), 0, len(shape) - 1] if len(shape) > 1 else range(len(shape))
  for axis in BATCH_AXES:
    if mesh.shape[axis] == 1 or axis in used:
      continue
    for i in order:
      if shape[i] % (math.prod(mesh.shape[a] for a in parts[i]) * mesh.shape[axis]) == 0:
        parts[i] += (axis,)
        break
  return PartitionSpec(*(part or None for part in parts))


def axes_of(logical: str, mesh) -> tuple[str, ...]:
  """The mesh axes that really split a logical axis: those longer than 1."""
  names = TABLE[logical]
  return tuple(a for a in ((names,) if isinstance(names, str) else names or ()) if mesh.shape[a] > 1)


def parts(logical: str, mesh) -> int:
  """Number of parts a logical axis is split into; 1 without a mesh."""
  return 1 if mesh.empty else math.prod(mesh.shape[a] for a in axes_of(logical, mesh))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Pins the sharding of an activation; the identity where no mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*logical))


def current_device():
  """What the program is traced for: the devices of the mesh that is set (also of a topology), else the first device there
  is. Either has `device_kind` and `platform`."""
  return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def batch_sharding(mesh) -> NamedSharding:
  return NamedSharding(mesh, spec("batch", "sequence"))


class HostPart(NamedTuple):
  """What one process needs of an array [B, S]: the rows and columns that its devices hold."""

  rows: np.ndarray  # [n] int64, ascending
  columns: slice  # with begin and end


def host_part(shards: NamedSharding, shape: tuple[int, int], process: int | None = None) -> HostPart:
  """The rows and columns of an array that the devices of a process hold.

  It follows from the sharding alone. A process number says nothing about rows: processes along a tensor or context axis
  hold the same rows, and the devices of a TPU host need not follow each other in the mesh.

  Args:
    shards: of the array, on a mesh of real or of topology devices.
    shape: (B, S) of the whole array.
    process: whose part; None: this process.

  Raises:
    config.ConfigError: the process has no device in the mesh, so that it would have nothing to load.
  """
  process = jax.process_index() if process is None else process
  held = [index for device, index in shards.devices_indices_map(shape).items() if device.process_index == process]
  if not held:
    axes = " x ".join(f"{axis}={size}" for axis, size in shards.mesh.shape.items() if size > 1)
    raise config.ConfigError(f"host {process} has no device in the mesh {axes} of {shards.mesh.size} devices; start only the "
                             "hosts that it needs, or enlarge it")
  row_bounds = {rows.indices(shape[0])[:2] for rows, _ in held}
  column_bounds = [columns.indices(shape[1])[:2] for _, columns in held]
  rows = np.unique(np.concatenate([np.arange(*bounds) for bounds in row_bounds]))
  columns = slice(min(begin for begin, _ in column_bounds), max(end for _, end in column_bounds))
  return HostPart(rows, columns)


def global_array(local: np.ndarray, part: HostPart, shards: NamedSharding, shape: tuple[int, int]) -> jax.Array:
  """The array of this shape of which every process passes its own part.

  Args:
    local: [rows, columns] of `part`.
    part: `host_part` of this process.
    shards: of the array.
    shape: (B, S) of the whole array.
  """
  return jax.make_array_from_callback(shape, shards, lambda index: cut(local, part, index, shape))


def cut(local: np.ndarray, part: HostPart, index: tuple[slice, slice], shape: tuple[int, int]) -> np.ndarray:
  """What a device holds, by its index into the whole array of this shape, out of its host's part."""
  (row, row_end, _), (column, column_end, _) = (axis.indices(size) for axis, size in zip(index, shape))
  first = np.searchsorted(part.rows, row)  # a device's rows follow each other, so they do in `local`
  begin = part.columns.start
  return local[first : first + row_end - row, column - begin : column_end - begin]


def check_run(run: config.Run, mesh) -> None:
  """Refuses a run whose sizes do not divide by the mesh, naming both.

  Raises:
    config.ConfigError
  """
  def must_divide(name, size, logical):
    count = parts(logical, mesh)
    if size % count:
      axes = " x ".join(axes_of(logical, mesh))
      raise config.ConfigError(f"{name} = {size} is not divisible by the mesh's {axes} = {count}; change one of them")

  model = run.model
  must_divide("Data.batch_sequences / Train.micro_batches", run.data.batch_sequences // run.train.micro_batches, "batch")
  must_divide("Data.sequence_tokens", run.data.sequence_tokens, "part")
  must_divide("Experts.num_experts", model.experts.num_experts, "experts")
  must_divide("Model.d_model", model.d_model, "embed")
  must_divide("Attention.num_heads", model.attention.num_heads, "heads")
  must_divide("Attention.q_lora_rank", model.attention.q_lora_rank, "rank")
  must_divide("Attention.kv_lora_rank", model.attention.kv_lora_rank, "rank")
  must_divide("Attention.num_kv_heads", model.attention.kv_heads, "kv_heads")
  must_divide("Experts.d_expert", model.experts.d_expert, "inner")
  must_divide("Experts.d_shared", model.experts.d_shared, "hidden")
  must_divide("Model.d_ff", model.d_ff, "hidden")
  must_divide("Model.vocab_size", model.vocab_size, "vocab")
  pre_gate = model.router.pre_gate
  if pre_gate.d_model:
    must_divide("PreGate.d_model", pre_gate.d_model, "embed")
    must_divide("PreGate.num_heads", pre_gate.num_heads, "heads")
    must_divide("PreGate.d_ff", pre_gate.d_ff, "hidden")
