"""Hugging Face models: the same logits, the same tensors both ways, and refusals by name.

The golden models and their logits are transformers' own (tests/golden/hugging_face/make.py). `bash tools/dev.sh parity` also
runs the tests marked `parity`, against transformers itself.
"""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from moe import config
from moe import hugging_face
from moe import stored
from moe.errors import UserError
from tests import small
from tools import export_hf
from tools import hf_logits
from tools import import_hf

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hugging_face"
FAMILIES = sorted(hugging_face.FAMILIES)


class Arrays:
  """A source in memory."""

  kind = "orbax"

  def __init__(self, values: dict[str, np.ndarray]):
    self.values = values
    self.leaves = {name: stored.Leaf(name, x.shape, x.dtype.name, x.shape) for name, x in sorted(values.items())}

  def read(self, name, begin, end):
    return self.values[name][tuple(slice(b, e) for b, e in zip(begin, end))]


def golden(name):
  """(the model, its arrays under our names, tokens, transformers' logits)."""
  found = stored.find(GOLDEN / name)
  model = hugging_face.read_config(found.config)
  ours = hugging_face.AsOurs(found.source, model, hugging_face.FAMILIES[name])
  truth = np.load(GOLDEN / name / "logits.npz")
  return model, Arrays({leaf: stored.whole(ours, leaf) for leaf in ours.leaves}), truth["tokens"], truth["logits"]


