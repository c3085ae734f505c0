"""Values out of range, and a router that learns nothing: accepted without a word?

PYTHONPATH=CHECKOUT python tests/symptoms/config_ranges.py
"""

from moe import config

for values in (
  {"beta1": 1.5},
  {"beta2": 1.0},
  {"beta1": -0.1},
  {"final_fraction": 7.0},
  {"schedule": "wsd", "decay_tokens": 0},
):
  try:
    config.Optimizer(**values)
    print(f"{values}: accepted")
  except config.ConfigError as error:
    print(f"{values}: {error}")
model = config.Model(
  vocab_size=64,
  num_layers=2,
  d_model=16,
  attention=config.Attention(num_heads=2, head_dim=8),
  experts=config.Experts(num_experts=4, d_expert=16),
  router=config.Router(top_k=1),
)
print("top_k = 1, renormalize = True:", getattr(model, "blind_router", "") or "nothing is said")
