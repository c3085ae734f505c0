"""Hugging Face checkpoints: one table of names and one of config keys a family, each read in both directions. No JAX.

`AsOurs` shows a Hugging Face directory under our names and layout, `AsTheirs` one of our checkpoints under theirs; both read
single tensors when asked, so import and export are a copy from one to the other, and `tools.inspect_checkpoint` reads either.

Axes of a tensor: L layer  E expert  D width  V vocabulary  H query heads  G key/value heads  K width of a query/key head
W width of a value head  N + P of an MLA head without and with positions  Q rank of the queries' latent  C of the keys'
F hidden width of an expert  S of the shared experts  M of a dense block.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe import config
from moe import stored
from moe.errors import UserError


class InteropError(UserError):
  """A model or a checkpoint that the other side has no form for; names the option."""


# --------------------------------------------------------------------------------------------------------------- names


class Part(NamedTuple):
  """One of our leaves and what it is called there; `(a b)` is the product of axes."""

  ours: str  # below the layer
  shape: str
  name: str  # below the layer; {e} is the expert
  layout: str


_EMBEDDING = Part("embedding", "V D", "model.embed_tokens.weight", "V D")
_HEAD = Part("head", "D V", "lm_head.weight", "V D")
_FINAL_NORM = Part("final_norm_scale", "D", "model.norm.weight", "D")

_NORMS = (Part("attention_norm_scale", "D", "input_layernorm.weight", "D"),
          Part("block_norm_scale", "D", "post_attention_layernorm.weight", "D"))

_GQA = (Part("attention.q", "D H K", "self_attn.q_proj.weight", "(H K) D"),
        Part("attention.k", "D G K", "self_attn.k_proj.weight", "(G K) D"),
        Part("attention.v", "D G K", "self_attn.v_proj.weight", "(G K) D"),
        Part("attention.out", "H K D", "self_attn.o_proj.weight", "D (H K)"))
_QKV_BIAS = (Part("attention.q_bias", "H K", "self_attn.q_proj.bias", "(H K)"),
             Part("attention.k_bias", "G K", "self_attn.k_proj.bias", "(G K)"),
             Part("attention.v_bias", "G K", "self_attn.v_proj.bias", "(G K)"))
_QK_NORM = {"none": (),
            "head": (Part("attention.q_norm_scale", "K", "self_attn.q_norm.weight", "K"),
                     Part("attention.k_norm_scale", "K", "self_attn.k_norm.weight", "K")),
            "whole": (Part("attention.q_norm_scale", "HK", "self_attn.q_norm.weight", "HK"),
                      Part("attention.k_norm_scale", "GK", "self_attn.k_norm.weight", "GK"))}

_MLA = (Part("attention.kv_down", "D CP", "self_attn.kv_a_proj_with_mqa.weight", "CP D"),
        Part("attention.kv_norm_scale", "C", "self_attn.kv_a_layernorm.weight", "C"),
        Part("attention.kv_up", "C H NW", "self_attn.kv_b_proj.weight", "(H NW) C"),
        Part("attention.out", "H W D", "self_attn.o_proj.weight", "D (H W)"))
_MLA_Q = (Part("attention.q", "D H NP", "self_attn.q_proj.weight", "(H NP) D"),)
_MLA_Q_LATENT = (Part("attention.q_down", "D Q", "self_attn.q_a_proj.weight", "Q D"),
                 Part("attention.q_norm_scale", "Q", "self_attn.q_a_layernorm.weight", "Q"),
                 Part("attention.q_up", "Q H NP", "self_attn.q_b_proj.weight", "(H NP) Q"))

_DENSE = (Part("dense.gate", "D M", "mlp.gate_proj.weight", "M D"), Part("dense.up", "D M", "mlp.up_proj.weight", "M D"),
          Part("dense.down", "M D", "mlp.down_proj.weight", "D M"))


@dataclasses.dataclass(frozen=True)
class Family:
  """What differs between the architectures."""

  model_type: str
  architecture: str
  keys: tuple  # of config.json, see below
  block: str = "mlp"
  gate: str = "gate_proj"
  up: str = "up_proj"
  down: str = "down_proj"
  shared: str = "shared_experts"

  def moe_parts(self, m: config.Model) -> tuple[Part, ...]:
    b, each = self.block, f"{self.block}.experts.{{e}}."
    parts = [Part("moe.router.weight", "D E", f"{b}.gate.weight", "E D"),
             Part("moe.gate", "E D F", f"{each}{self.gate}.weight", "F D"),
             Part("moe.up", "E D F", f"{each}{self.up}.weight", "F D"),
             Part("moe.down", "E F D", f"{each}{self.down}.weight", "D F")]
    if m.router.bias_update_rate:
      parts.append(Part("moe.router.selection_bias", "E", f"{b}.gate.e_score_correction_bias", "E"))
    if m.experts.d_shared:
      parts += [Part("moe.shared.gate", "D S", f"{b}.{self.shared}.gate_proj.weight", "S D"),
                Part("moe.shared.up", "D S", f"{b}.{self.shared}.up_proj.weight", "S D"),
                Part("moe.shared.down", "S D", f"{b}.{self.shared}.down_proj.weight", "D S")]
    if m.experts.shared_gate:
      parts.append(Part("moe.shared_gate", "D 1", f"{b}.{self.shared}_gate.weight", "1 D"))
    return tuple(parts)


def _attention_parts(a: config.Attention) -> tuple[Part, ...]:
  if a.kind == "mla":
    return _MLA + (_MLA_Q_LATENT if a.q_lora_rank else _MLA_Q)
  return _GQA + _QK_NORM[a.qk_norm] + (_QKV_BIAS if a.qkv_bias else ())


def axis_sizes(m: config.Model) -> dict[str, int]:
  a, e = m.attention, m.experts
  k, w = a.qk_dim, a.v_dim
  return {"D": m.d_model, "V": m.vocab_size, "H": a.num_heads, "G": a.kv_heads, "K": k, "HK": a.num_heads * k,
          "GK": a.kv_heads * k, "W": w, "NW": a.head_dim + w, "NP": k, "Q": a.q_lora_rank, "C": a.kv_lora_rank,
          "CP": a.kv_lora_rank + a.rope_head_dim, "E": e.num_experts, "F": e.d_expert, "S": e.d_shared, "M": m.d_ff, "1": 1}


class _Place(NamedTuple):
  """One of our leaves, and the tensor there for each index of its leading axes (layer, expert)."""

  leaf: str
  part: Part
  layers: tuple[int, ...] | None  # their number of each of our stacked layers; None: it is not stacked
  by_expert: bool


def places(m: config.Model, family: Family) -> Iterator[_Place]:
  """Every leaf of a model of ours and what a family calls it."""
  for part in (_EMBEDDING, _FINAL_NORM) + (() if m.tie_embeddings else (_HEAD,)):
    yield _Place(f"params.{part.ours}", part, None, False)
  attention, every, first = _attention_parts(m.attention), m.moe_every, m.num_dense_layers
  stacks = [("dense_layers", tuple(range(first)), _DENSE)] if first else []
  groups = range(first, m.num_layers, every)
  stacks += [(f"layers.dense_{i}", tuple(g + i for g in groups), _DENSE) for i in range(every - 1)]
  stacks.append(("layers.experts", tuple(g + every - 1 for g in groups), family.moe_parts(m)))
  for prefix, layers, block in stacks:
    for part in _NORMS + attention + block:
      yield _Place(f"params.{prefix}.{part.ours}", part, layers, "{e}" in part.name)


def _axes(text: str) -> list[list[str]]:
  """"(H K) D" -> [["H", "K"], ["D"]]."""
  found, group = [], None
  for word in text.replace("(", "( ").replace(")", " )").split():
    if word == "(":
      group = []
    elif word == ")":
      found.append(group)
      group = None
    elif group is not None:
      group.append(word)
    else:
      found.append([word])
  return found


@functools.cache
def _order(part: Part) -> tuple[list[str], list[list[str]], tuple[int, ...]]:
  """(our axes without the expert where there is a tensor an expert, their groups, permutation from ours to theirs)."""
  ours = part.shape.split()[1 if "{e}" in part.name else 0 :]
  groups = _axes(part.layout)
  flat = [axis for group in groups for axis in group]
  return ours, groups, tuple(ours.index(axis) for axis in flat)


def _to_theirs(part: Part, x: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
  _, groups, order = _order(part)
  return np.ascontiguousarray(x.transpose(order)).reshape([math.prod(sizes[a] for a in group) for group in groups])


def _to_ours(part: Part, x: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
  _, groups, order = _order(part)
  return x.reshape([sizes[a] for group in groups for a in group]).transpose(np.argsort(order))


# ------------------------------------------------------------------------------------------------- the two directions


class AsOurs:
  """A Hugging Face directory under our names and stacked layout, in `dtype`."""

  kind = "orbax"

  def __init__(self, source: stored.Source, m: config.Model, family: Family, dtype: str | None = None):
    if any(name.endswith(_FUSED) for name in source.leaves):
      source = _Separated(source, m, family)
    self._source, self._dtype, self._sizes = source, dtype, axis_sizes(m)
    self._places = {place.leaf: place for place in sorted(places(m, family))}
    self.leaves, used = {}, set()
    for name, place in self._places.items():
      self.leaves[name] = self._leaf(place, used)
    further = [name for name in source.leaves if family.model_type == "deepseek_v3" and _layer_of(name) >= m.num_layers]
    self.left_out = further  # of multi-token prediction
    unknown = sorted(set(source.leaves) - used - _derived(m) - set(further))
    if unknown:
      raise InteropError(f"{len(unknown)} tensors have no place in a {family.model_type} model of this config: "
                         + ", ".join(unknown[:4]))
    if m.tie_embeddings and _HEAD.name in source.leaves:
      self._check_tied()

  def _check_tied(self) -> None:
    """A file may hold the head of a tied model as well; another head would be lost without a word."""
    for begin, block in stored.blocks(self._source, _HEAD.name):
      end = tuple(b + n for b, n in zip(begin, block.shape))
      if self._source.leaves[_HEAD.name].shape != self._source.leaves[_EMBEDDING.name].shape or not np.array_equal(
          block, self._source.read(_EMBEDDING.name, begin, end)):
        raise InteropError(f"tie_word_embeddings = true, but {_HEAD.name} is not {_EMBEDDING.name}: the model was trained with "
                           "a head of its own; set tie_word_embeddings to false in config.json")

  def _leaf(self, place: _Place, used: set[str]) -> stored.Leaf:
    part, sizes = place.part, self._sizes
    want = tuple(math.prod(sizes[a] for a in group) for group in _order(part)[1])
    for at in _indices(place, sizes["E"]):
      name = _their_name(place, at)
      found = self._source.leaves.get(name)
      if found is None:
        raise InteropError(_missing(name, self._source))
      if found.shape != want:
        raise InteropError(f"{name} has shape {found.shape}, the config makes it {want}")
      used.add(name)
    inner = tuple(sizes[a] for a in _order(part)[0])
    lead = ((len(place.layers),) if place.layers is not None else ()) + ((sizes["E"],) if place.by_expert else ())
    dtype = found.dtype if place.leaf.endswith("selection_bias") else self._dtype or found.dtype  # near ties hang on it
    return stored.Leaf(place.leaf, lead + inner, dtype, (1,) * len(lead) + inner)

  def read(self, name, begin, end):
    place, leaf = self._places[name], self.leaves[name]
    lead = len(leaf.shape) - len(_order(place.part)[0])
    out = np.empty([e - b for b, e in zip(begin, end)], stored.dtype_of(leaf.dtype))
    inner = tuple(slice(b, e) for b, e in zip(begin[lead:], end[lead:]))
    for at in np.ndindex(*out.shape[:lead]):
      tensor = stored.whole(self._source, _their_name(place, tuple(b + i for b, i in zip(begin, at))))
      out[at] = _to_ours(place.part, tensor, self._sizes)[inner]
    return out


_FUSED = (".experts.gate_up_proj", ".experts.down_proj")


class _Separated:
  """Experts as transformers 5 holds them, stacked (gate_up_proj [E, 2F, D], down_proj [E, D, F]), shown one by one."""

  def __init__(self, source: stored.Source, m: config.Model, family: Family):
    self.kind, self._source = source.kind, source
    self._where: dict[str, tuple[str, int, int]] = {}  # the stacked tensor, the expert, its first row
    self.leaves = {}
    e, f, d = m.experts.num_experts, m.experts.d_expert, m.d_model
    for name, leaf in source.leaves.items():
      ours = name.replace(".mlp.", f".{family.block}.") if family.block != "mlp" else name  # Mixtral's block has a new name
      if not name.endswith(_FUSED):
        self.leaves[ours], self._where[ours] = leaf._replace(name=ours), (name, -1, 0)
        continue
      stack = ours.rpartition(".")[0]
      gate_up = name.endswith("gate_up_proj")
      want = (e, 2 * f, d) if gate_up else (e, d, f)
      if leaf.shape != want:
        raise InteropError(f"{name} has shape {leaf.shape}, the config makes it {want}")
      for expert in range(e):
        for row, part in ((0, family.gate), (f, family.up)) if gate_up else ((0, family.down),):
          one = f"{stack}.{expert}.{part}.weight"
          shape = (f, d) if gate_up else (d, f)
          self.leaves[one], self._where[one] = stored.Leaf(one, shape, leaf.dtype, (1, *shape[1:])), (name, expert, row)

  def read(self, name, begin, end):
    stack, expert, row = self._where[name]
    if expert < 0:
      return self._source.read(stack, begin, end)
    return self._source.read(stack, (expert, begin[0] + row, begin[1]), (expert + 1, end[0] + row, end[1]))[0]


def _missing(name: str, source: stored.Source) -> str:
  """What to say of a tensor that is not there."""
  if name == _HEAD.name:
    return f"{name} is missing; where the embedding is the head, set tie_word_embeddings to true in config.json"
  longer = next((other for other in source.leaves if other.endswith("." + name)), None)
  shorter = name.removeprefix("model.")
  if longer or shorter in source.leaves:
    return f"{name} is missing, {longer or shorter} is there: save the whole causal language model, by its own names"
  return f"{name} is missing"


class AsTheirs:
  """One of our checkpoints under the names and layout of a family, in `dtype`; `read` gives whole tensors."""

  kind = "safetensors"

  def __init__(self, source: stored.Source, m: config.Model, family: Family, dtype: str | None = None):
    self._source, self._dtype, self._sizes = source, dtype, axis_sizes(m)
    self._where, self.leaves = {}, {}
    for place in places(m, family):
      found = source.leaves.get(place.leaf)
      if found is None:
        raise InteropError(f"the checkpoint has no {place.leaf}, which its config asks for")
      shape = tuple(math.prod(self._sizes[a] for a in group) for group in _order(place.part)[1])
      kept = "float32" if place.leaf.endswith("selection_bias") else dtype or found.dtype  # near ties are decided by it
      for at in _indices(place, self._sizes["E"]):
        name = _their_name(place, at)
        self._where[name] = place, at
        self.leaves[name] = stored.Leaf(name, shape, kept, shape)
    params = {name for name in source.leaves if name.startswith("params.")}
    left = sorted(params - {place.leaf for place, _ in self._where.values()})
    if left:
      raise InteropError(f"{', '.join(left[:3])} has no name in a {family.model_type} model")

  def read(self, name, begin, end):
    place, at = self._where[name]
    shape = self._source.leaves[place.leaf].shape
    x = self._source.read(place.leaf, at + (0,) * (len(shape) - len(at)), tuple(i + 1 for i in at) + shape[len(at) :])
    made = _to_theirs(place.part, x.reshape(shape[len(at) :]), self._sizes).astype(stored.dtype_of(self.leaves[name].dtype))
    return np.ascontiguousarray(made[tuple(slice(b, e) for b, e in zip(begin, end))])


def _indices(place: _Place, experts: int) -> Iterator[tuple[int, ...]]:
  lead = (len(place.layers),) if place.layers is not None else ()
  return np.ndindex(*lead, *((experts,) if place.by_expert else ()))


def _their_name(place: _Place, at: tuple[int, ...]) -> str:
  if place.layers is None:
    return place.part.name
  return f"model.layers.{place.layers[at[0]]}." + place.part.name.replace("{e}", str(at[-1]))


def _layer_of(name: str) -> int:
  parts = name.split(".")
  return int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2].isdigit() else -1


def _derived(m: config.Model) -> set[str]:
  """Tensors that may stand in a file though they follow from others."""
  tied = {"lm_head.weight"} if m.tie_embeddings else set()
  return tied | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(m.num_layers)}


# -------------------------------------------------------------------------------------------------------------- configs


class Key(NamedTuple):
  """A key of config.json and the field it sets."""

  theirs: str
  ours: str  # path in config.Model
  default: Any = ...  # where config.json lacks the key; ...: it must be there
  read: Callable[[Any, dict], Any] = lambda value, _: value  # (value, whole config.json)
  write: Callable[[Any, dict], Any] = lambda value, _: value  # (value, our model as flat paths)


class Only(NamedTuple):
  """A key of config.json that must have one of these values, the first where it is absent and when it is written."""

  theirs: str
  values: tuple


class Fixed(NamedTuple):
  """A field of ours that the family has only in this way."""

  ours: str
  value: Any


# What transformers takes where config.json lacks the key.
_ABSENT = {"mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6}, "olmoe": {"rms_norm_eps": 1e-5},
           **{name: {"rms_norm_eps": 1e-6} for name in ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")}}


def _none_is(value):
  return lambda given, _: value if given is None else given


def _zero_is_none(value, _):
  return value or None


_COMMON = (
    Key("vocab_size", "vocab_size"), Key("hidden_size", "d_model"), Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "attention.num_heads"), Key("rms_norm_eps", "norm_eps", None, lambda v, c: v or _ABSENT[
        c["model_type"]]["rms_norm_eps"]),
    Key("tie_word_embeddings", "tie_embeddings", False), Key("num_experts_per_tok", "router.top_k"),
    Only("hidden_act", ("silu",)), Only("attention_dropout", (0.0, None)), Fixed("activation", "swiglu"),
    Fixed("attention.logit_softcap", 0.0), Fixed("experts.capacity_factor", 0.0), Fixed("router.recurrent.cell", "none"),
    Fixed("router.pre_gate.d_model", 0))
_HEADS = (
    Key("num_key_value_heads", "attention.num_kv_heads", None, lambda v, c: v or c["num_attention_heads"]),
    Key("head_dim", "attention.head_dim", None, lambda v, c: v or c["hidden_size"] // c["num_attention_heads"]),
    Fixed("attention.kind", "gqa"), Fixed("attention.rope.interleaved", False))
_SOFTMAX = (Fixed("router.gate", "softmax"), Fixed("router.weight_scale", 1.0), Fixed("router.num_groups", 1),
            Fixed("router.top_groups", 1), Fixed("router.bias_update_rate", 0.0))
_ALL_SPARSE = (Fixed("num_dense_layers", 0), Fixed("moe_every", 1), Fixed("d_ff", 0))
_NO_SHARED = (Fixed("experts.d_shared", 0), Fixed("experts.shared_gate", False))
_NO_WINDOW = (Fixed("attention.window_tokens", 0),)


def _leading(layers, given: dict) -> int:
  """Of Qwen's list of dense layers, which for us must be the first ones."""
  if list(layers or ()) != list(range(len(layers or ()))):
    raise InteropError(f"mlp_only_layers = {layers}: only leading layers can be dense (Model.num_dense_layers)")
  if layers and given.get("decoder_sparse_step", 1) != 1:
    raise InteropError(f"mlp_only_layers = {layers} together with decoder_sparse_step = {given['decoder_sparse_step']}")
  return len(layers or ())


