"""Programs whose static cost `tpu_static` estimates: our kernels, the plain grouped matmul of the peers, whole MoE layers.

A program is (function, abstract arguments). A *twin* is the same kernel on experts of equal size, its index maps by
arithmetic; of two twins with different numbers of experts the difference is the cost of an expert.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe import config
from moe import experts
from moe.kernels import fused_experts
from moe.kernels import plan
from moe.kernels import visits as visits_lib
from moe.kernels.fused_experts import Blocks
from moe.kernels.quantize import Quantized

_spec = jax.ShapeDtypeStruct


def _kernel(name: str, shape: plan.Shape, blocks: Blocks, num_experts: int, num_tiles: int, visits=None):
  """(function of (visits, ...), arguments) of one of our kernels; `visits` fixes them."""
  tile, dtype = blocks.tile_rows, jnp.bfloat16
  token, scale = _spec((num_tiles, 1, tile), jnp.int32), _spec((num_tiles, 1, tile), jnp.float32)
  packed = _spec((shape.tokens + 1, shape.d_model // 256, 128), jnp.uint32)
  into = _spec((num_experts, shape.d_model, shape.d_expert), dtype)
  down = _spec((num_experts, shape.d_expert, shape.d_model), dtype)
  rows = _spec((num_tiles * tile, shape.d_expert), dtype)
  small = lambda w: Quantized(_spec(w.shape, jnp.int8), _spec((w.shape[0], 1, w.shape[2]), jnp.float32))
  f, kernel = fused_experts, {
      "hidden_int8": (lambda v, t, x, g, u: f.hidden(v, x, t, (g, u), activation="swiglu", blocks=blocks, residuals=False),
                      (token, packed, small(into), small(into))),
      "combine_int8": (lambda v, t, h, w, s: f.combine(v, [(h, w)], t, s, shape.tokens, transposed=False, blocks=blocks),
                       (token, rows, small(down), scale)),
      "hidden": (lambda v, t, x, g, u: f.hidden(v, x, t, (g, u), activation="swiglu", blocks=blocks, residuals=True),
                 (token, packed, into, into)),
      "hidden_forward": (lambda v, t, x, g, u: f.hidden(v, x, t, (g, u), activation="swiglu", blocks=blocks, residuals=False),
                         (token, packed, into, into)),
      "combine": (lambda v, t, h, w, s: f.combine(v, [(h, w)], t, s, shape.tokens, transposed=False, blocks=blocks),
                  (token, rows, down, scale)),
      "hidden_gradient": (lambda v, t, x, s, w, g, u: f.hidden_gradient(
          v, x, t, s, w, (g, u), activation="swiglu", blocks=blocks),
                          (token, packed, scale, down, rows, rows)),
      "combine_gradient": (lambda v, t, h, w: f.combine(
          v, [(h, w), (h, w)], t, None, shape.tokens, transposed=True, blocks=blocks),
                           (token, rows, into)),
      "weight_gradient": (lambda v, t, x, h: f.weight_gradient(v, x, t, h, num_experts, transposed=False, blocks=blocks),
                          (token, packed, rows)),
      "weight_gradient_down": (lambda v, t, x, h: f.weight_gradient(v, x, t, h, num_experts, transposed=True, blocks=blocks),
                               (token, packed, rows)),
  }[name]
  function, arguments = kernel
  if visits is not None:
    return functools.partial(function, visits), arguments
  table = tuple(_spec((num_tiles,), jnp.int32) for _ in range(3))
  return (lambda group, source, rows, *rest: function(visits_lib.Tiles(group, source, rows, None, None, None), *rest),
          (*table, *arguments))


KERNELS = ("hidden", "combine", "hidden_gradient", "combine_gradient", "weight_gradient", "weight_gradient_down", "hidden_int8",
           "combine_int8")
MATMULS = {"hidden": 2, "hidden_forward": 2, "hidden_int8": 2, "combine_gradient": 2}  # of T x K x D x F; others 1


def kernel(name: str, shape, blocks):
  """One of our kernels as it is used, for compile facts."""
  shape, blocks = plan.Shape(*shape), Blocks(*blocks)
  num = visits_lib.count(shape.tokens * shape.top_k, shape.num_experts, blocks.tile_rows)
  return _kernel(name, shape, blocks, shape.num_experts, num)


def twin_rows(name: str, shape: plan.Shape, blocks: Blocks) -> int:
  """Rows of one visit of the twin: one chunk, because the compiler's profiler misreads nested loops."""
  most = 1024 if name.startswith("weight_gradient") else 256
  rows = 32
  while 2 * rows <= min(most, blocks.tile_rows, max(shape.mean_rows, 32)):
    rows *= 2
  return rows


