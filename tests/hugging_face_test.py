"""Hugging Face models: the same logits, the same tensors both ways, and refusals by name.

The golden models and their logits are transformers' own (tests/golden/hugging_face/make.py). `bash tools/dev.sh parity` also
runs the tests marked `parity`, against transformers itself.
"""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers as hf_tokenizers

from moe import checkpoint
from moe import config
from moe import hugging_face
from moe import hugging_face_files
from moe import layers
from moe import model as model_lib
from moe import stored
from moe.data import tokenizers
from moe.errors import UserError
from tests import small
from tools import export_hf
from tools import hf_logits
from tools import import_hf
from tools import sample

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


def write_run(folder, run, seed=0):
  """A run directory with random parameters, as a trainer would leave it."""
  transformer = model_lib.build(run.model)
  abstract = jax.eval_shape(lambda key: model_lib.unbox(model_lib.init(transformer, key))[0], jax.random.key(0))
  leaves = jax.tree_util.tree_leaves_with_path(small.params(abstract, seed))
  values = {"params." + ".".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in leaves}
  checkpoint.write(folder / "checkpoints" / "0", Arrays(values), run)
  return folder


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


def test_a_flag_that_is_null_is_false():
  for name, flags in (("qwen3_moe", {"attention_bias": None, "use_sliding_window": None}),
                      ("olmoe", {"norm_topk_prob": None, "tie_word_embeddings": None, "attention_bias": None})):
    given = json.loads((GOLDEN / name / "config.json").read_text())
    assert hugging_face.read_config({**given, **flags}) == hugging_face.read_config(given)


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
    ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear' with factor 2: .* no 'linear' stretch"),
    ("qwen3_moe", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 5e5}},
     "rope type 'llama3' with factor 8.0: positions here are plain or stretched by YaRN"),
    ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.88}}, "attn_factor = 0.88 is none of"),
    ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}}, "beta_fast = 16 is not there"),
    ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate = False is not there"),
    ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale = 0.7 without mscale_all_dim"),
    ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("mixtral", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one object must describe the positions of all"),
    ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention in some"),
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


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("yarn, magnitude", [
    ({"factor": 4.0, "original_max_position_embeddings": 16}, 0.1 * np.log(4) + 1),
    ({"factor": 4.0}, 0.1 * np.log(4) + 1),  # max_position_embeddings stands for the original one
    ({"factor": 8.0, "original_max_position_embeddings": 16, "attention_factor": 1.0}, 1.0),
    ({"factor": 2.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 0.5},
     (0.1 * np.log(2) + 1) / (0.05 * np.log(2) + 1)),
])
def test_yarn_of_grouped_queries(name, yarn, magnitude):
  """The factor of cos and sin is transformers'; the logits are not scaled; and it comes back, in the words of 4 and of 5."""
  given = json.loads((GOLDEN / name / "config.json").read_text())
  theta = given.pop("rope_parameters")["rope_theta"]
  for words in ({"rope_theta": theta, "rope_scaling": {"type": "yarn", **yarn}},
                {"rope_parameters": {"rope_type": "yarn", "rope_theta": theta, **yarn}}):
    rope = hugging_face.read_config({**given, **words}).attention.rope
    cos, sin = layers.rope_tables(np.array([[3]]), rope, 8)
    np.testing.assert_allclose(np.hypot(cos, sin), magnitude, rtol=1e-6)
    assert layers.attention_scale(rope, 16) == 0.25 and rope.theta == theta
    model = hugging_face.read_config({**given, **words})
    back = hugging_face.read_config(hugging_face.write_config(model, hugging_face.FAMILIES[name], max_positions=64))
    assert hugging_face.same_model(back, model)


def test_dynamic_positions_are_plain_and_said(tmp_path, capsys):
  folder = copied("qwen3_moe", tmp_path)
  given = json.loads((folder / "config.json").read_text())
  given["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
  (folder / "config.json").write_text(json.dumps(given))
  import_hf.main([str(folder), f"--out={tmp_path}/run"])
  assert "the same up to max_position_embeddings = 64 tokens" in capsys.readouterr().out
  export_hf.main([f"{tmp_path}/run", f"--out={tmp_path}/hf"])
  assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"] == given["rope_parameters"]


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


def as_held(tensors: dict, name: str) -> dict:
  """Experts stacked, as transformers 5 holds them and saves them with save_original_format=False."""
  family = hugging_face.FAMILIES[name]
  held, stacks = {}, {}
  for key, value in tensors.items():
    head, experts, rest = key.partition(".experts.")
    if experts:
      number, part, _ = rest.split(".")
      stacks.setdefault(head, {}).setdefault(part, {})[int(number)] = value
    else:
      held[key] = value
  for head, parts in stacks.items():
    gate, up, down = (np.stack([parts[part][i] for i in range(len(parts[part]))])
                      for part in (family.gate, family.up, family.down))
    held[f"{head}.experts.gate_up_proj"] = np.concatenate([gate, up], 1)
    held[f"{head}.experts.down_proj"] = down
  return {key.replace("block_sparse_moe", "mlp"): np.ascontiguousarray(value) for key, value in held.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_stacked_experts_are_read(tmp_path, name):
  _, arrays, _, _ = golden(name)
  found = stored.find(copied(name, tmp_path, lambda tensors: as_held(tensors, name)))
  model = hugging_face.read_config(found.config)
  assert not any(".experts.0." in leaf for leaf in found.source.leaves)
  ours = hugging_face.AsOurs(found.source, model, hugging_face.FAMILIES[name])
  assert set(ours.leaves) == set(arrays.leaves)
  for leaf in ours.leaves:
    np.testing.assert_array_equal(stored.whole(ours, leaf), arrays.values[leaf], leaf)


def turned(tensors):
  """Experts as [E, D, 2F], the layout of Llama 4 and gpt-oss."""
  return {key: np.ascontiguousarray(value.swapaxes(1, 2)) if key.endswith("gate_up_proj") else value
          for key, value in as_held(tensors, "mixtral").items()}


def without_prefix(tensors):
  """As the model without its head is saved."""
  return {key.removeprefix("model."): value for key, value in tensors.items() if key != "lm_head.weight"}


@pytest.mark.parametrize("name, change, words", [
    ("mixtral", turned, r"mlp.experts.gate_up_proj has shape \(6, 32, 48\), the config makes it \(6, 48, 32\)"),
    ("mixtral", without_prefix, "model.embed_tokens.weight is missing, embed_tokens.weight is there"),
    ("mixtral", lambda tensors: {f"module.{key}": value for key, value in tensors.items()}, "module.model.embed_tokens.weight"),
    ("mixtral", lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"}, "set tie_word_embeddings to true"),
    ("qwen3_moe", lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
     "lm_head.weight is not model.embed_tokens.weight"),
])
def test_tensors_of_another_form_are_refused_by_what_is_there(tmp_path, name, change, words):
  with pytest.raises(UserError, match=words):
    import_hf.main([str(copied(name, tmp_path, change)), f"--out={tmp_path}/out"])


def test_a_tied_head_may_stand_in_the_file(tmp_path):
  given = copied("qwen3_moe", tmp_path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].copy()})
  assert import_hf.main([str(given), f"--out={tmp_path}/out"]) == 0


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
  tokenizers.train_bpe(["in the beginning was the word"] * 20, 300, tmp_path / "tokenizer.json")
  folder = copied("mixtral", tmp_path)
  shutil.copy(tmp_path / "tokenizer.json", folder)
  import_hf.main([str(folder), f"--out={tmp_path}/run"])
  export_hf.main([f"{tmp_path}/run", f"--out={tmp_path}/hf"])
  assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
  told = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
  assert told == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "clean_up_tokenization_spaces": False}


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


TEXTS = ["In the beginning é", "", " two  spaces\n", "strike </s>out <pad>", "\x00\U0001f600"]


def byte_run(tmp_path):
  """A run like the quickstart's: bytes, and a table that is padded beyond them."""
  return write_run(tmp_path / "run", small.run(length=64, model={"vocab_size": 272}))


def bpe_run(tmp_path):
  """A byte-level BPE of our own, which comes without a tokenizer_config.json."""
  tokenizers.train_bpe(["in the beginning was the word, and the word was"] * 20, 290, tmp_path / "tokenizer.json")
  data = {"tokenizer": str(tmp_path / "tokenizer.json")}
  return write_run(tmp_path / "run", small.run(length=64, model={"vocab_size": 300}, data=data))


def metaspace_tokenizer(scheme: str):
  """As Llama's: spaces become a letter, words begin with it, unknown letters fall back to bytes, and a text begins with <s>.

  `scheme`: of Metaspace, or `normalizer`, the older form, which puts the letter even before a text that begins with a space.
  """
  made = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
  metaspace = hf_tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always" if scheme == "normalizer" else scheme)
  made.pre_tokenizer = metaspace
  bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
  trainer = hf_tokenizers.trainers.BpeTrainer(vocab_size=330, show_progress=False,
                                              special_tokens=["<unk>", "<s>", "</s>", *bytes_])
  made.train_from_iterator(["in the beginning was the word, and the word was with the light"] * 20, trainer)
  described = json.loads(made.to_str())
  described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
  described["decoder"] = {"type": "Sequence", "decoders": [
      {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
      {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
  if scheme == "normalizer":
    described["pre_tokenizer"] = None
    described["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
  made = hf_tokenizers.Tokenizer.from_str(json.dumps(described))
  made.post_processor = hf_tokenizers.processors.TemplateProcessing(
      single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
  return made


SIDE_FILES = {
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                              "unk_token": {"content": "<unk>", "__type": "AddedToken"}, "add_bos_token": True,
                              "chat_template": "{{ messages[0]['content'] }}", "model_max_length": 32768},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
    "added_tokens.json": {"<turn>": 331},
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.6},
}


def foreign(folder, scheme="first", **settings):
  """A Mixtral directory as another program would have written it, with all that may stand beside the tensors."""
  tokenizer = metaspace_tokenizer(scheme)
  run = write_run(folder / "of_ours", small.run(length=64, model={"vocab_size": tokenizer.get_vocab_size()}))
  export_hf.main([str(run), f"--out={folder}/given", "--family=mixtral"])
  given = folder / "given"
  for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    (given / name).unlink()
  tokenizer.save(str(given / "tokenizer.json"))
  for name, value in SIDE_FILES.items():
    (given / name).write_text(json.dumps(value))
  (given / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
  (given / "additional_chat_templates").mkdir()
  (given / "additional_chat_templates" / "tool.jinja").write_text("tool")
  (given / "LICENSE").write_text("as it is")
  described = json.loads((given / "config.json").read_text())
  described |= {"max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 7,
                "router_aux_loss_coef": 0.02, **settings}
  del described["dtype"]
  (given / "config.json").write_text(json.dumps(described))
  return given


def imported(tmp_path, scheme="first", begins=True):
  """A run directory that tools.import_hf made of `foreign`; `begins`: whether its texts begin with <s>."""
  given = foreign(tmp_path, scheme)
  if not begins:
    described = json.loads((given / "tokenizer.json").read_text()) | {"post_processor": None}
    (given / "tokenizer.json").write_text(json.dumps(described))
    settings = SIDE_FILES["tokenizer_config.json"] | {"add_bos_token": False}
    (given / "tokenizer_config.json").write_text(json.dumps(settings))
  import_hf.main([str(given), f"--out={tmp_path}/imported"])
  return tmp_path / "imported"


RUNS = {"byte": byte_run, "bpe": bpe_run, "first": imported, "always": lambda place: imported(place, "always"),
        "normalizer": lambda place: imported(place, "normalizer"),
        "no_bos": lambda place: imported(place, begins=False)}


def test_what_lies_beside_the_tensors_is_carried_along(tmp_path):
  """Import, then export: the files as they were, and config.json too, but for the dtype."""
  given = foreign(tmp_path)
  import_hf.main([str(given), f"--out={tmp_path}/run"])
  shutil.move(given, tmp_path / "gone")  # nothing is read from there again
  export_hf.main([f"{tmp_path}/run", f"--out={tmp_path}/hf", "--dtype=bfloat16"])
  before, after = tmp_path / "gone", tmp_path / "hf"
  beside = [p.relative_to(before) for p in before.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
  assert len(beside) == 9 and {p.relative_to(after) for p in after.rglob("*") if p.is_file()} >= set(beside)
  for name in beside:
    if name.name != "config.json":
      assert (before / name).read_bytes() == (after / name).read_bytes(), name
  expected = json.loads((before / "config.json").read_text()) | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
  assert json.loads((after / "config.json").read_text()) == expected


def trained_on(tmp_path, **changes):
  """A run that began from an import in `run`, with its tokenizer, and went on."""
  found = stored.find(tmp_path / "run")
  run = small.change(config.from_dict(config.Run, found.config), **changes)
  return write_run(tmp_path / "later", run, seed=1)


def test_a_run_that_trains_on_keeps_the_settings_of_its_import(tmp_path):
  """Also with another option of the model, which config.json then says; and with a longer row than there were positions."""
  import_hf.main([str(foreign(tmp_path, max_position_embeddings=128)), f"--out={tmp_path}/run"])
  run_dir = trained_on(tmp_path, model={"router": {"top_k": 1}}, data={"sequence_tokens": 256})
  export_hf.main([str(run_dir), f"--out={tmp_path}/hf"])
  described = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert [described[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 7]
  assert described["num_experts_per_tok"] == 1 and described["max_position_embeddings"] == 256
  assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == SIDE_FILES["generation_config.json"]
  # A copy in the run is enough: the folder of the import may be gone.
  run = config.from_dict(config.Run, stored.find(run_dir).config)
  assert hugging_face_files.keep(run, run_dir, tmp_path / "run").descended
  assert sorted(p.name for p in (run_dir / "hf").iterdir()) == sorted(p.name for p in (tmp_path / "run" / "hf").iterdir())
  tokenizers.save(tokenizers.load(run.data.tokenizer), run_dir / "tokenizer")  # as the trainer does
  shutil.move(tmp_path / "run", tmp_path / "gone")
  export_hf.main([str(run_dir), f"--out={tmp_path}/again"])
  for name in ("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
  # Bytes are another tokenizer, of which those files say nothing.
  other = hugging_face_files.Kept(small.change(run, data={"tokenizer": "byte"}), tmp_path / "gone" / "hf")
  assert other.folder is None and "not the one in" in other.note and not other.descended


def test_what_begins_and_ends_a_text_is_what_the_import_says(tmp_path):
  run_dir = imported(tmp_path)
  run = config.from_dict(config.Run, stored.find(run_dir).config)

  def said(**tokenizer_config):
    settings = SIDE_FILES["tokenizer_config.json"] | tokenizer_config
    (run_dir / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizers.load(run.data.tokenizer), hugging_face_files.of(run, run_dir)

  tokenizer, kept = said()
  assert kept.stops(tokenizer) == (2, 7) and kept.start(tokenizer) == [1] and kept.first(tokenizer) == 1
  # A prompt may spell control tokens, its beginning too; a text of training may not.
  assert kept.encode("<s>in</s>", tokenizer)[:1] == [1] and kept.encode("<s>in</s>", tokenizer)[-1] == 2
  assert kept.encode("<s>in", tokenizer).count(1) == 1 and not {1, 2} & set(tokenizer.encode("<s>in</s>").tolist())
  (run_dir / "hf" / "generation_config.json").unlink()
  tokenizer, kept = said(tokenizer_class="LlamaTokenizer", add_bos_token=False)
  assert kept.stops(tokenizer) == (2,) and kept.start(tokenizer) == [] and kept.first(tokenizer) == 1
  assert said(tokenizer_class="LlamaTokenizerFast", add_bos_token=True)[1].start(tokenizer) == [1]
  # A run of ours, of the same tokenizer but another size, puts what the trainer does.
  kept = hugging_face_files.of(small.change(run, model={"num_layers": 3}), run_dir)
  assert not kept.descended and kept.start(tokenizer) == [tokenizer.bos] and kept.stops(tokenizer) == (tokenizer.eos,)


def test_the_parameters_dtype_is_computed_in(tmp_path):
  for dtype in ("float32", "bfloat16"):
    import_hf.main([str(GOLDEN / "olmoe"), f"--out={tmp_path}/{dtype}", f"--dtype={dtype}"])
    assert stored.find(tmp_path / dtype).config["model"]["compute_dtype"] == dtype


@pytest.mark.parametrize("make", [byte_run, bpe_run])
def test_a_written_tokenizer_gives_what_the_trainer_feeds(tmp_path, make):
  run_dir = make(tmp_path)
  export_hf.main([str(run_dir), f"--out={tmp_path}/hf"])
  run = config.from_dict(config.Run, stored.find(run_dir).config)
  ours = tokenizers.load(run.data.tokenizer)
  written = hf_tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
  written.encode_special_tokens = True  # what split_special_tokens does
  for text in TEXTS:
    assert written.encode(text).ids == [ours.bos, *ours.encode(text)]
    assert written.decode(written.encode(text).ids) == text
  described = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
  assert described["split_special_tokens"] and described["eos_token"] == described["bos_token"] == "</s>"
  settings = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
  assert settings["suppress_tokens"] == list(range(ours.vocab_size, run.model.vocab_size))


@pytest.mark.parity
@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("make", [byte_run, bpe_run])
def test_transformers_opens_our_export_and_goes_on_as_we_do(tmp_path, make, capsys):
  import torch
  import transformers

  run_dir = make(tmp_path)
  export_hf.main([str(run_dir), f"--out={tmp_path}/hf"])
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
  ours = tokenizers.load(config.from_dict(config.Run, stored.find(run_dir).config).data.tokenizer)
  for text in TEXTS:
    ids = tokenizer(text)["input_ids"]
    assert ids == [ours.bos, *ours.encode(text)] and tokenizer.decode(ids, skip_special_tokens=True) == text
  assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (ours.eos, ours.bos)
  capsys.readouterr()
  assert sample.main([str(run_dir), "--prompt=In the ", "--temperature=0", "--tokens=40"]) == 0
  prompt = tokenizer("In the ", return_tensors="pt")
  theirs = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
  assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(theirs, skip_special_tokens=True).rstrip("\n")


@pytest.mark.parity
@pytest.mark.slow
@needs_transformers
def test_transformers_opens_what_was_carried_along(tmp_path, capsys):
  """The same ids, the same chat, the same greedy text, up to the first of several ends, before and after."""
  import torch
  import transformers

  given = foreign(tmp_path)
  import_hf.main([str(given), f"--out={tmp_path}/run"])
  export_hf.main([f"{tmp_path}/run", f"--out={tmp_path}/hf"])
  a, b = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (given, tmp_path / "hf"))
  for text in TEXTS:
    assert a(text)["input_ids"] == b(text)["input_ids"]
  assert a.apply_chat_template([{"role": "user", "content": "in the"}], tokenize=False) == "in the"
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
  ended = 0
  for prompt in ("in the", "the word was", "light", "and with"):
    capsys.readouterr()
    assert sample.main([f"{tmp_path}/run", f"--prompt={prompt}", "--temperature=0", "--tokens=60"]) == 0
    inputs = b(prompt, return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
    continued = b.decode(theirs[inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    assert capsys.readouterr().out.rstrip("\n") == (prompt + continued).rstrip("\n")
    ended += int(theirs[-1]) in (2, 7)
  print(f"{ended} of 4 texts ended")


@pytest.mark.parity
@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("name, yarn", [
    ("qwen3_moe", {"factor": 4.0, "original_max_position_embeddings": 16}),
    ("qwen2_moe", {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.8}),
    ("mixtral", {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5}),
])
def test_yarn_of_grouped_queries_is_that_of_transformers(tmp_path, name, yarn):
  given = copied(name, tmp_path)
  described = json.loads((given / "config.json").read_text())
  plain = hugging_face.read_config(described)
  described["rope_parameters"] |= {"rope_type": "yarn", **yarn}
  described["head_dim"] = plain.attention.head_dim  # transformers 5.23 cannot stretch where it is null
  (given / "config.json").write_text(json.dumps(described))
  import_hf.main([str(given), f"--out={tmp_path}/run"])
  found = stored.find(tmp_path / "run")
  model, tokens = config.from_dict(config.Run, found.config).model, np.arange(2, 62).reshape(2, 30)
  a, b = hf_logits.ours(found.source, model, tokens), hf_logits.theirs(given, tokens)
  assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
  assert np.abs(hf_logits.ours(found.source, plain, tokens) - b).max() > 0.01 * np.abs(b).max()  # control
  # What is written anew, and not carried along, says the same.
  (tmp_path / "run" / "hf" / "config.json").unlink()
  export_hf.main([f"{tmp_path}/run", f"--out={tmp_path}/hf"])
  assert np.abs(a - hf_logits.theirs(tmp_path / "hf", tokens)).max() < 1e-5 * np.abs(b).max()


@pytest.mark.parity
@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_as_it_holds_it_is_read(tmp_path, name):
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name)
  model.save_pretrained(tmp_path / "held", save_original_format=False, max_shard_size="100KB")
  found = stored.find(tmp_path / "held")
  assert any(leaf.endswith("gate_up_proj") for leaf in found.source.leaves)
  ours = hugging_face.AsOurs(found.source, hugging_face.read_config(found.config), hugging_face.FAMILIES[name])
  _, arrays, _, _ = golden(name)
  for leaf in arrays.leaves:
    np.testing.assert_array_equal(stored.whole(ours, leaf), arrays.values[leaf], leaf)


@pytest.mark.parity
@pytest.mark.slow
@needs_transformers
def test_rounding_is_no_difference_of_the_model(tmp_path, capsys):
  """The arrays are compared rounded, the logits unrounded on both sides."""
  assert import_hf.main([str(GOLDEN / "olmoe"), f"--out={tmp_path}/run", "--dtype=bfloat16", "--check"]) == 0
  assert "equal to the bit" in capsys.readouterr().out
