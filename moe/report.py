"""Records of runs as pictures: one HTML file with everything in it, and the PNGs beside it. Needs no device, no network."""

from __future__ import annotations

import base64
import collections
import html
import io
import json
import math

from etils import epath
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from moe import jsonl  # noqa: E402
from moe.errors import UserError  # noqa: E402
from moe.routing import analysis  # noqa: E402

_SNAPSHOTS = 4  # points in time of the load heatmap


class ReportError(UserError):
  """A directory that is not a run, or has no records yet."""


def read(run_dir) -> dict[str, list[dict]]:
  """The records of a run by kind, in order of step; where a resume repeated a step, the later record.

  Raises:
    ReportError
  """
  by_kind: dict[str, dict[int, dict]] = collections.defaultdict(dict)
  for record in jsonl.read(epath.Path(run_dir) / "metrics.jsonl"):
    by_kind[record["kind"]][record["step"]] = record
  if not by_kind.get("train"):
    raise ReportError(f"{run_dir} has no training records (metrics.jsonl); give the --run_dir of a run")
  return {kind: [records[step] for step in sorted(records)] for kind, records in by_kind.items()}


def write(run_dir, folder=None, refresh_seconds: int = 0) -> epath.Path:
  """Draws every picture and writes `index.html`; returns its path.

  Args:
    folder: where to, by default `<run_dir>/report`.
    refresh_seconds: > 0: the page loads itself again after so long.

  Raises:
    ReportError
  """
  run_dir, records = epath.Path(run_dir), read(run_dir)
  folder = epath.Path(folder or run_dir / "report")
  runs = {run_dir.name: records}
  pictures = _save(folder, {
      "curves": ("Training and evaluation", _draw_curves(runs)), "load": ("Expert load over time", _draw_load(records)),
      "domains": ("Which experts a domain uses", _draw_domains(records)), "routing": ("Routing", _draw_routing(records)),
      "specialisation": ("Specialisation", _draw_specialisation(records)),
      "information": ("What one layer's routing tells about another's", _draw_information(records)),
      "goodput": ("Where the time went", _draw_goodput(runs))})
  kept = _config(run_dir)
  shown = json.dumps(kept, indent=1) if kept else "no config.json"
  body = (_facts(runs) + pictures + _domain_table(records) + _examples(records)
          + f"<details><summary>Resolved config</summary><pre>{html.escape(shown)}</pre></details>")
  return _write_page(folder, run_dir.name, body, refresh_seconds)


def compare(run_dirs, folder, refresh_seconds: int = 0) -> epath.Path:
  """Several runs over each other, and what differs in their configs: `<folder>/index.html`.

  Raises:
    ReportError
  """
  paths = [epath.Path(path) for path in run_dirs]
  names = [path.name for path in paths]
  if len(set(names)) < len(names):
    names = [str(path) for path in paths]
  runs = {name: read(path) for name, path in zip(names, paths)}
  pictures = _save(epath.Path(folder), {"curves": ("Training and evaluation", _draw_curves(runs)),
                                        "balance": ("Balance", _draw_balance(runs)),
                                        "goodput": ("Where the time went", _draw_goodput(runs))})
  body = _facts(runs) + _config_table({name: _config(path) for name, path in zip(names, paths)}) + pictures
  return _write_page(epath.Path(folder), " / ".join(names), body, refresh_seconds)


def _save(folder: epath.Path, figures: dict) -> str:
  """Writes the PNGs; the same as HTML."""
  folder.mkdir(parents=True, exist_ok=True)
  parts = []
  for name, (title, figure) in figures.items():
    if figure is None:
      continue
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    (folder / f"{name}.png").write_bytes(buffer.getvalue())
    parts.append(f"<h2>{html.escape(title)}</h2><img alt='{html.escape(title)}' "
                 f"src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>")
  return "".join(parts)


def _config(run_dir: epath.Path) -> dict | None:
  path = run_dir / "config.json"
  return json.loads(path.read_text()) if path.exists() else None


