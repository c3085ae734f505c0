"""One of several processes that load and score together: `python -m tests.loading_hosts PORT HOSTS INDEX DEVICES CORPUS OUT`.

Process 0 leaves in OUT (JSON) what each mesh of `cases` gave: whether every host's rows are those of one process, the loss of
the first batch, its tokens, and the score of the corpus. With a CPU's devices in `far` order the innermost axis of the mesh
crosses the hosts; in `near` order the outermost does.
"""

import itertools
import json
import math
import os
import sys

if __name__ == "__main__":
  flags = f"--xla_force_host_platform_device_count={sys.argv[4]} --xla_backend_optimization_level=0"
  os.environ.update(XLA_FLAGS=flags, JAX_PLATFORMS="cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

from moe import config  # noqa: E402
from moe import evaluate  # noqa: E402
from moe import sharding  # noqa: E402
from moe import step as step_lib  # noqa: E402
from moe.data import pipeline  # noqa: E402
from moe.data import tokenizers  # noqa: E402
from tests import small  # noqa: E402

AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH, LENGTH, MICRO = 8, 32, 2


def meshes(devices: int) -> list[dict[str, int]]:
  """Every factorisation of the devices over the axes, tensor at most 2: the model has two key and value heads."""
  divisors = [d for d in range(1, devices + 1) if devices % d == 0]
  found = [dict(zip(AXES, sizes)) for sizes in itertools.product(divisors, repeat=len(AXES)) if math.prod(sizes) == devices]
  return [{axis: size for axis, size in mesh.items() if size > 1} for mesh in found if mesh["tensor"] <= 2]


def run_of(corpus: str, mesh: dict[str, int]) -> config.Run:
  """The same small model on the given mesh; bytes as tokens."""
  base = small.run(batch=BATCH, length=LENGTH, mesh=mesh, model={"vocab_size": 260}, train={"micro_batches": MICRO})
  return small.change(base, data={"domains": (config.Domain(name="tiny", path=corpus),), "virtual_shards": 0})


def load(run: config.Run, mesh, by_process_number: bool = False) -> step_lib.Batch:
  """The first batch on the mesh, as the trainer loads it.

  by_process_number: as it must not be done: an equal share of the rows for each process, whatever the mesh.
  """
  rows = sharding.batch_sharding(mesh)
  shape = (BATCH, LENGTH)
  if by_process_number:
    each = BATCH // jax.process_count()
    local = next(pipeline.Loader(run.data, 0, range(jax.process_index() * each, (jax.process_index() + 1) * each)))
    return step_lib.Batch(*[jax.make_array_from_process_local_data(rows, field) for field in local])
  part = sharding.host_part(rows, shape)
  local = next(pipeline.Loader(run.data, 0, *part))
  return step_lib.Batch(*[sharding.global_array(field, part, rows, shape) for field in local])


def rows_of_one_process(run: config.Run, batch: step_lib.Batch) -> bool:
  """Whether every device of every host holds what one process would give it."""
  whole = next(pipeline.Loader(run.data, 0))
  mine = batch.inputs.shape == (BATCH, LENGTH) and all(
      np.array_equal(shard.data, field[shard.index])
      for given, field in zip(jax.tree.leaves(batch), whole) for shard in given.addressable_shards)
  return bool(multihost_utils.process_allgather(np.int32(mine)).all())


def loss_of(run: config.Run, mesh, batch: step_lib.Batch) -> tuple[float, int]:
  """(sum of losses, real tokens) of a batch, forward only, with parameters that do not depend on the mesh."""
  params = small.params(step_lib.abstract_state(run, mesh).params)
  key = jax.random.key(0)
  forward = jax.jit(lambda params, batch: (
      step_lib._forward(run, params, batch, jnp.arange(BATCH), key, key)[0], jnp.sum(batch.segment_ids > 0)))
  nll, tokens = forward(params, batch)
  return float(nll), int(tokens)


def score(run: config.Run, mesh) -> dict[str, float]:
  params = small.params(step_lib.abstract_state(run, mesh).params)
  result, _ = evaluate.evaluate_domain(run, mesh, step_lib.jit_eval_step(run, mesh), params, run.data.domains[0],
                                       tokenizers.ByteTokenizer())
  return {name: float(result[name]) for name in ("loss", "bits_per_byte", "tokens", "bytes")}


def cases(devices: int, hosts: int) -> list[tuple[dict[str, int], bool, bool]]:
  """(mesh, whether in far order, whether the loss and the score are computed, which takes seconds to compile)."""
  found = []
  for mesh, far in itertools.product(meshes(devices), (False, True)):
    whole = len(mesh) == 1 and not far if devices == hosts else len(mesh) == 2 and far and "tensor" in mesh
    found.append((mesh, far, whole))
  return found


def ordered(far: bool) -> list:
  """All devices, process by process, or one of each process in turn."""
  by_process: dict[int, list] = {}
  for device in jax.devices():
    by_process.setdefault(device.process_index, []).append(device)
  groups = zip(*by_process.values()) if far else by_process.values()
  return [device for group in groups for device in group]


def main() -> None:
  port, hosts, index, _, corpus, out = sys.argv[1:]
  if int(hosts) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(hosts), int(index))
  results = []
  for sizes, far, whole in cases(len(jax.devices()), int(hosts)):
    run = run_of(corpus, sizes)
    mesh = sharding.make_mesh(run.mesh, ordered(far))
    with jax.set_mesh(mesh):
      sharding.check_run(run, mesh)
      batch = load(run, mesh)
      entry = {"mesh": sizes, "far": far, "rows": rows_of_one_process(run, batch)}
      try:
        entry["old_rows"] = rows_of_one_process(run, load(run, mesh, by_process_number=True))
      except ValueError:
        entry["old_rows"] = False  # jax itself noticed
      if whole:
        entry["loss"], entry["tokens"] = loss_of(run, mesh, batch)
        entry["score"] = score(run, mesh)
    results.append(entry)
  if index == "0":
    with open(out, "w") as file:
      json.dump(results, file)


if __name__ == "__main__":
  main()
