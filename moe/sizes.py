"""Parameter counts and model FLOPs by formula, without JAX. Tests hold them to the real parameter tree."""

from __future__ import annotations

import dataclasses

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


def _scorer(m: Model, width: int) -> int:
  """Parameters from a router's features to its logits."""
  r, experts = m.router, m.experts.num_experts
  scorer = {"noisy": 2 * width * experts, "cosine": width * r.cosine_width + r.cosine_width * experts + 1,
            "soft": width * experts * r.soft_slots}.get(r.gate, width * experts)
  return scorer + (experts if r.bias_update_rate else 0)


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


def flops_per_token(m: Model, sequence_tokens: int) -> float:
  """Model FLOPs of one training token: 6 for each active matrix parameter, plus attention over half the sequence.

  The input embeddings are look-ups and do no FLOPs; recomputation under remat does not count (as in MFU, PaLM,
  arXiv 2204.02311, appendix B). SoftMoE runs its experts on soft_slots inputs a sequence, not on every token.
  """
  s = sizes(m)
  routed = s.routed_active
  if m.router.gate == "soft":
    routed = routed * m.router.soft_slots / sequence_tokens
  look_ups = m.vocab_size * ((0 if m.tie_embeddings else m.d_model) + m.router.pre_gate.d_model)
  matrices = s.active - s.routed_active + routed - look_ups
  seen = sequence_tokens / 2
  if m.attention.window_tokens:
    seen = min(seen, m.attention.window_tokens)
  attention = m.num_layers * m.attention.num_heads * (m.attention.qk_dim + m.attention.v_dim) * 2 * seen
  attention += 2 * m.router.pre_gate.d_model * 2 * (sequence_tokens / 2)
  return 6.0 * matrices + 3.0 * attention
