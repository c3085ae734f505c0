"""The dataclasses: how many knobs there are, and what they refuse."""

import dataclasses
import inspect

import pytest

from moe import config
from tests import small

# DESIGN.md aims for 80. The rest is what the shipped presets need and nothing else could say: YaRN (5), latent
# attention (4), group-limited choice (2), shared experts and their gate (2), QKV bias, the soft cap. The family of
# routers added 16: the gate (4 with its options), the recurrent router (6) and the pre-gate (4) with their variants, the
# selection bias, the micro mix and the capacity group, less the softmax order, which renormalize says already. The kernels
# added one, the name that forces an attention, and the snapshots ten; the bound of the last evaluation one, the token that
# begins a document one, the observers four.
NUMBER_OF_KNOBS = 139


def classes():
  return [c for c in vars(config).values() if inspect.isclass(c) and dataclasses.is_dataclass(c)]


def test_number_of_knobs():
  assert sum(len(dataclasses.fields(c)) for c in classes()) == NUMBER_OF_KNOBS


def test_no_dict_fields_and_frozen():
  for cls in classes():
    assert cls.__dataclass_params__.frozen
    assert not [f for f in dataclasses.fields(cls) if "dict" in str(f.type).lower()]


@pytest.mark.parametrize("changes, message", [
    ({"router": {"top_k": 9}}, "Router.top_k = 9 exceeds Experts.num_experts = 8"),
    ({"router": {"num_groups": 3}}, "does not split into Router.num_groups = 3"),
    ({"router": {"num_groups": 4, "top_groups": 5}}, "top_groups = 5 exceeds num_groups = 4"),
    ({"router": {"num_groups": 8, "top_groups": 1}}, "exceeds the 1 experts of top_groups = 1"),
    ({"attention": {"num_heads": 5}}, "num_heads = 5 is not a multiple of num_kv_heads = 2"),
    ({"attention": {"kind": "mla"}}, "kv_lora_rank = 0 must be at least 1"),
    ({"attention": {"head_dim": 7}}, "even width, got 7"),
    ({"attention": {"kind": "mqa"}}, "'mqa' is not one of 'gqa', 'mla'"),
    ({"num_dense_layers": 2}, "positive multiple of moe_every"),
    ({"moe_every": 2}, "d_ff must be set"),
    ({"dropout": 1.0}, "must be in [0, 1)"), ({"remat": "offload", "scan_unroll": 2}, "does not go with"),
    ({"experts": {"shared_gate": True}}, "needs shared experts"),
    ({"vocab_size": "64"}, "Model.vocab_size = '64' is a str, not an int"),
    ({"vocab_size": True}, "is a bool, not an int"),
    ({"dropout": float("nan")}, "is not finite"),
    ({"router": {"balance_scope": "layer"}}, "'layer' is not one of"),
    ({"router": {"gate": "sigmod"}}, "; did you mean 'sigmoid'?"),
    ({"compute_dtype": "bf16"}, "; did you mean 'bfloat16'?"),
    ({"router": {"gate": "gshard"}}, "Router.gate = 'gshard' is not one of 'softmax', 'noisy', 'sigmoid', 'cosine'"),
    ({"router": {"gate": "expert_choice"}}, "a causal model would learn from what it must predict"),
    ({"router": {"gate": "soft"}}, "set Router.allow_lookahead = True"),
    ({"router": {"gate": "soft", "allow_lookahead": True}}, "set Router.balance_coef = 0 (it is 0.01)"),
    ({"router": {"gate": "expert_choice", "allow_lookahead": True, "balance_coef": 0.0, "bias_update_rate": 0.1}},
     "takes no selection bias"),
    ({"router": {"gate": "soft", "allow_lookahead": True, "balance_coef": 0.0}, "experts": {"capacity_factor": 1.0}},
     "do not apply to Router.gate = 'soft'"),
    ({"router": {"recurrent": {"cell": "gru"}, "pre_gate": {"d_model": 8, "d_ff": 8, "num_heads": 2}}},
     "a pre-gate decides once for all layers, so there is nothing for Recurrent.cell = 'gru' to carry"),
    ({"router": {"recurrent": {"cell": "mamba"}}}, "Recurrent.cell = 'mamba' is not one of 'none', 'gru', 'lstm', 'rnn'"),
    ({"router": {"recurrent": {"carry": "half"}}}, "'half' is not one of 'gradient', 'detach', 'none'"),
    ({"router": {"pre_gate": {"d_model": 8}}}, "needs a d_ff > 0 (it is 0)"),
    ({"router": {"gate": "sigmoid", "num_groups": 8, "top_groups": 4}}, "leaves groups of 1 expert"),
    ({"router": {"micro_mix": 0.01, "balance_scope": "sequence"}}, "adds to a wider scope than balance_scope = 'sequence'"),
    ({"experts": {"drop_policy": "score"}}, "'score' is not one of 'position', 'probability', 'random'"),
    ({"experts": {"capacity_group": "shard"}}, "'shard' is not one of 'sequence', 'microbatch'"),
])
def test_refusals(changes, message):
  with pytest.raises(config.ConfigError) as error:
    small.model(**changes)
  assert message in str(error.value)