def domains(records: dict) -> list[str]:
  return sorted(kind.removeprefix("eval/") for kind in records if kind.startswith("eval/"))


def _column(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of a key; values that were not finite are nan."""
  pairs = [(r["step"], math.nan if r[key] is None else r[key]) for r in records if key in r]
  return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], float)


def _tokens(records: list[dict], steps: np.ndarray) -> np.ndarray:
  """Tokens read up to each of the steps."""
  at, each = _column(records, "tokens")
  return np.interp(steps, at, np.cumsum(each))


def _hours(records: list[dict]) -> np.ndarray:
  """Wall time of each record since the first one; nan where a long pause begins, so that no line is drawn over it."""
  times = np.array([r["time"] for r in records])
  gaps = np.diff(times, prepend=times[0])
  hours = (times - times[0]) / 3600
  usual = np.median(gaps[gaps > 0]) if (gaps > 0).any() else 1.0  # records of one window share a time
  hours[gaps > 60 * max(usual, 1.0)] = np.nan
  return hours


def _smooth(values: np.ndarray) -> np.ndarray:
  """Mean over a hundredth of the run, so that several runs can be told apart."""
  width = max(len(values) // 100, 1)
  kernel = np.ones(width)
  valid = np.isfinite(values)
  return (np.convolve(np.where(valid, values, 0), kernel, "same") / np.maximum(np.convolve(valid, kernel, "same"), 1e-9))


def _draw_curves(runs: dict[str, dict]):
  """Loss by tokens and by time, validation by domain, gradient norm, learning rate, speed; runs over each other."""
  figure, axes = plt.subplots(2, 3, figsize=(16, 7.2), layout="constrained")
  names = sorted({name for records in runs.values() for name in domains(records)})
  styles = dict(zip(names, ("-", "--", ":", "-.") * len(names)))
  tops = []
  for number, (run, records) in enumerate(runs.items()):
    train, color = records["train"], f"C{number}"
    steps, loss = _column(train, "loss")
    millions = _tokens(train, steps) / 1e6
    tops += [np.percentile(loss[np.isfinite(loss)], 99.5)] if np.isfinite(loss).any() else []
    for axis, x in ((axes[0, 0], millions), (axes[0, 1], _hours([r for r in train if "loss" in r]))):
      axis.plot(x, loss, color=color, linewidth=0.5, alpha=0.3)
      axis.plot(x, _smooth(loss), color=color, linewidth=1.2, label=run)
    for name in domains(records):
      at, bits = _column(records[f"eval/{name}"], "bits_per_byte")
      axes[0, 2].plot(_tokens(train, at) / 1e6, bits, color=color, linestyle=styles[name], marker="o", markersize=3,
                      label=f"{run}: {name}" if len(runs) > 1 else name)
      axes[0, 2].annotate(f"{bits[-1]:.3f}", (_tokens(train, at[-1:])[0] / 1e6, bits[-1]), textcoords="offset points",
                          xytext=(-3, 6), ha="right", fontsize=8, color=color)
    axes[1, 0].plot(millions, _smooth(_column(train, "gradient_norm")[1]), color=color, linewidth=0.9)
    axes[1, 1].plot(millions, _column(train, "learning_rate")[1], color=color, linewidth=1.2)
    if records.get("speed"):
      at, speed = _column(records["speed"], "tokens_per_second")
      axes[1, 2].plot(_tokens(train, at) / 1e6, speed, color=color, linewidth=0.9)
      mfu = np.nanmedian(_column(records["speed"], "mfu")[1])
      whose = f"{run}: " if len(runs) > 1 else ""
      axes[1, 2].plot([], [], color=color, label=f"{whose}median {np.median(speed):,.0f}, MFU {mfu:.1%}")
  for axis in axes[0, :2] if tops else ():
    axis.set_ylim(top=max(tops) * 1.05)
  axes[0, 0].set(title="training loss, nats a token", xlabel="million tokens")
  axes[0, 1].set(title="training loss, nats a token", xlabel="hours")
  axes[0, 2].set(title="validation, bits a byte", xlabel="million tokens")
  axes[1, 0].set(title="gradient norm", xlabel="million tokens", yscale="log")
  axes[1, 1].set(title="learning rate", xlabel="million tokens", ylim=(0, None))
  axes[1, 2].set(title="tokens a second", xlabel="million tokens", ylim=(0, None))
  for axis in [axes[0, 2], axes[1, 2], *([axes[0, 0]] if len(runs) > 1 else [])]:
    if axis.get_legend_handles_labels()[0]:
      axis.legend(fontsize=8)
  for axis in axes.flat:
    axis.grid(alpha=0.2)
  return figure


def _draw_balance(runs: dict[str, dict]):
  figure, axes = plt.subplots(1, 3, figsize=(16, 3.4), layout="constrained")
  titles = {"balance": "balance loss (1 is balanced)", "load_max": "largest load / mean load", "router_entropy":
            "router entropy, nats"}
  for number, (run, records) in enumerate(runs.items()):
    for axis, (key, title) in zip(axes, titles.items()):
      steps, values = _column(records["train"], key)
      axis.plot(_tokens(records["train"], steps) / 1e6, _smooth(values), color=f"C{number}", linewidth=1, label=run)
      axis.set(title=title, xlabel="million tokens")
      axis.grid(alpha=0.2)
  axes[0].legend(fontsize=8)
  return figure


def _draw_goodput(runs: dict[str, dict]):
  """A bar a run: seconds by what they went into, as the run last told."""
  told = {run: {key.removeprefix("goodput/"): value for key, value in records["speed"][-1].items()
                if key.startswith("goodput/")} for run, records in runs.items() if records.get("speed")}
  told = {run: table for run, table in told.items() if table}
  if not told:
    return None
  kinds = ["step"] + sorted({kind for table in told.values() for kind in table} - {"step"})
  figure, axis = plt.subplots(figsize=(12, 1.2 + 0.5 * len(told)), layout="constrained")
  for place, table in enumerate(reversed(told.values())):
    left, total = 0.0, sum(table.values())
    for number, kind in enumerate(kinds):
      share = table.get(kind, 0.0) / total
      axis.barh(place, share, left=left, color="C2" if kind == "step" else f"C{(number + 2) % 10}",
                label=kind if place == 0 else None)
      if share > 0.04:
        axis.text(left + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=8, color="white")
      left += share
  axis.set_yticks(range(len(told)), [f"{run} ({sum(table.values()):,.0f} s)" for run, table in reversed(told.items())])
  axis.set(xlim=(0, 1), xlabel="share of the time; steps are what it is for")
  axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45 if len(told) < 3 else -0.25), ncols=len(kinds), fontsize=8)
  return figure


def _shares(counts) -> np.ndarray:
  """[L, E] counts -> load over the mean load of the layer."""
  counts = np.asarray(counts, float)
  return counts / np.maximum(counts.mean(-1, keepdims=True), 1e-9)


def _heat(axis, values, title, top):
  image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top)
  axis.set(title=title, xlabel="expert", ylabel="layer")
  axis.set_xticks(range(0, values.shape[1], max(values.shape[1] // 8, 1)))
  axis.set_yticks(range(0, values.shape[0], max(values.shape[0] // 8, 1)))
  return image


def _draw_load(records):
  """Layer x expert heatmaps at a few times, each over a tenth of the run so that single batches do not flicker."""
  train = records["train"]
  width = max(len(train) // 10, 1)
  starts = np.unique(np.linspace(0, len(train) - width, _SNAPSHOTS).astype(int))
  loads = [_shares(np.sum([r["expert_counts"] for r in train[s : s + width]], 0)) for s in starts]
  top = max(2.0, max(load.max() for load in loads))
  figure, axes = plt.subplots(1, len(starts), figsize=(3.2 * len(starts), 2.8), squeeze=False, layout="constrained")
  for axis, start, load in zip(axes[0], starts, loads):
    image = _heat(axis, load, f"steps {train[start]['step']}-{train[start + width - 1]['step']}", top)
  figure.colorbar(image, ax=axes, label="load / mean load", shrink=0.9)
  return figure


def _draw_domains(records):
  names = domains(records)
  if not names:
    return None
  loads = [_shares(records[f"eval/{name}"][-1]["expert_counts"]) for name in names]
  top = max(2.0, max(load.max() for load in loads))
  figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 2.8), squeeze=False, layout="constrained")
  for axis, name, load in zip(axes[0], names, loads):
    image = _heat(axis, load, name, top)
  figure.colorbar(image, ax=axes, label="load / mean load", shrink=0.9)
  return figure


def _draw_routing(records):
  titles = {"balance": "balance loss (1 is balanced)", "load_max": "largest load / mean load", "dead_experts": "dead experts",
            "dropped": "dropped share of selections", "router_entropy": "router entropy, nats",
            "top_k_weight": "probability on the chosen experts", "router_z": "router z, mean squared logsumexp"}
  figure, axes = plt.subplots(2, 4, figsize=(16, 6), layout="constrained")
  axes[1, 3].axis("off")
  for axis, (key, title) in zip(axes.flat, titles.items()):
    axis.plot(*_column(records["train"], key), linewidth=0.8)
    axis.set(title=title, xlabel="step")
  return figure


def _draw_specialisation(records):
  """What an expert tells about the domain, for each layer, at every evaluation."""
  names = domains(records)
  if len(names) < 2:
    return None
  steps = sorted(set.intersection(*({r["step"] for r in records[f"eval/{name}"]} for name in names)))
  by_step = [{r["step"]: np.asarray(r["expert_counts"], float) for r in records[f"eval/{name}"]} for name in names]
  values = np.array([analysis.specialisation(np.stack([counts[step] for counts in by_step])) for step in steps])
  figure, axis = plt.subplots(figsize=(6, 3.2))
  for layer in range(values.shape[1]):
    axis.plot(steps, values[:, layer], marker="o", label=f"layer {layer}")
  axis.set(title="I(domain; expert) / H(domain)", xlabel="step", ylim=(0, None))
  if values.shape[1] <= 12:
    axis.legend()
  return figure


def _draw_information(records):
  """Layer x layer, in nats, mean over domains: between first choices, and between the layers' probabilities."""
  last = [records[f"eval/{name}"][-1] for name in domains(records)]
  if not last or len(last[0].get("information_choices", ())) < 2:
    return None
  figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
  for axis, key, title in zip(axes, ("information_choices", "information_probabilities"),
                              ("between first choices", "between probabilities (RMoE A.4.2)")):
    values = np.mean([r[key] for r in last], 0)
    np.fill_diagonal(values, np.nan)  # a layer knows itself
    image = axis.imshow(values, cmap="viridis", vmin=0)
    ticks = range(0, len(values), max(len(values) // 8, 1))
    axis.set(title=title, xlabel="layer", ylabel="layer", xticks=ticks, yticks=ticks)
    figure.colorbar(image, ax=axis, label="nats", shrink=0.9)
  return figure


def _domain_table(records) -> str:
  """Domain x expert: each expert's share of the domain's selections, averaged over layers."""
  rows = []
  for name in domains(records):
    share = np.asarray(records[f"eval/{name}"][-1]["expert_counts"], float)
    share = (share / np.maximum(share.sum(-1, keepdims=True), 1)).mean(0)
    rows.append(f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{v:.1%}</td>" for v in share) + "</tr>")
  if not rows:
    return ""
  count = len(records[f"eval/{domains(records)[0]}"][-1]["expert_counts"][0])
  head = "<tr><th>domain</th>" + "".join(f"<th>{i}</th>" for i in range(count)) + "</tr>"
  return f"<h2>Share of each expert, mean over layers</h2><div class=wide><table>{head}{''.join(rows)}</table></div>"


def _examples(records) -> str:
  """What each expert reads, by domain and layer, folded away."""
  def cell(entry):
    tokens = " ".join(f"<code>{html.escape(repr(text)[1:-1])}</code>&nbsp;{share:.0%}" for text, share in entry["tokens"])
    places = "".join(f"<br><small>{html.escape(a)}<mark>{html.escape(b)}</mark>{html.escape(c)}</small>"
                     for a, b, c in entry["snippets"])
    return tokens + places

  parts = []
  for name in domains(records):
    for layer, experts in enumerate(records.get(f"examples/{name}", [{"examples": []}])[-1]["examples"]):
      rows = "".join(f"<tr><th>{i}</th><td>{cell(entry)}</td></tr>" for i, entry in enumerate(experts))
      parts.append(f"<details><summary>{html.escape(name)}, layer {layer}</summary><table>{rows}</table></details>")
  if not parts:
    return ""
  return ("<h2>What the experts read</h2><p>The tokens that tell an expert from the others, with their share of what it reads, "
          "and two places in the text.</p>" + "".join(parts))


def _facts(runs: dict[str, dict]) -> str:
  """A column a run."""
  columns = []
  for records in runs.values():
    last = records["train"][-1]
    facts = {"steps": f"{last['step'] + 1:,}", "tokens": f"{_column(records['train'], 'tokens')[1].sum():,.0f}",
             "training loss, nats a token": f"{last['loss']:.4f}" if last["loss"] is not None else "not finite",
             "balance": "not finite" if last["balance"] is None else f"{last['balance']:.4f}",
             "skipped steps": str(last["skipped_steps"])}
    facts |= {f"{name}, validation, bits a byte": f"{records[f'eval/{name}'][-1]['bits_per_byte']:.4f}"
              for name in domains(records)}
    if records.get("speed"):
      facts["tokens a second, median"] = f"{np.median(_column(records['speed'], 'tokens_per_second')[1]):,.0f}"
    columns.append(facts)
  keys = list(dict.fromkeys(key for facts in columns for key in facts))
  head = "<tr><th></th>" + "".join(f"<th>{html.escape(run)}</th>" for run in runs) + "</tr>" if len(runs) > 1 else ""
  return f"<table class=figures>{head}{_rows(keys, columns, '')}</table>"


def _rows(keys, columns: list[dict[str, str]], missing: str) -> str:
  """A table row a key, a cell a column."""
  return "".join(f"<tr><th>{html.escape(key)}</th>" + "".join(
      f"<td>{html.escape(column.get(key, missing))}</td>" for column in columns) + "</tr>" for key in keys)


def _config_table(configs: dict[str, dict | None]) -> str:
  """The fields in which the runs differ."""
  def flat(values, prefix=""):
    for key, value in (values or {}).items():
      if isinstance(value, dict):
        yield from flat(value, f"{prefix}{key}.")
      else:
        yield prefix + key, json.dumps(value)

  columns = [dict(flat(kept)) for kept in configs.values()]
  keys = sorted({key for column in columns for key in column})
  different = [key for key in keys if len({column.get(key) for column in columns}) > 1]
  head = "<tr><th>config</th>" + "".join(f"<th>{html.escape(run)}</th>" for run in configs) + "</tr>"
  if not different:
    return "<p>Their configs are equal.</p>"
  return f"<h2>What differs in their configs</h2><table class=figures>{head}{_rows(different, columns, '-')}</table>"


def _write_page(folder: epath.Path, title: str, body: str, refresh_seconds: int) -> epath.Path:
  again = f"<meta http-equiv=refresh content={refresh_seconds}>" if refresh_seconds else ""
  page = folder / "index.html"
  page.write_text(
      f"<!doctype html><html lang=en><meta charset=utf-8>{again}<link rel=icon href='data:,'>"
      f"<meta name=viewport content='width=device-width'><title>{html.escape(title)}</title><style>"
      "body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
      "img{max-width:100%}th,td{padding:.15rem .7rem;text-align:left}td{font-variant-numeric:tabular-nums}"
      "tr:nth-child(even){background:#f6f6f6}.figures td,.figures th+th{text-align:right}table{border-collapse:collapse}"
      ".wide{overflow-x:auto}mark{background:#fd6}pre{font-size:.8rem}</style>"
      f"<h1>{html.escape(title)}</h1>{body}</html>\n")
  return page
