"""Looks into a checkpoint: `python -m tools.inspect_checkpoint VERB PATH [--json]`

PATH is a run (its newest checkpoint), a step, an Orbax item, a Hugging Face directory or a .safetensors file, here or on
gs://; with --live it is a run under --supervise, and its committed snapshot is read out of the hosts' memory. Arrays are read
in blocks and JAX is not loaded, but for `convert`.

Exit code 0: fine; 1: it differs or is unhealthy (NaN, a wrong digest, a dead expert); 2: it cannot be read.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import sys

from etils import epath
import numpy as np

from moe import config
from moe import hugging_face
from moe import sizes
from moe import stored
from moe.errors import UserError
from tools import conversion
from tools import leaf_names
from tools import terminal
from tools import weight_health
from tools.terminal import DIFFERS, FINE

_PIECE = 1 << 21  # elements compared at a time


def main(argv: list[str] | None = None) -> int:
  arguments = _parser().parse_args(argv)
  return arguments.verb(arguments)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m tools.inspect_checkpoint", description=__doc__.splitlines()[0],
                                   epilog="\n".join(__doc__.splitlines()[2:]), formatter_class=argparse.RawTextHelpFormatter)
  verbs = parser.add_subparsers(required=True, metavar="VERB")

  def verb(function, name: str, *, filtered: bool = False):
    made = verbs.add_parser(name, help=function.__doc__.splitlines()[0], description=function.__doc__)
    made.set_defaults(verb=function)
    made.add_argument("path")
    made.add_argument("--json", action="store_true", help="one JSON document")
    if name not in ("config", "verify"):
      made.add_argument("--live", action="store_true", help="the snapshot in memory of a run that is alive")
    if filtered:
      made.add_argument("--filter", metavar="NAMES", default="*",
                        help="leaves, with commas between: patterns such as 'params.*gate*', parts of names, or words such as\n"
                             "'first moment router' (see `ls`)" if name != "convert" else "a pattern such as 'params.*gate*'")
      made.add_argument("--limit", type=int, metavar="N", help="rows to show")
    return made

  made = verb(ls, "ls", filtered=True)
  made.add_argument("--sort", choices=("name", "bytes"), default="name")
  verb(summary, "summary")
  made = verb(tree, "tree", filtered=True)
  made.add_argument("--depth", type=int, default=3)
  made = verb(stats, "stats", filtered=True)
  made.add_argument("--sort", choices=("name", "norm", "max"), default="name")
  made.add_argument("--experts", action="store_true", help="a row for each expert of each layer")
  made = verb(experts, "experts")
  made.add_argument("--alike", type=float, default=0.9, metavar="COSINE", help="from which on two experts are alike")
  made.add_argument("--png", type=pathlib.Path, metavar="FILE", help="heatmaps")
  made = verb(cat, "cat")
  made.add_argument("leaf", help="name or what finds it, with a slice if wanted: 'moe.gate[3,:4]'")
  made.add_argument("--out", type=pathlib.Path, metavar="FILE.npy")
  made = verb(diff, "diff", filtered=True)
  made.add_argument("other")
  made.add_argument("--rtol", type=float, default=0.0)
  made.add_argument("--atol", type=float, default=0.0)
  made = verb(show_config, "config")
  made.add_argument("other", nargs="?", help="show the differences from this one")
  verb(verify, "verify")
  made = verb(convert, "convert", filtered=True)
  made.add_argument("--out", required=True, metavar="DIR", help="a new directory")
  made.add_argument("--format", choices=("checkpoint", "safetensors"), default="checkpoint")
  made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of all float leaves")
  made.add_argument("--params_only", action="store_true", help="without the optimizer's state")
  made.add_argument("--unstack", action="store_true", help="a leaf a layer: layers.3.experts... for layers.experts...[3]")
  made.add_argument("--stack", action="store_true", help="the way back")
  made.add_argument("--map", action="append", default=[], metavar="REGEX=NAME", help="renames leaves; repeatable, in order")
  made.add_argument("--chunk_mb", type=int, default=64, help="largest chunk of the arrays written")
  return parser


def _find(arguments) -> stored.Found:
  if not arguments.live:
    return stored.find(arguments.path)
  from moe.snapshot import reader

  source = reader.Live(arguments.path)
  run_dir = epath.Path(arguments.path)
  return stored.Found(source, run_dir, source.step, json.loads((run_dir / "config.json").read_text()))


def _as_ours(found: stored.Found) -> tuple[stored.Source, config.Model | None]:
  """A Hugging Face model of a known family under our names; the rest as it is."""
  if found.config and "model" in found.config:
    return found.source, config.from_dict(config.Run, found.config).model
  if found.config and found.config.get("model_type") in hugging_face.FAMILIES:
    model = hugging_face.read_config(found.config)
    return hugging_face.AsOurs(found.source, model, hugging_face.family_of(found.config)), model
  return found.source, None


def _chosen(found: stored.Found, arguments) -> list[stored.Leaf]:
  return [found.source.leaves[name] for name in leaf_names.select(found.source.leaves, arguments.filter, str(found.folder))]


def _title(found: stored.Found) -> str:
  return f"{found.folder}" + (f", step {found.step}" if found.step is not None else "")


# --------------------------------------------------------------------------------------------------------------- verbs


def ls(arguments) -> int:
  """Name, shape, dtype, chunk, sharding and bytes of every leaf, and what it is."""
  found = _find(arguments)
  leaves = _chosen(found, arguments)
  if arguments.sort == "bytes":
    leaves.sort(key=lambda leaf: -leaf.bytes)
  leaves = leaves[: arguments.limit]
  listed = [{"step": int(p.name), "read_back": stored.read_back(p)} for p in reversed(stored.steps(arguments.path))]
  if arguments.json:
    terminal.as_json({"path": str(found.folder), "step": found.step, "steps": listed, "leaves": [
        {**leaf._asdict(), "bytes": leaf.bytes, "is": leaf_names.plain(leaf.name)} for leaf in leaves]})
    return FINE
  if listed:
    print("steps: " + ", ".join(f"{row['step']} ({row['read_back']})" for row in listed))
  terminal.table(("name", "shape", "dtype", "bytes", "chunk", "sharding", "is"),
                 [(leaf.name, leaf.shape, leaf.dtype, leaf.bytes, "whole" if leaf.chunk == leaf.shape else leaf.chunk,
                   leaf.sharding, leaf_names.plain(leaf.name)) for leaf in leaves], _title(found),
                 left=("name", "dtype", "sharding", "is"))
  return FINE


def summary(arguments) -> int:
  """Parameters in all, active for a token, of an expert, by group; optimizer bytes; step and tokens seen."""
  found = _find(arguments)
  told = _summary(found)
  if arguments.json:
    terminal.as_json(told)
    return FINE
  print(_title(found))
  terminal.table(("of the state", "leaves", "elements", "bytes"),
                 [(name, *row.values()) for name, row in told["state"].items()], left=("of the state",))
  if told["parameters"]:
    print()
    terminal.table(("parameters", "count", "share"), [
        (name, value, f"{value / told['parameters']['total']:.1%}") for name, value in told["parameters"].items()],
        left=("parameters",))
  else:
    print("no config here: active parameters are not known")
  if told["tokens_seen"] is not None:
    print(f"\nstep {told['step']}: {terminal.count(told['tokens_seen'])} token positions seen, "
          f"{told['tokens_seen'] / told['parameters']['active']:.2g} for each active parameter")
  return FINE


def _summary(found: stored.Found) -> dict:
  state: dict[str, dict] = collections.defaultdict(lambda: {"leaves": 0, "elements": 0, "bytes": 0})
  for leaf in found.source.leaves.values():
    group = "params" if found.source.kind == "safetensors" else leaf.name.partition(".")[0]
    for key, value in (("leaves", 1), ("elements", leaf.size), ("bytes", leaf.bytes)):
      state[group][key] += value
  told = {"path": str(found.folder), "step": found.step, "state": dict(state), "parameters": {}, "tokens_seen": None}
  try:
    m = _as_ours(found)[1]
  except hugging_face.InteropError as error:  # the arrays can be counted all the same
    print(f"{error}: active parameters are not known", file=sys.stderr)
    m = None
  if m is not None:
    s = sizes.sizes(m)
    told["parameters"] = {"total": s.total, "active": s.active, "embedding": s.embedding, "attention": s.attention,
                          "dense and shared": s.dense, "routed experts": s.routed, "routers": s.router, "norms": s.other,
                          "one expert of one layer": s.routed // (m.num_moe_layers * m.experts.num_experts)}
    if found.step is not None and "model" in found.config:
      told["tokens_seen"] = found.step * config.from_dict(config.Run, found.config).tokens_per_step
  return told


def tree(arguments) -> int:
  """Elements and bytes by part of the name, to a depth."""
  found = _find(arguments)
  parts: dict[tuple, list[int]] = {}
  for leaf in _chosen(found, arguments):
    path = tuple(leaf.name.split("."))
    for depth in range(1, min(len(path), arguments.depth) + 1):
      row = parts.setdefault(path[:depth], [0, 0, 0])
      for i, value in enumerate((1, leaf.size, leaf.bytes)):
        row[i] += value
  rows = [(path, *parts[path]) for path in sorted(parts)][: arguments.limit]
  if arguments.json:
    terminal.as_json([{"name": ".".join(path), "leaves": n, "elements": size, "bytes": b} for path, n, size, b in rows])
    return FINE
  terminal.table(("name", "leaves", "elements", "bytes"),
                 [("  " * (len(path) - 1) + path[-1], n, size, terminal.size(b)) for path, n, size, b in rows], _title(found))
  return FINE


def stats(arguments) -> int:
  """Norm, mean, largest magnitude, zeros, NaN and Inf of every leaf; 1 if there is a NaN or Inf."""
  found = _find(arguments)
  rows, leaves = [], _chosen(found, arguments)
  with terminal.progress("read", len(leaves), "leaves") as work:
    for leaf in leaves:
      _warn_of_large_chunk(leaf)
      rows += weight_health.statistics(found.source, leaf.name, arguments.experts)
      work.advance()
  key = {"name": None, "norm": lambda row: -row["norm"], "max": lambda row: -row["max_abs"]}[arguments.sort]
  rows = sorted(rows, key=key) if key else rows
  bad = [row["name"] for row in rows if row["nan"] or row["inf"]]
  if arguments.json:
    terminal.as_json(rows[: arguments.limit])
  else:
    terminal.table(tuple(rows[0]), [tuple(row.values()) for row in rows[: arguments.limit]], _title(found))
  if bad:
    print(f"not finite: {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''}", file=sys.stderr)
  return DIFFERS if bad else FINE


def _warn_of_large_chunk(leaf: stored.Leaf) -> None:
  chunk = int(np.prod(leaf.chunk, dtype=np.int64)) * stored.dtype_of(leaf.dtype).itemsize
  if chunk > 512 << 20:
    print(f"{leaf.name}: one chunk is {terminal.size(chunk)}, and a chunk is read whole; memory goes with it", file=sys.stderr)


def experts(arguments) -> int:
  """Health of the routers and experts from the weights, and the load that the run recorded; 1 if one is dead, an outlier or
  like another."""
  found = _find(arguments)
  source, model = _as_ours(found)
  with terminal.progress("compares experts"):
    layers = weight_health.layers(source, arguments.alike, model, weight_health.recorded_load(found.folder, found.step))
  if not layers:
    raise UserError(f"{found.folder} has no routed experts that are known here (params.layers.experts.moe..., or a Hugging "
                    "Face directory of a known family with its config.json)")
  troubles = [line for layer in layers for line in layer.troubles()]
  if arguments.png:
    weight_health.draw(layers, arguments.png)
  if arguments.json:
    shown = [{**layer._asdict(), "load": layer.load._asdict() if layer.load else None} for layer in layers]
    terminal.as_json({"path": str(found.folder), "layers": shown, "troubles": troubles})
    return DIFFERS if troubles else FINE
  print(_title(found))
  top = float(np.max([layer.router_norms for layer in layers], initial=0, where=np.isfinite([x.router_norms for x in layers])))
  load = layers[0].load
  print(f"norm of each expert's router column (full bar: {top:.4g})" + (
      f", and its load in steps {load.first_step} to {load.last_step} (full bar: twice the mean)" if load else ""))
  width = max(len(layer.name) for layer in layers)
  for layer in layers:
    print(f"  {layer.name:{width}s}  |{terminal.bars(layer.router_norms, top)}|" + (
        f"  |{terminal.bars(np.minimum(layer.load.over_mean, 2.0), 2.0)}|" if load else ""))
  columns = ("layer", "experts", "router norm", "to", "expert norm", "to", "closest pair", "cosine", "bias", "to", "load", "to")
  terminal.table(
      columns,
      [(layer.name, len(layer.router_norms), *_range(layer.router_norms), *_range(layer.expert_norms),
        "-".join(map(str, layer.closest[0])), layer.closest[1], *(_range(layer.bias) if layer.bias is not None else ("", "")),
        *(_range(layer.load.over_mean) if layer.load else ("", ""))) for layer in layers], left=("layer",))
  print("\n".join(troubles) or _nothing_wrong(layers, arguments.alike))
  return DIFFERS if troubles else FINE


def _nothing_wrong(layers: list[weight_health.Layer], alike: float) -> str:
  """What was looked at and is fine, no more than that."""
  seen = ["no router column or expert is zero, not finite or an outlier", f"of the closest pairs none has a cosine of {alike}"]
  if layers[0].load:
    seen.append("every expert is chosen")
  else:
    seen.append("who is chosen is not recorded here, so an expert without load would not show")
  return "; ".join(seen)


def _range(values) -> tuple[float, float]:
  return float(np.min(values)), float(np.max(values))


def cat(arguments) -> int:
  """Prints a leaf or a slice of it, or writes it as .npy."""
  found = _find(arguments)
  name, where = _parse_leaf(arguments.leaf)
  meant = leaf_names.select(found.source.leaves, name, str(found.folder))
  if len(meant) > 1:  # the parameter goes before its moments
    meant = [leaf for leaf in meant if leaf.startswith("params.")] or meant
  if len(meant) > 1:
    raise UserError(f"{name!r} may be any of {len(meant)} leaves: {', '.join(meant[:6])}" + (", ..." if meant[6:] else ""))
  name, leaf = meant[0], found.source.leaves[meant[0]]
  shown = f"{name}[{where}]" if where else name
  begin, end, squeezed = _bounds(leaf, where)
  values = found.source.read(name, begin, end)[squeezed]
  if arguments.out:
    np.save(arguments.out, values.astype(np.float32) if values.dtype.kind == "V" or values.dtype.name == "bfloat16" else values)
    print(f"{arguments.out}: {leaf.dtype} {'x'.join(map(str, values.shape)) or 'scalar'}")
  elif arguments.json:
    terminal.as_json({"name": shown, "dtype": leaf.dtype, "shape": values.shape, "values": values.astype(float)})
  else:
    print(f"{shown}: {leaf.dtype} {'x'.join(map(str, values.shape)) or 'scalar'}")
    print(np.array2string(values.astype(np.float64) if values.dtype.kind not in "iub" else values, max_line_width=120))
  return FINE


def _parse_leaf(text: str) -> tuple[str, str]:
  name, bracket, rest = text.partition("[")
  if bracket and not rest.endswith("]"):
    raise UserError(f"{text!r} lacks its closing bracket; write NAME[3,:4]")
  return name, rest[:-1]


def _bounds(leaf: stored.Leaf, where: str):
  """(begin, end, index that drops the axes given by a number)."""
  parts = [part.strip() for part in where.split(",")] if where.strip() else []
  if len(parts) > len(leaf.shape):
    raise UserError(f"[{where}] has {len(parts)} axes, {leaf.name} has {len(leaf.shape)} ({'x'.join(map(str, leaf.shape))})")
  begin, end, squeezed = [], [], []
  for axis, n in enumerate(leaf.shape):
    part = parts[axis] if axis < len(parts) else ":"
    if not re.fullmatch(r"-?\d+|(-?\d+)?:(-?\d+)?", part):
      raise UserError(f"[{where}]: {part!r} is neither a number nor BEGIN:END")
    if ":" in part:
      b, e, _ = slice(*(int(p) if p else None for p in part.split(":"))).indices(n)
      squeezed.append(slice(None))
    else:
      b = int(part) + (n if int(part) < 0 else 0)
      e = b + 1
      squeezed.append(0)
      if not 0 <= b < n:
        raise UserError(f"[{where}]: {part} is outside of axis {axis} of {leaf.name}, which has {n}")
    begin.append(b)
    end.append(max(b, e))
  return tuple(begin), tuple(end), tuple(squeezed)


def diff(arguments) -> int:
  """Names, shapes, dtypes and values of two checkpoints; 1 if they differ by more than the tolerance."""
  a, b = _find(arguments), stored.find(arguments.other)
  rows, names = [], sorted(a.source.leaves.keys() | b.source.leaves.keys())
  names = leaf_names.select(names, arguments.filter, "either checkpoint")
  with terminal.progress("compared", len(names), "leaves") as work:
    for name in names:
      x, y = a.source.leaves.get(name), b.source.leaves.get(name)
      if x is None or y is None:
        rows.append({"name": name, "what": f"only in {arguments.path if x else arguments.other}"})
      elif x.shape != y.shape:
        rows.append({"name": name, "what": f"shape {terminal._cell(x.shape)} and {terminal._cell(y.shape)}"})
      else:
        rows += _value_difference(a.source, b.source, x, y, arguments)
      work.advance()
  if arguments.json:
    terminal.as_json({"a": str(a.folder), "b": str(b.folder), "differences": rows})
  elif rows:
    terminal.table(("name", "what"), [(row["name"], row["what"]) for row in rows[: arguments.limit]], left=("name", "what"))
    if arguments.limit is not None and len(rows) > arguments.limit:
      print(f"and {len(rows) - arguments.limit} more")
  else:
    print(f"{len(names)} leaves, none differs")
  return DIFFERS if rows else FINE


def _value_difference(a: stored.Source, b: stored.Source, x: stored.Leaf, y: stored.Leaf, arguments) -> list[dict]:
  worst, beyond, scale = 0.0, 0, 0.0
  for begin, block in stored.blocks(a, x.name):
    other = b.read(y.name, begin, tuple(start + n for start, n in zip(begin, block.shape)))
    for at in range(0, block.size, _PIECE):
      p, q = (np.ascontiguousarray(v).reshape(-1)[at : at + _PIECE] for v in (block, other))
      if p.dtype == q.dtype and np.array_equal(p.view(np.uint8), q.view(np.uint8)):
        scale = max(scale, float(np.nanmax(np.abs(p.astype(np.float32)), initial=0)))
        continue
      p, q = p.astype(np.float64), q.astype(np.float64)
      gap = np.abs(p - q)
      gap[(p == q) | (np.isnan(p) & np.isnan(q))] = 0.0  # infinities of one sign, NaN in both
      gap[np.isnan(gap)] = np.inf
      largest = np.where(np.isfinite(q), np.abs(q), 0.0)
      beyond += int(np.sum(gap > arguments.atol + arguments.rtol * largest))
      worst, scale = max(worst, float(gap.max(initial=0))), max(scale, float(largest.max(initial=0)))
  told = []
  if x.dtype != y.dtype:
    told.append(f"dtype {x.dtype} and {y.dtype}")
  if beyond:
    told.append(f"{beyond:,} of {x.size:,} elements differ, at most by {worst:.4g} ({worst / (scale or 1):.2g} of the largest)")
  return [{"name": x.name, "what": "; ".join(told), "elements": beyond, "max_abs": worst}] if told else []


def show_config(arguments) -> int:
  """The config saved with the checkpoint, or its differences from another's; 1 if they differ."""
  mine = _config(arguments.path)
  if arguments.other is None:
    terminal.as_json(mine) if arguments.json else print("\n".join(terminal.flat(mine)))
    return FINE
  lines = config.differences(mine, json.loads(json.dumps(_config(arguments.other))))
  terminal.as_json(lines) if arguments.json else print("\n".join(lines) or "the configs are equal")
  return DIFFERS if lines else FINE