_QWEN = _COMMON + _HEADS + _SOFTMAX + _NO_WINDOW + (
    Key("moe_intermediate_size", "experts.d_expert"), Key("norm_topk_prob", "router.renormalize", False),
    Key("decoder_sparse_step", "moe_every", 1),
    Key("mlp_only_layers", "num_dense_layers", (), _leading, lambda n, _: list(range(n))),
    Key("intermediate_size", "d_ff", 0,
        lambda v, c: v if c.get("mlp_only_layers") or c.get("decoder_sparse_step", 1) > 1 else 0,
        lambda v, m: v or m["experts.d_expert"]),
    Only("use_sliding_window", (False,)))

_DEEPSEEK = _COMMON + _NO_WINDOW + (
    Key("q_lora_rank", "attention.q_lora_rank", None, _none_is(0), _zero_is_none),
    Key("kv_lora_rank", "attention.kv_lora_rank"), Key("qk_nope_head_dim", "attention.head_dim"),
    Key("qk_rope_head_dim", "attention.rope_head_dim"), Key("v_head_dim", "attention.v_head_dim"),
    Key("num_key_value_heads", "attention.num_kv_heads", None, lambda v, c: v or c["num_attention_heads"]),
    Key("moe_intermediate_size", "experts.d_expert"), Key("n_routed_experts", "experts.num_experts"),
    Key("n_shared_experts", "experts.d_shared", None, lambda v, c: (v or 0) * c["moe_intermediate_size"],
        lambda v, m: v // m["experts.d_expert"]),
    Key("first_k_dense_replace", "num_dense_layers"), Key("routed_scaling_factor", "router.weight_scale"),
    Key("intermediate_size", "d_ff", 0, lambda v, c: v if c.get("first_k_dense_replace") else 0,
        lambda v, m: v or m["experts.d_expert"]),
    Only("moe_layer_freq", (1,)), Only("attention_bias", (False,)), Fixed("moe_every", 1), Fixed("attention.kind", "mla"),
    Fixed("attention.qk_norm", "none"), Fixed("attention.qkv_bias", False), Fixed("experts.shared_gate", False),
    Fixed("norm_eps", 1e-6))  # their norms of the latents have it fixed

FAMILIES = {f.model_type: f for f in (
    Family("mixtral", "MixtralForCausalLM", _COMMON + _HEADS + _SOFTMAX + _ALL_SPARSE + _NO_SHARED + (
        Key("intermediate_size", "experts.d_expert"), Key("num_local_experts", "experts.num_experts"),
        Key("sliding_window", "attention.window_tokens", None, _none_is(0), _zero_is_none),
        Only("router_jitter_noise", (0.0,)), Fixed("router.renormalize", True), Fixed("attention.qk_norm", "none"),
        Fixed("attention.qkv_bias", False)), "block_sparse_moe", "w1", "w3", "w2"),
    Family("olmoe", "OlmoeForCausalLM", _COMMON + _HEADS + _SOFTMAX + _ALL_SPARSE + _NO_SHARED + _NO_WINDOW + (
        Key("intermediate_size", "experts.d_expert"), Key("num_experts", "experts.num_experts"),
        Key("norm_topk_prob", "router.renormalize", False), Only("clip_qkv", (None,)), Only("attention_bias", (False,)),
        Fixed("attention.qk_norm", "whole"), Fixed("attention.qkv_bias", False))),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", _QWEN + (
        Key("num_experts", "experts.num_experts"), Key("qkv_bias", "attention.qkv_bias", True),
        Key("shared_expert_intermediate_size", "experts.d_shared"), Fixed("experts.shared_gate", True),
        Fixed("attention.qk_norm", "none")), shared="shared_expert"),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN + _NO_SHARED + (
        Key("num_experts", "experts.num_experts", None, lambda v, c: v or c["num_local_experts"]),
        Only("attention_bias", (False,)), Fixed("attention.qk_norm", "head"), Fixed("attention.qkv_bias", False))),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", _DEEPSEEK + (
        Key("n_group", "router.num_groups", None, lambda v, c: v if c.get("topk_method") == "group_limited_greedy" else 1),
        Key("topk_group", "router.top_groups", None, lambda v, c: v if c.get("topk_method") == "group_limited_greedy" else 1),
        Only("norm_topk_prob", (False,)), Only("scoring_func", ("softmax",)), Fixed("router.renormalize", False),
        Fixed("router.gate", "softmax"), Fixed("router.bias_update_rate", 0.0), Fixed("attention.rope.interleaved", True))),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK + (
        Key("n_group", "router.num_groups"), Key("topk_group", "router.top_groups"),
        Key("norm_topk_prob", "router.renormalize", True), Key("rope_interleave", "attention.rope.interleaved", True),
        Only("scoring_func", ("sigmoid",)), Only("topk_method", ("noaux_tc",)), Fixed("router.gate", "sigmoid"))),
)}
_MLA_BIAS_RATE = 0.001  # DeepSeek-V3's; config.json does not say, and a trained bias must have a place