def gap(model, arrays, tokens, logits) -> float:
  """Largest difference over the largest logit."""
  return float(np.abs(hf_logits.ours(arrays, model, tokens) - logits).max() / np.abs(logits).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers(name):
  assert gap(*golden(name)) < 1e-5  # measured 6e-7 to 4.4e-6


def changed(model, **changes):
  return small.change(model, **changes)


def with_experts_turned(arrays):
  turned = {name: np.roll(x, 1, axis=1) if name.endswith(("moe.gate", "moe.up", "moe.down")) else x
            for name, x in arrays.values.items()}
  return Arrays(turned)


@pytest.mark.parametrize("what, name, wrong", [
    ("rotary pairs of the other layout", "mixtral", {"attention": {"rope": {"interleaved": True}}}),
    ("another rotary base", "qwen2_moe", {"attention": {"rope": {"theta": 1e6}}}),
    ("weights renormalised", "olmoe", {"router": {"renormalize": True}}),
    ("no YaRN", "deepseek_v2", {"attention": {"rope": {"yarn_factor": 1.0}}}),
    ("no groups", "deepseek_v3", {"router": {"num_groups": 1, "top_groups": 1}}),
    ("no window", "mixtral", {"attention": {"window_tokens": 0}}),
])
def test_a_wrong_option_shows(what, name, wrong):
  model, arrays, tokens, logits = golden(name)
  assert gap(changed(model, **wrong), arrays, tokens, logits) > 0.02, what


def test_a_wrong_order_of_experts_or_a_turned_rotary_sign_shows():
  model, arrays, tokens, logits = golden("qwen3_moe")
  assert gap(model, with_experts_turned(arrays), tokens, logits) > 0.1
  half = model.attention.head_dim // 2
  heads = ("attention.q", "attention.k", "q_norm_scale", "k_norm_scale")
  turned = {name: np.concatenate([x[..., half:], x[..., :half]], -1) if name.endswith(heads) else x
            for name, x in arrays.values.items()}
  assert gap(model, Arrays(turned), tokens, logits) > 0.02  # exchanging the halves turns the angle's sign


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_layout_go_both_ways(name):
  model, arrays, _, _ = golden(name)
  theirs = stored.find(GOLDEN / name).source
  back = hugging_face.AsTheirs(arrays, model, hugging_face.FAMILIES[name])
  assert set(back.leaves) == set(theirs.leaves)
  for leaf in theirs.leaves:
    np.testing.assert_array_equal(stored.whole(back, leaf), stored.whole(theirs, leaf), leaf)


def test_blocks_of_a_stacked_leaf_are_the_whole():
  found = stored.find(GOLDEN / "deepseek_v3")
  model = hugging_face.read_config(found.config)
  ours = hugging_face.AsOurs(found.source, model, hugging_face.FAMILIES["deepseek_v3"])
  name = "params.layers.experts.moe.gate"
  whole = stored.whole(ours, name)
  for begin, block in stored.blocks(ours, name, block_bytes=5000):
    np.testing.assert_array_equal(block, whole[tuple(slice(b, b + n) for b, n in zip(begin, block.shape))])
  np.testing.assert_array_equal(ours.read(name, (1, 2, 3, 4), (2, 5, 9, 11)), whole[1:2, 2:5, 3:9, 4:11])


# ------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name", FAMILIES)
def test_config_goes_both_ways(name):
  model = hugging_face.read_config(json.loads((GOLDEN / name / "config.json").read_text()))
  made = hugging_face.write_config(model, hugging_face.FAMILIES[name], max_positions=64)
  assert hugging_face.read_config(json.loads(json.dumps(made))) == model
  assert hugging_face.suited(model).model_type == name


def test_config_of_transformers_4():
  given = json.loads((GOLDEN / "deepseek_v2" / "config.json").read_text())
  model = hugging_face.read_config(given)
  rope = given.pop("rope_parameters")
  old = {**given, "rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope},
         "torch_dtype": given.pop("dtype"), "scoring_func": "softmax", "moe_layer_freq": 1}
  assert hugging_face.read_config(old) == model
  mixtral = json.loads((GOLDEN / "mixtral" / "config.json").read_text())
  model = hugging_face.read_config(mixtral)
  mixtral["rope_theta"] = mixtral.pop("rope_parameters")["rope_theta"]
  del mixtral["head_dim"]
  assert hugging_face.read_config(mixtral) == model
  qwen = json.loads((GOLDEN / "qwen3_moe" / "config.json").read_text())
  model = hugging_face.read_config(qwen)
  qwen["num_experts"] = qwen.pop("num_local_experts")
  assert hugging_face.read_config(qwen) == model


def test_what_a_config_leaves_out_is_the_familys():
  """Defaults of transformers, which released config.json files rely on."""
  given = json.loads((GOLDEN / "mixtral" / "config.json").read_text())
  model = hugging_face.read_config({k: v for k, v in given.items() if k not in ("rms_norm_eps", "rope_parameters")})
  assert model.norm_eps == 1e-5 and model.attention.rope.theta == 1e6
  given = json.loads((GOLDEN / "olmoe" / "config.json").read_text())
  model = hugging_face.read_config({k: v for k, v in given.items() if k not in ("rms_norm_eps", "rope_parameters")})
  assert model.norm_eps == 1e-5 and model.attention.rope.theta == 1e4


@pytest.mark.parametrize("name, change, words", [
    ("mixtral", {"model_type": "llama"}, "'llama' is none of"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2}}, "type 'linear'"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
])
def test_a_foreign_config_is_refused_by_its_key(name, change, words):
  given = json.loads((GOLDEN / name / "config.json").read_text())
  with pytest.raises(hugging_face.InteropError, match=words):
    hugging_face.read_config({**given, **change})


@pytest.mark.parametrize("change, words", [
    ({"router": {"recurrent": config.Recurrent(cell="gru")}}, "Model.router.recurrent.cell"),
    ({"attention": {"logit_softcap": 30.0}}, "Model.attention.logit_softcap"),
    ({"experts": {"capacity_factor": 1.25}}, "Model.experts.capacity_factor"),
    ({"router": {"gate": "cosine"}}, "Model.router.gate"),
    ({"router": {"bias_update_rate": 0.01}}, "selection bias"),
    ({"activation": "gelu"}, "Model.activation"),
])
def test_an_option_without_a_family_is_refused_by_its_name(change, words):
  with pytest.raises(hugging_face.InteropError, match=words):
    hugging_face.write_config(small.model(**change), hugging_face.FAMILIES["mixtral"], max_positions=64)
  with pytest.raises(hugging_face.InteropError, match="no Hugging Face family"):
    hugging_face.suited(small.model(**change))


# --------------------------------------------------------------------------------------------------------------- files


