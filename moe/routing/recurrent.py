"""The recurrent router (RMoE, arXiv 2408.06793): one cell over the depth of the model, for each token by itself.

    x'_i = x_i W_i          h_i = cell(x'_i, h_{i-1}), h_0 = 0          logits_i = h_i G_i  (+ r logits_{i-1})

Layer i projects with its own W_i (or one for all) and scores with its own G_i; the cell's parameters are shared. The
recurrence runs over layers, not over time, so decoding needs no state of earlier tokens. All arithmetic in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

class Cell(NamedTuple):
  """Parameters shared by all layers, in the gate order of torch.nn: GRU (r, z, n), LSTM (i, f, g, o)."""

  w_in: jax.Array  # [p, blocks x p]
  w_state: jax.Array  # [p, blocks x p]
  b_in: jax.Array  # [blocks x p]
  b_state: jax.Array  # [blocks x p]
  projector: jax.Array | None  # [D, p], where one serves all layers


class State(NamedTuple):
  """What a token carries from one routed layer to the next."""

  hidden: jax.Array  # [B, S, p] float32
  memory: jax.Array | None  # [B, S, p] float32, LSTM only
  logits: jax.Array | None  # [B, S, E] float32, of the previous layer, where they are added


def start(kind: str, tokens: tuple[int, int], width: int, num_experts: int, with_logits: bool) -> State:
  """The zero state before the first layer; `tokens` is [B, S]."""
  hidden = jnp.zeros((*tokens, width), jnp.float32)
  return State(hidden, hidden if kind == "lstm" else None,
               jnp.zeros((*tokens, num_experts), jnp.float32) if with_logits else None)


def carried(state: State, how: str) -> State:
  """The state as the next layer receives it: with its gradient, without it (`detach`), or zeros (`none`, the paper's NP).

  The logits of the previous layer are a connection of their own, which `none` leaves as it is.
  """
  if how == "none":
    return state._replace(hidden=jnp.zeros_like(state.hidden),
                          memory=None if state.memory is None else jnp.zeros_like(state.memory))
  return jax.lax.stop_gradient(state) if how == "detach" else state


def advance(kind: str, cell: Cell, x, state: State) -> State:
  """One application of the cell: x [B, S, p] float32; the state's logits pass through.

  gru: r, z = sig(W x + U h + b), n = tanh(W x + b + r (U h + b')), h' = (1 - z) n + z h (Eqs. 2-4 of the paper, in the
  form of torch.nn.GRUCell; the printed Eq. 3 has W_h twice). lstm and rnn: as torch.nn.LSTMCell and RNNCell (tanh).
  """
  def matmul(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

  from_x, from_h = matmul(x, cell.w_in) + cell.b_in, matmul(state.hidden, cell.w_state) + cell.b_state
  if kind == "rnn":
    return state._replace(hidden=jnp.tanh(from_x + from_h))
  if kind == "lstm":
    i, f, g, o = jnp.split(from_x + from_h, 4, -1)
    memory = jax.nn.sigmoid(f) * state.memory + jax.nn.sigmoid(i) * jnp.tanh(g)
    return state._replace(hidden=jax.nn.sigmoid(o) * jnp.tanh(memory), memory=memory)
  (r_x, z_x, n_x), (r_h, z_h, n_h) = jnp.split(from_x, 3, -1), jnp.split(from_h, 3, -1)
  z = jax.nn.sigmoid(z_x + z_h)
  n = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
  return state._replace(hidden=(1 - z) * n + z * state.hidden)
