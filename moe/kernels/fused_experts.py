"""The experts' feed-forward block as Pallas TPU kernels, with its gradient.

    out[t] = sum over t's experts e of  gate[t, e] x down_e(silu(x[t] gate_e) * (x[t] up_e))

What a library composition moves through HBM besides (the gathered rows, the products before the activation, every
expert's output in sorted order) stays in vector memory here: the tokens are resident there and rows are gathered by
register moves, the weighted sum accumulates there in float32.

    hidden           gather -> gate and up matmuls -> SwiGLU        [T, D] -> [rows, F]
    combine          down matmul -> weighted sum                    [rows, F] -> [T, D]
    hidden_gradient  gather -> down transposed -> SwiGLU's gradient  [T, D] -> [rows, F]
    weight_gradient  gather -> transposed matmul of each expert     [T, D], [rows, F] -> [E, D, F]
    combine          again, gate and up transposed, for the tokens' gradient

bfloat16 operands, float32 accumulation; the hidden rows are rounded to bfloat16, an expert's output never is. Rows are laid
out in tiles (visits.py). All kernels are grids of blocks without DMA of their own; a grid is sequential.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels import visits as visits_lib
from moe.kernels.activation import activate
from moe.kernels.quantize import Quantized
from moe.kernels.visits import Tiles

# By the static twins of v5e and v5p: 256 rows feed the matrix unit at 0.94 of its rate where a matmul's result is used at
# once; where it is added to what stands in memory, only 1024 rows do (0.97; 512 give 0.84, 256 give 0.73).
_CHUNK, _GRADIENT_CHUNK = 256, 1024
_COLUMNS = 512  # of one matmul, to keep the code small


class Blocks(NamedTuple):
  """What each kernel keeps in vector memory at a time; every choice gives the same result up to rounding."""

  tile_rows: int  # rows of a visit: 32, 64 or a multiple of 128
  hidden: int  # columns of F of hidden and hidden_gradient
  contract: int  # columns of F of combine
  width: int  # columns of D whose sum combine keeps
  gradient: int  # columns of F of weight_gradient
  gradient_buffers: int = 2  # of its result; 1 saves memory, and the next expert waits for the write
  vmem_bytes: int = 100 << 20  # limit handed to the compiler


def supports(width: int, hidden: int, dtype) -> str:
  """'' where the kernels apply, else the reason."""
  if dtype != jnp.bfloat16:
    return f"fused experts compute in bfloat16, not {jnp.dtype(dtype).name}"
  if width % 256 or hidden % 128:
    return f"fused experts want d_model in multiples of 256 and d_expert of 128; got {width} and {hidden}"
  return ""


# ------------------------------------------------------------------------------------------------------------ grids


def _call(body, visits, grid, in_specs, out_specs, out_shape, scratch, operands, blocks: Blocks, name, cost, interpret):
  """A `pallas_call` whose bodies and index maps first receive a visits object."""
  if isinstance(visits, visits_lib.Counted):
    visits.count(name, grid, [*in_specs, *out_specs], [a.dtype for a in (*operands, *out_shape)], scratch)
    return out_shape
  if isinstance(visits, visits_lib.Even):
    spec_of = lambda s: s.spec(lambda index: lambda *at: index(visits, *at))
    scalars, wrapped = (), functools.partial(body, visits)
  else:
    n = visits_lib.Prefetched.num_scalars
    spec_of = lambda s: s.spec(
        lambda index: lambda *at: index(visits_lib.Prefetched(*at[-n:]), *at[:-n]))
    scalars = (visits.group, visits.source, visits.rows)
    wrapped = lambda *refs: body(visits_lib.Prefetched(*refs[:n]), *refs[n:])
  grid_spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars), grid=grid, in_specs=[spec_of(s) for s in in_specs],
      out_specs=[spec_of(s) for s in out_specs], scratch_shapes=scratch)
  return pl.pallas_call(
      wrapped, grid_spec=grid_spec, out_shape=out_shape, name=name, interpret=interpret, cost_estimate=cost,
      compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * len(grid), vmem_limit_bytes=blocks.vmem_bytes),
  )(*scalars, *operands)


class _Block(NamedTuple):
  """A BlockSpec whose index map is index(visits, *grid position)."""

  shape: tuple[int, ...]
  index: object
  memory: object = pltpu.VMEM
  buffers: int = 2

  def spec(self, bind):
    return pl.BlockSpec(self.shape, bind(self.index), memory_space=self.memory,
                        pipeline_mode=None if self.buffers == 2 else pl.Buffered(self.buffers))


def _resident(array):
  return _Block(array.shape, lambda visits, *at: (0,) * array.ndim, buffers=1)


def _scalars(tile_rows: int, visit):
  """Per-row scalars of the tile that visit(*at) names."""
  return _Block((1, 1, tile_rows), lambda visits, *at: (visits.tile(visit(*at)), 0, 0), pltpu.SMEM)


def _columns(total: int, body) -> None:
  """body(start, size) for blocks of columns."""
  def whole(i, carry):
    body(pl.multiple_of(i * _COLUMNS, 128), _COLUMNS)
    return carry

  if total // _COLUMNS > 1:
    jax.lax.fori_loop(0, total // _COLUMNS, whole, 0)
  elif total >= _COLUMNS:
    body(0, _COLUMNS)
  if total % _COLUMNS:
    body(total // _COLUMNS * _COLUMNS, total % _COLUMNS)


def _chunk(tile_rows: int, most: int = _CHUNK) -> int:
  """Rows of the largest matmul: the granule, doubled while it fits."""
  size = visits_lib.GRANULE
  while 2 * size <= min(tile_rows, most):
    size *= 2
  return size


def transposed_bytes(tile_rows: int, width: int) -> int:
  """What weight_gradient needs besides its blocks: the tokens of one chunk, transposed."""
  return _chunk(tile_rows, _GRADIENT_CHUNK) * width * 2


def _values(weights):
  """The matrices, and the scales of those that are quantized."""
  return [w.values if isinstance(w, Quantized) else w for w in weights], [w.scale for w in weights if isinstance(w, Quantized)]


def _dot(a, b, contract_a: int = 1, contract_b: int = 0):
  return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32)


# ---------------------------------------------------------------------------------------------------------- kernels


def hidden(visits, x, token, weights, *, activation: str, blocks: Blocks, residuals: bool, interpret=False):
  """Gather -> gate and up matmuls -> activation.

  Args:
    visits: `Tiles`, or `Even` for a static twin.
    x: [T + 1, D / 256, 128] uint32 from `visits.pack`.
    token: [V, 1, tile_rows] int32.
    weights: (gate, up) or (gate,), each [E, D, F] bfloat16, or all `Quantized`.
    residuals: also return the products before the activation.

  Returns:
    [h, *products], each [V x tile_rows, F] bfloat16; rows past a tile's count (rounded up to the granule) are undefined.
  """
  weights, scales = _values(weights)
  width, columns = weights[0].shape[1:]
  num, tile, block = token.shape[0], blocks.tile_rows, blocks.hidden
  parts, inputs = len(weights), len(weights) + len(scales)

  def body(visits, token, x, *refs):
    matrices, factors, (out, *products) = refs[:parts], refs[parts:inputs], refs[inputs:-2]
    staging, gathered = refs[-2:]
    rows = visits.rows(pl.program_id(0))

    @pl.when(pl.program_id(1) == 0)
    def _():
      visits_lib.gather(x, token, rows, staging, gathered)

    def chunk(offset, size):
      part = visits_lib.read_rows(gathered, offset, size)

      def some(start, count):
        at = (pl.ds(offset, size), pl.ds(start, count))
        values = [_dot(part, matrix[0, :, pl.ds(start, count)].astype(part.dtype)) for matrix in matrices]
        if factors:
          values = [value * factor[0, :, pl.ds(start, count)] for value, factor in zip(values, factors)]
        for ref, value in zip(products, values):
          ref[at] = value.astype(ref.dtype)
        out[at] = activate(values[0], values[-1], activation).astype(out.dtype)

      _columns(block, some)

    visits_lib.for_row_chunks(rows, _chunk(tile), chunk)

  outputs = 1 + parts * residuals
  row_block = _Block((tile, block), lambda visits, v, j: (visits.tile(v), visits.column(v, j, columns // block)))
  flops = 2 * num * tile * width * columns * parts
  moved = x.size * 4 + sum(w.size * w.dtype.itemsize for w in weights) + outputs * num * tile * columns * 2

  def column(visits, v, j):
    return (visits.expert(v), 0, visits.column(v, j, columns // block))

  return _call(
      body, visits, (num, columns // block),
      [_scalars(tile, lambda v, j: v), _resident(x)]
      + [_Block((1, width, block), column)] * parts + [_Block((1, 1, block), column)] * len(scales),
      [row_block] * outputs, [jax.ShapeDtypeStruct((num * tile, columns), jnp.bfloat16)] * outputs,
      visits_lib.gather_scratch(tile, width), (token, x, *weights, *scales), blocks, "experts_hidden",
      pl.CostEstimate(flops=flops, transcendentals=num * tile * columns, bytes_accessed=moved), interpret)


def combine(visits, pairs, token, scale, num_tokens: int, *, transposed: bool, blocks: Blocks, interpret=False):
  """Matmul of each expert's rows -> sum over each token's rows.

  Args:
    visits: as in `hidden`.
    pairs: [(rows [V x tile_rows, F], matrices)], products summed; matrices [E, F, D], or `Quantized`, or [E, D, F] if
      `transposed`.
    token: [V, 1, tile_rows] int32.
    scale: [V, 1, tile_rows] float32 that multiplies each row's product, or None.
    num_tokens: T.

  Returns:
    [T, D] bfloat16, summed in float32 in the order of the visits.
  """
  matrices, factors = _values([matrix for _, matrix in pairs])
  pairs = [(rows, matrix) for (rows, _), matrix in zip(pairs, matrices)]
  hidden_size = pairs[0][0].shape[1]
  width = pairs[0][1].shape[1 if transposed else 2]
  num, tile, block, contract = token.shape[0], blocks.tile_rows, blocks.width, blocks.contract
  lanes, steps = block // 128, hidden_size // contract
  write = next(size for size in (256, 128) if num_tokens % size == 0)  # tokens of one step that writes

  def body(visits, token, *refs):
    scale_ref = refs[0] if scale is not None else None
    refs = refs[scale is not None:]
    if factors:
      factor, *refs = refs
    lhs, rhs = refs[:len(pairs)], refs[len(pairs):2 * len(pairs)]
    out, total, partial, staging = refs[2 * len(pairs):]
    visit, step = pl.program_id(1), pl.program_id(2)

    @pl.when((visit == 0) & (step == 0))
    def _():
      def clear(i, carry):
        total[i] = jnp.zeros(total.shape[1:], total.dtype)
        return carry

      jax.lax.fori_loop(0, num_tokens + 1, clear, 0)

    def add(offset, size):
      def some(r, carry):
        row = r * 8
        where = [token[0, 0, offset + row + k] for k in range(8)]
        # The rows of an expert are of different tokens (but for those that do not exist, whose sum nobody reads), so
        # all reads may come before the writes.
        values = []
        for k in range(8):
          value = staging[pl.ds(pl.multiple_of((row + k) * lanes, lanes), lanes), :]
          if scale_ref is not None:
            value = value * scale_ref[0, 0, offset + row + k]
          values.append(total[where[k]] + value)
        for k in range(8):
          total[where[k]] = values[k]
        return carry

      jax.lax.fori_loop(0, size // 8, some, 0)

    def chunk(offset, size):
      at = pl.ds(offset, size)
      value = sum(_dot(a[at, :], b[0].astype(a.dtype), 1, 1 if transposed else 0) for a, b in zip(lhs, rhs))
      if factors:
        value = value * factor[0]
      if steps > 1:
        value = jnp.where(step == 0, value, partial[at, :] + value)
        partial[at, :] = value

      @pl.when(step == steps - 1)
      def _():
        for c in range(lanes):
          staging[pl.ds(c, size, stride=lanes), :] = value[:, c * 128:(c + 1) * 128]
        add(offset, size)

    @pl.when(visit < num)
    def _():
      visits_lib.for_row_chunks(visits.rows(jnp.minimum(visit, num - 1)), _chunk(tile), chunk)

    @pl.when((visit >= num) & (step == steps - 1))
    def _():
      first = pl.multiple_of((visit - num) * write, write)
      for c in range(lanes):
        partial[pl.ds(0, write), c * 128:(c + 1) * 128] = total[pl.ds(first, write), c, :]
      out[...] = partial[pl.ds(0, write), :].astype(out.dtype)

  def last(v):  # the steps that write need nothing new
    return visits_lib.where(v < num, v, num - 1)

  def column(visits, v, f):  # of the contraction
    return visits_lib.where(v < num, visits.column(last(v), f, steps), steps - 1)

  def rhs_index(visits, d, v, f):
    expert, f = visits.expert(last(v)), column(visits, v, f)
    return (expert, d, f) if transposed else (expert, f, d)

  rhs_block = (1, block, contract) if transposed else (1, contract, block)
  scalars = _scalars(tile, lambda d, v, f: last(v))
  flops = 2 * num * tile * width * hidden_size * len(pairs)
  moved = (num * tile * hidden_size * (width // block) + pairs[0][1].size) * 2 * len(pairs) + num_tokens * width * 2
  return _call(
      body, visits, (width // block, num + num_tokens // write, steps),
      [scalars] * (1 if scale is None else 2)
      + [_Block((1, 1, block), lambda visits, d, v, f: (visits.expert(last(v)), 0, d))] * len(factors)
      + [_Block((tile, contract), lambda visits, d, v, f: (visits.tile(last(v)), column(visits, v, f)))] * len(pairs)
      + [_Block(rhs_block, rhs_index)] * len(pairs),
      [_Block((write, block), lambda visits, d, v, f: (visits_lib.where(v < num, 0, v - num), d))],
      [jax.ShapeDtypeStruct((num_tokens, width), jnp.bfloat16)],
      [pltpu.VMEM((num_tokens + 1, lanes, 128), jnp.float32),
       pltpu.VMEM((max(tile, write) if steps > 1 else write, block), jnp.float32),
       pltpu.VMEM((_chunk(tile) * lanes, 128), jnp.float32)],
      (token, *([] if scale is None else [scale]), *factors, *(p[0] for p in pairs), *(p[1] for p in pairs)), blocks,
      "experts_combine", pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved), interpret)[0]


def hidden_gradient(visits, grad, token, scale, down, products, *, activation: str, blocks: Blocks, interpret=False):
  """Gather of the output's gradient -> down transposed -> gradient of the activation and of the gates.

  Args:
    grad: [T + 1, D / 256, 128] uint32, packed.
    token: [V, 1, tile_rows] int32.
    scale: [V, 1, tile_rows] float32, the gate of each row; 0 where there is none.
    down: [E, F, D] bfloat16.
    products: (gate, up) or (gate,) of `hidden`, each [V x tile_rows, F].

  Returns:
    (gradients of the products, scaled hidden rows [V x tile_rows, F] bfloat16, gradient of scale [V, 1, tile_rows] float32).
  """
  columns, width = down.shape[1:]
  num, tile, block = token.shape[0], blocks.tile_rows, blocks.hidden
  parts, most, piece = len(products), _chunk(tile), min(128, tile)

  def body(visits, token, scale, grad, down, *refs):
    values, grads, scaled, out_scale = refs[:parts], refs[parts:2 * parts], refs[2 * parts], refs[2 * parts + 1]
    staging, gathered, weight, sums = refs[-4:]
    rows, step = visits.rows(pl.program_id(0)), pl.program_id(1)

    @pl.when(step == 0)
    def _():
      visits_lib.gather(grad, token, rows, staging, gathered)
      for first in range(0, tile, piece):  # along lanes -> [piece, 128] with equal lanes
        lanes = pl.ds(first, piece)
        weight[lanes, :] = jnp.broadcast_to(scale[0, :, lanes], (128, piece)).T
      sums[...] = jnp.zeros(sums.shape, sums.dtype)

    def chunk(offset, size):
      part = visits_lib.read_rows(gathered, offset, size)

      def some(start, count):
        at = (pl.ds(offset, size), pl.ds(start, count))
        back = _dot(part, down[0, pl.ds(start, count), :], 1, 1)
        forward = [ref[at].astype(jnp.float32) for ref in values]
        weights = jnp.tile(weight[pl.ds(offset, size), :], (1, count // 128))
        if activation == "swiglu":
          gate, up = forward
          share = jax.nn.sigmoid(gate)
          silu = gate * share
          hidden_rows, weighted = silu * up, back * weights
          results = (weighted * up * (share + silu * (1 - share)), weighted * silu)
        else:
          hidden_rows, pull = jax.vjp(jax.nn.gelu, forward[0])
          results = pull(back * weights)
        for ref, value in zip(grads, results):
          ref[at] = value.astype(ref.dtype)
        scaled[at] = (hidden_rows * weights).astype(scaled.dtype)
        products = hidden_rows * back
        sums[pl.ds(offset, size), :] += sum(products[:, c:c + 128] for c in range(0, count, 128))

      _columns(block, some)

    visits_lib.for_row_chunks(rows, most, chunk)

    @pl.when((step == columns // block - 1) & (rows > 0))  # an empty visit still holds the block of the one before
    def _():
      for first in range(0, tile, piece):
        at = pl.ds(first, piece)
        out_scale[0, :, at] = jnp.sum(sums[at, :].T, 0, keepdims=True)

  row_block = _Block((tile, block), lambda visits, v, j: (visits.tile(v), visits.column(v, j, columns // block)))
  scale_block = _Block((1, 1, tile), lambda visits, v, j: (visits.tile(v), 0, 0))
  rows_shape = jax.ShapeDtypeStruct((num * tile, columns), jnp.bfloat16)
  moved = grad.size * 4 + down.size * 2 + (2 * parts + 1) * num * tile * columns * 2
  out = _call(
      body, visits, (num, columns // block),
      [_scalars(tile, lambda v, j: v), scale_block, _resident(grad),
       _Block((1, block, width), lambda visits, v, j: (visits.expert(v), visits.column(v, j, columns // block), 0))]
      + [row_block] * parts,
      [row_block] * (parts + 1) + [scale_block],
      [rows_shape] * (parts + 1) + [jax.ShapeDtypeStruct(scale.shape, jnp.float32)],
      visits_lib.gather_scratch(tile, width) + [pltpu.VMEM((tile, 128), jnp.float32)] * 2,
      (token, scale, grad, down, *products), blocks, "experts_hidden_gradient",
      pl.CostEstimate(flops=2 * num * tile * width * columns, transcendentals=num * tile * columns, bytes_accessed=moved),
      interpret)
  return out[:parts], out[parts], out[parts + 1]


def weight_gradient(visits, x, token, rows, num_groups: int, *, transposed: bool, blocks: Blocks, interpret=False):
  """For each expert the matmul of gathered tokens, transposed, with its rows.

  Args:
    x: [T + 1, D / 256, 128] uint32, packed.
    token: [V, 1, tile_rows] int32.
    rows: [V x tile_rows, F] bfloat16; zero where a row of the granule does not exist.
    num_groups: E.
    transposed: return [E, F, D] instead of [E, D, F].

  Returns:
    [E, D, F] bfloat16, accumulated in float32; 0 for an expert without rows.
  """
  columns, width = rows.shape[1], x.shape[1] * 256
  num, tile, block = token.shape[0], blocks.tile_rows, blocks.gradient

  def body(visits, token, x, rows, out, staging, gathered, total):
    visit = pl.program_id(1)
    visits_lib.gather(x, token, visits.rows(visit), staging, gathered)

    @pl.when(visits.is_first(visit))
    def _():
      total[...] = jnp.zeros(total.shape, total.dtype)

    def chunk(offset, size):
      tokens, part = visits_lib.read_rows(gathered, offset, size), rows[pl.ds(offset, size), :]
      total[...] += _dot(part, tokens, 0, 0) if transposed else _dot(tokens, part, 0, 0)

    visits_lib.for_row_chunks(visits.rows(visit), _chunk(tile, _GRADIENT_CHUNK), chunk)

    @pl.when(visits.is_last(visit))
    def _():
      out[0] = total[...].astype(out.dtype)

  shape, out_block = (num_groups, width, columns), (1, width, block)
  if transposed:
    shape, out_block = (num_groups, columns, width), (1, block, width)

  def out_index(visits, j, v):
    return (visits.group(v), j, 0) if transposed else (visits.group(v), 0, j)

  moved = (x.size * 2 + num * tile * columns + num_groups * width * columns) * 2
  return _call(
      body, visits, (columns // block, num),
      [_scalars(tile, lambda j, v: v), _resident(x), _Block((tile, block), lambda visits, j, v: (visits.tile(v), j))],
      [_Block(out_block, out_index, buffers=blocks.gradient_buffers)], [jax.ShapeDtypeStruct(shape, jnp.bfloat16)],
      visits_lib.gather_scratch(tile, width) + [pltpu.VMEM(out_block[1:], jnp.float32)],
      (token, x, rows), blocks, "experts_weight_gradient",
      pl.CostEstimate(flops=2 * num * tile * width * columns, transcendentals=0, bytes_accessed=moved), interpret)[0]


# --------------------------------------------------------------------------------------------------------------- op


def fused_experts(x, gates, tiles: Tiles, weights, *, activation: str, blocks: Blocks, forward_weights=None,
                  interpret=False) -> jax.Array:
  """The experts' block on the tokens of one device, differentiable in x, gates and weights.

  Args:
    x: [T, D] bfloat16.
    gates: [T, K] float32.
    tiles: from `visits.make` with blocks.tile_rows.
    weights: (gate, up, down), up None for GELU; [E, D, F] and [E, F, D] bfloat16.
    activation: swiglu | gelu.
    forward_weights: `weights` as `Quantized`, which the forward reads in their place; the gradient reads `weights`.
    interpret: as in `pallas_call`.

  Returns:
    [T, D] bfloat16.

  Raises:
    ValueError: shapes or dtypes that the kernels do not take (`supports` gives the reason beforehand).
  """
  reason = supports(x.shape[1], weights[0].shape[2], x.dtype)
  if reason:
    raise ValueError(reason)
  tokens = x.shape[0]
  if not tokens:
    return x
  x = jnp.pad(x, ((0, -tokens % 128), (0, 0)))  # row `tokens`, which stands for no row, stays zero
  return _fused(activation, blocks, interpret, x, gates, tiles, tuple(weights),
                None if forward_weights is None else tuple(forward_weights))[:tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(activation, blocks, interpret, x, gates, tiles, weights, quantized):
  return _forward(activation, blocks, interpret, x, gates, tiles, weights, quantized, residuals=False)[0]


def _row_scale(gates, tiles: Tiles):
  """[V, 1, tile_rows] float32: each row's gate, 0 where there is no row."""
  return jnp.append(gates.reshape(-1), 0.0)[tiles.selection]


