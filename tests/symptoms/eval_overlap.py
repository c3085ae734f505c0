"""A small model on King James: its figures, and how often the routing statistics count a scored token."""
# ruff: noqa: E501, UP031


import jax
import time

jax.config.update("jax_platforms", "cpu")
from tests import small
from moe import evaluate, sharding, step as step_lib, config
from moe.data import tokenizers

run = small.run(batch=8, length=512, model={"vocab_size": 384})
mesh = sharding.make_mesh(run.mesh, jax.devices()[:1])
with jax.set_mesh(mesh):
  params = small.params(step_lib.abstract_state(run, mesh).params)
  begin = time.perf_counter()
  r, _ = evaluate.evaluate_domain(
    run,
    mesh,
    step_lib.jit_eval_step(run, mesh),
    params,
    config.Domain(name="kjv", path="embedded:kjv"),
    tokenizers.ByteTokenizer(),
  )
print(
  f"bits/byte {r['bits_per_byte']:.9f} loss {r['loss']:.9f} accuracy {r['accuracy']:.9f} tokens {r['tokens']} bytes {r['bytes']}; routing counted per scored token {r['expert_counts'].sum(-1) / 2 / r['tokens']}; "
  f"entropy {r['router_entropy']}; {time.perf_counter() - begin:.0f} s; forward {r.get('forward_tokens')}, windows {r.get('window_tokens')}"
)
