"""Logged against applied learning rate where steps were skipped: a decay to zero over 20 steps, every third step refused.

PYTHONPATH=CHECKOUT:CHECKOUT_WITH_TESTS python tests/symptoms/schedule.py
"""

import inspect

import jax.numpy as jnp

from moe import optimizer
from moe import schedules
from tests import small

run = small.run(
  train={"steps": 20},
  optimizer={
    "learning_rate": 0.5,
    "schedule": "wsd",
    "decay_tokens": 2560,
    "weight_decay": 0.0,
    "final_fraction": 0.0,
    "clip_norm": 0.0,
  },
)
params, grads = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
state = optimizer.make(run).init(params)
rate = schedules.learning_rate(run.optimizer, run.tokens_per_step, run.train.steps)
steps = {"step"} & set(inspect.signature(optimizer.update).parameters)
for step in range(20):
  before = params["w"]
  params, state = optimizer.update(run, grads, state, params, step % 3 != 1, **{name: step for name in steps})
  if step in (9, 18):
    print(f"step {step}: logged {float(rate(step)):.3f}, applied {float(before - params['w']):.3f}")
