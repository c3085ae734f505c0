"""What the weights alone tell: statistics of a leaf, and how the routers and experts of each layer are."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np

from moe import stored

_SKETCH = 32  # x 32 random sums an expert, from which its likeness to others is guessed before it is computed
_PAIRS = 8  # of a layer, computed exactly
_DEAD = 1e-3  # of the layer's median norm


def statistics(source: stored.Source, name: str, by_expert: bool = False) -> list[dict]:
  """Norm, mean, largest magnitude, zeros, NaN and Inf of a leaf; of finite elements where some are not.

  Args:
    by_expert: a row for each layer and expert where the leaf is a stack of experts' matrices.
  """
  shape = source.leaves[name].shape
  kept = 2 if by_expert and _is_expert_stack(name, shape) else 0
  groups = shape[:kept]
  square, total, largest = np.zeros(groups), np.zeros(groups), np.zeros(groups)
  zeros, nan, inf = (np.zeros(groups, np.int64) for _ in range(3))
  for begin, block in stored.blocks(source, name):
    where = tuple(slice(b, b + n) for b, n in zip(begin[:kept], block.shape[:kept]))
    axes = tuple(range(kept, block.ndim))
    values = block.astype(np.float32) if block.dtype.itemsize <= 4 else block.astype(np.float64)
    zeros[where] += np.sum(values == 0, axes)
    finite = np.isfinite(values)
    if not finite.all():
      nan[where] += np.sum(np.isnan(values), axes)
      inf[where] += np.sum(np.isinf(values), axes)
      values = np.where(finite, values, 0)
    total[where] += np.sum(values, axes, dtype=np.float64)
    magnitude = np.abs(values, out=values)
    largest[where] = np.maximum(largest[where], np.max(magnitude, axes, initial=0))
    square[where] += np.sum(np.square(magnitude, out=magnitude), axes, dtype=np.float64)
  count = max(int(np.prod(shape[kept:], dtype=np.int64)), 1)
  return [{"name": name + (f"[{','.join(map(str, at))}]" if at else ""), "norm": float(np.sqrt(square[at])),
           "rms": float(np.sqrt(square[at] / count)), "mean": float(total[at] / count), "max_abs": float(largest[at]),
           "zeros": int(zeros[at]), "nan": int(nan[at]), "inf": int(inf[at])} for at in np.ndindex(*groups)]


def _is_expert_stack(name: str, shape) -> bool:
  return len(shape) == 4 and name.rpartition(".")[0].endswith("moe") and name.rpartition(".")[2] in ("gate", "up", "down")


class Layer(NamedTuple):
  """One layer with experts."""

  number: int  # among those
  router_norms: np.ndarray  # [E] of each expert's column of the router
  expert_norms: np.ndarray  # [E] of all its matrices together
  closest: tuple[tuple[int, int], float]  # the two whose first matrices are most alike, and their cosine
  alike: list[tuple[int, int, float]]  # pairs from the asked cosine on, among the closest ones
  bias: np.ndarray | None  # [E] selection bias
  without_gradient: list[int]  # experts whose second moments are all zero

  def troubles(self) -> list[str]:
    """What is wrong, a line each."""
    found = []
    for what, norms in (("router column", self.router_norms), ("matrices", self.expert_norms)):
      middle = np.median(norms[np.isfinite(norms)]) if np.isfinite(norms).any() else 0.0
      dead = [i for i, n in enumerate(norms) if not (np.isfinite(n) and n > _DEAD * middle)]
      if dead:
        found.append(f"layer {self.number}: the {what} of expert {', '.join(map(str, dead[:8]))} is all but zero or not finite")
    found += [f"layer {self.number}: experts {a} and {b} are alike, cosine {c:.4f}" for a, b, c in self.alike]
    if self.without_gradient:
      found.append(f"layer {self.number}: expert {', '.join(map(str, self.without_gradient[:8]))} never had a gradient")
    return found


def layers(source: stored.Source, alike: float) -> list[Layer]:
  """Every layer that routes, by our names (`...layers.experts.moe`); [] where there is none."""
  first = next((name for name in source.leaves if name.endswith("layers.experts.moe.gate") and ".mu." not in name
                and ".nu." not in name), None)
  if first is None:
    return []
  prefix = first.removesuffix("gate")
  count, experts = source.leaves[first].shape[:2]
  matrices = [prefix + part for part in ("gate", "up", "down") if prefix + part in source.leaves]
  rows = [statistics(source, name, True) for name in matrices]
  norms = np.sqrt(sum(np.square([row["norm"] for row in table]) for table in rows))
  sick = np.sum([[row["nan"] + row["inf"] for row in table] for table in rows], 0) > 0
  norms = np.where(sick, np.nan, norms).reshape(count, experts)
  router = stored.whole(source, _router(source, prefix, "weight")).astype(np.float32)
  router = np.broadcast_to(router.reshape(-1, *router.shape[-2:]), (count, *router.shape[-2:]))
  columns = np.sqrt(np.sum(np.square(router.reshape(count, router.shape[1], experts, -1)), (1, 3)))
  bias_name = _router(source, prefix, "selection_bias")
  bias = stored.whole(source, bias_name) if bias_name else None
  sketch = _sketches(source, first)
  idle = _without_gradient(source, prefix)
  found = []
  for number in range(count):
    pairs = _closest_pairs(source, first, number, sketch[number])
    found.append(Layer(number, columns[number], norms[number], (pairs[0][:2], pairs[0][2]) if pairs else ((0, 0), 1.0),
                       [pair for pair in pairs if pair[2] >= alike],
                       None if bias is None else np.atleast_2d(bias)[number % len(np.atleast_2d(bias))], idle[number]))
  return found


def _router(source: stored.Source, prefix: str, part: str) -> str | None:
  """The router of the layers, or the pre-gate's."""
  names = (f"{prefix}router.{part}", f"{prefix.partition('layers.')[0]}pre_gate.router.{part}")
  return next((name for name in names if name in source.leaves), None)