# What a checkpoint's arithmetic does not depend on.
FREE = ("attention.backend", "dropout", "compute_dtype", "scan_unroll", "remat",
        *(f"experts.{name}" for name in ("backend", "dispatch", "buffer_factor", "overlap_degree", "backward_degree",
                                         "capacity_group", "drop_policy", "forward_weights")),
        *(f"router.{name}" for name in ("balance_scope", "balance_coef", "micro_mix", "z_loss_coef", "bias_update_rate",
                                        "cosine_width", "soft_slots", "allow_lookahead")))
_FREE_GROUPS = ("init_std.", "router.recurrent.", "router.pre_gate.")


def family_of(config_json: dict) -> Family:
  """Raises InteropError for an architecture that is not in the table."""
  kind = config_json.get("model_type")
  if kind not in FAMILIES:
    raise InteropError(f"model_type = {kind!r} is none of {', '.join(FAMILIES)}")
  return FAMILIES[kind]


def read_config(given: dict) -> config.Model:
  """config.json of transformers 4 or 5 -> our model.

  Raises:
    InteropError: a family or a key's value that we do not have.
  """
  family = family_of(given)
  if given.get("quantization_config"):
    raise InteropError("quantization_config: quantised weights are not read; give a checkpoint in bfloat16 or float32")
  kinds = set(given.get("layer_types") or ()) - {"full_attention"}
  if kinds and not (kinds == {"sliding_attention"} == set(given["layer_types"]) and given.get("sliding_window")):
    raise InteropError(f"layer_types: {', '.join(sorted(kinds))} in some layers; here all layers attend in one way")
  fixed = {key.ours: key.value for key in family.keys if isinstance(key, Fixed)}
  flat = dict(fixed)
  for key in family.keys:
    if isinstance(key, Only) and _said(given, key.theirs, key.values[0]) not in key.values:
      raise InteropError(f"{family.model_type}: {key.theirs} = {given[key.theirs]!r} is not supported, only {key.values[0]!r}")
    if isinstance(key, Key):
      value = _said(given, key.theirs, key.default)
      if value is ...:
        raise InteropError(f"config.json lacks {key.theirs}")
      value = key.read(value, given)
      if fixed.get(key.ours, value) != value:
        raise InteropError(f"{family.model_type}: {key.theirs} = {value!r} is not supported, only {flat[key.ours]!r}")
      flat[key.ours] = value
  flat |= {f"attention.rope.{name}": value for name, value in _read_rope(given, flat["attention.kind"]).items()}
  if family.model_type == "deepseek_v3":
    flat["router.bias_update_rate"] = _MLA_BIAS_RATE
  return _model(flat)


