"""One of several processes that do a step together: `python -m tests.mesh_hosts PORT HOSTS INDEX MESH OUT`; MESH is JSON.

Process 0 leaves the gradients, the sums and the updated parameters in OUT (npz), whole.
"""

import functools
import json
import os
import sys

if __name__ == "__main__":
  flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
  os.environ.update(XLA_FLAGS=flags, JAX_PLATFORMS="cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

from tests import small  # noqa: E402

DROPLESS = {"dispatch": "all_to_all", "overlap_degree": 2}
MODEL = {"router": {"balance_coef": 1.0, "z_loss_coef": 0.1}, "experts": DROPLESS}


def main() -> None:
  port, hosts, index, mesh, out = sys.argv[1:]
  jax.distributed.initialize(f"127.0.0.1:{port}", int(hosts), int(index))
  whole = functools.partial(multihost_utils.process_allgather, tiled=True)
  results = small.whole_step(small.run(model=MODEL, mesh=json.loads(mesh)), small.batch(), whole)
  if index == "0":
    np.savez(out, *jax.tree.leaves(results))


if __name__ == "__main__":
  main()