def _forward(activation, blocks, interpret, x, gates, tiles, weights, quantized, residuals: bool = True):
  gate, up, down = weights if quantized is None else quantized
  into = (gate,) if up is None else (gate, up)
  packed, scale = visits_lib.pack(x), _row_scale(gates, tiles)
  rows, *products = hidden(tiles, packed, tiles.token, into, activation=activation, blocks=blocks, residuals=residuals,
                           interpret=interpret)
  out = combine(tiles, [(rows, down)], tiles.token, scale, x.shape[0], transposed=False, blocks=blocks, interpret=interpret)
  return out, (packed, scale, gates, tiles, weights, tuple(products))


def _backward(activation, blocks, interpret, saved, grad):
  packed, scale, gates, tiles, (gate, up, down), products = saved
  num_experts, num_tokens = gate.shape[0], grad.shape[0]
  into = (gate,) if up is None else (gate, up)
  options = dict(blocks=blocks, interpret=interpret)
  packed_grad = visits_lib.pack(grad.astype(jnp.bfloat16))
  grads, scaled, grad_scale = hidden_gradient(tiles, packed_grad, tiles.token, scale, down, products,
                                              activation=activation, **options)
  grad_x = combine(tiles, list(zip(grads, into)), tiles.token, None, num_tokens, transposed=True, **options)
  grad_into = [weight_gradient(tiles, packed, tiles.token, g, num_experts, transposed=False, **options) for g in grads]
  grad_down = weight_gradient(tiles, packed_grad, tiles.token, scaled, num_experts, transposed=True, **options)
  grad_gates = jnp.append(grad_scale.reshape(-1), 0.0)[tiles.place].reshape(gates.shape)
  return grad_x, grad_gates, None, (grad_into[0], grad_into[1] if up is not None else None, grad_down), None


_fused.defvjp(_forward, _backward)
