"""Parameter counts and model FLOPs by formula, without JAX. Tests hold them to the real parameter tree."""

from __future__ import annotations

import dataclasses
import math

from moe.config import Model


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Parameters of a model, by where they are."""

  embedding: int  # the input table, and the output head where it is not tied
  attention: int
  dense: int  # dense feed-forward blocks and shared experts
  routed: int  # all routed experts
  routed_active: int  # those one token passes through
  router: int  # all routers, or the pre-gate
  other: int  # norms, the gates of shared experts

  @property
  def total(self) -> int:
    return self.embedding + self.attention + self.dense + self.routed + self.router + self.other

  @property
  def active(self) -> int:
    """Parameters one token passes through, both embedding tables included."""
    return self.total - self.routed + self.routed_active


def sizes(m: Model) -> Sizes:
  a, e = m.attention, m.experts
  matrices = 3 if m.activation == "swiglu" else 2
  moe_layers = m.num_moe_layers
  dense_layers = m.num_layers - moe_layers
  if a.kind == "mla":
    q = a.num_heads * a.qk_dim
    attention = m.d_model * a.q_lora_rank + a.q_lora_rank * q if a.q_lora_rank else m.d_model * q
    attention += m.d_model * (a.kv_lora_rank + a.rope_head_dim)
    attention += a.kv_lora_rank * a.num_heads * (a.head_dim + a.v_head_dim) + a.num_heads * a.v_head_dim * m.d_model
    norms = a.kv_lora_rank + a.q_lora_rank
  else:
    heads = a.num_heads + 2 * a.kv_heads
    attention = m.d_model * a.head_dim * (heads + a.num_heads) + (heads * a.head_dim if a.qkv_bias else 0)
    norms = {"none": 0, "head": 2 * a.head_dim, "whole": (a.num_heads + a.kv_heads) * a.head_dim}[a.qk_norm]
  expert = matrices * m.d_model * e.d_expert
  gate = _pre_gate(m) if m.router.pre_gate.d_model else _routers(m)
  return Sizes(
      embedding=m.vocab_size * m.d_model * (1 if m.tie_embeddings else 2),
      attention=m.num_layers * attention,
      dense=matrices * m.d_model * (dense_layers * m.d_ff + moe_layers * e.d_shared),
      routed=moe_layers * e.num_experts * expert,
      routed_active=moe_layers * (e.num_experts if m.router.gate == "soft" else m.router.top_k) * expert,
      router=gate,
      other=m.num_layers * (2 * m.d_model + norms) + m.d_model + (moe_layers * m.d_model if e.shared_gate else 0),
  )


def _scorer_matrices(m: Model, width: int) -> int:
  """Matrix parameters from a router's features to its logits."""
  r, experts = m.router, m.experts.num_experts
  return {"noisy": 2 * width * experts, "cosine": width * r.cosine_width + r.cosine_width * experts,
          "soft": width * experts * r.soft_slots}.get(r.gate, width * experts)


def _scorer(m: Model, width: int) -> int:
  """Parameters from a router's features to its logits: the matrices, the cosine gate's temperature, the selection bias."""
  r = m.router
  temperature = 1 if r.gate == "cosine" else 0
  return _scorer_matrices(m, width) + temperature + (m.experts.num_experts if r.bias_update_rate else 0)


def _routers(m: Model) -> int:
  r = m.router.recurrent
  if r.cell == "none":
    return m.num_moe_layers * _scorer(m, m.d_model)
  cell = r.blocks * (2 * r.width**2 + 2 * r.width)
  projectors = m.d_model * r.width * (1 if r.shared_projector else m.num_moe_layers)
  return cell + projectors + m.num_moe_layers * _scorer(m, r.width)


def _pre_gate(m: Model) -> int:
  p = m.router.pre_gate
  layer = 4 * p.d_model**2 + 3 * p.d_model * p.d_ff + 2 * p.d_model
  return m.vocab_size * p.d_model + layer + p.d_model + _scorer(m, p.d_model)


def _router_products(m: Model) -> int:
  """Multiply-adds of all routers on one token."""
  r, p = m.router.recurrent, m.router.pre_gate
  if p.d_model:
    return 4 * p.d_model**2 + 3 * p.d_model * p.d_ff + _scorer_matrices(m, p.d_model)
  if r.cell == "none":
    return m.num_moe_layers * _scorer_matrices(m, m.d_model)
  # One cell, and with `shared_projector` one projector, but every layer applies them.
  return m.num_moe_layers * (m.d_model * r.width + 2 * r.blocks * r.width**2 + _scorer_matrices(m, r.width))


def _selections(m: Model, sequence_tokens: int) -> float:
  """Experts that a token passes through in the mean: K, or as many as the slots allow where these are fewer.

  Experts that choose fill all their slots.
  """
  e, r = m.experts, m.router
  by_expert = r.gate == "expert_choice"
  factor = e.capacity_factor or (1.0 if by_expert else 0.0)
  slots = factor * r.top_k  # for each token, those of all experts together
  if e.capacity_group == "sequence":
    slots = math.ceil(slots * sequence_tokens / e.num_experts) * e.num_experts / sequence_tokens
  if by_expert:
    return min(slots, e.num_experts)
  return min(slots, r.top_k) if factor else r.top_k


def attended_keys(sequence_tokens: int, window_tokens: int = 0) -> float:
  """Keys that a query of a causal sequence sees, in the mean over its places.

  The query at place i from 1 sees the smaller of i and the window.
  """
  window = min(window_tokens or sequence_tokens, sequence_tokens)
  return window - window * (window - 1) / (2 * sequence_tokens)


def flops_per_token(m: Model, sequence_tokens: int) -> float:
  """Model FLOPs of one training token: 3 times those of the forward matrix products, of 2 for each multiply-add.

  Look-ups, norms and biases are no matrix products, and recomputation under remat does not count (as in MFU, PaLM, arXiv
  2204.02311, appendix B). Attention counts the keys that a causal query sees, in its window, where each row is one document.
  What the policy of a capacity drops depends on the tokens: only selections that no slot can be there for are left out.
  SoftMoE runs its experts on soft_slots mixtures a sequence, made from all tokens and mixed back.
  """
  s, a, e = sizes(m), m.attention, m.experts
  heads = a.num_heads + 2 * a.kv_heads
  biases = m.num_layers * heads * a.head_dim if a.qkv_bias else 0
  expert = s.routed / (m.num_moe_layers * e.num_experts)
  if m.router.gate == "soft":
    slots = e.num_experts * m.router.soft_slots
    routed = slots * expert / sequence_tokens + 2 * slots * m.d_model
  else:
    routed = _selections(m, sequence_tokens) * expert
  products = s.attention - biases + s.dense + m.num_moe_layers * routed + _router_products(m) + m.vocab_size * m.d_model
  if e.shared_gate:
    products += m.num_moe_layers * m.d_model
  # A key costs a product with the query, of the width of a key, and one with its weight, of the width of a value.
  products += m.num_layers * a.num_heads * (a.qk_dim + a.v_dim) * attended_keys(sequence_tokens, a.window_tokens)
  products += 2 * m.router.pre_gate.d_model * attended_keys(sequence_tokens)
  return 3.0 * 2.0 * products
