"""Times a small mixture-of-experts training step on CPU, ours and MaxText's, in turn.

  python -m tools.bench.small_moe --maxtext_python=ENV/bin/python

where ENV is an environment of its own on Python 3.12:

  python3.12 -m venv ENV && ENV/bin/pip install uv && VIRTUAL_ENV=ENV ENV/bin/uv pip install "maxtext[tpu]==0.2.5"

Same model (configs/size/bench_small_moe.gin), batch 8 x 256, float32, AdamW, synthetic tokens, the cores this process may
use. Every measurement is a process watched from outside: wall and CPU seconds between the lines it prints for two steps,
divided by the steps between. Rounds go through all variants in turn, so a slow minute hits them alike; medians are over
rounds. The yardstick is the best float32 2048-cubed JAX matmul, timed in each round too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

_WARM, _STEPS = 4, 16  # timed from after step _WARM to after step _STEPS - 1

_MAXTEXT = (
    "run_name=x hardware=cpu skip_jax_distributed_system=true dataset_type=synthetic enable_checkpointing=false "
    "enable_tensorboard=false log_config=false jax_cache_dir= decoder_block=mixtral base_num_decoder_layers=4 base_emb_dim=256 "
    "base_num_query_heads=4 base_num_kv_heads=4 head_dim=64 base_mlp_dim=512 base_moe_mlp_dim=512 num_experts=8 "
    f"num_experts_per_tok=2 vocab_size=4096 max_target_length=256 per_device_batch_size=8 dtype=float32 weight_dtype=float32 "
    f"steps={_STEPS}").split()
_VARIANTS = {
    "ours, dropless, 1 device": ["ours", "1"],
    "ours, dropless, 1 device a core": ["ours", "-1"],
    "MaxText, dropless (ragged_dot, minimal_with_context)": ["maxtext", "megablox=false", "remat_policy=minimal_with_context"],
    "MaxText, capacity 1.25 (drops)": ["maxtext", "sparse_matmul=false", "megablox=false", "capacity_factor=1.25"],
}


def ours(devices: int) -> None:
  """The measured process: a line a step. `devices` as Mesh.data."""
  import jax
  import numpy as np

  from moe import gin_config
  from moe import hardware
  from moe import sharding
  from moe import step as step_lib
  from moe.model import Batch

  files = [gin_config.CONFIGS / name for name in ("base.gin", "size/bench_small_moe.gin", "data/embedded.gin")]
  flags = ["--gin.Data.batch_sequences=8", "--gin.Data.sequence_tokens=256", f"--gin.Train.steps={_STEPS}",
           f"--gin.Mesh.data={devices}"]
  run = gin_config.resolve(files, flags).run
  jax.config.update("jax_num_cpu_devices", hardware.cpu_devices(run.mesh))
  mesh = sharding.make_mesh(run.mesh)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 4096, (8, 257)).astype(np.int32)
  batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((8, 256), np.int32), np.tile(np.arange(256, dtype=np.int32), (8, 1)))
  with jax.set_mesh(mesh):
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, train_step = step_lib.init_state(run, mesh), step_lib.jit_train_step(run, mesh)
    for step in range(_STEPS):
      state, metrics = train_step(state, batch)
      print(f"completed step: {step}, loss {float(metrics['loss']):.4f}", flush=True)


def _cpu_seconds(pid: int) -> float:
  with open(f"/proc/{pid}/stat") as file:
    fields = file.read().rsplit(")", 1)[1].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watch(command: list[str], environment: dict[str, str], folder: str | None = None) -> dict[str, float]:
  """Runs a command that prints `completed step: N, ... loss X`; wall and CPU seconds a step, seconds to the first, last loss.

  Raises:
    RuntimeError: the command failed; its last lines.
  """
  begin, marks, tail = time.monotonic(), {}, []
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             cwd=folder)
  for line in process.stdout:
    tail = tail[-20:] + [line]
    if found := re.search(r"completed step: (\d+).*loss:? (\S+)", line):
      loss = float(found.group(2))
      marks[int(found.group(1))] = (time.monotonic(), _cpu_seconds(process.pid))
  if process.wait() or _STEPS - 1 not in marks:
    raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(tail)}")
  steps = _STEPS - 1 - _WARM
  (wall_a, cpu_a), (wall_b, cpu_b) = marks[_WARM], marks[_STEPS - 1]
  return {"wall": (wall_b - wall_a) / steps, "cpu": (cpu_b - cpu_a) / steps, "first": marks[0][0] - begin, "loss": loss}


def measure(name: str, maxtext_python: str | None) -> dict[str, float]:
  kind, *arguments = _VARIANTS[name]
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  if kind in ("ours", "other"):
    environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # as moe.train does for itself
    return watch([sys.executable, "-m", "tools.bench.small_moe", "--ours", arguments[0]], environment,
                 None if kind == "ours" else arguments[1])
  with tempfile.TemporaryDirectory() as folder:
    program = [maxtext_python, "-m", "maxtext.trainers.pre_train.train"]
    return watch([*program, *_MAXTEXT, f"base_output_directory={folder}", *arguments], environment)


def matmul_flops() -> float:
  code = ("import jax; from moe import hardware; "
          "print(hardware.measured_matmul_flops(jax.devices(), repeats=10))")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                        env=os.environ | {"JAX_PLATFORMS": "cpu"})
  return float(done.stdout)


def model_flops() -> float:
  from moe import config
  from moe import sizes

  model = config.Model(vocab_size=4096, num_layers=4, d_model=256, attention=config.Attention(num_heads=4, head_dim=64),
                       experts=config.Experts(num_experts=8, d_expert=512))
  return sizes.flops_per_token(model, 256) * 8 * 256


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--maxtext_python", help="Python of an environment with MaxText; without it only ours is timed")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--maxtext_huge_pages", action="store_true", help="give MaxText glibc's huge pages too")
  parser.add_argument("--against", metavar="DIR", help="another checkout of this project, timed in the same rounds")
  parser.add_argument("--ours", type=int, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.ours is not None:
    ours(arguments.ours)
    return
  if arguments.maxtext_huge_pages:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  if arguments.against:
    _VARIANTS["other checkout, dropless, 1 device"] = ["other", "1", arguments.against]
  names = [name for name, (kind, *_) in _VARIANTS.items() if arguments.maxtext_python or kind != "maxtext"]
  rounds, peaks = [], []
  for number in range(arguments.rounds):
    peaks.append(matmul_flops())
    rounds.append({name: measure(name, arguments.maxtext_python) for name in names})
    print(f"round {number}: matmul {peaks[-1] / 1e9:.0f} GFLOP/s; " + "; ".join(
        f"{name} {r['wall']:.3f} s wall {r['cpu']:.3f} s CPU" for name, r in rounds[-1].items()), flush=True)
  flops = model_flops()
  cores = len(os.sched_getaffinity(0))
  print(f"\nmodel FLOPs a step {flops / 1e9:.1f} G; medians of {arguments.rounds} rounds, {cores} cores\n")
  print(f"{'':56s} wall s   CPU s   first step s   share of matmul peak")
  for name in names:
    middle = {key: statistics.median(r[name][key] for r in rounds) for key in ("wall", "cpu", "first")}
    share = statistics.median(flops / r[name]["wall"] / peak for r, peak in zip(rounds, peaks))
    print(f"{name:56s} {middle['wall']:6.3f}  {middle['cpu']:6.3f}   {middle['first']:12.1f}   {share:20.1%}")
  for name in names:
    print(f"{name}: loss of the last step {rounds[-1][name]['loss']:.4f}")
  for mine in [n for n in names if _VARIANTS[n][0] == "ours"]:
    for theirs in [n for n in names if _VARIANTS[n][0] != "ours"]:
      ratios = [[r[theirs][key] / r[mine][key] for r in rounds] for key in ("wall", "cpu")]
      print(f"{theirs} / {mine}: wall {statistics.median(ratios[0]):.2f}, CPU {statistics.median(ratios[1]):.2f}")
  print(json.dumps({"rounds": rounds, "matmul_flops": peaks}))


if __name__ == "__main__":
  main()