def _said(given: dict, key: str, absent: Any) -> Any:
  """The value of a key; null is false where a flag is meant, as transformers reads it."""
  value = given.get(key, absent)
  return False if value is None and isinstance(absent, bool) else value


def _read_rope(given: dict, kind: str) -> dict[str, Any]:
  """Positions, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4) -> fields of config.Rope."""
  rope, scaling = given.get("rope_parameters") or {}, given.get("rope_scaling") or {}
  for key, value in (("rope_parameters", rope), ("rope_scaling", scaling)):
    if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
      raise InteropError(f"{key} = {value!r}: one object must describe the positions of all layers")
  absent = _ABSENT[given["model_type"]].get("rope_theta", 1e4)
  theta = float(rope.get("rope_theta") or scaling.get("rope_theta") or given.get("rope_theta") or absent)
  if _rope_type(rope) != "default":
    scaling = rope
  for place in (given, rope, scaling):
    if place.get("partial_rotary_factor", 1) not in (1, None):
      raise InteropError(f"partial_rotary_factor = {place['partial_rotary_factor']}: here all of a head is turned")
  name = _rope_type(scaling)
  if name in ("default", "dynamic") or (name == "linear" and scaling.get("factor") == 1):
    return {"theta": theta}  # dynamic: the same up to max_position_embeddings, see `notes`
  if name != "yarn":
    factor = f" with factor {scaling['factor']}" if "factor" in scaling else ""
    raise InteropError(f"rope type {name!r}{factor}: positions here are plain or stretched by YaRN (Rope.yarn_factor), and "
                       f"there is no {name!r} stretch of them")
  return {"theta": theta, **_read_yarn(scaling, given, kind)}


