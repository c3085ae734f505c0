"""Times the experts' backends on the device there is, for a run's shape, and remembers the quickest for `backend = "auto"`.

    python -m tools.bench.autotune --gin_file=configs/run/quickstart.gin

The block of the model, forward and gradient, on one device, balanced loads; the backends take turns and the medians decide. The
The block of the model, forward and gradient, on one device, balanced loads; the backends take turns and medians decide. The
sees, so run it with the devices of the run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe import config
from moe import experts
from moe import gin_config
from moe import sharding
from moe.kernels import plan
from tools.bench import static_programs

CANDIDATES = {"cpu": ("loop", "ragged_dot"), "tpu": ("ragged_dot", "fused", "tokamax"), "gpu": ("ragged_dot",)}


def time_backends(shape: plan.Shape, backends, rounds: int) -> dict[str, float]:
  """Median seconds of the block, forward and gradient; a backend that cannot run is reported and left out."""
  rng = np.random.default_rng(0)
  chosen = np.stack([rng.permutation(shape.num_experts)[:shape.top_k] for _ in range(shape.tokens)])
  programs = {}
  for backend in backends:
    function, (x, gates, weights, _, _) = static_programs.layer(shape, backend, True)
    fill = lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype)
    arguments = (fill(x), abs(fill(gates)), jax.tree.map(fill, weights), jnp.asarray(chosen[None], jnp.int32), fill(x))
    jitted = jax.jit(function)
    try:
      jax.block_until_ready(jitted(*arguments))
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
      print(f"{backend}: left out, {str(error).splitlines()[0][:200]}")
      continue
    programs[backend] = lambda jitted=jitted, arguments=arguments: jax.block_until_ready(jitted(*arguments))
  seconds = {backend: [] for backend in programs}
  for _ in range(rounds):
    for backend, run in programs.items():
      begin = time.perf_counter()
      run()
      seconds[backend].append(time.perf_counter() - begin)
  return {backend: statistics.median(values) for backend, values in seconds.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--gin_file", action="append", default=[], required=True)
  parser.add_argument("--rounds", type=int, default=7)
  arguments = parser.parse_args()
  try:
    run = gin_config.resolve(arguments.gin_file, []).run
  except config.ConfigError as error:
    sys.exit(str(error))
  device = jax.devices()[0]
  shape = experts.kernel_shape(run, sharding.make_mesh(run.mesh))
  with jax.set_mesh(sharding.make_mesh(config.Mesh(data=1), [device])):
    rows = shape.tokens * shape.num_experts // shape.total_experts  # as many rows as come to the experts one device owns
    alone = shape._replace(tokens=rows, total_experts=shape.num_experts)
    seconds = time_backends(alone, CANDIDATES[device.platform], arguments.rounds)
  if not seconds:
    sys.exit(f"no backend could run on {device.device_kind}; nothing is remembered")
  best = min(seconds, key=seconds.get)
  plan.remember(shape, device.device_kind, best, seconds)
  for backend, value in sorted(seconds.items(), key=lambda item: item[1]):
    print(f"{backend}: {value * 1e3:.2f} ms forward and gradient{' <- remembered' if backend == best else ''}")
  print(f"{plan.cache_path()}: {plan.cache_key(shape, device.device_kind)}")


if __name__ == "__main__":
  main()
