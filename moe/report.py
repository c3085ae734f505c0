"""A run's records as pictures: one HTML file with everything in it, and the PNGs beside it. Needs no device."""

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


def write(run_dir) -> epath.Path:
  """Draws every picture and writes `<run_dir>/report/index.html`; returns its path.

  Raises:
    ReportError
  """
  records = read(run_dir)
  folder = epath.Path(run_dir) / "report"
  folder.mkdir(parents=True, exist_ok=True)
  pictures = []
  for name, title, draw in (("loss", "Loss and evaluation", _draw_loss), ("load", "Expert load over time", _draw_load),
                            ("domains", "Which experts a domain uses", _draw_domains),
                            ("routing", "Routing", _draw_routing), ("specialisation", "Specialisation", _draw_specialisation),
                            ("information", "What one layer's routing tells about another's", _draw_information),
                            ("speed", "Throughput", _draw_speed)):
    figure = draw(records)
    if figure is not None:
      buffer = io.BytesIO()
      figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
      plt.close(figure)
      (folder / f"{name}.png").write_bytes(buffer.getvalue())
      pictures.append((title, buffer.getvalue()))
  page = folder / "index.html"
  page.write_text(_page(epath.Path(run_dir), records, pictures))
  return page


def domains(records: dict) -> list[str]:
  return sorted(kind.removeprefix("eval/") for kind in records if kind.startswith("eval/"))


def _column(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of a key; values that were not finite are nan."""
  pairs = [(r["step"], math.nan if r[key] is None else r[key]) for r in records if key in r]
  return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], float)


def _draw_loss(records):
  figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6))
  left.plot(*_column(records["train"], "loss"), linewidth=0.8)
  left.set(title="training loss", xlabel="step", ylabel="nats a token")
  left.set_ylim(top=np.nanpercentile(_column(records["train"], "loss")[1], 99.5) * 1.05)
  for name in domains(records):
    right.plot(*_column(records[f"eval/{name}"], "bits_per_byte"), marker="o", label=name)
  right.set(title="validation", xlabel="step", ylabel="bits a byte")
  if domains(records):
    right.legend()
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


def _draw_speed(records):
  if not records.get("speed"):
    return None
  figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.2))
  left.plot(*_column(records["speed"], "tokens_per_second"))
  left.set(title="tokens a second", xlabel="step", ylim=(0, None))
  right.plot(*_column(records["speed"], "mfu"))
  right.set(title="MFU", xlabel="step", ylim=(0, None))
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


def _page(run_dir, records, pictures) -> str:
  last = records["train"][-1]
  facts = [("steps", last["step"] + 1), ("training loss", f"{last['loss']:.4f} nats a token"),
           ("balance", f"{last['balance']:.4f}"), ("skipped steps", last["skipped_steps"])]
  facts += [(f"{name}, validation", f"{records[f'eval/{name}'][-1]['bits_per_byte']:.4f} bits a byte")
            for name in domains(records)]
  if records.get("speed"):
    facts.append(("tokens a second, median", f"{np.median(_column(records['speed'], 'tokens_per_second')[1]):,.0f}"))
  rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts)
  images = "".join(f"<h2>{html.escape(title)}</h2><img alt='{html.escape(title)}' "
                   f"src='data:image/png;base64,{base64.b64encode(data).decode()}'>" for title, data in pictures)
  config_file = run_dir / "config.json"
  shown = json.dumps(json.loads(config_file.read_text()), indent=1) if config_file.exists() else "no config.json"
  return (f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(run_dir.name)}</title><style>"
          "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
          "img{max-width:100%}th,td{padding:.15rem .7rem;text-align:left}td{font-variant-numeric:tabular-nums}"
          ".wide{overflow-x:auto}mark{background:#fd6}pre{font-size:.8rem}</style>"
          f"<h1>{html.escape(run_dir.name)}</h1><table>{rows}</table>{images}{_domain_table(records)}{_examples(records)}"
          f"<details><summary>Resolved config</summary><pre>{html.escape(shown)}</pre></details></html>\n")
