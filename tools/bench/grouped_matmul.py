"""Grouped matmul on CPU: ours beside `jax.lax.ragged_dot`, a batched matmul of the same useful work, and PyTorch.

    python -m tools.bench.grouped_matmul              # 8, 32, 64 experts, with and without gradient, 1 and 2 cores
    python -m tools.bench.grouped_matmul --groups=8 --cores=1 --rounds=20

Float32, 4096 rows in groups of multinomial size, [rows, 256] x [groups, 256, 512]. The variants take turns, round by round, in
one process bound to the cores. On one core the figure is the median of CPU time, which other work on the machine hardly
changes; on more it is the least wall time, for whatever else runs takes a thread from a matmul. Each is called twice and the
second call counts, so that none pays for memory that the one before gave back. The batched matmul has equal groups, so it is
what grouping could cost at least.
PyTorch (a loop over the experts) takes part where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

ROWS, WIDTH, HIDDEN = 4096, 256, 512


def variants(groups: int):
  """name -> (forward, forward with gradient), each a function without arguments that returns when it is done."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from moe.kernels.grouped_matmul import grouped_matmul

  rng = np.random.default_rng(0)
  sizes = rng.multinomial(ROWS, [1 / groups] * groups).astype(np.int32)
  lhs, rhs, grad = (rng.normal(size=s).astype(np.float32) for s in ((ROWS, WIDTH), (groups, WIDTH, HIDDEN), (ROWS, HIDDEN)))

  def pair(multiply, *operands):
    def both(a, b, cotangent):
      out, pull = jax.vjp(multiply, a, b)
      return out, pull(cotangent)

    operands = [jnp.asarray(a) for a in operands]
    forward, backward = jax.jit(multiply), jax.jit(both)
    return lambda: jax.block_until_ready(forward(*operands[:2])), lambda: jax.block_until_ready(backward(*operands))

  def grouped(backend):
    return pair(lambda a, b: grouped_matmul(a, b, jnp.asarray(sizes), backend=backend), lhs, rhs, grad)

  found = {"ours (loop)": grouped("loop"),
           "batched matmul, equal groups": pair(lambda a, b: jnp.einsum("gmk,gkn->gmn", a, b), lhs.reshape(groups, -1, WIDTH),
                                                rhs, grad.reshape(groups, -1, HIDDEN)),
           "one matmul": pair(lambda a, b: a @ b, lhs, rhs[0], grad),
           "jax.lax.ragged_dot": grouped("ragged_dot")}
  try:
    import torch
  except ImportError:
    return found
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  a, b, c = (torch.from_numpy(x) for x in (lhs, rhs, grad))

  def forward(a, b):
    return torch.cat([part @ b[g] for g, part in enumerate(torch.split(a, sizes.tolist()))])

  def both():
    x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
    forward(x, w).backward(c)

  found["PyTorch, loop over experts"] = ((lambda: forward(a, b)), both)
  return found


def _child(groups: int, cores: int, rounds: int) -> None:
  os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
  clock = time.process_time if cores == 1 else time.perf_counter
  result = {}
  for kind in (0, 1):
    functions = {name: pair[kind] for name, pair in variants(groups).items()}
    seconds = {name: [] for name in functions}
    for function in functions.values():
      function()
    for _ in range(rounds):
      for name, function in functions.items():
        function()
        begin = clock()
        function()
        seconds[name].append(clock() - begin)
    for name, values in seconds.items():
      result.setdefault(name, []).append(statistics.median(values) if cores == 1 else min(values))
  print(json.dumps(result))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--groups", type=int, action="append")
  parser.add_argument("--cores", type=int, action="append")
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    _child(arguments.groups[0], arguments.cores[0], arguments.rounds)
    return
  available = len(os.sched_getaffinity(0))
  for cores in arguments.cores or [1, 2]:
    if cores > available:
      print(f"{cores} cores: skipped, there are {available}")
      continue
    for groups in arguments.groups or [8, 32, 64]:
      command = [sys.executable, "-m", "tools.bench.grouped_matmul", "--child", f"--groups={groups}", f"--cores={cores}",
                 f"--rounds={arguments.rounds}"]
      environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
      result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
      base = result["batched matmul, equal groups"]
      print(f"{groups} experts, {cores} core{'s' * (cores > 1)}, {'median CPU' if cores == 1 else 'least wall'} ms: forward, "
            "forward and gradient (ratio to the batched matmul)")
      for name, (forward, both) in result.items():
        print(f"  {name:30s} {forward * 1e3:8.2f} ({forward / base[0]:5.2f})  {both * 1e3:8.2f} ({both / base[1]:5.2f})  "
              f"{2 * ROWS * WIDTH * HIDDEN / forward / 1e9:5.0f} GFLOP/s forward", flush=True)


if __name__ == "__main__":
  main()
