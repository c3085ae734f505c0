"""How often the routing statistics of evaluation count a scored token, on a small model and King James.

PYTHONPATH=CHECKOUT python tests/symptoms/eval_overlap.py
"""

import jax

jax.config.update("jax_platforms", "cpu")

from moe import config, evaluate, sharding, step
from moe.data import tokenizers
from tests import small

run = small.run(batch=8, length=512, model={"vocab_size": 384})
kjv = config.Domain(name="kjv", path="embedded:kjv")
mesh = sharding.make_mesh(run.mesh, jax.devices()[:1])
with jax.set_mesh(mesh):
  params = small.params(step.abstract_state(run, mesh).params)
  result, _ = evaluate.evaluate_domain(run, mesh, step.jit_eval_step(run, mesh), params, kjv, tokenizers.ByteTokenizer())

counted = result["expert_counts"].sum(-1) / run.model.router.top_k / result["tokens"]
print(f"{result['tokens']} tokens, {result['bits_per_byte']:.9f} bits/byte, loss {result['loss']:.9f}; "
      f"routing counted per scored token, by layer: {counted}")
