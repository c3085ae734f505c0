"""Short trainings of the quickstart model under several configs and seeds, compared: what the two experiments share.

Nothing is written but a picture and a JSON file; each run is the library's own step, data and evaluation.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import jax
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from moe import evaluate  # noqa: E402
from moe import gin_config  # noqa: E402
from moe import hardware  # noqa: E402
from moe import sharding  # noqa: E402
from moe import step as step_lib  # noqa: E402
from moe.data import pipeline  # noqa: E402
from moe.data import tokenizers  # noqa: E402
from moe.routing import analysis  # noqa: E402

_EVAL_BATCHES = 12


def train(flags: list[str]) -> dict[str, float]:
  """Trains the quickstart with these gin flags; measures it on a part of each domain's validation text."""
  run = gin_config.resolve([gin_config.CONFIGS / "run/quickstart.gin"], flags).run
  mesh = sharding.make_mesh(run.mesh)
  loader, tokenizer = pipeline.Loader(run.data, run.train.seed), tokenizers.load(run.data.tokenizer, run.data.bos)
  rows = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    state, train_step = step_lib.init_state(run, mesh), step_lib.jit_train_step(run, mesh)
    tail = []
    for step in range(run.train.steps):
      state, metrics = train_step(state, step_lib.Batch(*[jax.device_put(a, rows) for a in next(loader)]))
      if step >= run.train.steps - 20:
        tail.append(jax.device_get(metrics))
    eval_step = step_lib.jit_eval_step(run, mesh)
    results = {}
    for domain in run.data.domains:
      results[domain.name], _ = evaluate.evaluate_domain(run, mesh, eval_step, state.params, domain, tokenizer,
                                                         limit_batches=_EVAL_BATCHES)
  counts = np.stack([r["expert_counts"] for r in results.values()])
  total = np.sum([m["expert_counts"] for m in tail], 0)
  between = np.mean([r["information_choices"] for r in results.values()], 0)
  pairs = max(len(between) * (len(between) - 1), 1)
  return {**{f"{name} bits/byte": r["bits_per_byte"] for name, r in results.items()},
          "max/mean load": float((total.max(-1) / total.mean(-1)).mean()),
          "balance": float(np.mean([m["balance"] for m in tail])),
          "top-k sum": float(np.mean([m["top_k_weight"] for m in tail])),
          "specialised": float(analysis.specialisation(counts).mean()),
          "information between layers": float((between.sum() - np.trace(between)) / pairs)}


def compare(name: str, description: str, variants: dict[str, list[str]], notes: list[str]) -> None:
  """Runs every variant with every seed, in turn, and prints and draws the table."""
  parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=100)
  parser.add_argument("--out", default="runs/experiments")
  arguments = parser.parse_args()
  base = [f"--gin.Train.steps={arguments.steps}", "--gin.Optimizer.decay_tokens=200_000"]
  resolved = gin_config.resolve([gin_config.CONFIGS / "run/quickstart.gin"], base + variants[next(iter(variants))])
  jax.config.update("jax_num_cpu_devices", hardware.cpu_devices(resolved.run.mesh))
  hardware.use_compile_cache()
  results: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
  for seed in range(arguments.seeds):
    for variant, flags in variants.items():
      begin = time.monotonic()
      results[variant].append(train([*base, *flags, f"--gin.Train.seed={seed}"]))
      values = ", ".join(f"{key} {value:.3f}" for key, value in results[variant][-1].items())
      print(f"seed {seed}, {variant} ({time.monotonic() - begin:.0f} s): {values}", flush=True)
  keys = list(results[next(iter(variants))][0])
  print(f"\nmean and spread (max - min) of {arguments.seeds} seeds, {arguments.steps} steps of the quickstart model")
  print(" " * 26 + "".join(f"{key:>28s}" for key in keys))
  for variant, runs in results.items():
    cells = [[run[key] for run in runs] for key in keys]
    print(f"{variant:26s}" + "".join(f"{np.mean(c):18.3f} +- {np.ptp(c):<6.3f}" for c in cells))
  print(*notes, sep="\n")
  folder = pathlib.Path(arguments.out)
  folder.mkdir(parents=True, exist_ok=True)
  figure, axes = plt.subplots(1, len(keys), figsize=(2.6 * len(keys), 3.4), layout="constrained")
  for axis, key in zip(axes, keys):
    for place, runs in enumerate(results.values()):
      axis.plot([place] * len(runs), [run[key] for run in runs], "o", alpha=0.6)
    axis.set_title(key, fontsize=9)
    axis.set_xticks(range(len(results)), list(results), rotation=60, fontsize=8)
  figure.savefig(folder / f"{name}.png", dpi=110)
  (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
  print(f"wrote {folder}/{name}.png and .json")
