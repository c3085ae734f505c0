"""The quickstart model for some steps and seeds: balance, load, spread of the loss from step to step, bits per byte.

    PYTHONPATH=CHECKOUT python tests/symptoms/quickstart.py [STEPS] [SEED ...]
"""

import sys

import jax
import numpy as np

from moe import evaluate
from moe import gin_config
from moe import sharding
from moe import step as step_lib
from moe.data import pipeline
from moe.data import tokenizers

jax.config.update("jax_num_cpu_devices", 2)
steps, *seeds = [int(argument) for argument in sys.argv[1:]] or [60, 0, 1, 2]
for seed in seeds:
  flags = [f"--gin.Train.steps={steps}", f"--gin.Train.seed={seed}", "--gin.Optimizer.decay_tokens=100_000"]
  run = gin_config.resolve([gin_config.CONFIGS / "run/quickstart.gin"], flags).run
  mesh = sharding.make_mesh(run.mesh)
  with jax.set_mesh(mesh):
    state, train_step = step_lib.init_state(run, mesh), step_lib.jit_train_step(run, mesh)
    loader, rows, records = pipeline.Loader(run.data, seed), sharding.batch_sharding(mesh), []
    for _ in range(steps):
      state, metrics = train_step(state, step_lib.Batch(*[jax.device_put(field, rows) for field in next(loader)]))
      records.append(jax.device_get(metrics))
    eval_step = step_lib.jit_eval_step(run, mesh)
    scores = {domain.name: evaluate.evaluate_domain(run, mesh, eval_step, state.params, domain, tokenizers.ByteTokenizer(),
                                                    limit_batches=8)[0]["bits_per_byte"] for domain in run.data.domains}
  late = records[steps // 2 :]
  spread = np.std(np.diff([record["loss"] for record in late])) / np.sqrt(2)
  balance, load = (np.mean([record[key] for record in late]) for key in ("balance", "load_max"))
  bits = ", ".join(f"{name} {score:.3f} bits/byte" for name, score in scores.items())
  print(f"seed {seed}: balance {balance:.3f}, largest load {load:.2f}, spread of the loss {spread:.3f}, {bits}", flush=True)
