"""Mesh axes, named once, and the table from logical axes to mesh axes.

The batch is split over every data-like axis (data, fsdp, expert): expert parallelism re-uses data-parallel devices.
`jax.set_mesh` is the only way a mesh reaches the model; under the older `with mesh:` constraints vanish silently.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe import config

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

# Logical axis of a parameter or an activation -> mesh axis (or axes, or None: not split).
TABLE = {
    "batch": BATCH_AXES,
    "sequence": None,
    "width": None,  # D of an activation
    "embed": "fsdp",  # D of a parameter
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "latent": None,  # low-rank widths of latent attention
    "hidden": "tensor",  # F
    "experts": "expert",  # E
    "router": None,  # E of the router matrix
    "vocab": "tensor",
    "layer": None,
}


def make_mesh(sizes: config.Mesh, devices=None) -> jax.sharding.Mesh:
  """A mesh with the axes of `AXES` over the given devices (default: all); works for topology devices too.

  Raises:
    config.ConfigError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = [getattr(sizes, axis) for axis in AXES]
  if -1 in shape:
    known = -math.prod(shape)
    shape[shape.index(-1)] = len(devices) // known if known <= len(devices) else 0
  if math.prod(shape) != len(devices):
    wanted = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape))
    raise config.ConfigError(f"Mesh {wanted} does not cover the {len(devices)} devices there are; change the sizes "
                             "(one may be -1)")
  if devices[0].platform == "tpu" and len(devices) > 1:
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
  return jax.sharding.Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(*logical: str | None) -> PartitionSpec:
  """PartitionSpec of an array with these logical axes.

  Raises:
    KeyError: a name that is not in `TABLE`.
    ValueError: two axes of one array would land on the same mesh axis.
  """
  parts = [TABLE[name] if name is not None else None for name in logical]
  used = [axis for part in parts if part for axis in ((part,) if isinstance(part, str) else part)]
  if len(set(used)) < len(used):
    raise ValueError(f"logical axes {logical} collide on mesh axes {used}")
  return PartitionSpec(*parts)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Pins the sharding of an activation; the identity where no mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*logical))


def current_device():
  """What the program is traced for: the devices of the mesh that is set (also of a topology), else the first device there
  is. Either has `device_kind` and `platform`."""
  return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def data_shards(mesh) -> int:
  """Number of parts the batch axis is split into; 1 without a mesh."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES) if not mesh.empty else 1


def batch_sharding(mesh) -> NamedSharding:
  return NamedSharding(mesh, spec("batch", "sequence"))


def check_run(run: config.Run, mesh) -> None:
  """Refuses a run whose sizes do not divide by the mesh, naming both.

  Raises:
    config.ConfigError
  """
  def must_divide(name, size, axis, parts):
    if size % parts:
      raise config.ConfigError(f"{name} = {size} is not divisible by the mesh's {axis} = {parts}; change one of them")

  micro = run.data.batch_sequences // run.train.micro_batches
  must_divide("Data.batch_sequences / Train.micro_batches", micro, "data x fsdp x expert", data_shards(mesh))
  must_divide("Experts.num_experts", run.model.experts.num_experts, "expert", mesh.shape["expert"])
  must_divide("Model.d_model", run.model.d_model, "fsdp", mesh.shape["fsdp"])
  tensor = mesh.shape["tensor"]
  must_divide("Attention.num_heads", run.model.attention.num_heads, "tensor", tensor)
  must_divide("Attention.num_kv_heads", run.model.attention.kv_heads, "tensor", tensor)
  must_divide("Experts.d_expert", run.model.experts.d_expert, "tensor", tensor)
  must_divide("Experts.d_shared", run.model.experts.d_shared, "tensor", tensor)
  must_divide("Model.d_ff", run.model.d_ff, "tensor", tensor)
  must_divide("Model.vocab_size", run.model.vocab_size, "tensor", tensor)
  pre_gate = run.model.router.pre_gate
  if pre_gate.d_model:
    must_divide("PreGate.d_model", pre_gate.d_model, "fsdp", mesh.shape["fsdp"])
    must_divide("PreGate.num_heads", pre_gate.num_heads, "tensor", tensor)
    must_divide("PreGate.d_ff", pre_gate.d_ff, "tensor", tensor)