def _rope_type(scaling: dict) -> str:
  return scaling.get("rope_type") or scaling.get("type") or "default"


_YARN_KEYS = ("type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "mscale", "mscale_all_dim",
              "attention_factor", "beta_fast", "beta_slow", "truncate", "partial_rotary_factor")


def _read_yarn(scaling: dict, given: dict, kind: str) -> dict[str, Any]:
  """YaRN's factor and what it multiplies cos and sin by.

  transformers multiplies them by attention_factor, else by the ratio of the corrections of mscale and mscale_all_dim, else
  by the correction of 1; only MLA scales the attention logits by mscale_all_dim too. A factor of grouped queries is therefore
  one number, which is kept as the yarn_mscale that gives it.
  """
  for key in scaling:
    if key not in _YARN_KEYS:
      raise InteropError(f"rope_scaling: {key} = {scaling[key]!r} is none of YaRN's keys in transformers, which ignores it; "
                         "take it out, or say what it means by one of them (attention_factor)")
  for key, value in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
    if scaling.get(key, value) not in (value, None):
      raise InteropError(f"rope_scaling: {key} = {scaling[key]} is not there, YaRN here has {value}")
  original = scaling.get("original_max_position_embeddings") or given.get("max_position_embeddings")
  if not original:
    raise InteropError("rope_scaling: YaRN needs original_max_position_embeddings, or max_position_embeddings beside it")
  factor = scaling.get("factor") or given.get("max_position_embeddings", original) / original
  mscale, over = scaling.get("mscale"), scaling.get("mscale_all_dim")
  if mscale not in (None, 1) and not over:
    raise InteropError(f"rope_scaling: mscale = {mscale} without mscale_all_dim is read in two ways by transformers and by "
                       "DeepSeek's own code; give attention_factor instead")
  found = {"yarn_factor": float(factor), "yarn_original_tokens": int(original), "yarn_mscale": 1.0, "yarn_mscale_all": 0.0}
  ratio = _correction(factor, mscale) / _correction(factor, over) if mscale and over else None
  wanted = scaling.get("attention_factor")
  if kind == "mla" and over:
    if wanted is not None and not math.isclose(wanted, ratio or 1.0, rel_tol=1e-6):
      raise InteropError(f"rope_scaling: attention_factor = {wanted} beside mscale = {mscale} and mscale_all_dim = {over}, "
                         f"which make it {ratio}; leave out one")
    return found | {"yarn_mscale": float(mscale or 1.0), "yarn_mscale_all": float(over)}
  wanted = ratio if wanted is None else wanted
  if wanted is not None and not math.isclose(wanted, _correction(factor, 1.0), rel_tol=1e-9):
    if factor <= 1:
      raise InteropError(f"rope_scaling: attention_factor = {wanted} without a stretch (factor = {factor})")
    found["yarn_mscale"] = (wanted - 1) / (0.1 * math.log(factor))
  return found