def _config(path: str) -> dict:
  found = stored.find(path)
  if found.config is None:
    raise UserError(f"{found.folder} has no config beside it")
  return found.config


def convert(arguments) -> int:
  """Writes the arrays anew: another dtype, names, layers stacked or not, other chunks; nothing is overwritten."""
  found = _find(arguments)
  source = conversion.Changed(found.source, arguments.filter if not arguments.params_only else "params.*", arguments.dtype,
                              arguments.map, arguments.unstack, arguments.stack)
  out = epath.Path(arguments.out)
  if out.exists() and any(out.iterdir()):
    raise UserError(f"--out={out} is not empty; nothing is overwritten, choose another directory")
  if arguments.format == "safetensors":
    out.mkdir(parents=True, exist_ok=True)
    stored.write_shards(source, out, 1 << 30)
    (out / "config.json").write_text(json.dumps(found.config or {}, indent=2) + "\n")
  else:
    from moe import checkpoint

    out = out / "checkpoints" / str(found.step or 0)
    checkpoint.write(out, source, found.config or {}, chunk_bytes=arguments.chunk_mb << 20)
  told = {"path": str(out), "leaves": len(source.leaves), "bytes": sum(leaf.bytes for leaf in source.leaves.values())}
  terminal.as_json(told) if arguments.json else print(f"{out}: {told['leaves']} leaves, {terminal.size(told['bytes'])}")
  return FINE


def verify(arguments) -> int:
  """Reads everything and compares it with the digests saved beside it; 1 if a leaf is wrong."""
  found = stored.find(arguments.path)
  if (epath.Path(found.folder) / "digests").exists():
    with terminal.progress("compares with the digests"):
      wrong = stored.wrong(found.folder)
    count = len(found.source.leaves.keys() | stored.expected_digests(found.folder).keys())
    told = {"path": str(found.folder), "leaves": count, "wrong": wrong, "digests": True}
  else:
    for name in found.source.leaves:
      for _ in stored.blocks(found.source, name):
        pass
    told = {"path": str(found.folder), "leaves": len(found.source.leaves), "wrong": [], "digests": False}
  if arguments.json:
    terminal.as_json(told)
  elif told["wrong"]:
    print(f"{found.folder}: {len(told['wrong'])} of {told['leaves']} leaves are not what was saved: "
          + ", ".join(told["wrong"]))
  else:
    how = "every digest is right" if told["digests"] else "everything can be read; there are no digests to compare with"
    print(f"{found.folder}: {told['leaves']} leaves, {how}")
  return DIFFERS if told["wrong"] else FINE


if __name__ == "__main__":
  terminal.run(main)
