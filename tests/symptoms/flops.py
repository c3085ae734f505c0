"""FLOPs of a token by formula, beside a count of the pairs that a window attends to.

PYTHONPATH=CHECKOUT python tests/symptoms/flops.py
"""

import dataclasses

from moe import gin_config, sizes


def run_of(name: str):
  return gin_config.resolve([gin_config.CONFIGS / "run" / f"{name}.gin"]).run


for name in ("rmoe_24_v5e_8", "olmoe_1b_7b_v5e_16", "deepseek_v3_v5p_1024", "quickstart"):
  run = run_of(name)
  print(f"{name}: {sizes.flops_per_token(run.model, run.data.sequence_tokens):.6e}")

model, length = run_of("olmoe_1b_7b_v5e_16").model, 4096
attention, counted = model.attention, sizes.sizes(model)
# Forward and backward: three passes of two FLOPs a weight, and a pair of tokens is two dot products.
matmuls = 6 * (counted.active - counted.other - model.vocab_size * model.d_model)
pair = 6 * model.num_layers * attention.num_heads * (attention.qk_dim + attention.v_dim)
for window in (1, 512, 1024, 2048, 4095):
  windowed = dataclasses.replace(model, attention=dataclasses.replace(attention, window_tokens=window))
  exact = matmuls + pair * sum(min(i + 1, window) for i in range(length)) / length
  formula = sizes.flops_per_token(windowed, length)
  print(f"olmoe, window {window}: {formula:.6e} beside {exact:.6e} counted: {formula / exact - 1:+.3%}")
