"""Model FLOPs by formula against the matrix products that a traced forward pass has, and pairs counted one by one."""

import jax
import numpy as np
import pytest

from moe import layers
from moe import model as model_lib
from moe import sizes
from tests import small

LOOKAHEAD = {"allow_lookahead": True, "balance_coef": 0.0}
CHOICE = {"gate": "expert_choice", **LOOKAHEAD}
RECURRENT = {"cell": "gru", "width": 6}
MODELS = {
    "biases_and_norms": {"attention": {"qkv_bias": True, "qk_norm": "whole"}},
    "window": {"attention": {"window_tokens": 4}},
    "window_of_one": {"attention": {"window_tokens": 1}},
    "mla": {"attention": {"kind": "mla", "num_kv_heads": 0, "kv_lora_rank": 8, "rope_head_dim": 4, "v_head_dim": 6,
                          "q_lora_rank": 8}},
    "shared_gate": {"experts": {"d_shared": 24, "shared_gate": True}},
    "gelu_tied": {"activation": "gelu", "tie_embeddings": True},
    "dense_layers": {"num_layers": 5, "num_dense_layers": 1, "moe_every": 2, "d_ff": 32},
    "capacity": {"experts": {"capacity_factor": 1.0}}, "half_the_slots": {"experts": {"capacity_factor": 0.5}},
    "sigmoid": {"router": {"gate": "sigmoid", "bias_update_rate": 0.01}}, "noisy": {"router": {"gate": "noisy"}},
    "cosine": {"router": {"gate": "cosine", "cosine_width": 6}},
    "expert_choice": {"router": CHOICE}, "expert_choice_twice": {"router": CHOICE, "experts": {"capacity_factor": 2.0}},
    "soft": {"router": {"gate": "soft", "soft_slots": 2, **LOOKAHEAD}},
    "gru": {"router": {"recurrent": RECURRENT}, "num_layers": 3},
    "lstm_shared": {"router": {"gate": "cosine", "cosine_width": 5,
                               "recurrent": {**RECURRENT, "cell": "lstm", "shared_projector": True}}},
    "pre_gate": {"router": {"pre_gate": {"d_model": 8, "num_heads": 2, "d_ff": 12}}},
}
ROWS, LENGTH = 2, 16


def products(jaxpr) -> int:
  """Multiply-adds of all matrix products in a traced function, those of a scan as often as it turns."""
  total = 0
  for equation in jaxpr.eqns:
    name, shapes = equation.primitive.name, [v.aval.shape for v in equation.invars]
    if name == "dot_general":
      contracted = equation.params["dimension_numbers"][0][0]
      total += equation.outvars[0].aval.size * int(np.prod([shapes[0][axis] for axis in contracted]))
    elif name.startswith("ragged_dot"):
      total += equation.outvars[0].aval.size * shapes[0][-1]
    parts = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns"))
    inner = [getattr(part, "jaxpr", part) for part in parts if hasattr(part, "jaxpr") or hasattr(part, "eqns")]
    total += sum(map(products, inner)) * equation.params.get("length", 1)
  return total


def pairs(window: int) -> int:
  """(query, key) pairs of one row, counted by what the mask lets through."""
  positions, ones = np.arange(LENGTH)[None], np.ones((1, LENGTH), np.int32)
  return int(np.sum(np.asarray(layers.attention_bias(positions, positions, ones, ones, window)) == 0))


@pytest.mark.parametrize("name", MODELS)
def test_flops_equal_the_products_of_a_traced_forward(name, monkeypatch):
  model = small.change(small.model(**MODELS[name]), experts={"backend": "ragged_dot"})  # rows of an expert are counted exactly
  monkeypatch.setattr(layers, "apply_rope", lambda x, *_: x)  # it turns pairs by a matmul, which is no product of the model
  transformer, batch = model_lib.build(model), small.batch(ROWS, LENGTH, padding=False)
  params = jax.eval_shape(lambda key: model_lib.unbox(model_lib.init(transformer, key))[0], jax.random.key(0))

  def forward(params):
    out = transformer.apply({"params": params}, batch.inputs, batch.segment_ids, batch.positions)
    return transformer.apply({"params": params}, out.hidden, method="logits")

  # Short rows are written out, all keys for all queries, so the pairs that no query sees are taken off.
  a, gate = model.attention, model.router.pre_gate.d_model
  hidden_pairs = ROWS * model.num_layers * a.num_heads * (a.qk_dim + a.v_dim) * (LENGTH**2 - pairs(a.window_tokens))
  hidden_pairs += ROWS * 2 * gate * (LENGTH**2 - pairs(0))
  counted = products(jax.make_jaxpr(forward)(params).jaxpr) - hidden_pairs
  assert sizes.flops_per_token(model, LENGTH) * ROWS * LENGTH == pytest.approx(3 * 2 * counted, rel=1e-12)


@pytest.mark.parametrize("window", [0, 1, 2, 7, 15, 16, 40])
def test_attended_keys_are_those_of_the_mask(window):
  assert sizes.attended_keys(LENGTH, window) * LENGTH == pairs(window)