def visits_of(rows_per_group: int, rows: int) -> int:
  """Visits of one group in a twin: as many as its rows take, at most 4, which cost four times one and not more to profile."""
  return min(max(round(rows_per_group / rows), 1), 4)


def kernel_twin(name: str, shape, blocks, groups: int):
  """The same on `groups` experts of about mean size, each visit one chunk; profile 2 and 4 groups."""
  shape, blocks = plan.Shape(*shape), Blocks(*blocks)
  rows = twin_rows(name, shape, blocks)
  per_group = visits_of(shape.mean_rows, rows)
  blocks = blocks._replace(tile_rows=max(rows, 32))
  return _kernel(name, shape, blocks, groups, groups * per_group, visits_lib.Even(per_group, rows))


def grouped_matmul_twin(rows_per_group: int, k: int, n: int, tile, groups: int, backward: bool = False):
  """The plain grouped matmul of the peers (blocks over n, visits, k; a float32 block that collects over k), one block of n."""
  tm, tk, tn = tile
  del n
  per_group = min(max(rows_per_group // tm, 1), 4)
  visits, steps = groups * per_group, k // tk

  def body(lhs, rhs, out, total):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
      total[...] = jnp.zeros(total.shape, total.dtype)

    total[...] += jnp.dot(lhs[...], rhs[0], preferred_element_type=jnp.float32)

    @pl.when(step == steps - 1)
    def _():
      row = jax.lax.broadcasted_iota(jnp.int32, (tm, tn), 0)
      out[...] = jnp.where(row >= 0, total[...], out[...].astype(jnp.float32)).astype(out.dtype)

  def run(lhs, rhs):
    return pl.pallas_call(
        body, grid=(visits, steps), out_shape=_spec((visits * tm, tn), jnp.bfloat16), name="grouped_matmul_twin",
        in_specs=[pl.BlockSpec((tm, tk), lambda v, s: (v, s)), pl.BlockSpec((1, tk, tn), lambda v, s: (v // per_group, s, 0))],
        out_specs=pl.BlockSpec((tm, tn), lambda v, s: (v, 0)), scratch_shapes=[pltpu.VMEM((tm, tn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=60 << 20),
    )(lhs, rhs)

  return run, (_spec((visits * tm, k), jnp.bfloat16), _spec((groups, k, tn), jnp.bfloat16))


def layer(shape, backend: str, gradient: bool):
  """The experts' block of the model, routed already: forward, or forward and gradient."""
  shape = plan.Shape(*shape)
  dtype = jnp.dtype(shape.dtype)
  x = _spec((1, shape.tokens, shape.d_model), dtype)
  gates = _spec((1, shape.tokens, shape.top_k), jnp.float32)
  chosen = _spec((1, shape.tokens, shape.top_k), jnp.int32)
  into = _spec((shape.num_experts, shape.d_model, shape.d_expert), dtype)
  down = _spec((shape.num_experts, shape.d_expert, shape.d_model), dtype)

  def forward(x, gates, weights, chosen):
    block = config.Experts(num_experts=shape.num_experts, d_expert=shape.d_expert, backend=backend)
    plans = experts.make_plan(chosen, block)
    return experts.apply_experts(x, plans, gates, experts.Weights(*weights), activation="swiglu", experts=block)

  def both(x, gates, weights, chosen, cotangent):
    out, pull = jax.vjp(lambda *a: forward(*a, chosen), x, gates, weights)
    return out, pull(cotangent)

  arguments = (x, gates, (into, into, down), chosen)
  return (both, (*arguments, x)) if gradient else (forward, arguments)