def _sketches(source: stored.Source, name: str) -> np.ndarray:
  """[L, E, 1024] float32: random sums S^T W R of each expert's matrix; their cosines are near the matrices'."""
  count, experts, rows, columns = source.leaves[name].shape
  rng = np.random.default_rng(0)
  left, right = (rng.choice(np.float32([-1, 1]), (n, _SKETCH)) for n in (rows, columns))
  sums = np.zeros((count, experts, _SKETCH, _SKETCH), np.float32)
  for (l, e, r, c), block in stored.blocks(source, name):
    x = np.nan_to_num(block.astype(np.float32))
    part = np.matmul(left[r : r + x.shape[2]].T, np.matmul(x, right[c : c + x.shape[3]]))
    sums[l : l + x.shape[0], e : e + x.shape[1]] += part
  return sums.reshape(count, experts, -1)


def _closest_pairs(source: stored.Source, name: str, layer: int, sketch: np.ndarray) -> list[tuple[int, int, float]]:
  """The pairs that look most alike with their cosines, largest first."""
  unit = sketch / np.maximum(np.linalg.norm(sketch, axis=-1, keepdims=True), 1e-30)
  guessed = np.triu(unit @ unit.T + 2, 1) - 2  # what is left out is -2
  _, _, rows, columns = source.leaves[name].shape

  def expert(i: int) -> np.ndarray:
    return source.read(name, (layer, i, 0, 0), (layer + 1, i + 1, rows, columns)).astype(np.float32).ravel()

  found = []
  for flat in np.argsort(guessed, axis=None)[::-1][: min(_PAIRS, len(unit) * (len(unit) - 1) // 2)]:
    i, j = divmod(int(flat), len(unit))
    a, b = expert(i), expert(j)
    scale = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    found.append((i, j, float(a @ b) / scale if scale else 0.0))
  return sorted(found, key=lambda pair: -pair[2])


def _without_gradient(source: stored.Source, prefix: str) -> list[list[int]]:
  """For each layer the experts whose squared gradients (Adam's nu) were always zero; none where they are not kept."""
  tail = prefix.partition("layers.")[1] + prefix.partition("layers.")[2] + "down"
  name = next((n for n in source.leaves if n.endswith(tail) and ".nu." in n), None)
  count, experts = source.leaves[prefix + "gate"].shape[:2]
  if name is None:
    return [[] for _ in range(count)]
  rows = statistics(source, name, True)
  step_done = any(row["max_abs"] > 0 for row in rows)
  return [[e for e in range(experts) if step_done and rows[l * experts + e]["max_abs"] == 0] for l in range(count)]


def draw(found: list[Layer], path: pathlib.Path) -> None:
  """Layer x expert heatmaps of the norms, and of the bias where there is one."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  pictures = [("norm of the router's columns", [layer.router_norms for layer in found]),
              ("norm of the experts", [layer.expert_norms for layer in found])]
  if found[0].bias is not None:
    pictures.append(("selection bias", [layer.bias for layer in found]))
  figure, axes = plt.subplots(1, len(pictures), figsize=(5 * len(pictures), 1.2 + 0.3 * max(len(found), 6)), squeeze=False,
                              layout="constrained")
  for axis, (title, values) in zip(axes[0], pictures):
    image = axis.imshow(np.array(values), aspect="auto", cmap="viridis")
    axis.set(title=title, xlabel="expert", ylabel="layer")
    axis.locator_params(integer=True)
    figure.colorbar(image, ax=axis)
  figure.savefig(path, dpi=110)
  plt.close(figure)
