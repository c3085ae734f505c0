"""Greedy tokens beside the training-style forward over the same text, capacity factor 1.0."""
# ruff: noqa: E501, UP031


import inspect
import jax
import numpy as np
from moe import generate, model as M
from tests import small

model = small.model(experts={"capacity_factor": 1.0})
t = M.build(model)
p = small.params(jax.eval_shape(lambda key: M.unbox(M.init(t, key))[0], jax.random.key(0)))
ways = {"from the cache": {}}
if "row_tokens" in inspect.signature(generate.sample).parameters:
  ways["as trained"] = {"row_tokens": 26}
for way, options in ways.items():
  made = generate.sample(model, p, np.array([1, 5, 9]), 23, vocab_size=60, temperature=0, **options)
  text = np.concatenate([[1, 5, 9], made.ids])[None]
  out = t.apply({"params": p}, text, np.ones_like(text), np.arange(26)[None])
  best = np.argmax(t.apply({"params": p}, out.hidden, method="logits")[0, 2:-1, :60], -1)
  print(
    f"{way}: {int((best != made.ids).sum())} of 23 greedy tokens differ from the training forward, which dropped {int(out.stats.dropped.sum())} selections"
  )
