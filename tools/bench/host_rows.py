"""Which rows and columns of a batch each host of a TPU pod needs, and gets. Needs libtpu, no TPU.

    python -m tools.bench.host_rows                                             # eleven pods
    python -m tools.bench.host_rows --topology=v5p:4x4x4 --mesh='{"fsdp": 16, "tensor": 4}'
    python -m tools.bench.host_rows --gin_file=configs/run/palm_540b_v5p_2048.gin

The devices, their hosts and their places in the mesh are the TPU compiler's. `by number` says whether an equal run of rows
for each process number, whatever the mesh, would be right for every device.
"""

from __future__ import annotations

import argparse
import json
from typing import NamedTuple

import numpy as np

from moe import config
from moe import gin_config
from moe import sharding
from tools import compile_check

# Topology, mesh; rows are one a data-parallel device, or two where there is but one such device.
PODS = [
    ("v5e:2x4", {"fsdp": 4, "tensor": 2}), ("v5e:4x4", {"fsdp": 4, "context": 4}),
    ("v5e:8x8", {"data": 4, "fsdp": 4, "tensor": 4}), ("v5e:16x16", {"fsdp": 32, "expert": 8}),
    ("v5p:2x2x1", {"tensor": 4}), ("v5p:2x2x4", {"expert": 8, "context": 2}),
    ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}), ("v6e:4x4", {"fsdp": 2, "context": 8}), ("v6e:8x8", {"expert": 8, "tensor": 8}),
    ("tpu7x:4x4x4", {"fsdp": 32, "tensor": 4}), ("tpu7x:4x8x8", {"data": 4, "expert": 16, "context": 2, "tensor": 4}),
]


class Host(NamedTuple):
  """What a host needs of a batch [B, S]."""

  part: sharding.HostPart
  devices: int
  complete: bool  # every device of it finds its rows and columns in the part
  by_number: bool  # an equal run of rows by process number would hold them, with whole rows

  @property
  def contiguous(self) -> bool:
    return len(self.part.rows) == self.part.rows[-1] - self.part.rows[0] + 1


def hosts_of(mesh, shape: tuple[int, int]) -> dict[int, Host]:
  """Process -> what it needs of a batch of this shape, by the sharding of batches on the mesh."""
  shards = sharding.batch_sharding(mesh)
  bounds: dict[int, list[tuple[int, int, int, int]]] = {}
  for device, index in shards.devices_indices_map(shape).items():
    rows, columns = (axis.indices(size)[:2] for axis, size in zip(index, shape))
    bounds.setdefault(device.process_index, []).append((*rows, *columns))
  found = {}
  each = shape[0] / len(bounds)
  for process, held in bounds.items():
    part = sharding.host_part(shards, shape, process)
    rows = set(part.rows.tolist())
    complete = all(rows.issuperset(range(row, row_end)) and part.columns.start <= column and column_end <= part.columns.stop
                   for row, row_end, column, column_end in held)
    first, last = each * process, each * (process + 1)
    by_number = min(rows) == first and max(rows) + 1 == last and len(rows) == each
    found[process] = Host(part, len(held), complete, by_number)
  return found


def line(topology: str, sizes: dict[str, int], hosts: dict[int, Host], shape: tuple[int, int]) -> str:
  parts = [host.part for host in hosts.values()]
  rows = sorted({len(part.rows) for part in parts})
  columns = sorted({part.columns.stop - part.columns.start for part in parts})
  groups = {(tuple(part.rows), part.columns.start) for part in parts}
  text = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
  said = lambda values: "-".join(str(v) for v in {values[0]: None, values[-1]: None})
  return (f"{topology:>14s}  {text:42s} {shape[0]:5d} x {shape[1]:<5d} {len(hosts):5d} {said(rows):>7s} {said(columns):>9s} "
          f"{len(hosts) / len(groups):7.1f} {'yes' if all(h.contiguous for h in hosts.values()) else 'no':>10s} "
          f"{'yes' if all(h.complete for h in hosts.values()) else 'NO':>6s} "
          f"{'yes' if all(h.by_number for h in hosts.values()) else 'no':>9s}")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology")
  parser.add_argument("--mesh", type=json.loads, default={}, help="sizes of the mesh's axes, as JSON")
  parser.add_argument("--sequence_tokens", type=int, default=4096)
  parser.add_argument("--gin_file", action="append", default=[], help="run configs: their own pods, meshes and batches")
  arguments = parser.parse_args()
  pods = [(arguments.topology, arguments.mesh)] if arguments.topology else [] if arguments.gin_file else PODS
  print(f"{'pod':>14s}  {'mesh':42s} {'batch':>13s} {'hosts':>5s} {'rows':>7s} {'columns':>9s} {'sharing':>7s} "
        f"{'contiguous':>10s} {'found':>6s} {'by number':>9s}")
  for topology, sizes in pods:
    mesh = sharding.make_mesh(config.Mesh(**sizes), compile_check.devices_of(topology))
    shape = (max(int(np.prod([mesh.shape[axis] for axis in sharding.BATCH_AXES])), 2), arguments.sequence_tokens)
    print(line(topology, sizes, hosts_of(mesh, shape), shape), flush=True)
  for path in arguments.gin_file:
    run = gin_config.resolve([path]).run
    topology, slices = compile_check.pod([path], None)
    mesh = sharding.make_mesh(run.mesh, compile_check.devices_of(topology, slices))
    shape = (run.data.batch_sequences, run.data.sequence_tokens)
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    print(line(topology if slices == 1 else f"{slices} x {topology}", sizes, hosts_of(mesh, shape), shape), flush=True)
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
