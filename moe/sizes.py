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
  other: int  # routers, norms, gates

  @property
  def total(self) -> int:
    return self.embedding + self.attention + self.dense + self.routed + self.other

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
  return Sizes(
      embedding=m.vocab_size * m.d_model * (1 if m.tie_embeddings else 2),
      attention=m.num_layers * attention,
      dense=matrices * m.d_model * (dense_layers * m.d_ff + moe_layers * e.d_shared),
      routed=moe_layers * e.num_experts * expert,
      routed_active=moe_layers * m.router.top_k * expert,
      other=(m.num_layers * (2 * m.d_model + norms) + m.d_model + moe_layers * m.d_model * e.num_experts
             + (moe_layers * m.d_model if e.shared_gate else 0)),
  )


def flops_per_token(m: Model, sequence_tokens: int) -> float:
  """Model FLOPs of one training token: 6 for each active matrix parameter, plus attention over half the sequence.

  The input embedding is a look-up and does no FLOPs; recomputation under remat does not count (as in MFU, PaLM,
  arXiv 2204.02311, appendix B).
  """
  s = sizes(m)
  matrices = s.active - m.vocab_size * m.d_model * (0 if m.tie_embeddings else 1)
  seen = sequence_tokens / 2
  if m.attention.window_tokens:
    seen = min(seen, m.attention.window_tokens)
  attention = m.num_layers * m.attention.num_heads * (m.attention.qk_dim + m.attention.v_dim) * 2 * seen
  return 6.0 * matrices + 3.0 * attention
