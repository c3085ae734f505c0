"""FLOPs of a token by formula, beside a count of the pairs that a window attends to."""
# ruff: noqa: E501
from moe import gin_config, sizes
import dataclasses

for name in ("rmoe_24_v5e_8", "olmoe_1b_7b_v5e_16", "deepseek_v3_v5p_1024", "quickstart"):
  run = gin_config.resolve([gin_config.CONFIGS / "run" / f"{name}.gin"]).run
  print(f"{name}: {sizes.flops_per_token(run.model, run.data.sequence_tokens):.6e}")
m = gin_config.resolve([gin_config.CONFIGS / "run" / "olmoe_1b_7b_v5e_16.gin"]).run.model
for w in (1, 512, 1024, 2048, 4095):
  S = 4096
  mw = dataclasses.replace(m, attention=dataclasses.replace(m.attention, window_tokens=w))
  a = m.attention
  per = 6 * m.num_layers * a.num_heads * (a.qk_dim + a.v_dim)
  pairs = sum(min(i + 1, w) for i in range(S)) / S
  s = sizes.sizes(m)
  exact = 6 * (s.active - s.other - m.vocab_size * m.d_model) + per * pairs
  print(
    f"olmoe, window {w}: {sizes.flops_per_token(mw, S):.6e} beside {exact:.6e} counted: {sizes.flops_per_token(mw, S) / exact - 1:+.3%}"
  )
