"""What the routing statistics and the recurrent router cost, as a share of the step.

    python -m tools.bench.routing_cost                 # seconds on this machine's CPU, variants in turn
    python -m tools.bench.routing_cost --tpu=v5e:2x2   # FLOPs and bytes, from compiled TPU programs (needs jax[tpu])

The model has 64 experts (8 of them for each token), unrolled layers. A part's cost is the difference between the step with
it and without it: without statistics only what the balance loss needs is computed; without the recurrent router the router
is linear. On the TPU side nothing runs: the numbers are the compiler's own counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from moe import config
from moe import sharding
from moe import sizes
from moe import step as step_lib
from moe.model import Batch
from moe.routing import balance


def make_run(scale: str, cell: str) -> config.Run:
  """`tpu`: OLMoE's widths with two layers; `cpu`: an eighth of them."""
  d_model, heads, hidden, rows, tokens = {"tpu": (2048, 16, 1024, 16, 1024), "cpu": (256, 4, 128, 8, 256)}[scale]
  model = config.Model(
      vocab_size=50304 if scale == "tpu" else 512, num_layers=2, d_model=d_model, scan_unroll=0,
      compute_dtype="bfloat16" if scale == "tpu" else "float32",
      attention=config.Attention(num_heads=heads, head_dim=d_model // heads),
      experts=config.Experts(num_experts=64, d_expert=hidden),
      router=config.Router(top_k=8, recurrent=config.Recurrent(cell=cell, width=128)))
  data = config.Data(domains=(config.Domain(name="x", path="embedded:kjv"),), batch_sequences=rows, sequence_tokens=tokens)
  return config.Run(model=model, data=data, train=config.Train(steps=10), mesh=config.Mesh(data=-1))


def bare(logits, choice, kept, mask, segment_ids, router, data_shards, priority=None):
  """Stands in for `balance.collect`: what the balance and z losses need, and no statistic besides."""
  del segment_ids, data_shards, priority
  num_experts = logits.shape[-1]
  counts = jax.nn.one_hot(choice.experts, num_experts, dtype=jnp.int32).sum(-2) * mask[..., None]
  zero = jnp.zeros((), jnp.float32)
  return balance.Stats(
      tokens=mask.sum(dtype=jnp.int32), counts=counts.sum((0, 1), dtype=jnp.int32),
      probability_sums=(choice.probabilities * mask[..., None]).sum((0, 1)), dropped=jnp.zeros((), jnp.int32),
      z_sum=jnp.sum(jnp.square(jax.nn.logsumexp(logits, -1)) * mask), entropy_sum=zero, weight_sum=zero, local_balance_sum=zero)


VARIANTS = {"linear router": ("none", False), "without statistics": ("none", True), "recurrent router": ("gru", False)}


def variant(scale: str, name: str, build):
  cell, without = VARIANTS[name]
  with mock.patch.object(balance, "collect", bare if without else balance.collect):
    return build(make_run(scale, cell))


def cpu(rounds: int) -> None:
  def build(run):
    mesh = sharding.make_mesh(run.mesh)
    with jax.set_mesh(mesh):
      state, train_step = step_lib.init_state(run, mesh), step_lib.jit_train_step(run, mesh)
      shape, rng = (run.data.batch_sequences, run.data.sequence_tokens), np.random.default_rng(0)
      ids = rng.integers(0, 512, shape).astype(np.int32)
      positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
      batch = jax.device_put(Batch(ids, ids, np.ones(shape, np.int32), positions),
                             sharding.batch_sharding(mesh))
      for _ in range(3):
        state, metrics = train_step(state, batch)
      jax.block_until_ready(metrics)
    return mesh, state, batch, train_step

  programs = {name: list(variant("cpu", name, build)) for name in VARIANTS}
  seconds = {name: [] for name in programs}
  for _ in range(rounds):
    for name, program in programs.items():
      mesh, state, batch, train_step = program
      with jax.set_mesh(mesh):
        begin = time.process_time()
        for _ in range(3):
          state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)
        seconds[name].append((time.process_time() - begin) / 3)
      program[1] = state
  base = statistics.median(seconds["linear router"])
  print(f"CPU-seconds a step, medians of {rounds} rounds of 3 steps: linear router {base:.3f}")
  for name, sign in (("without statistics", -1), ("recurrent router", 1)):
    ratios = [sign * (b / a - 1) for a, b in zip(seconds["linear router"], seconds[name])]
    low, _, high = statistics.quantiles(ratios, n=4)
    what = "statistics" if sign < 0 else name
    print(f"{what:20s} {statistics.median(ratios):+.2%} of the step (middle half of the rounds: {low:+.2%} to {high:+.2%})")


def tpu(topology: str) -> None:
  from tools import compile_check
  devices = compile_check.devices_of(topology)

  def build(run):
    cost = step_lib.compile_step(run, sharding.make_mesh(run.mesh, devices)).cost_analysis()
    return cost["flops"], cost["bytes accessed"]

  costs = {name: variant("tpu", name, build) for name in VARIANTS}
  run = make_run("tpu", "none")
  model = sizes.flops_per_token(run.model, run.data.sequence_tokens) * run.tokens_per_step / len(devices)
  base = costs["linear router"]
  print(f"{topology}, a device: linear router {base[0] / 1e12:.3f} TFLOP and {base[1] / 1e9:.2f} GB by the compiler's count; "
        f"model FLOPs by formula {model / 1e12:.3f} T")
  for name, sign in (("without statistics", -1), ("recurrent router", 1)):
    flops, data = (sign * (b - a) for a, b in zip(base, costs[name]))
    what = "statistics" if sign < 0 else name
    print(f"{what:20s} {flops / 1e9:+9.3f} GFLOP ({flops / model:+.4%} of the model FLOPs)  {data / 1e6:+9.1f} MB "
          f"({data / base[1]:+.3%} of the bytes)")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tpu", metavar="TOPOLOGY", help="count for this topology, such as v5e:2x2, instead of timing")
  parser.add_argument("--rounds", type=int, default=15)
  arguments = parser.parse_args()
  if arguments.tpu:
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")
    tpu(arguments.tpu)
  else:
    cpu(arguments.rounds)


if __name__ == "__main__":
  main()