def copied(name, tmp_path, change=lambda tensors: tensors):
  folder = tmp_path / "given"
  shutil.copytree(GOLDEN / name, folder)
  path = folder / "model.safetensors"
  safetensors.numpy.save_file(change(dict(safetensors.numpy.load_file(path))), path)
  return folder


def dropped(tensors):
  del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
  return tensors


def cut(tensors):
  tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"][:, :-1])
  return tensors


@pytest.mark.parametrize("change, words", [
    (dropped, "experts.3.w2.weight is missing"), (cut, r"lm_head.weight has shape \(96, 31\)"),
    (lambda tensors: {**tensors, "model.extra.weight": np.zeros(3, np.float32)}, "model.extra.weight"),
])
def test_wrong_tensors_are_named(tmp_path, change, words):
  with pytest.raises(UserError, match=words):
    import_hf.main([str(copied("mixtral", tmp_path, change)), f"--out={tmp_path}/out"])
  assert not (tmp_path / "out" / "checkpoints").exists()


def test_multi_token_prediction_is_left_out_and_said(tmp_path, capsys):
  extra = {"model.layers.3.enorm.weight": np.ones(32, np.float32)}
  given = copied("deepseek_v3", tmp_path, lambda tensors: {**tensors, **extra})
  assert import_hf.main([str(given), f"--out={tmp_path}/out"]) == 0
  assert "left out: 1 tensors of multi-token prediction" in capsys.readouterr().out


def test_import_then_export_gives_the_same_files(tmp_path, capsys):
  for suffix, flags in (("", []), ("16", ["--dtype=bfloat16", "--shard_gb=0.00006"])):
    assert import_hf.main([str(GOLDEN / "olmoe"), f"--out={tmp_path}/run{suffix}", "--check"]) == 0
    assert export_hf.main([f"{tmp_path}/run{suffix}", f"--out={tmp_path}/hf{suffix}", "--check", *flags]) == 0
  given, made, small_made = (stored.find(p).source for p in (GOLDEN / "olmoe", tmp_path / "hf", tmp_path / "hf16"))
  assert set(given.leaves) == set(made.leaves) == set(small_made.leaves)
  for name in given.leaves:
    np.testing.assert_array_equal(stored.whole(given, name), stored.whole(made, name), name)
    assert small_made.leaves[name].dtype == "bfloat16"
  index = json.loads((tmp_path / "hf16" / "model.safetensors.index.json").read_text())
  assert len(set(index["weight_map"].values())) > 1
  assert sum(leaf.bytes for leaf in small_made.leaves.values()) == index["metadata"]["total_size"]
  assert "arrays are equal to the bit" in capsys.readouterr().out
  (tmp_path / "hf16" / sorted(set(index["weight_map"].values()))[1]).unlink()
  with pytest.raises(stored.Unreadable, match="which its index names"):
    stored.find(tmp_path / "hf16").source.leaves  # noqa: B018
  with pytest.raises(UserError, match="not empty"):
    export_hf.main([f"{tmp_path}/run", f"--out={tmp_path}/hf"])
  with pytest.raises(UserError, match="holds checkpoints already"):
    import_hf.main([str(GOLDEN / "olmoe"), f"--out={tmp_path}/run"])


def test_the_options_of_an_import_train(tmp_path):
  """model.gin with a run's file resolves to the imported model."""
  from moe import gin_config

  import_hf.main([str(GOLDEN / "deepseek_v3"), f"--out={tmp_path}/run"])
  resolved = gin_config.resolve([gin_config.CONFIGS / "run" / "quickstart.gin", tmp_path / "run" / "model.gin"])
  wanted = hugging_face.read_config(stored.find(GOLDEN / "deepseek_v3").config)
  hugging_face._refuse(hugging_face._flat(resolved.run.model), hugging_face._flat(wanted), hugging_face.FAMILIES["deepseek_v3"])
  assert resolved.run.model.router.bias_update_rate == wanted.router.bias_update_rate
  assert resolved.run.model.compute_dtype == "float32"  # the run's, not the import's