def _correction(factor: float, mscale: float) -> float:
  """What YaRN multiplies by (arXiv 2309.00071, section 3.4)."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _write_rope(rope: config.Rope) -> dict[str, Any]:
  """Both forms of the keys that `_read_rope` reads."""
  if rope.yarn_factor == 1:
    return {"rope_theta": rope.theta, "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta}}
  scaling = {"rope_type": "yarn", "rope_theta": rope.theta, "factor": rope.yarn_factor,
             "original_max_position_embeddings": rope.yarn_original_tokens, "beta_fast": 32, "beta_slow": 1}
  if rope.yarn_mscale_all:
    scaling |= {"mscale": rope.yarn_mscale, "mscale_all_dim": rope.yarn_mscale_all}
  elif rope.yarn_mscale != 1:
    scaling["attention_factor"] = _correction(rope.yarn_factor, rope.yarn_mscale)
  return {"rope_theta": rope.theta, "rope_scaling": {"type": "yarn", **scaling}, "rope_parameters": scaling}


def notes(given: dict) -> list[str]:
  """What transformers would do with a config.json that we read, and this model does not."""
  scaling = given.get("rope_parameters") or given.get("rope_scaling") or {}
  if _rope_type(scaling) != "dynamic":
    return []
  return [f"rope type 'dynamic': the same up to max_position_embeddings = {given.get('max_position_embeddings')} tokens; "
          "beyond them transformers stretches the positions and this model does not"]


def write_config(m: config.Model, family: Family, *, max_positions: int, bos: int | None = None,
                 eos: int | list[int] | None = None, pad: int | None = None, dtype: str = "float32") -> dict:
  """Our model -> config.json for transformers 4 and 5.

  Raises:
    InteropError: the model has an option that the family has no key for; by its name.
  """
  flat = _flat(m)
  made: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
  for key in family.keys:
    if isinstance(key, Only):
      made[key.theirs] = key.values[0]
    elif isinstance(key, Key):
      made[key.theirs] = key.write(flat[key.ours], flat)
  made |= _write_rope(m.attention.rope)
  made |= {"max_position_embeddings": max_positions, "use_cache": True, "initializer_range": m.init_std.weight,
           "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "torch_dtype": dtype, "dtype": dtype}
  if family.model_type == "qwen3_moe":
    made["num_local_experts"] = made["num_experts"]
  if family.model_type == "deepseek_v2":
    made["topk_method"] = "group_limited_greedy" if m.router.num_groups > 1 else "greedy"
  _refuse(flat, _flat(read_config(json.loads(json.dumps(made)))), family)
  return made


def _refuse(ours: dict[str, Any], back: dict[str, Any], family: Family) -> None:
  """What a config says after the way there and back must be what it said."""
  for path in _differing(ours, back):
    if path == "router.bias_update_rate":
      raise InteropError(f"a {family.model_type} model has {'a' if back[path] else 'no'} selection bias "
                         f"(Router.bias_update_rate = {ours[path]})")
    raise InteropError(f"a {family.model_type} model has Model.{path} = {back[path]!r}, this one {ours[path]!r}; choose "
                       "another family, or export the arrays as they are (inspect_checkpoint convert)")


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
  """Paths in which two flat models differ, of those on which the arithmetic of a checkpoint depends."""
  plain = a["attention.rope.yarn_factor"] == b["attention.rope.yarn_factor"] == 1  # the rest of YaRN is then without effect

  def matters(path: str) -> bool:
    if path in ("router.recurrent.cell", "router.pre_gate.d_model"):
      return True
    return not (path in FREE or path.startswith(_FREE_GROUPS) or (plain and path.startswith("attention.rope.yarn_")))

  def same(x, y) -> bool:
    return math.isclose(x, y, rel_tol=1e-9) if isinstance(x, float) and isinstance(y, float) else x == y

  differing = [path for path in a if matters(path) and not same(a[path], b[path])]
  biased = "router.bias_update_rate"
  return differing + ([biased] if bool(a[biased]) != bool(b[biased]) else [])


def same_model(a: config.Model, b: config.Model) -> bool:
  """Whether one set of parameters means the same under both."""
  return not _differing(_flat(a), _flat(b))


def _flat(m: config.Model) -> dict[str, Any]:
  """Dotted path -> value; heads as counted."""
  def walk(values, prefix):
    for key, value in values.items():
      if isinstance(value, dict):
        yield from walk(value, f"{prefix}{key}.")
      else:
        yield prefix + key, value

  return {**dict(walk(config.to_dict(m), "")), "attention.num_kv_heads": m.attention.kv_heads}


def _model(flat: dict[str, Any]) -> config.Model:
  nested: dict = {}
  for path, value in flat.items():
    *folders, last = path.split(".")
    place = nested
    for folder in folders:
      place = place.setdefault(folder, {})
    place[last] = value
  return config.from_dict(config.Model, nested)


def suited(m: config.Model) -> Family:
  """The family that has all of the model's options.

  Raises:
    InteropError: none has; with what the closest lacks.
  """
  problems = []
  for family in FAMILIES.values():
    try:
      write_config(m, family, max_positions=1)
      return family
    except (InteropError, config.ConfigError) as error:
      problems.append(f"{family.model_type}: {error}")
  raise InteropError("no Hugging Face family has this model's options: " + "; ".join(problems))
