"""The transformer, and the only file that imports flax.

Modules declare parameters (with logical axis names) and wire scan and remat; the arithmetic is in layers.py,
routing/ and experts.py. Everything a caller may want is a return value: nothing is sown. The modules are plain:
`MoEBlock` can be used in a model of one's own.

Parameters of the repeated layers are stacked on a leading axis "layer", whether the layers are scanned or unrolled.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe import config
from moe import experts as experts_lib
from moe import layers
from moe import sharding
from moe.kernels import attention
from moe.kernels.activation import activate
from moe.kernels.matmul import matmul
from moe.routing import balance
from moe.routing import capacity
from moe.routing import gates
from moe.routing import recurrent


class Batch(NamedTuple):
  """Packed sequences, each [B, S] int32."""

  inputs: jax.Array  # token ids
  targets: jax.Array  # the token that follows each input
  segment_ids: jax.Array  # document within the row, from 1; 0 is padding
  positions: jax.Array  # position within the document


class Output(NamedTuple):
  hidden: jax.Array  # [B, S, D], after the final norm
  stats: balance.Stats  # leading axis L: the layers that route (1 with a pre-gate)
  experts: jax.Array  # [L, B, S, K] int32, what each token chose; E where it has none
  probabilities: jax.Array  # [L, B, S, E] float32, scores normalised over the experts
  cache: Any  # keys and values of the tokens so far, or None


class _Context(NamedTuple):
  """What every layer reads of the batch."""

  rope: tuple[jax.Array, jax.Array]
  bias: jax.Array  # [B, S, T] float32, what may attend to what
  segment_ids: jax.Array  # [B, S]
  counted: jax.Array | None  # [B, S] bool, the tokens that the routing statistics count; None: all that exist
  rows: jax.Array  # [B] number of each row in the batch of the step; what routing noise depends on
  cache_index: jax.Array | None  # where the new keys go, when decoding
  cell: recurrent.Cell | None  # of a recurrent router
  decision: Any  # of a pre-gate, a Decision


def block_context(segment_ids, rows=None) -> _Context:
  """What a `MoEBlock` used by itself needs of the batch: segment ids [B, S], and rows [B] with an rng "routing"."""
  rows = jnp.arange(segment_ids.shape[0]) if rows is None else rows
  return _Context(None, None, segment_ids, None, rows, None, None, None)


class Decision(NamedTuple):
  """What a router says about the tokens of one micro-batch."""

  choice: gates.Choice | gates.SoftChoice  # as it is carried out: weights
  plans: experts_lib.Plans | None  # None for SoftMoE
  stats: balance.Stats
  experts: jax.Array  # [B, S, K] int32
  probabilities: jax.Array  # [B, S, E] float32


class _Weights(nn.Module):
  """Base of the modules below: parameters by role."""

  model: config.Model

  @property
  def dtype(self):
    return jnp.dtype(self.model.compute_dtype)

  def weight(self, name: str, shape, axes, role: str = "weight"):
    """A float32 parameter, normal with the deviation of its role; used in the compute dtype, but for the router."""
    init = nn.with_logical_partitioning(nn.initializers.normal(getattr(self.model.init_std, role)), axes)
    value = self.param(name, init, shape, jnp.float32)
    return value if role == "router" else value.astype(self.dtype)

  def bias(self, name: str, shape, axes):
    return self.param(name, nn.with_logical_partitioning(nn.initializers.zeros, axes), shape).astype(self.dtype)

  def norm(self, name: str, x, axis: str = "width"):
    scale = self.param(f"{name}_scale", nn.with_logical_partitioning(nn.initializers.ones, (axis,)), x.shape[-1:])
    return layers.rms_norm(x, scale, self.model.norm_eps)


class GroupedQueryAttention(_Weights):
  """Grouped-query attention (arXiv 2305.13245)."""

  @nn.compact
  def __call__(self, x, context: _Context, cache):
    a, d_model = self.model.attention, self.model.d_model

    def project(name, heads, axis):
      out = matmul(x, self.weight(name, (d_model, heads, a.head_dim), ("embed", axis, "head_dim")))
      if a.qkv_bias:
        out = out + self.bias(f"{name}_bias", (heads, a.head_dim), (axis, "head_dim"))
      return out

    q, k, v = project("q", a.num_heads, "heads"), project("k", a.kv_heads, "kv_heads"), project("v", a.kv_heads, "kv_heads")
    if a.qk_norm == "head":
      q, k = self.norm("q_norm", q, "head_dim"), self.norm("k_norm", k, "head_dim")
    elif a.qk_norm == "whole":
      q = self.norm("q_norm", q.reshape(*q.shape[:2], -1)).reshape(q.shape)
      k = self.norm("k_norm", k.reshape(*k.shape[:2], -1)).reshape(k.shape)
    q, k = (layers.apply_rope(t, context.rope, a.rope.interleaved) for t in (q, k))
    return _attend(self, q, k, v, context, cache)


class LatentAttention(_Weights):
  """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, Eqs. 9-19), keys and values expanded."""

  @nn.compact
  def __call__(self, x, context: _Context, cache):
    a, d_model = self.model.attention, self.model.d_model
    if a.q_lora_rank:
      latent = jnp.einsum("bsd,dr->bsr", x, self.weight("q_down", (d_model, a.q_lora_rank), ("embed", "latent")))
      q = jnp.einsum("bsr,rhk->bshk", self.norm("q_norm", latent),
                     self.weight("q_up", (a.q_lora_rank, a.num_heads, a.qk_dim), ("rank", "heads", "head_dim")))
    else:
      q = jnp.einsum("bsd,dhk->bshk", x, self.weight("q", (d_model, a.num_heads, a.qk_dim), ("embed", "heads", "head_dim")))
    q_plain, q_rotary = jnp.split(q, [a.head_dim], -1)
    q = jnp.concatenate([q_plain, layers.apply_rope(q_rotary, context.rope, a.rope.interleaved)], -1)

    down = self.weight("kv_down", (d_model, a.kv_lora_rank + a.rope_head_dim), ("embed", "latent"))
    latent, k_rotary = jnp.split(jnp.einsum("bsd,dr->bsr", x, down), [a.kv_lora_rank], -1)
    k_rotary = layers.apply_rope(k_rotary[:, :, None], context.rope, a.rope.interleaved)
    up = self.weight("kv_up", (a.kv_lora_rank, a.num_heads, a.head_dim + a.v_head_dim), ("rank", "heads", "head_dim"))
    k_plain, v = jnp.split(jnp.einsum("bsr,rhk->bshk", self.norm("kv_norm", latent), up), [a.head_dim], -1)
    k = jnp.concatenate([k_plain, jnp.broadcast_to(k_rotary, (*k_plain.shape[:3], a.rope_head_dim))], -1)
    return _attend(self, q, k, v, context, cache)


def _attend(module: _Weights, q, k, v, context: _Context, cache):
  """Attention over the new keys, or over the cache with the new keys written into it; then the output projection."""
  a = module.model.attention
  if cache is not None:
    k, v = (jax.lax.dynamic_update_slice_in_dim(old, new, context.cache_index, 1) for old, new in zip(cache, (k, v)))
    cache = (k, v)
  out = attention.attention(q, k, v, context.bias, context.segment_ids, scale=layers.attention_scale(a.rope, a.qk_dim),
                            softcap=a.logit_softcap, window_tokens=a.window_tokens, backend=a.backend)
  out = checkpoint_name(out, "attention")
  shape = (a.num_heads, a.v_dim, module.model.d_model)
  weight = module.weight("out", shape, ("heads", "head_dim", "embed"), "residual")
  return matmul(out.reshape(*out.shape[:2], -1), weight.reshape(-1, shape[-1])), cache


class DenseBlock(_Weights):
  """SwiGLU or GELU feed-forward block."""

  hidden: int

  @nn.compact
  def __call__(self, x):
    d_model, into = self.model.d_model, ("embed", "hidden")
    gate = matmul(x, self.weight("gate", (d_model, self.hidden), into))
    up = matmul(x, self.weight("up", (d_model, self.hidden), into)) if self.model.activation == "swiglu" else None
    hidden = activate(gate, up, self.model.activation)
    return matmul(hidden, self.weight("down", (self.hidden, d_model), ("hidden", "embed"), "residual"))


class RecurrentCell(_Weights):
  """The parameters that a recurrent router shares over all layers."""

  @nn.compact
  def __call__(self) -> recurrent.Cell:
    r, d_model = self.model.router.recurrent, self.model.d_model
    columns = r.blocks * r.width

    def matrix(name):
      init = nn.with_logical_partitioning(nn.initializers.normal(r.width**-0.5), ("router", None))
      return self.param(name, init, (r.width, columns), jnp.float32)

    def bias(name):
      return self.param(name, nn.with_logical_partitioning(nn.initializers.zeros, (None,)), (columns,), jnp.float32)

    projector = self.weight("projector", (d_model, r.width), ("embed", None), "router") if r.shared_projector else None
    return recurrent.Cell(matrix("input"), matrix("state"), bias("input_bias"), bias("state_bias"), projector)


class TokenRouter(_Weights):
  """Scores every token and decides. Arithmetic is float32 whatever the compute dtype: near ties decide which expert runs."""

  @nn.compact
  def __call__(self, x, context: _Context, state: recurrent.State | None) -> tuple[Decision, recurrent.State | None]:
    e, r = self.model.experts, self.model.router
    mask, key = context.segment_ids > 0, self.make_rng("routing") if self.has_rng("routing") else None
    x = x.astype(jnp.float32)
    if r.recurrent.cell != "none":
      x, state = self._recurrent_features(x, context.cell, state)
    logits = self._logits(x, e.num_experts)
    if r.gate == "noisy":
      spread = jax.nn.softplus(self._matmul(x, "noise", e.num_experts))
      if key is not None:
        logits = logits + spread * gates.row_noise(jax.random.normal, key, context.rows, logits.shape[1:])
    if state is not None and state.logits is not None:
      logits = logits + r.recurrent.previous_scores * state.logits
      state = state._replace(logits=logits)
    bias = None
    if r.bias_update_rate:
      bias = self.param("selection_bias", nn.with_logical_partitioning(nn.initializers.zeros, ("router",)), (e.num_experts,))
    decision = decide(logits, self.model, mask, context.segment_ids, bias, key, context.rows, context.counted)
    return decision, state

  def _matmul(self, x, name: str, width: int):
    axes = ("embed" if x.shape[-1] == self.model.d_model else None, "router")
    weight = self.weight(name, (x.shape[-1], width), axes, "router")
    return jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)

  def _logits(self, x, num_experts: int):
    r = self.model.router
    if r.gate == "cosine":
      place = self._matmul(x, "projection", r.cosine_width)
      points = self.weight("weight", (r.cosine_width, num_experts), (None, "router"), "router")
      scale = self.param("log_scale", nn.with_logical_partitioning(
          nn.initializers.constant(gates.COSINE_SCALE_START), (None,)), (1,), jnp.float32)
      return gates.cosine_logits(place, points, scale)
    if r.gate == "soft":
      return self._matmul(x, "weight", num_experts * r.soft_slots).reshape(*x.shape[:2], num_experts, r.soft_slots)
    return self._matmul(x, "weight", num_experts)

  def _recurrent_features(self, x, cell: recurrent.Cell, state: recurrent.State):
    r = self.model.router.recurrent
    if r.shared_projector:
      x = jnp.matmul(x, cell.projector, precision=jax.lax.Precision.HIGHEST)
    else:
      x = self._matmul(x, "projector", r.width)
    state = recurrent.advance(r.cell, cell, x, recurrent.carried(state, r.carry))
    return state.hidden, state


def decide(logits, model: config.Model, mask, segment_ids, bias=None, key=None, rows=None, counted=None) -> Decision:
  """From a router's logits [B, S, E] (soft: [B, S, E, p]) to who goes where.

  Args:
    mask: [B, S] bool, tokens that exist.
    segment_ids: [B, S] int32.
    bias: [E], or None: selection bias.
    key: of this layer's routing noise; None in evaluation.
    rows: [B] int32, see `gates.row_noise`; needed with a key.
    counted: [B, S] bool, some of `mask`, that the statistics count; None: all. Who goes where does not depend on it.
  """
  e, r = model.experts, model.router
  shards = sharding.parts("batch", jax.sharding.get_abstract_mesh())
  counted = mask if counted is None else counted
  if r.gate == "soft":
    soft = gates.soft_choice(logits, mask)
    probabilities = soft.combine.sum(-1)
    _, best = jax.lax.top_k(jax.lax.stop_gradient(probabilities), r.top_k)  # no selections: for the statistics only
    kept = jnp.broadcast_to(counted[..., None], best.shape)
    stats = balance.collect(logits, gates.Choice(probabilities, best, probabilities), kept, counted, segment_ids, r, shards)
    return Decision(soft, None, stats, best, probabilities)

  group_tokens = mask.shape[1] if e.capacity_group == "sequence" else mask.size
  factor = e.capacity_factor or (1.0 if r.gate == "expert_choice" else 0.0)
  slots = min(capacity.slots(factor, r.top_k, group_tokens, e.num_experts), group_tokens)
  priority = None
  if key is not None and model.draws_routing_noise:
    priority = gates.row_noise(jax.random.uniform, jax.random.fold_in(key, 1), rows, mask.shape[1:])
  if r.gate == "expert_choice":
    choice = gates.expert_choice(logits, r, mask, slots, e.capacity_group)
    kept = (choice.experts < e.num_experts) & mask[..., None]
  else:
    choice = gates.token_choice(logits, r, bias)
    if e.capacity_factor:
      kept = capacity.keep(choice, mask, slots, e.drop_policy, e.capacity_group, priority)
    else:
      kept = jnp.broadcast_to(mask[..., None], choice.experts.shape)
  stats = balance.collect(logits, choice, kept & counted[..., None], counted, segment_ids, r, shards, priority)
  carried_out = jnp.where(kept, choice.experts, e.num_experts)
  bound = {"slots_in_row" if e.capacity_group == "sequence" else "slots_in_batch": slots}
  return Decision(choice, experts_lib.make_plan(carried_out, e, **bound), stats, choice.experts,
                  choice.probabilities)


class MoEBlock(_Weights):
  """Routed experts, and shared experts beside them."""

  @nn.compact
  def __call__(self, x, context: _Context, state=None):
    """x [B, S, D] -> ([B, S, D], this layer's Decision or None with a pre-gate, the recurrent router's state)."""
    m, e = self.model, self.model.experts
    decision = context.decision
    if decision is None:
      decision, state = TokenRouter(m, name="router")(x, context, state)

    into, out_of = experts_lib.EXPERT_AXES
    shape = (e.num_experts, m.d_model, e.d_expert)
    weights = experts_lib.Weights(
        gate=self.weight("gate", shape, into),
        up=self.weight("up", shape, into) if m.activation == "swiglu" else None,
        down=self.weight("down", (e.num_experts, e.d_expert, m.d_model), out_of, "residual"))
    if m.router.gate == "soft":
      out = experts_lib.apply_soft_experts(x, decision.choice, weights, activation=m.activation)
    else:
      out = experts_lib.apply_experts(x, decision.plans, decision.choice.weights, weights, activation=m.activation, experts=e)
    out = checkpoint_name(out, "experts")
    if e.d_shared:
      shared = DenseBlock(m, e.d_shared, name="shared")(x)
      if e.shared_gate:
        shared = jax.nn.sigmoid(x @ self.weight("shared_gate", (m.d_model, 1), ("embed", None))) * shared
      out = out + shared
    return out, None if context.decision is not None else decision, state


def _routed(decision: Decision):
  """What leaves the layers of a decision."""
  return decision.stats, decision.experts, decision.probabilities


class Layer(_Weights):
  """Pre-norm residual layer: attention, then a dense or a mixture-of-experts block."""

  deterministic: bool
  has_experts: bool = True

  @nn.compact
  def __call__(self, carry, context: _Context, cache):
    """((x [B, S, D], router state), context, cache) -> ((x, router state), (Routed or None, cache))."""
    (x, state), m = carry, self.model
    x = checkpoint_name(x, "layer")
    kind = LatentAttention if m.attention.kind == "mla" else GroupedQueryAttention
    out, cache = kind(m, name="attention")(self.norm("attention_norm", x), context, cache)
    x = sharding.constrain(x + self.drop(out), "batch", "sequence", "width")
    normal = self.norm("block_norm", x)
    routed = None
    if self.has_experts:
      out, decision, state = MoEBlock(m, name="moe")(normal, context, state)
      routed = None if decision is None else _routed(decision)
    else:
      out = DenseBlock(m, m.d_ff, name="dense")(normal)
    return (sharding.constrain(x + self.drop(out), "batch", "sequence", "width"), state), (routed, cache)

  def drop(self, x):
    return nn.Dropout(self.model.dropout)(x, deterministic=self.deterministic) if self.model.dropout else x


class LayerGroup(_Weights):
  """The unit that is scanned: moe_every - 1 dense layers, then one with experts."""

  deterministic: bool

  @nn.compact
  def __call__(self, carry, context: _Context, cache):
    caches, count = [], self.model.moe_every
    for i in range(count):
      last = i == count - 1
      layer = Layer(self.model, self.deterministic, last, name="experts" if last else f"dense_{i}")
      carry, (routed, new) = layer(carry, context, None if cache is None else cache[i])
      caches.append(new)
    return carry, (routed, None if cache is None else tuple(caches))


class PreGate(_Weights):
  """The router of Read-ME (arXiv 2410.19123 section 3.2): its own embedding, one causal layer, one decision for all."""

  @nn.compact
  def __call__(self, inputs, positions, k_positions, k_segments, context: _Context, cache):
    """tokens [B, S] -> (Decision, cache)."""
    model = pre_gate_model(self.model)
    table = self.param("embedding", nn.with_logical_partitioning(
        nn.initializers.normal(model.init_std.embedding), ("vocab", "embed")), (model.vocab_size, model.d_model), jnp.float32)
    a = model.attention
    context = context._replace(
        rope=layers.rope_tables(positions, a.rope, a.rotary_dim),
        bias=layers.attention_bias(positions, k_positions, context.segment_ids, k_segments, 0))
    x = sharding.constrain(table.astype(self.dtype)[inputs], "batch", "sequence", "width")
    block = Layer(model, deterministic=True, has_experts=False, name="layer")
    (x, _), (_, cache) = block((x, None), context, cache)
    decision, _ = TokenRouter(model, name="router")(self.norm("norm", x), context, None)
    return decision, cache


def pre_gate_model(m: config.Model) -> config.Model:
  """The pre-gate as a model of its own: one dense layer."""
  p = m.router.pre_gate
  attention = config.Attention(num_heads=p.num_heads, head_dim=p.d_model // p.num_heads, rope=m.attention.rope)
  return dataclasses.replace(m, d_model=p.d_model, d_ff=p.d_ff, attention=attention, num_layers=2, num_dense_layers=1,
                             moe_every=1, activation="swiglu", dropout=0.0)


_REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer"], offload_src="device", offload_dst="pinned_host"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention", "experts"),
}


class Transformer(_Weights):
  """Decoder-only transformer; `__call__` gives the final hidden states, `logits` turns them into scores."""

  deterministic: bool = True  # no dropout

  def setup(self):
    m = self.model
    self.embedding = self.param("embedding", nn.with_logical_partitioning(
        nn.initializers.normal(m.init_std.embedding), ("vocab", "embed")), (m.vocab_size, m.d_model), jnp.float32)
    self.final_norm_scale = self.param("final_norm_scale", nn.with_logical_partitioning(
        nn.initializers.ones, ("width",)), (m.d_model,))
    if not m.tie_embeddings:
      self.head = self.weight("head", (m.d_model, m.vocab_size), ("embed", "vocab"))
    if m.router.recurrent.cell != "none":
      self.router_cell = RecurrentCell(m)
    if m.router.pre_gate.d_model:
      self.pre_gate = PreGate(m)
    if m.num_dense_layers:
      self.dense_layers = self._stack(Layer, m.num_dense_layers, has_experts=False)
    self.layers = self._stack(LayerGroup, m.num_moe_layers)

  def _stack(self, kind, length: int, **options):
    """`length` layers of one kind with stacked parameters, scanned or unrolled."""
    if self.model.remat != "none":
      kind = nn.remat(kind, policy=_REMAT[self.model.remat], prevent_cse=not self.model.scan_unroll)
    stack = nn.scan(kind, variable_axes={"params": 0}, length=length, in_axes=(nn.broadcast, 0),
                    split_rngs={"params": True, "dropout": True, "routing": True},
                    unroll=min(self.model.scan_unroll or length, length),
                    metadata_params={nn.PARTITION_NAME: "layer"})
    return stack(self.model, deterministic=self.deterministic, **options)

  def __call__(self, inputs, segment_ids, positions, cache=None, cache_index=None, rows=None, counted=None) -> Output:
    """Runs the model on tokens [B, S]; with a cache, on tokens that follow those in it.

    Args:
      inputs, segment_ids, positions: [B, S] int32, see `Batch`.
      cache: from `empty_cache`; then segment ids must all be 1.
      cache_index: [] int32, tokens already in the cache.
      rows: [B] int32, number of each row in the batch of the step (default: 0 to B - 1); used with an rng "routing".
      counted: [B, S] bool, tokens that the routing statistics count (default: all that are not padding).
    """
    m = self.model
    if cache is None:
      k_segments, k_positions = segment_ids, positions
    else:
      length = cache[1][0][0].shape[2]
      k_positions = jnp.broadcast_to(jnp.arange(length), (inputs.shape[0], length))
      k_segments = jnp.ones_like(k_positions)
    context = _Context(
        rope=layers.rope_tables(positions, m.attention.rope, m.attention.rotary_dim),
        bias=layers.attention_bias(positions, k_positions, segment_ids, k_segments, m.attention.window_tokens),
        segment_ids=segment_ids, counted=counted, rows=jnp.arange(inputs.shape[0]) if rows is None else rows,
        cache_index=cache_index, cell=None, decision=None)
    dense_cache, group_cache, gate_cache = (None, None, None) if cache is None else cache
    state = None
    if m.router.recurrent.cell != "none":
      r = m.router.recurrent
      context = context._replace(cell=self.router_cell())
      state = recurrent.start(r.cell, inputs.shape, r.width, m.experts.num_experts, r.previous_scores > 0)
    if m.router.pre_gate.d_model:
      decision, gate_cache = self.pre_gate(inputs, positions, k_positions, k_segments, context, gate_cache)
      context = context._replace(decision=decision)
    x = self.embedding.astype(self.dtype)[inputs]
    x = sharding.constrain(x, "batch", "sequence", "width")
    if m.num_dense_layers:
      (x, state), (_, dense_cache) = self.dense_layers((x, state), context, dense_cache)
    (x, _), (routed, group_cache) = self.layers((x, state), context, group_cache)
    if m.router.pre_gate.d_model:
      routed = jax.tree.map(lambda a: a[None], _routed(context.decision))
    hidden = layers.rms_norm(x, self.final_norm_scale, m.norm_eps)
    return Output(hidden, *routed, None if cache is None else (dense_cache, group_cache, gate_cache))

  def head_matrix(self):
    """[D, V] in the compute dtype; it turns hidden states into logits."""
    return self.embedding.astype(self.dtype).T if self.model.tie_embeddings else self.head

  def logits(self, hidden):
    """[..., D] -> [..., V] float32."""
    return matmul(hidden, self.head_matrix(), jnp.float32)


def empty_cache(model: config.Model, batch: int, length: int):
  """Zero keys and values for `length` tokens: (dense layers, layer groups, pre-gate), layers stacked."""
  def layer(m, *count):
    a = m.attention
    shape, dtype = (*count, batch, length, a.num_heads if a.kind == "mla" else a.kv_heads), jnp.dtype(m.compute_dtype)
    return jnp.zeros((*shape, a.qk_dim), dtype), jnp.zeros((*shape, a.v_dim), dtype)

  dense = layer(model, model.num_dense_layers) if model.num_dense_layers else None
  groups = tuple(layer(model, model.num_moe_layers) for _ in range(model.moe_every))
  return dense, groups, layer(pre_gate_model(model)) if model.router.pre_gate.d_model else None


@functools.cache
def build(model: config.Model, deterministic: bool = True) -> Transformer:
  return Transformer(model, deterministic=deterministic)


def init(transformer: Transformer, key: jax.Array):
  """The parameters: a dict whose leaves are flax boxes that carry the logical axis names."""
  rows = sharding.parts("batch", jax.sharding.get_abstract_mesh())
  token = jnp.zeros((rows, 2), jnp.int32)

  def everything(module, *args):
    return module.logits(module(*args).hidden)

  return transformer.init(key, token, token, token, method=everything)["params"]


def unbox(boxed):
  """(parameters without boxes, PartitionSpec of mesh axes for each)."""
  specs = jax.tree.map(lambda s: sharding.spec(*s), nn.get_partition_spec(boxed),
                       is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec))
  return nn.meta.unbox(boxed), specs