def test_a_model_without_its_tokenizer_is_not_fed_bytes(tmp_path):
  from tools import restore

  import_hf.main([str(GOLDEN / "mixtral"), f"--out={tmp_path}/run"])  # 96 ids, and no tokenizer.json
  with pytest.raises(config.ConfigError, match="'byte' has 259 ids but the model only 96"):
    restore.load(str(tmp_path / "run"))


def test_check_fails_when_a_tensor_is_wrong(tmp_path, capsys):
  """Control of --check."""
  import_hf.main([str(GOLDEN / "olmoe"), f"--out={tmp_path}/run"])
  found = stored.find(GOLDEN / "olmoe")
  model, family = hugging_face.read_config(found.config), hugging_face.FAMILIES["olmoe"]
  arrays = Arrays({name: stored.whole(a, name).copy() for a in [hugging_face.AsOurs(found.source, model, family)]
                   for name in a.leaves})
  arrays.values["params.head"][3, 5] += 1e-6
  written = stored.find(tmp_path / "run").source
  assert hf_logits.check(arrays, written, GOLDEN / "olmoe", written, model) == 1
  assert "not params.head" in capsys.readouterr().out


@pytest.mark.parametrize("make", [lambda x: x.T, lambda x: x[:, ::2], np.asfortranarray])
def test_safetensors_of_any_memory_order(tmp_path, make):
  value = make(np.arange(24, dtype=np.float32).reshape(4, 6))
  stored.save_tensors(tmp_path / "x.safetensors", {"x": value})
  np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "x.safetensors")["x"], value)


def test_tokenizers_travel(tmp_path):
  from moe.data import tokenizers

  tokenizers.train_bpe(["in the beginning was the word"] * 20, 300, tmp_path / "tokenizer.json")
  folder = copied("mixtral", tmp_path)
  shutil.copy(tmp_path / "tokenizer.json", folder)
  import_hf.main([str(folder), f"--out={tmp_path}/run"])
  export_hf.main([f"{tmp_path}/run", f"--out={tmp_path}/hf"])
  assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
  told = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
  assert told == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}


needs_transformers = pytest.mark.skipif(not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
                                        reason="transformers and torch are not installed")


@pytest.mark.parity
@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_what_is_exported(tmp_path, name):
  """Both directions against transformers itself, with new random weights."""
  model, arrays, tokens, _ = golden(name)
  rng = np.random.default_rng(1)
  drawn = Arrays({leaf: (rng.normal(0, 0.3, x.shape) + ("norm" in leaf)).astype(np.float32)
                  for leaf, x in arrays.values.items()})
  family = hugging_face.FAMILIES[name]
  folder = tmp_path / "hf"
  folder.mkdir()
  stored.write_shards(hugging_face.AsTheirs(drawn, model, family), folder, 1 << 30)
  (folder / "config.json").write_text(json.dumps(hugging_face.write_config(model, family, max_positions=64)))
  a, b = hf_logits.ours(drawn, model, tokens), hf_logits.theirs(folder, tokens)
  assert np.abs(b).max() > 2
  assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
  if name == "deepseek_v3":  # control: the compared thing reacts
    assert np.abs(hf_logits.ours(drawn, dataclasses.replace(model, norm_eps=1e-2), tokens) - b).max() > 1e-3


@pytest.mark.parity
@pytest.mark.slow
@needs_transformers
def test_transformers_reads_the_byte_tokenizer(tmp_path):
  import transformers

  export_hf._write_tokenizer("byte", tmp_path)
  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert loaded("In the beginning é", add_special_tokens=False)["input_ids"] == [b + 3 for b in "In the beginning é".encode()]
  assert loaded.eos_token_id == 1


@pytest.mark.parity
@pytest.mark.slow
@needs_transformers
def test_rounding_is_no_difference_of_the_model(tmp_path, capsys):
  """The arrays are compared rounded, the logits unrounded on both sides."""
  assert import_hf.main([str(GOLDEN / "olmoe"), f"--out={tmp_path}/run", "--dtype=bfloat16", "--check"]) == 0
  assert "equal to the bit" in capsys.readouterr().out
