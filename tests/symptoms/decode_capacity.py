"""Greedy tokens beside the training forward over the same text, where capacity factor 1.0 drops tokens.

PYTHONPATH=CHECKOUT python tests/symptoms/decode_capacity.py
"""

import inspect

import jax
import numpy as np

from moe import generate
from moe import model as model_lib
from tests import small

PROMPT, CONTINUED, VOCABULARY = [1, 5, 9], 23, 60

model = small.model(experts={"capacity_factor": 1.0})
transformer = model_lib.build(model)
params = small.params(jax.eval_shape(lambda key: model_lib.unbox(model_lib.init(transformer, key))[0], jax.random.key(0)))

ways = {"from the cache": {}}
if "row_tokens" in inspect.signature(generate.sample).parameters:
  ways["as trained"] = {"row_tokens": len(PROMPT) + CONTINUED}

for way, options in ways.items():
  made = generate.sample(model, params, np.array(PROMPT), CONTINUED, vocab_size=VOCABULARY, temperature=0, **options)
  text = np.concatenate([PROMPT, made.ids])[None]
  out = transformer.apply({"params": params}, text, np.ones_like(text), np.arange(text.size)[None])
  logits = transformer.apply({"params": params}, out.hidden, method="logits")
  best = np.argmax(logits[0, len(PROMPT) - 1 : -1, :VOCABULARY], -1)
  differ = int((best != made.ids).sum())
  print(f"{way}: {differ} of {CONTINUED} greedy tokens differ from the training forward, "
        f"which dropped {int(out.stats.dropped.sum())} selections")