@pytest.mark.parametrize("changes, message", [
    ({"train": {"micro_batches": 3}}, "batch_sequences = 8 is not a multiple of Train.micro_batches = 3"),
    ({"data": {"virtual_shards": -1}}, "Data.virtual_shards = -1 must be at least 0"),
    ({"optimizer": {"beta1": 1.5}}, "Optimizer.beta1 = 1.5 must be in [0, 1)"),
    ({"optimizer": {"beta1": -0.1}}, "Optimizer.beta1 = -0.1 must be in [0, 1)"),
    ({"optimizer": {"beta2": 1.0}}, "Optimizer.beta2 = 1.0 must be in [0, 1)"),
    ({"optimizer": {"final_fraction": 7.0}}, "Optimizer.final_fraction = 7.0 is a share, at most 1"),
    ({"optimizer": {"schedule": "wsd"}}, "decay_tokens = 0 never comes to final_fraction = 0.1"),
    ({"data": {"domains": ()}}, "at least one domain"),
    ({"train": {"final_eval_batches": -1}}, "Train.final_eval_batches = -1 must be at least 0"),
    ({"train": {"eval_batches": 0}}, "Train.eval_batches = 0 must be at least 1"),
    ({"mesh": {"data": 0}}, "sizes are positive"),
    ({"mesh": {"data": -1, "fsdp": -1}}, "at most one is -1"),
])
def test_run_refusals(changes, message):
  with pytest.raises(config.ConfigError) as error:
    small.run(**changes)
  assert message in str(error.value)


def test_layers_with_experts_have_the_models_own_numbers():
  assert [small.model().moe_layer_name(i) for i in range(2)] == ["layer 0", "layer 1"]
  model = small.model(num_layers=7, num_dense_layers=3, moe_every=2, d_ff=8)
  assert [model.moe_layer_name(i) for i in range(2)] == ["layer 4 (MoE layer 1 of 2)", "layer 6 (MoE layer 2 of 2)"]


def test_dict_round_trip():
  run = small.run()
  assert config.from_dict(config.Run, config.to_dict(run)) == run
  kept = config.to_dict(run)
  with pytest.raises(config.ConfigError, match="Router has no field 'old_name': the config is of another version"):
    config.from_dict(config.Run, {**kept, "model": {**kept["model"], "router": {"old_name": 1}}})
  with pytest.raises(config.ConfigError, match="Run lacks model"):
    config.from_dict(config.Run, {key: value for key, value in kept.items() if key != "model"})


def test_differences_names_every_leaf():
  a, b = config.to_dict(small.run()), config.to_dict(small.run(model={"d_model": 32}, train={"seed": 1}))
  assert config.differences(a, b) == ["model.d_model: 16 -> 32", "train.seed: 0 -> 1"]
  assert config.differences(a, a) == []
