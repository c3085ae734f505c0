"""Every knob of a run, as frozen dataclasses compared by value. No JAX, no gin.

Units are in the names: `_tokens`, `_steps`, `_sequences`, `_bytes`. A value that cannot work is refused in
`__post_init__` with both values and the way out. `tests/config_test.py` holds the exact number of fields.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import math
import sys
import tokenize
import typing
from typing import Any

from moe.errors import UserError

_dataclass = dataclasses.dataclass(frozen=True, kw_only=True)


class ConfigError(UserError, ValueError):
  """A configuration that cannot work; the message names the field, the value and the remedy."""


class _Checked:
  """Checks the type of every field, then what the class itself asks for in `check`."""

  def __post_init__(self):
    hints = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):
      value, hint = getattr(self, field.name), hints[field.name]
      wanted = typing.get_origin(hint) or hint
      accepted = (int, float) if wanted is float else wanted
      if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{type(self).__name__}.{field.name} = {value!r} is {_a(type(value).__name__)}, "
                          f"not {_a(wanted.__name__)}")
      for item in value if wanted is tuple else ():
        kind = typing.get_args(hint)[0]
        if not isinstance(item, kind):
          raise ConfigError(f"{type(self).__name__}.{field.name} holds {_a(type(item).__name__)}; each is {_a(kind.__name__)}")
      if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{type(self).__name__}.{field.name} = {value!r} is not finite")
    self.check()

  def check(self):
    """Raises ConfigError where the values do not go together."""


def _a(noun: str) -> str:
  return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def did_you_mean(name: str, candidates: typing.Iterable[str], cutoff: float = 0.6) -> str:
  """`; did you mean 'X'?` for the candidate that is most like `name`, whatever its case and its `-` or `_`; else empty."""
  plain = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
  near = difflib.get_close_matches(name.lower().replace("-", "_"), list(plain), n=1, cutoff=cutoff)
  return f"; did you mean {plain[near[0]]!r}?" if near else ""


def _one_of(owner: Any, name: str, choices: tuple[str, ...]) -> None:
  value = getattr(owner, name)
  if value not in choices:
    raise ConfigError(f"{type(owner).__name__}.{name} = {value!r} is not one of {', '.join(map(repr, choices))}"
                      + did_you_mean(value, choices, cutoff=0.5))  # of a few short words: bf16 is bfloat16


def _at_least(owner: Any, bound: float, *names: str) -> None:
  for name in names:
    if getattr(owner, name) < bound:
      raise ConfigError(f"{type(owner).__name__}.{name} = {getattr(owner, name)} must be at least {bound}")


@_dataclass
class Rope(_Checked):
  """Rotary position embedding, optionally stretched by YaRN (arXiv 2309.00071)."""

  theta: float = 10_000.0
  interleaved: bool = False  # rotate pairs (2i, 2i+1) as DeepSeek does; else the two halves (i, i+dim/2)
  yarn_factor: float = 1.0  # context stretch; 1 switches YaRN off
  yarn_original_tokens: int = 4096
  yarn_mscale: float = 1.0  # numerator of the magnitude correction of cos and sin
  yarn_mscale_all: float = 0.0  # its denominator; > 0 also scales the attention logits (DeepSeek-V2)

  def check(self):
    _at_least(self, 1.0, "theta", "yarn_factor", "yarn_original_tokens")


@_dataclass
class Attention(_Checked):
  """Grouped-query attention, or multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1)."""

  kind: str = "gqa"
  num_heads: int
  num_kv_heads: int = 0  # 0: one for each query head; unused by mla
  head_dim: int  # mla: the part of a query/key head without positions
  qk_norm: str = "none"  # none | head (after the split, Qwen3) | whole (before the split, OLMoE)
  qkv_bias: bool = False
  window_tokens: int = 0  # a token sees itself and the window_tokens - 1 before it; 0: all
  logit_softcap: float = 0.0  # cap * tanh(logits / cap); 0: off
  backend: str = "auto"  # plain | splash (TPU) | dot_product (jax.nn); auto: kernels/attention.py chooses
  q_lora_rank: int = 0  # mla: 0 projects queries directly
  kv_lora_rank: int = 0
  rope_head_dim: int = 0  # mla: the rotary part of a head, one key shared by all heads
  v_head_dim: int = 0  # mla
  rope: Rope = Rope()

  def check(self):
    _one_of(self, "kind", ("gqa", "mla"))
    _one_of(self, "qk_norm", ("none", "head", "whole"))
    _one_of(self, "backend", ("auto", "plain", "splash", "dot_product"))
    _at_least(self, 1, "num_heads", "head_dim")
    _at_least(self, 0, "num_kv_heads", "window_tokens", "logit_softcap", "q_lora_rank", "kv_lora_rank")
    if self.num_heads % self.kv_heads:
      raise ConfigError(
          f"Attention.num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
    if self.kind == "mla":
      _at_least(self, 1, "kv_lora_rank", "rope_head_dim", "v_head_dim")
      if self.qk_norm != "none" or self.qkv_bias:
        raise ConfigError(f"Attention.kind = 'mla' takes neither qk_norm = {self.qk_norm!r} nor qkv_bias = {self.qkv_bias}; "
                          "leave both off")
    if self.rotary_dim % 2:
      raise ConfigError(f"Attention.{'rope_' if self.kind == 'mla' else ''}head_dim: rotary positions need an even width, got "
                        f"{self.rotary_dim}")

  @property
  def kv_heads(self) -> int:
    return self.num_kv_heads or self.num_heads

  @property
  def rotary_dim(self) -> int:
    return self.rope_head_dim if self.kind == "mla" else self.head_dim

  @property
  def qk_dim(self) -> int:
    """Width of one query or key head."""
    return self.head_dim + self.rope_head_dim if self.kind == "mla" else self.head_dim

  @property
  def v_dim(self) -> int:
    return self.v_head_dim if self.kind == "mla" else self.head_dim


@_dataclass
class Recurrent(_Checked):
  """A router that carries a state from layer to layer, for each token by itself (RMoE, arXiv 2408.06793)."""

  cell: str = "none"  # none | gru | lstm | rnn; one cell for all layers
  width: int = 128  # p, of the projected token and of the state
  carry: str = "gradient"  # gradient | detach (the state passes, its gradient does not) | none (from zeros: the paper's NP)
  shared_projector: bool = False  # one projection D -> p for all layers, instead of one a layer
  previous_scores: float = 0.0  # the paper's r: the previous layer's logits, times this, are added

  def check(self):
    _one_of(self, "cell", ("none", "gru", "lstm", "rnn"))
    _one_of(self, "carry", ("gradient", "detach", "none"))
    _at_least(self, 1, "width")
    _at_least(self, 0, "previous_scores")

  @property
  def blocks(self) -> int:
    """Blocks of `width` columns in each matrix of the cell: its gates."""
    return {"gru": 3, "lstm": 4, "rnn": 1}[self.cell]


@_dataclass
class PreGate(_Checked):
  """One causal transformer block on the token ids routes for all layers (Read-ME, arXiv 2410.19123)."""

  d_model: int = 0  # 0: each layer routes for itself
  num_heads: int = 4
  d_ff: int = 0

  def check(self):
    _at_least(self, 0, "d_model", "d_ff")
    _at_least(self, 1, "num_heads")
    if self.d_model and (self.d_ff < 1 or self.d_model % (2 * self.num_heads)):
      raise ConfigError(f"PreGate.d_model = {self.d_model} needs a d_ff > 0 (it is {self.d_ff}) and heads of even width "
                        f"(num_heads = {self.num_heads})")


LOOKAHEAD_GATES = ("expert_choice", "soft")  # what becomes of a token depends on later tokens


@_dataclass
class Router(_Checked):
  """Scores to assignment, and the losses that keep the experts balanced. Formulas of the gates: routing/gates.py.

  The balance loss is E x sum_i f_i P_i with f_i = selections of i / (K x tokens) and P_i the mean probability, so a
  perfectly balanced router scores 1 (Demons in the Detail, arXiv 2501.11873). `balance_scope` says over which
  tokens f is taken: `sequence` (one document), `microbatch` (one data shard of one micro-batch), `shuffle` (as many
  tokens as a data shard has, drawn from the whole micro-batch), `global` (all data shards of one micro-batch), `step`
  (the whole optimizer step, exact), `step_buffer` (the paper's running buffer).
  """

  gate: str = "softmax"  # softmax | noisy | sigmoid | cosine | expert_choice | soft
  top_k: int = 2  # experts of a token; expert_choice: on average
  renormalize: bool = True  # the chosen weights of a token sum to 1 (the same as a softmax after the choice)
  weight_scale: float = 1.0  # DeepSeek's routed scaling factor
  num_groups: int = 1  # group-limited choice: experts are split into groups ...
  top_groups: int = 1  # ... and only the best groups take part
  cosine_width: int = 256  # of the space in which the cosine gate compares tokens and experts
  soft_slots: int = 1  # inputs of one expert for each sequence, each a mixture of its tokens
  allow_lookahead: bool = False  # expert_choice and soft see later tokens; for models that are not causal
  recurrent: Recurrent = Recurrent()
  pre_gate: PreGate = PreGate()
  balance_scope: str = "global"  # sequence | microbatch | shuffle | global | step | step_buffer
  balance_coef: float = 0.01  # of the balance loss, a mean over the layers
  micro_mix: float = 0.0  # adds this much of the microbatch loss to the one of the scope (the paper: 0.01)
  bias_update_rate: float = 0.0  # > 0: balance by a selection bias, moved by this much a step (arXiv 2408.15664)
  z_loss_coef: float = 0.001

  def check(self):
    _one_of(self, "gate", ("softmax", "noisy", "sigmoid", "cosine", *LOOKAHEAD_GATES))
    _one_of(self, "balance_scope", ("sequence", "microbatch", "shuffle", "global", "step", "step_buffer"))
    _at_least(self, 1, "top_k", "num_groups", "top_groups", "cosine_width", "soft_slots")
    _at_least(self, 0, "balance_coef", "z_loss_coef", "micro_mix", "bias_update_rate")
    if self.top_groups > self.num_groups:
      raise ConfigError(f"Router.top_groups = {self.top_groups} exceeds num_groups = {self.num_groups}")
    if self.micro_mix and self.balance_scope not in ("global", "step", "step_buffer"):
      raise ConfigError(f"Router.micro_mix = {self.micro_mix} adds to a wider scope than balance_scope = "
                        f"{self.balance_scope!r}; use 'global', 'step' or 'step_buffer', or set it to 0")
    if self.gate in LOOKAHEAD_GATES:
      self._check_lookahead()
    if self.pre_gate.d_model and self.recurrent.cell != "none":
      raise ConfigError(f"PreGate.d_model = {self.pre_gate.d_model}: a pre-gate decides once for all layers, so there is "
                        f"nothing for Recurrent.cell = {self.recurrent.cell!r} to carry; choose one of them")

  def _check_lookahead(self):
    gate = f"Router.gate = {self.gate!r}"
    if not self.allow_lookahead:
      raise ConfigError(f"{gate} lets later tokens decide about earlier ones, so a causal model would learn from what it "
                        "must predict; choose a token-choice gate, or set Router.allow_lookahead = True")
    if self.balance_coef:
      raise ConfigError(f"{gate} loads the experts evenly by construction; set Router.balance_coef = 0 (it is "
                        f"{self.balance_coef})")
    if self.bias_update_rate or self.num_groups > 1 or self.pre_gate.d_model:
      raise ConfigError(f"{gate} takes no selection bias, groups or pre-gate: they belong to gates where tokens choose")

  @property
  def draws_noise(self) -> bool:
    """Whether the gate or the balance loss needs a random key in training."""
    return self.gate == "noisy" or self.balance_scope == "shuffle"


@_dataclass
class Experts(_Checked):
  """The mixture-of-experts feed-forward block."""

  num_experts: int
  d_expert: int  # F, hidden width of one routed expert
  d_shared: int = 0  # hidden width of all shared experts together; 0: none
  shared_gate: bool = False  # sigmoid gate on the shared experts (Qwen2-MoE)
  capacity_factor: float = 0.0  # 0: dropless; else C = ceil(factor x K x T / E) slots an expert and group of T tokens
  capacity_group: str = "sequence"  # whose tokens share the slots: a row, or the whole microbatch
  drop_policy: str = "position"  # who keeps a slot: earlier tokens | higher probability | random (both look ahead)
  backend: str = "auto"  # of the matmuls: loop | ragged_dot | dense | fused | tokamax; auto: kernels/plan.py chooses
  dispatch: str = "auto"  # all_gather | ring | all_to_all: how tokens reach their experts; auto: all_to_all but on CPU
  buffer_factor: float = 1.5  # rows that a device has room for over the mean; what is beyond takes a longer way
  overlap_degree: int = 1  # chunks of tokens whose transfers may run beside other chunks' matmuls
  backward_degree: int = 0  # the same for the backward pass, which then does the layer's forward again; 0: as the forward
  forward_weights: str = ""  # int8 | float8_e4m3fn: the experts' matrices in the forward; their gradient passes through

  def check(self):
    _at_least(self, 1, "num_experts", "d_expert", "overlap_degree", "buffer_factor")
    _at_least(self, 0, "d_shared", "capacity_factor", "backward_degree")
    _one_of(self, "dispatch", ("auto", "all_gather", "ring", "all_to_all"))
    _one_of(self, "capacity_group", ("sequence", "microbatch"))
    _one_of(self, "drop_policy", ("position", "probability", "random"))
    _one_of(self, "backend", ("auto", "loop", "ragged_dot", "dense", "fused", "tokamax"))
    _one_of(self, "forward_weights", ("", "int8", "float8_e4m3fn"))
    if self.dispatch == "ring" and max(self.overlap_degree, self.backward_degree) > 1:
      raise ConfigError(f"Experts.overlap_degree = {self.overlap_degree} and backward_degree = {self.backward_degree}: "
                        "dispatch = 'ring' has one chunk for each device; leave out both, or take another dispatch")
    if self.shared_gate and not self.d_shared:
      raise ConfigError("Experts.shared_gate needs shared experts; set d_shared > 0")


@_dataclass
class InitStd(_Checked):
  """Standard deviation of the normal initialisation, by role."""

  embedding: float = 0.02
  weight: float = 0.02  # all other matrices, the output head among them
  residual: float = 0.02  # the projections that write into the residual stream
  router: float = 0.02


@_dataclass
class Model(_Checked):
  """A decoder-only transformer with mixture-of-experts blocks."""

  vocab_size: int
  num_layers: int
  d_model: int
  attention: Attention
  experts: Experts
  router: Router = Router()
  d_ff: int = 0  # hidden width of the dense feed-forward blocks; 0: there are none
  num_dense_layers: int = 0  # leading layers without experts
  moe_every: int = 1  # of the layers after those, each moe_every-th has experts
  activation: str = "swiglu"
  norm_eps: float = 1e-6
  tie_embeddings: bool = False
  dropout: float = 0.0  # on the output of each attention and feed-forward block
  compute_dtype: str = "bfloat16"  # parameters, router and softmax stay float32
  scan_unroll: int = 1  # layers in one turn of the scan, the later ones' weights gathered beside the earlier's work; 0: no scan
  remat: str = "none"  # none | full | offload (full, and the inputs of layers go to the host) | dots | attention
  init_std: InitStd = InitStd()

  def check(self):
    _at_least(self, 1, "vocab_size", "num_layers", "d_model", "moe_every")
    _at_least(self, 0, "num_dense_layers", "d_ff", "scan_unroll")
    _one_of(self, "activation", ("swiglu", "gelu"))
    _one_of(self, "compute_dtype", ("float32", "bfloat16"))
    _one_of(self, "remat", ("none", "full", "offload", "dots", "attention"))
    if self.remat == "offload" and self.scan_unroll > 1:
      raise ConfigError(f"Model.scan_unroll = {self.scan_unroll} does not go with Model.remat = 'offload', whose arrays in the "
                        "host's memory the TPU compiler cannot cut into turns; set scan_unroll = 1, or another remat")
    if not 0 <= self.dropout < 1:
      raise ConfigError(f"Model.dropout = {self.dropout} must be in [0, 1)")
    if self.router.top_k > self.experts.num_experts:
      raise ConfigError(
          f"Router.top_k = {self.router.top_k} exceeds Experts.num_experts = {self.experts.num_experts}: "
          "a token cannot choose more experts than there are")
    if self.router.gate == "soft" and (self.experts.capacity_factor or self.experts.capacity_group != "sequence"):
      raise ConfigError("Experts.capacity_factor and capacity_group do not apply to Router.gate = 'soft', which has "
                        "Router.soft_slots for each sequence; leave them at their defaults")
    if self.experts.num_experts % self.router.num_groups:
      raise ConfigError(f"Experts.num_experts = {self.experts.num_experts} does not split into "
                        f"Router.num_groups = {self.router.num_groups} equal groups")
    group = self.experts.num_experts // self.router.num_groups
    if self.router.gate == "sigmoid" and self.router.num_groups > 1 and group < 2:
      raise ConfigError(f"Router.num_groups = {self.router.num_groups} leaves groups of {group} expert; the sigmoid gate "
                        "ranks groups by their two best")
    reachable = group * self.router.top_groups
    if self.router.top_k > reachable:
      raise ConfigError(f"Router.top_k = {self.router.top_k} exceeds the {reachable} experts of "
                        f"top_groups = {self.router.top_groups} groups")
    if (self.num_layers - self.num_dense_layers) % self.moe_every or self.num_dense_layers >= self.num_layers:
      raise ConfigError(f"Model.num_layers = {self.num_layers} less num_dense_layers = {self.num_dense_layers} must be a "
                        f"positive multiple of moe_every = {self.moe_every}")
    if not self.d_ff and (self.num_dense_layers or self.moe_every > 1):
      raise ConfigError("Model.d_ff must be set where there are dense layers")

  @property
  def num_moe_layers(self) -> int:
    return (self.num_layers - self.num_dense_layers) // self.moe_every

  def moe_layer_number(self, ordinal: int) -> int:
    """The model's own number, from 0 and with dense layers counted, of a layer that is the ordinal-th, from 0, with experts."""
    return self.num_dense_layers + (ordinal + 1) * self.moe_every - 1

  def moe_layer_name(self, ordinal: int) -> str:
    """`layer 3 (MoE layer 1 of 58)`; where every layer has experts `layer 0`."""
    number = self.moe_layer_number(ordinal)
    return f"layer {number}" + (f" (MoE layer {ordinal + 1} of {self.num_moe_layers})" if number != ordinal else "")

  @property
  def num_routers(self) -> int:
    """Layers that route for themselves; 1 with a pre-gate."""
    return 1 if self.router.pre_gate.d_model else self.num_moe_layers

  @property
  def draws_routing_noise(self) -> bool:
    """Whether routing needs a random key in training."""
    return self.router.draws_noise or (self.experts.capacity_factor > 0 and self.experts.drop_policy == "random")

  @property
  def blind_router(self) -> str:
    """What keeps the gradient of the language-model loss from the router; empty where nothing does."""
    if self.router.top_k == 1 and self.router.renormalize and self.router.gate not in LOOKAHEAD_GATES:
      return "Router.top_k = 1 with Router.renormalize = True"
    return ""

  @property
  def lookahead(self) -> str:
    """What in the routing makes earlier tokens depend on later ones; empty for a causal model."""
    if self.router.gate in LOOKAHEAD_GATES:
      return f"Router.gate = {self.router.gate!r}"
    if self.experts.capacity_factor and self.experts.drop_policy != "position":
      return f"Experts.drop_policy = {self.experts.drop_policy!r}"
    return ""


@_dataclass
class Mesh(_Checked):
  """Sizes of the mesh axes; their product is the number of devices, and one of them may be -1 (the rest).

  The batch is split over slice x data x fsdp x expert, each sequence over context; parameters over fsdp x context, experts
  over expert, heads and hidden widths over tensor (moe/sharding.py).
  """

  slice: int = 1  # pods joined by the data-centre network
  stage: int = 1
  data: int = 1  # copies of the parameters
  fsdp: int = 1  # parameters and optimizer split, gathered layer by layer
  expert: int = 1  # experts split
  context: int = 1  # sequences split
  tensor: int = 1  # heads and hidden widths split

  def check(self):
    sizes = dataclasses.asdict(self)
    if any(n == 0 or n < -1 for n in sizes.values()) or list(sizes.values()).count(-1) > 1:
      raise ConfigError(f"Mesh {sizes}: sizes are positive, and at most one is -1")
    if self.stage != 1:
      raise ConfigError(f"Mesh.stage = {self.stage}: the axis is reserved for pipeline stages, which are not built; use 1")


@_dataclass
class Domain(_Checked):
  """One source of documents. `path` is a directory made by tools.build_data (or gs://), `embedded:kjv`, `embedded:python`."""

  name: str
  path: str
  weight: float = 1.0  # share of the training rows, relative to the other domains

  def check(self):
    if not self.weight > 0:
      raise ConfigError(f"Domain.weight = {self.weight} of {self.name!r} must be positive; leave the domain out instead")


@_dataclass
class Data(_Checked):
  """What is read, and how it becomes batches."""

  domains: tuple[Domain, ...]
  batch_sequences: int  # of one optimizer step, over all hosts
  sequence_tokens: int  # of a row
  tokenizer: str = "byte"  # byte (ByT5 ids), or the path of a Hugging Face tokenizer.json
  bos: str = ""  # token before a document's first; empty: as the tokenizer's own config says, else its end-of-document token
  packing: str = "concat"  # concat (then split) | best_fit
  virtual_shards: int = 0  # streams of rows, each with packers of its own; 0: as many as the first batch has rows

  def check(self):
    _at_least(self, 1, "batch_sequences")
    _at_least(self, 0, "virtual_shards")
    _at_least(self, 2, "sequence_tokens")
    _one_of(self, "packing", ("concat", "best_fit"))
    names = [d.name for d in self.domains]
    if not names or len(set(names)) < len(names):
      raise ConfigError(f"Data.domains need at least one domain and distinct names, got {names}")


@_dataclass
class Optimizer(_Checked):
  """AdamW with a schedule in tokens, a global-norm clip and a guard that skips bad steps."""

  learning_rate: float = 3e-4  # at the peak
  beta1: float = 0.9
  beta2: float = 0.95
  weight_decay: float = 0.1  # on matrices only: norms, biases and 1-d leaves are exempt
  clip_norm: float = 1.0
  schedule: str = "cosine"  # cosine | wsd (constant, then linear decay over the last decay_tokens)
  warmup_tokens: int = 0  # of the linear rise from 0
  decay_tokens: int = 0  # wsd only
  final_fraction: float = 0.1  # of the peak, at the last step
  zero1: bool = False  # ZeRO-1: moments are split over data-parallel copies of the parameters, too
  offload: float = 0.0  # share of the moments, by whole stacked leaves, that lives in the host's memory
  skip_spike_sigmas: float = 8.0  # skip a step whose loss or gradient norm is this far above its recent mean; 0: off

  def check(self):
    _one_of(self, "schedule", ("cosine", "wsd"))
    _at_least(self, 0, "learning_rate", "weight_decay", "clip_norm", "warmup_tokens", "decay_tokens",
              "final_fraction", "skip_spike_sigmas", "offload")
    for name in ("beta1", "beta2"):
      if not 0 <= getattr(self, name) < 1:
        raise ConfigError(f"Optimizer.{name} = {getattr(self, name)} must be in [0, 1): it is the share of the old moment that "
                          "a step keeps")
    for name in ("final_fraction", "offload"):
      if getattr(self, name) > 1:
        raise ConfigError(f"Optimizer.{name} = {getattr(self, name)} is a share, at most 1")
    if self.schedule == "wsd" and not self.decay_tokens and self.final_fraction < 1:
      raise ConfigError(f"Optimizer.schedule = 'wsd' with decay_tokens = 0 never comes to final_fraction = "
                        f"{self.final_fraction} of the peak; set decay_tokens, or final_fraction = 1 for a rate that stays")


@_dataclass
class Checkpoint(_Checked):
  every_steps: int = 1000  # 0: only at the end and on SIGTERM
  keep_last: int = 2  # newest checkpoints that stay
  keep_every_steps: int = 0  # besides the last ones, keep multiples of this; 0: none

  def check(self):
    _at_least(self, 0, "every_steps", "keep_every_steps")
    _at_least(self, 1, "keep_last")


@_dataclass
class Snapshot(_Checked):
  """Snapshots in the hosts' memory; in force under `--supervise` only (docs/faults.md)."""

  every_steps: int = 10  # 0: none
  group_hosts: int = 8  # hosts that share parity
  parity_hosts: int = 1  # of a group, that may be lost: 0, 1 (XOR) or 2 (Reed-Solomon)
  slots: int = 2  # 1 takes half the memory, and a kill during a copy falls back to the checkpoints
  check_share: float = 0.01  # of the parity that is decoded after each snapshot
  memory_share: float = 0.9  # of what the host has left, that snapshots may take
  stuck_seconds: float = 60.0  # without a step, after which a trainer is killed (or 3 x the 99th percentile of its steps)
  compile_seconds: float = 1800.0  # the same before the first step, and in evaluations and saves
  same_failures: int = 2  # at one step, after which the job stops with a diagnosis

  def check(self):
    _at_least(self, 0, "every_steps", "parity_hosts")
    _at_least(self, 1, "group_hosts", "slots", "same_failures")
    if self.parity_hosts > 2 or self.slots > 2:
      raise ConfigError(f"Snapshot.parity_hosts = {self.parity_hosts} and Snapshot.slots = {self.slots} are at most 2")
    for name in ("check_share", "memory_share"):
      if not 0 <= getattr(self, name) <= 1:
        raise ConfigError(f"Snapshot.{name} = {getattr(self, name)} must be in [0, 1]")
    for name in ("stuck_seconds", "compile_seconds"):
      if getattr(self, name) <= 0:
        raise ConfigError(f"Snapshot.{name} = {getattr(self, name)} must be positive")


@_dataclass
class Observers(_Checked):
  """Who is told of the run besides its own records; none of them can stop or delay it (docs/observers.md)."""

  tensorboard: bool = True  # event files in the run directory
  wandb: str = ""  # Weights & Biases: the project; empty: none
  mlflow: str = ""  # MLflow: the address of its server; empty: none


@_dataclass
class Train(_Checked):
  steps: int  # of the optimizer
  micro_batches: int = 1  # gradient accumulation: the batch of a step goes through the model in this many parts
  seed: int = 0  # of the parameters, the dropout and the order of the data
  logit_z_loss_coef: float = 0.0
  offload_collectives: bool = True  # TPU with SparseCores: collectives run there, beside the matmuls (hardware.py)
  log_every_steps: int = 10
  eval_every_steps: int = 0  # 0: only at the end
  eval_batches: int = 8  # for each domain at those times
  final_eval_batches: int = 0  # the same at the end; 0: every byte of the split

  def check(self):
    _at_least(self, 1, "steps", "micro_batches", "log_every_steps", "eval_batches")
    _at_least(self, 0, "eval_every_steps", "final_eval_batches", "logit_z_loss_coef")


@_dataclass
class Run(_Checked):
  """All of a run, resolved."""

  model: Model
  data: Data
  train: Train
  optimizer: Optimizer = Optimizer()
  mesh: Mesh = Mesh()
  checkpoint: Checkpoint = Checkpoint()
  snapshot: Snapshot = Snapshot()
  observers: Observers = Observers()

  def check(self):
    if self.data.batch_sequences % self.train.micro_batches:
      raise ConfigError(f"Data.batch_sequences = {self.data.batch_sequences} is not a multiple of "
                        f"Train.micro_batches = {self.train.micro_batches}")

  @property
  def tokens_per_step(self) -> int:
    return self.data.batch_sequences * self.data.sequence_tokens

  @property
  def cautions(self) -> list[str]:
    """What works but is rarely meant. No errors: a trial of a few steps keeps the schedule of the whole run."""
    o, tokens = self.optimizer, self.train.steps * self.tokens_per_step
    run = f"the run's {tokens:,} tokens (Train.steps = {self.train.steps:,} of {self.tokens_per_step:,})"
    if o.warmup_tokens >= tokens:
      return [f"Optimizer.warmup_tokens = {o.warmup_tokens:,} is not below {run}: the learning rate rises to "
              f"{tokens / o.warmup_tokens:.0%} of its peak at most, and the warm-up never ends"]
    if o.schedule == "wsd" and o.warmup_tokens + o.decay_tokens > tokens:
      return [f"Optimizer.warmup_tokens = {o.warmup_tokens:,} and decay_tokens = {o.decay_tokens:,} are together more than "
              f"{run}: the learning rate decays while it still warms up, and never comes to its peak"]
    return []


def meanings() -> dict[str, str]:
  """`Router.top_k` -> its comment in this file, for every field of every class; empty where it has none."""
  text = inspect.getsource(sys.modules[__name__])
  comments = {token.start[0]: token.string.lstrip("# ") for token in tokenize.generate_tokens(io.StringIO(text).readline)
              if token.type == tokenize.COMMENT}
  return {f"{node.name}.{line.target.id}": comments.get(line.end_lineno, "")
          for node in ast.parse(text).body if isinstance(node, ast.ClassDef)
          for line in node.body if isinstance(line, ast.AnnAssign)}


def to_dict(config: Any) -> dict:
  """The config as plain JSON values."""
  return dataclasses.asdict(config)


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
  """One line `path: a -> b` for each leaf in which two dicts of `to_dict` differ."""
  if isinstance(a, dict) and isinstance(b, dict):
    lines = []
    for key in sorted(a.keys() | b.keys()):
      lines += differences(a.get(key, "(absent)"), b.get(key, "(absent)"), f"{prefix}.{key}" if prefix else key)
    return lines
  if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
    return [line for i, (x, y) in enumerate(zip(a, b)) for line in differences(x, y, f"{prefix}[{i}]")]
  return [] if a == b else [f"{prefix}: {a!r} -> {b!r}"]


def from_dict(cls, values: dict) -> Any:
  """The inverse of `to_dict`.

  Raises:
    ConfigError: an unknown or missing field, so a config of another version is not half read.
  """
  hints, arguments = typing.get_type_hints(cls), {}
  for name, value in values.items():
    if name not in hints:
      raise ConfigError(f"{cls.__name__} has no field {name!r}: the config is of another version of this code")
    hint = hints[name]
    if dataclasses.is_dataclass(hint):
      value = from_dict(hint, value)
    elif typing.get_origin(hint) is tuple:
      value = tuple(from_dict(typing.get_args(hint)[0], item) for item in value)
    arguments[name] = value
  lacking = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in arguments]
  if lacking:
    raise ConfigError(f"{cls.__name__} lacks {', '.join(lacking)}: the config is of another version of this code")
  return cls(**arguments)
