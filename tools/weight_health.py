"""What the weights alone tell: statistics of a leaf, and how the routers and experts of each layer are."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from etils import epath
import numpy as np

from moe import config
from moe import jsonl
from moe import metrics
from moe import stored

_SKETCH = 32  # x 32 random sums an expert, from which its likeness to others is guessed before it is computed
_PAIRS = 8  # of a layer, computed exactly
_DEAD = 1e-3  # of the layer's median norm
# A norm is an outlier where it is at least this many times its layer's median, or as small a part of it, and as many robust
# standard deviations (of the logarithms, over all layers) away. Among 1,000 normal values none is at 6.
_OUTLIER_RATIO, _OUTLIER_DEVIATIONS = 4.0, 6.0
_LOAD_STEPS = 50  # at least, before a checkpoint, over which the run's own load is summed
_LOAD_BYTES = 8 << 20  # of the end of the records, looked at first


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


class Load(NamedTuple):
  """What a run recorded of one layer before the checkpoint."""

  first_step: int
  last_step: int
  counts: np.ndarray  # [E] selections

  @property
  def over_mean(self) -> np.ndarray:
    return self.counts / max(self.counts.mean(), 1e-9)


class Layer(NamedTuple):
  """One layer with experts."""

  name: str  # with the model's own number; `MoE layer 1 of 58` where the checkpoint has no config
  number: int  # the model's own, else among the layers with experts, from 0
  router_norms: np.ndarray  # [E] of each expert's column of the router
  expert_norms: np.ndarray  # [E] of all its matrices together
  router_outliers: list[int]  # experts whose column is far from the others', see `_outliers`
  expert_outliers: list[int]  # experts whose matrices are
  closest: tuple[tuple[int, int], float]  # the two whose first matrices are most alike, and their cosine
  alike: list[tuple[int, int, float]]  # pairs from the asked cosine on, among the closest ones
  bias: np.ndarray | None  # [E] selection bias
  without_gradient: list[int]  # experts whose second moments are all zero
  load: Load | None  # where the checkpoint lies in a run with records of it

  def troubles(self) -> list[str]:
    """What is wrong, a line each."""
    found = []
    for what, norms, outliers in (("router column", self.router_norms, self.router_outliers),
                                  ("matrices", self.expert_norms, self.expert_outliers)):
      finite = np.isfinite(norms)
      middle = np.median(norms[finite]) if finite.any() else 0.0
      broken = np.flatnonzero(~finite)
      dead = np.flatnonzero(finite & (norms <= _DEAD * middle))
      if len(broken):
        found.append(f"{self.name}, expert {_listed(broken)}: {what} not finite")
      if len(dead):
        found.append(f"{self.name}, expert {_listed(dead)}: {what} all but zero")
      found += [f"{self.name}, expert {i}: {what} of {_times(norms[i] / middle)} the norm of the layer's median"
                f"{self._share(i)}" for i in outliers[:8]]
    found += [f"{self.name}: experts {a} and {b} are alike, cosine {c:.4f}" for a, b, c in self.alike]
    if self.without_gradient:
      found.append(f"{self.name}, expert {_listed(self.without_gradient)}: no gradient, the second moments are all zero")
    if self.load is not None and self.load.counts.mean() >= 100:  # else chance
      idle = np.flatnonzero(self.load.counts == 0)
      if len(idle):
        found.append(f"{self.name}, expert {_listed(idle)}: chosen by no token in steps {self.load.first_step} to "
                     f"{self.load.last_step}")
    return found

  def _share(self, expert: int) -> str:
    if self.load is None:
      return ""
    return (f"; it took {self.load.over_mean[expert]:.2g} times the mean load in steps {self.load.first_step} to "
            f"{self.load.last_step}")


def _listed(experts) -> str:
  return ", ".join(map(str, experts[:8])) + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")


def _times(ratio: float) -> str:
  return f"{ratio:.3g} times" if ratio >= 1 else f"1/{1 / ratio:.3g}"


def _outliers(norms: np.ndarray) -> list[list[int]]:
  """For each layer the experts whose norm is far from the median of their layer, in norms [L, E]; dead ones and those that are
  not finite are left out, for they are named as such."""
  finite = np.isfinite(norms)
  middle = np.nanmedian(np.where(finite, norms, np.nan), -1, keepdims=True) if finite.any() else np.ones((len(norms), 1))
  alive = finite & (norms > _DEAD * middle)
  distance = np.abs(np.log(np.where(alive, norms, 1.0) / np.where(middle > 0, middle, 1.0)))
  spread = 1.4826 * np.median(distance[alive]) if alive.any() else 0.0
  limit = max(np.log(_OUTLIER_RATIO), _OUTLIER_DEVIATIONS * spread)
  return [np.flatnonzero(row).tolist() for row in alive & (distance >= limit)]


def recorded_load(folder: epath.Path, step: int | None) -> metrics.Window | None:
  """The selections [L, E] of the last steps before a checkpoint, from the records of the run in which it lies; None where it
  lies in none, or its records have no load."""
  place = epath.Path(folder)
  run_dir = next((up for up in (place, *list(place.parents)[:3]) if (up / "metrics.jsonl").exists()), None)
  if run_dir is None or step is None:
    return None
  path = run_dir / "metrics.jsonl"
  windows = _windows(jsonl.read_end(path, _LOAD_BYTES), step) if jsonl.is_local(path) else []
  windows = windows or _windows(jsonl.read(path), step)
  left_open = metrics.Window.from_record(jsonl.read_one(metrics.latest_path(run_dir, "load")))
  if left_open and left_open.last_step < step and (not windows or windows[-1].last_step < left_open.first_step):
    windows.append(left_open)
  total = None
  for window in reversed(windows):
    if total is not None and (total.steps >= _LOAD_STEPS or window.counts.shape != total.counts.shape):
      break
    total = window if total is None else metrics.Window(window.first_step, total.last_step, window.counts + total.counts)
  return total


def _windows(records, step: int) -> list[metrics.Window]:
  """Those of the steps before `step`."""
  windows: list[metrics.Window] = []
  for record in records:
    window = metrics.Window.from_record(record) if record.get("kind") == "load" else None
    if window and window.last_step < step:
      metrics.append_window(windows, window)
  return windows


def layers(source: stored.Source, alike: float, model: config.Model | None = None,
           load: metrics.Window | None = None) -> list[Layer]:
  """Every layer with experts, by our names (`...layers.experts.moe`); [] where there is none.

  Args:
    source: the arrays.
    alike: the cosine from which on two experts are alike.
    model: the checkpoint's config, which knows the dense layers.
    load: see `recorded_load`.
  """
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
  router_outliers, expert_outliers = _outliers(columns), _outliers(norms)
  known = load is not None and load.counts.shape[1] == experts and len(load.counts) in (1, count)  # 1: a pre-gate
  found = []
  for i in range(count):
    pairs = _closest_pairs(source, first, i, sketch[i])
    found.append(Layer(
        name=model.moe_layer_name(i) if model else f"MoE layer {i + 1} of {count}",
        number=model.moe_layer_number(i) if model else i,
        router_norms=columns[i], expert_norms=norms[i],
        router_outliers=router_outliers[i], expert_outliers=expert_outliers[i],
        closest=(pairs[0][:2], pairs[0][2]) if pairs else ((0, 0), 1.0),
        alike=[pair for pair in pairs if pair[2] >= alike],
        bias=None if bias is None else np.atleast_2d(bias)[i % len(np.atleast_2d(bias))],
        without_gradient=idle[i],
        load=Load(load.first_step, load.last_step, load.counts[i % len(load.counts)]) if known else None))
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
  if found[0].load is not None:
    steps = f"steps {found[0].load.first_step} to {found[0].load.last_step}"
    pictures.append((f"load over the mean, {steps}", [layer.load.over_mean for layer in found]))
  figure, axes = plt.subplots(1, len(pictures), figsize=(5 * len(pictures), 1.2 + 0.3 * max(len(found), 6)), squeeze=False,
                              layout="constrained")
  for axis, (title, values) in zip(axes[0], pictures):
    image = axis.imshow(np.array(values), aspect="auto", cmap="viridis")
    axis.set(title=title, xlabel="expert", ylabel="layer")
    axis.locator_params(integer=True)
    if len(found) <= 32:
      axis.set_yticks(range(len(found)), [layer.number for layer in found])
    figure.colorbar(image, ax=axis)
  figure.savefig(path, dpi=110)
  plt.close(figure)
