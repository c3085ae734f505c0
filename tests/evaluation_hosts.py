"""One of several processes that evaluate together: `python -m tests.evaluation_hosts PORT HOSTS INDEX MESH DOMAIN OUT`; MESH is
JSON.

Process 0 leaves the figures in OUT (JSON), and for every process the number of layers of which it has examples.
"""

import json
import os
import pathlib
import sys

if __name__ == "__main__":
  flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
  os.environ.update(XLA_FLAGS=flags, JAX_PLATFORMS="cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

from moe import config  # noqa: E402
from moe import evaluate  # noqa: E402
from moe import sharding  # noqa: E402
from moe import step as step_lib  # noqa: E402
from moe.data import tokenizers  # noqa: E402
from tests import small  # noqa: E402


def main() -> None:
  port, hosts, index, mesh, path, out = sys.argv[1:]
  jax.distributed.initialize(f"127.0.0.1:{port}", int(hosts), int(index))
  run = small.run(batch=8, length=32, model={"vocab_size": 384}, mesh=json.loads(mesh))
  mesh = sharding.make_mesh(run.mesh)
  with jax.set_mesh(mesh):
    params = small.params(step_lib.abstract_state(run, mesh).params)
    result, shown = evaluate.evaluate_domain(run, mesh, step_lib.jit_eval_step(run, mesh), params,
                                             config.Domain(name="d", path=path), tokenizers.ByteTokenizer())
  examples = multihost_utils.process_allgather(np.int32(len(shown)))
  if index == "0":
    figures = {key: np.asarray(value).tolist() for key, value in result.items()}
    pathlib.Path(out).write_text(json.dumps({**figures, "examples": examples.tolist()}))


if __name__ == "__main__":
  main()
