"""Records of runs as pictures: one HTML file with everything in it, and the PNGs beside it. Needs no device, no network."""

from __future__ import annotations

import array
import base64
import datetime
import html
import io
import json
import math
import re
from typing import Any, NamedTuple

from etils import epath
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from moe import config  # noqa: E402
from moe import jsonl  # noqa: E402
from moe import metrics  # noqa: E402
from moe import sizes  # noqa: E402
from moe.errors import UserError  # noqa: E402
from moe.routing import analysis  # noqa: E402

_SNAPSHOTS = 4  # points in time of the load heatmap
_EXAMPLES = 2048  # experts of a domain with examples on the page, about 1 kB each
_ALARMS = 100  # kinds of alarms on the page
_LABEL_GAP = 0.06  # of an axis, between two labels that can be read


class ReportError(UserError):
  """A directory that is not a run, or has no records yet."""


class Table(NamedTuple):
  """The scalars of the records of one kind, in order of step; where a resume repeated a step, those of the later record."""

  steps: np.ndarray  # [N] int64
  columns: dict[str, np.ndarray]  # [N] float64; nan where the value was not finite, or the record has none

  def column(self, key: str) -> np.ndarray:
    return self.columns.get(key, np.full(len(self.steps), math.nan))

  def last(self, key: str) -> float:
    return float(self.column(key)[-1])


class Records(NamedTuple):
  """What is drawn of a run. Its size does not grow with the steps but for the tables, 8 bytes a number."""

  tables: dict[str, Table]  # by kind
  loads: list[metrics.Window]  # in order of step, each step in one of them
  scores: dict[str, dict[int, np.ndarray]]  # domain -> step -> counts [L, E] of the evaluation
  latest: dict[str, dict[str, Any]]  # kind -> the last record, whole, of what has a number or a text for each expert
  goodput: dict[str, float] = {}  # activity -> seconds, of all processes that worked on the run

  @property
  def train(self) -> Table:
    return self.tables["train"]

  @property
  def domains(self) -> list[str]:
    return sorted(kind.removeprefix("eval/") for kind in self.tables if kind.startswith("eval/"))


class _TableBuilder:
  """Takes records one by one; keeps 8 bytes a number."""

  def __init__(self):
    self._steps, self._columns = array.array("q"), {}

  def add(self, record: dict[str, Any]) -> None:
    for key, value in record.items():
      if value is not None and not isinstance(value, (int, float)):
        continue
      if key not in self._columns:
        self._columns[key] = array.array("d", [math.nan]) * len(self._steps)
      self._columns[key].append(math.nan if value is None else value)
    self._steps.append(record["step"])
    for column in self._columns.values():
      if len(column) < len(self._steps):
        column.append(math.nan)

  def table(self) -> Table:
    steps = np.array(self._steps)
    kept, from_end = np.unique(steps[::-1], return_index=True)
    rows = len(steps) - 1 - from_end
    return Table(kept, {key: np.array(column)[rows] for key, column in self._columns.items()})


class Alarm(NamedTuple):
  """Alarms that differ in their numbers alone."""

  count: int
  first_time: float  # seconds since the epoch
  last: dict[str, Any]


class Events(NamedTuple):
  """What happened to a run. Its size is bounded."""

  starts: int
  alarms: list[Alarm]  # in order of the first of each; beyond `_ALARMS` kinds, none
  goodput: list[tuple[float, dict[str, float]]]  # (time, seconds by activity) at each end


def read_events(run_dir) -> Events:
  """The events of a run, read in one pass."""
  starts, alarms, goodput = 0, {}, []
  for record in jsonl.read(epath.Path(run_dir) / "events.jsonl"):
    event, at = record.get("event"), _time(record)
    starts += event == "start"
    if event == "end" and isinstance(record.get("goodput"), dict):
      goodput.append((at, {key: value for key, value in record["goodput"].items() if isinstance(value, (int, float))}))
    if event == "alarm":
      kind = re.sub(r"[\d.]+", "0", str(record.get("message")))
      before = alarms.get(kind, Alarm(0, at, {}))
      if before.count or len(alarms) < _ALARMS:
        alarms[kind] = Alarm(before.count + 1, before.first_time, record)
  return Events(starts, list(alarms.values()), goodput)


class _Goodput:
  """Sums what each process of a run told: its clock begins at 0, so a total that falls is of another process."""

  def __init__(self, ends: list[tuple[float, dict[str, float]]]):
    self._ends = list(reversed(ends))
    self._before: dict[str, float] = {}
    self._now: dict[str, float] = {}

  def add(self, record: dict[str, Any]) -> None:
    """A record of kind `speed`. The end of a process, which has its final evaluation, comes in its place among them."""
    while self._ends and self._ends[-1][0] <= _time(record):
      self._take(self._ends.pop()[1])
    self._take({key.removeprefix("goodput/"): value for key, value in record.items()
                if key.startswith("goodput/") and isinstance(value, (int, float))})

  def total(self) -> dict[str, float]:
    while self._ends:
      self._take(self._ends.pop()[1])
    return self._sum()

  def _take(self, seconds: dict[str, float]) -> None:
    if sum(seconds.values()) < sum(self._now.values()):
      self._before = self._sum()
    self._now = seconds

  def _sum(self) -> dict[str, float]:
    return {key: self._before.get(key, 0.0) + self._now.get(key, 0.0) for key in {**self._before, **self._now}}


def read(run_dir, events: Events | None = None) -> Records:
  """The records of a run, read in one pass of which a record at a time is held.

  Older runs, which have the counts of the experts in the record of every step, are summed over the same windows as a run
  now writes.

  Args:
    events: of the run, where they are read already.

  Raises:
    ReportError
  """
  run_dir = epath.Path(run_dir)
  goodput = _Goodput((events or read_events(run_dir)).goodput)
  builders: dict[str, _TableBuilder] = {}
  windows: list[metrics.Window] = []
  by_step = metrics.LoadWindows()  # of a run that has counts in every step
  scores: dict[str, dict[int, np.ndarray]] = {}
  latest: dict[str, dict[str, Any]] = {}
  for record in jsonl.read(run_dir / "metrics.jsonl"):
    kind, step, counts = record.get("kind"), record.get("step"), record.get("expert_counts")
    if not isinstance(kind, str) or not isinstance(step, int):
      continue  # a damaged one
    if kind == "load":
      _append(windows, by_step.open_window)  # what an older version had of the run
      by_step = metrics.LoadWindows()
      _append(windows, metrics.Window.from_record(record))
      continue
    if kind.startswith("examples/"):
      _keep_latest(latest, record)
      continue
    builders.setdefault(kind, _TableBuilder()).add(record)
    if kind == "speed":
      goodput.add(record)
    if counts and kind == "train":
      for window in by_step.push(step, counts):
        _append(windows, window)
    elif counts:
      _keep_latest(latest, record)
      _keep_score(scores.setdefault(kind.removeprefix("eval/"), {}), step, counts)
  if "train" not in builders:
    raise ReportError(f"{run_dir} has no training records (metrics.jsonl); give the --run_dir of a run")

  # What is not among the records: the window that goes on, and the last of what is overwritten.
  _append(windows, by_step.open_window)
  left_open = metrics.Window.from_record(jsonl.read_one(metrics.latest_path(run_dir, "load")))
  if left_open and (not windows or windows[-1].last_step < left_open.first_step):  # else it is complete by now
    _append(windows, left_open)
  names = [kind.removeprefix("eval/") for kind in builders if kind.startswith("eval/")]
  for kind in [f"{group}/{name}" for name in names for group in ("eval", "examples")]:
    _keep_latest(latest, jsonl.read_one(metrics.latest_path(run_dir, kind)))
  tables = {kind: builder.table() for kind, builder in builders.items()}
  return Records(tables, windows, scores, latest, goodput.total())


def _append(windows: list[metrics.Window], window: metrics.Window | None) -> None:
  """With counts in 4 bytes: a thousand windows of 58 x 256 experts are held."""
  if window:
    metrics.append_window(windows, window._replace(counts=window.counts.astype(np.float32)))


def _keep_latest(latest: dict[str, dict], record: dict[str, Any] | None) -> None:
  if record and (record["kind"] not in latest or _age(latest[record["kind"]]) <= _age(record)):
    latest[record["kind"]] = _for_a_page(record) if "examples" in record else record


def _for_a_page(record: dict[str, Any]) -> dict[str, Any]:
  """Examples of as many layers as a page can have, instead of [L][E]: {layer: [E]}, and `layers`: L."""
  layers = record["examples"]
  experts_each = max([1, *map(len, layers)])
  count = min(max(_EXAMPLES // experts_each, 1), len(layers))
  shown = np.unique(np.linspace(0, len(layers) - 1, count).astype(int)).tolist()
  return {**record, "examples": {layer: layers[layer] for layer in shown}, "layers": len(layers)}


def _age(record: dict[str, Any]) -> tuple[float, int]:
  return _time(record), record["step"]


def _time(record: dict[str, Any]) -> float:
  """Seconds since the epoch; 0 of a damaged record."""
  at = record.get("time")
  return at if isinstance(at, (int, float)) and math.isfinite(at) else 0.0


def _keep_score(scores: dict[int, np.ndarray], step: int, counts) -> None:
  """As many as a run now records: older runs have the counts of every evaluation."""
  before = next(reversed(scores), None)
  if before is None or step in scores or metrics.score_window(before) != metrics.score_window(step):
    scores[step] = np.array(counts, np.float32)


def write(run_dir, folder=None, refresh_seconds: int = 0) -> epath.Path:
  """Draws every picture and writes `index.html`; returns its path.

  Args:
    folder: where to, by default `<run_dir>/report`.
    refresh_seconds: > 0: the page loads itself again after so long.

  Raises:
    ReportError
  """
  run_dir = epath.Path(run_dir)
  events = read_events(run_dir)
  records = read(run_dir, events)
  folder = epath.Path(folder or run_dir / "report")
  runs, descriptions = {run_dir.name: records}, {run_dir.name: _description(run_dir, records, events)}
  pictures = _save(folder, {
      "curves": ("Training and evaluation", _draw_curves(runs, descriptions)),
      "load": ("Expert load over time", _draw_load(records)),
      "domains": ("Which experts a domain uses", _draw_domains(records)), "routing": ("Routing", _draw_routing(records)),
      "specialisation": ("Specialisation", _draw_specialisation(records)),
      "information": ("What one layer's routing tells about another's", _draw_information(records)),
      "tokens": ("Tokens by domain", _draw_domain_tokens(records)),
      "goodput": ("Where the time went", _draw_goodput(runs))})
  kept = _config(run_dir)
  shown = json.dumps(kept, indent=1) if kept else "no config.json"
  body = (_facts(runs, descriptions) + _alarms(events) + pictures + _domain_table(records) + _examples(records)
          + f"<details><summary>Resolved config</summary><pre>{html.escape(shown)}</pre></details>")
  return _write_page(folder, run_dir.name, body, refresh_seconds)


def write_at_the_end(run_dir) -> str:
  """As `write`, for a run that is done, which no picture can fail: the line to print, of where the page is or why not."""
  try:
    return f"report: {write(run_dir)}"
  except Exception as error:  # a full disk, or whatever a record made matplotlib raise
    return f"no report ({type(error).__name__}: {error}); python -m tools.report {run_dir} draws it"


def compare(run_dirs, folder, refresh_seconds: int = 0) -> epath.Path:
  """Several runs over each other, and what differs in their configs: `<folder>/index.html`.

  Raises:
    ReportError
  """
  paths = [epath.Path(path) for path in run_dirs]
  names = [path.name for path in paths]
  if len(set(names)) < len(names):
    names = [str(path) for path in paths]
  runs, descriptions, configs = {}, {}, {}
  for name, path in zip(names, paths):
    events = read_events(path)
    runs[name] = read(path, events)._replace(loads=[], scores={}, latest={})
    descriptions[name] = _description(path, runs[name], events)
    configs[name] = _flat(_config(path))
  pictures = _save(epath.Path(folder), {"sweep": ("The swept value", _draw_sweep(runs, configs)),
                                        "curves": ("Training and evaluation", _draw_curves(runs, descriptions)),
                                        "validation": ("Validation by domain, bits a byte", _draw_domain_scores(runs)),
                                        "balance": ("Balance", _draw_balance(runs)),
                                        "goodput": ("Where the time went", _draw_goodput(runs))})
  body = _facts(runs, descriptions) + _config_table(configs) + pictures
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


def _json_of(path: epath.Path) -> dict | None:
  """None where there is no such file, or a damaged one."""
  try:
    return json.loads(path.read_text()) if path.exists() else None
  except ValueError:
    return None


def _config(run_dir: epath.Path) -> dict | None:
  return _json_of(run_dir / "config.json")


class Description(NamedTuple):
  """What a run is and where it ran."""

  facts: dict[str, str]
  on_cpu: bool  # where a share of the peak is noise


def _description(run_dir: epath.Path, records: Records, events: Events) -> Description:
  environment = _json_of(run_dir / "env.json") or {}
  devices = [str(device) for device in environment.get("devices", [])]
  # Of `TFRT_CPU_0`, `cuda:0`, `TPU_0(process=0,(0,0,0,0))` what is before the number.
  name = re.match(r"[A-Za-z]*(_[A-Za-z]+)*", devices[0])[0] if devices else ""
  kind = environment.get("device_kind") or name
  times = records.train.column("time")
  times = times[np.isfinite(times)]
  facts = {}
  if len(times):
    facts["from"] = _date(times.min())
    facts["last record"] = _date(times.max())
  if events.starts > 1:
    facts["starts"] = str(events.starts)
  if environment.get("commit"):
    facts["commit"] = environment["commit"][:12]
  if devices:
    facts["devices"] = f"{len(devices)} {kind}, {environment.get('hosts', 1)} host(s)"
  if environment.get("jax"):
    facts["jax"] = environment["jax"]
  facts |= _parameters(_config(run_dir), environment)
  facts["alarms"] = f"{sum(alarm.count for alarm in events.alarms):,}"
  return Description(facts, "cpu" in kind.lower())


def _date(seconds: float) -> str:
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _parameters(kept: dict | None, environment: dict) -> dict[str, str]:
  """As the run wrote them down, else counted from its config; none where that is of another version."""
  total, active = environment.get("parameters"), environment.get("active_parameters")
  if total is None and kept and "model" in kept:
    try:
      counted = sizes.sizes(config.from_dict(config.Model, kept["model"]))
      total, active = counted.total, counted.active
    except (config.ConfigError, TypeError, KeyError):
      pass
  if total is None:
    return {}
  return {"parameters": f"{total:,}"} | ({"active a token": f"{active:,}"} if active else {})


def _alarms(events: Events) -> str:
  """One row for the alarms that differ in numbers alone."""
  if not events.alarms:
    return ""
  rows = "".join(f"<tr><td>{alarm.count:,}</td><td>{_date(alarm.first_time)}</td><td>{_date(_time(alarm.last))}</td>"
                 f"<td>{html.escape(str(alarm.last.get('message')))}</td></tr>" for alarm in events.alarms)
  return ("<h2>Alarms</h2><div class=wide><table><tr><th>times</th><th>first</th><th>last</th><th>the last one</th></tr>"
          f"{rows}</table></div>")


def _tokens(records: Records, steps: np.ndarray) -> np.ndarray:
  """Tokens read up to each of the steps."""
  return np.interp(steps, records.train.steps, np.cumsum(np.nan_to_num(records.train.column("tokens"))))


def _hours(records: Records) -> np.ndarray:
  """Wall time of each step since the first one, long pauses left out; nan where one is, so that no line is drawn over it."""
  steps, times = records.train.steps, records.train.column("time").copy()
  # The loop writes the records of several steps at once, and then how long each of them took: count back from there.
  if "speed" in records.tables:
    speed = records.tables["speed"]
    window = np.searchsorted(speed.steps, steps)
    known = window < len(speed.steps)
    window = window[known]
    steps_before_end = speed.steps[window] - steps[known]
    times[known] = speed.column("time")[window] - steps_before_end * speed.column("seconds_per_step")[window]
  times = np.fmax.accumulate(times)  # a window that was timed too long must not turn the curve back
  gaps = np.diff(times, prepend=times[0])
  usual = np.median(gaps[gaps > 0]) if (gaps > 0).any() else 1.0
  is_pause = gaps > 60 * max(usual, 1.0)
  hours = np.cumsum(np.where(is_pause, usual, gaps)) / 3600
  return np.where(is_pause, np.nan, hours)


def _smooth(values: np.ndarray) -> np.ndarray:
  """Mean over a hundredth of the run, so that several runs can be told apart."""
  width = max(len(values) // 100, 1)
  kernel = np.ones(width)
  valid = np.isfinite(values)
  return (np.convolve(np.where(valid, values, 0), kernel, "same") / np.maximum(np.convolve(valid, kernel, "same"), 1e-9))


def _label_ends(axis, ends: list[tuple[float, str, str]]) -> None:
  """Labels (height, text, colour) at the right edge, moved apart so that each can be read."""
  ends = sorted(end for end in ends if math.isfinite(end[0]))
  low, high = axis.get_ylim()
  gap = min(_LABEL_GAP, 1 / max(len(ends), 1))
  places = []
  for height, _, _ in ends:
    wanted = (height - low) / (high - low)
    places.append(max(wanted, places[-1] + gap) if places else max(wanted, 0.0))
  ceiling = 1.0
  for index in reversed(range(len(places))):
    places[index] = min(places[index], ceiling)
    ceiling = places[index] - gap
  for (height, text, color), place in zip(ends, places):
    axis.annotate(text, (1, height), (1.03, place), xycoords=axis.get_yaxis_transform(), textcoords="axes fraction",
                  va="center", fontsize=min(8, 8 * gap / _LABEL_GAP * 1.3), color=color, annotation_clip=False,
                  arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0,
                              "relpos": (0, 0.5)})


def _draw_scores(axis, scores: dict[str, tuple[np.ndarray, np.ndarray]], names: list[str], title: str) -> None:
  """Curves by name, (million tokens, bits a byte) each, with the last value and the name at their ends.

  `names`: all that there are, so that one has the same colour in each picture.
  """
  ends = []
  for name, (millions, bits) in scores.items():
    color = f"C{names.index(name) % 10}"
    axis.plot(millions, bits, color=color, marker="o", markersize=3)
    ends.append((float(bits[-1]), f"{bits[-1]:.3f} {name}", color))
  axis.set(title=title, xlabel="million tokens")
  axis.grid(alpha=0.2)
  _label_ends(axis, ends)


def _score(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
  """(million tokens, bits a byte) of a domain's evaluations."""
  table = records.tables[f"eval/{name}"]
  return _tokens(records, table.steps) / 1e6, table.column("bits_per_byte")


def _mean_score(records: Records, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
  """The same of several domains, at the steps at which all were evaluated."""
  tables = [records.tables[f"eval/{name}"] for name in names]
  steps = sorted(set.intersection(*(set(table.steps.tolist()) for table in tables)))
  bits = [table.column("bits_per_byte")[np.searchsorted(table.steps, steps)] for table in tables]
  return _tokens(records, np.array(steps)) / 1e6, np.mean(bits, 0)


def _draw_validation(axis, runs: dict[str, Records]) -> None:
  """A colour a domain; of several runs a colour a run, of the mean of the domains that all of them have."""
  if len(runs) == 1:
    (records,) = runs.values()
    names = records.domains
    _draw_scores(axis, {name: _score(records, name) for name in names}, names, "validation, bits a byte")
    return
  shared = sorted(set.intersection(*(set(records.domains) for records in runs.values())))
  scores = {run: _mean_score(records, shared) for run, records in runs.items()} if shared else {}
  scores = {run: score for run, score in scores.items() if len(score[0])}
  of = f", mean of {len(shared)} domains" if len(shared) > 1 else f", {shared[0]}" if shared else ""
  _draw_scores(axis, scores, list(runs), f"validation, bits a byte{of}")


def _draw_domain_scores(runs: dict[str, Records]):
  """A picture a domain, a colour a run; None where the runs have one domain, which is drawn already."""
  names = sorted({name for records in runs.values() for name in records.domains})
  if len(names) < 2:
    return None
  rows = math.ceil(len(names) / 3)
  figure, axes = plt.subplots(rows, 3, figsize=(16, 3.4 * rows), layout="constrained", squeeze=False)
  for axis in axes.flat[len(names) :]:
    axis.axis("off")
  for axis, name in zip(axes.flat, names):
    scores = {run: _score(records, name) for run, records in runs.items() if name in records.domains}
    _draw_scores(axis, scores, list(runs), name)
  return figure


def _draw_curves(runs: dict[str, Records], descriptions: dict[str, Description]):
  """Loss by tokens and by time, validation by domain, gradient norm, learning rate, speed; runs over each other."""
  figure, axes = plt.subplots(2, 3, figsize=(16, 7.2), layout="constrained")
  tops = []
  for number, (run, records) in enumerate(runs.items()):
    train, color = records.train, f"C{number}"
    loss = train.column("loss")
    millions = _tokens(records, train.steps) / 1e6
    tops += [np.percentile(loss[np.isfinite(loss)], 99.5)] if np.isfinite(loss).any() else []
    for axis, x in ((axes[0, 0], millions), (axes[0, 1], _hours(records))):
      axis.plot(x, loss, color=color, linewidth=0.5, alpha=0.3)
      axis.plot(x, _smooth(loss), color=color, linewidth=1.2, label=run)
    axes[1, 0].plot(millions, _smooth(train.column("gradient_norm")), color=color, linewidth=0.9)
    axes[1, 1].plot(millions, train.column("learning_rate"), color=color, linewidth=1.2)
    if "speed" in records.tables:
      timed = records.tables["speed"]
      speed, mfu = timed.column("tokens_per_second"), timed.column("mfu")
      axes[1, 2].plot(_tokens(records, timed.steps) / 1e6, speed, color=color, linewidth=0.9)
      whose = f"{run}: " if len(runs) > 1 else ""
      of_peak = f", MFU {np.nanmedian(mfu):.1%}" if np.isfinite(mfu).any() and not descriptions[run].on_cpu else ""
      axes[1, 2].plot([], [], color=color, label=f"{whose}median {np.nanmedian(speed):,.0f}{of_peak}")
  _draw_validation(axes[0, 2], runs)
  for axis in axes[0, :2] if tops else ():
    axis.set_ylim(top=max(tops) * 1.05)
  axes[0, 0].set(title="training loss, nats a token", xlabel="million tokens")
  axes[0, 1].set(title="training loss, nats a token", xlabel="hours, pauses left out")
  axes[1, 0].set(title="gradient norm", xlabel="million tokens", yscale="log")
  axes[1, 1].set(title="learning rate", xlabel="million tokens", ylim=(0, None))
  axes[1, 2].set(title="tokens a second", xlabel="million tokens", ylim=(0, None))
  for axis in [axes[1, 2], *([axes[0, 0]] if len(runs) > 1 else [])]:
    if axis.get_legend_handles_labels()[0]:
      axis.legend(fontsize=8)
  for axis in axes.flat:
    axis.grid(alpha=0.2)
  return figure


def _different(configs: dict[str, dict[str, str]]) -> list[str]:
  """The fields in which the runs differ."""
  keys = sorted({key for fields in configs.values() for key in fields})
  return [key for key in keys if len({fields.get(key) for fields in configs.values()}) > 1]


def _comparable(text: str) -> Any:
  """A number, a name or the like of a config's JSON; of a list the text itself."""
  value = json.loads(text)
  return text if isinstance(value, (list, dict)) else value


def _draw_sweep(runs: dict[str, Records], configs: dict[str, dict[str, str]]):
  """The last scores over the one field in which the runs differ, seeds aside; None where there is no such field."""
  swept = [key for key in _different(configs) if key.rpartition(".")[2] != "seed"]
  names = sorted({name for records in runs.values() for name in records.domains})
  if len(swept) != 1 or not names:
    return None
  values = {run: _comparable(configs[run].get(swept[0], "null")) for run in runs}
  are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values.values())
  order = sorted(set(values.values()), key=None if are_numbers else str)
  places = {value: value if are_numbers else index for index, value in enumerate(order)}
  figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
  ends = []
  for number, name in enumerate(names):
    scores: dict[Any, list[float]] = {}  # by value; several of a value are seeds
    for run, records in runs.items():
      if name in records.domains:
        scores.setdefault(values[run], []).append(records.tables[f"eval/{name}"].last("bits_per_byte"))
    known = [value for value in order if value in scores]
    means = [float(np.mean(scores[value])) for value in known]
    axis.plot([places[value] for value in known], means, color=f"C{number % 10}", linewidth=1)
    for value in known:
      axis.plot([places[value]] * len(scores[value]), scores[value], "o", color=f"C{number % 10}", markersize=4)
    ends.append((means[-1], name, f"C{number % 10}"))
  if are_numbers and min(order) > 0 and max(order) >= 10 * min(order):
    axis.set_xscale("log")
  if not are_numbers:
    axis.set_xticks(range(len(order)), list(map(str, order)))
  axis.set(title="last validation, bits a byte", xlabel=swept[0])
  axis.grid(alpha=0.2)
  _label_ends(axis, ends)
  return figure


def _draw_domain_tokens(records: Records):
  """Tokens of each domain up to each step; None where they are not recorded."""
  prefix = "domain_tokens/"
  columns = {key.removeprefix(prefix): records.train.column(key) for key in records.train.columns if key.startswith(prefix)}
  if not columns:
    return None
  figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
  ends = []
  for number, (name, column) in enumerate(columns.items()):
    millions = np.cumsum(np.nan_to_num(column)) / 1e6
    axis.plot(records.train.steps, millions, color=f"C{number % 10}")
    ends.append((float(millions[-1]), f"{name} {millions[-1]:,.3g} M", f"C{number % 10}"))
  axis.set(title="million tokens read", xlabel="step", ylim=(0, None))
  axis.grid(alpha=0.2)
  _label_ends(axis, ends)
  return figure


def _draw_balance(runs: dict[str, Records]):
  figure, axes = plt.subplots(1, 3, figsize=(16, 3.4), layout="constrained")
  titles = {"balance": "balance loss (1 is balanced)", "load_max": "largest load / mean load", "router_entropy":
            "router entropy, nats"}
  for number, (run, records) in enumerate(runs.items()):
    for axis, (key, title) in zip(axes, titles.items()):
      train = records.train
      axis.plot(_tokens(records, train.steps) / 1e6, _smooth(train.column(key)), color=f"C{number}", linewidth=1, label=run)
      axis.set(title=title, xlabel="million tokens")
      axis.grid(alpha=0.2)
  axes[0].legend(fontsize=8)
  return figure


def _draw_goodput(runs: dict[str, Records]):
  """A bar a run: seconds by what they went into, of all its processes, the final evaluation included."""
  told = {run: records.goodput for run, records in runs.items() if sum(records.goodput.values())}
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


def _draw_load(records: Records):
  """Layer x expert heatmaps at a few times, each over a tenth of the run so that single batches do not flicker."""
  if not records.loads:
    return None
  first, end = records.loads[0].first_step, records.loads[-1].last_step + 1
  width = max((end - first) // 10, 1)
  starts = np.unique(np.linspace(first, end - width, _SNAPSHOTS).astype(int))
  parts = [_windows(records.loads, start, start + width) for start in starts]
  loads = [_shares(np.sum([window.counts for window in part], 0, dtype=float)) for part in parts]
  top = max(2.0, max(load.max() for load in loads))
  figure, axes = plt.subplots(1, len(starts), figsize=(3.2 * len(starts), 2.8), squeeze=False, layout="constrained")
  for axis, part, load in zip(axes[0], parts, loads):
    image = _heat(axis, load, f"steps {part[0].first_step}-{part[-1].last_step}", top)
  figure.colorbar(image, ax=axes, label="load / mean load", shrink=0.9)
  return figure


def _windows(windows: list[metrics.Window], start: int, end: int) -> list[metrics.Window]:
  """Those whose middle is in the steps from `start` up to `end`; where records are lacking, the nearest one."""
  middles = np.array([(window.first_step + window.last_step) / 2 for window in windows])
  inside = np.flatnonzero((middles >= start) & (middles < end))
  nearest = [np.abs(middles - (start + end) / 2).argmin()]
  return [windows[i] for i in (inside if len(inside) else nearest)]


def _last_scores(records: Records) -> dict[str, dict[str, Any]]:
  """By domain the last evaluation with all of its arrays."""
  return {name: records.latest[f"eval/{name}"] for name in records.domains if f"eval/{name}" in records.latest}


def _draw_domains(records: Records):
  last = _last_scores(records)
  if not last:
    return None
  names = list(last)
  loads = [_shares(score["expert_counts"]) for score in last.values()]
  top = max(2.0, max(load.max() for load in loads))
  figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 2.8), squeeze=False, layout="constrained")
  for axis, name, load in zip(axes[0], names, loads):
    image = _heat(axis, load, name, top)
  figure.colorbar(image, ax=axes, label="load / mean load", shrink=0.9)
  return figure


def _draw_routing(records: Records):
  titles = {"balance": "balance loss (1 is balanced)", "load_max": "largest load / mean load", "dead_experts": "dead experts",
            "dropped": "dropped share of selections", "router_entropy": "router entropy, nats",
            "top_k_weight": "probability on the chosen experts", "router_z": "router z, mean squared logsumexp"}
  figure, axes = plt.subplots(2, 4, figsize=(16, 6), layout="constrained")
  axes[1, 3].axis("off")
  for axis, (key, title) in zip(axes.flat, titles.items()):
    axis.plot(records.train.steps, records.train.column(key), linewidth=0.8)
    axis.set(title=title, xlabel="step")
  return figure


def _draw_specialisation(records: Records):
  """What an expert tells about the domain, for each layer, at the evaluations that kept their counts, and the last one."""
  by_domain = {name: dict(records.scores.get(name, {})) for name in records.domains}
  for name, score in _last_scores(records).items():
    by_domain[name][score["step"]] = np.asarray(score["expert_counts"], np.float32)
  steps = sorted(set.intersection(*map(set, by_domain.values()))) if by_domain else []
  if len(by_domain) < 2 or not steps:
    return None
  by_step = [np.stack([counts[step] for counts in by_domain.values()]).astype(float) for step in steps]
  values = np.array([analysis.specialisation(counts) for counts in by_step])
  figure, axis = plt.subplots(figsize=(6, 3.2))
  for layer in range(values.shape[1]):
    axis.plot(steps, values[:, layer], marker="o", label=f"layer {layer}")
  axis.set(title="I(domain; expert) / H(domain)", xlabel="step", ylim=(0, None))
  if values.shape[1] <= 12:
    axis.legend()
  return figure


def _draw_information(records: Records):
  """Layer x layer, in nats, mean over domains: between first choices, and between the layers' probabilities."""
  last = list(_last_scores(records).values())
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


def _domain_table(records: Records) -> str:
  """Domain x expert: each expert's share of the domain's selections, averaged over layers."""
  rows, last = [], _last_scores(records)
  for name, score in last.items():
    share = np.asarray(score["expert_counts"], float)
    share = (share / np.maximum(share.sum(-1, keepdims=True), 1)).mean(0)
    rows.append(f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{v:.1%}</td>" for v in share) + "</tr>")
  if not rows:
    return ""
  count = max(len(score["expert_counts"][0]) for score in last.values())
  head = "<tr><th>domain</th>" + "".join(f"<th>{i}</th>" for i in range(count)) + "</tr>"
  return f"<h2>Share of each expert, mean over layers</h2><div class=wide><table>{head}{''.join(rows)}</table></div>"


def _examples(records: Records) -> str:
  """What each expert reads, by domain and layer, folded away; where there are too many for a page, of some layers."""
  def cell(entry):
    tokens = " ".join(f"<code>{html.escape(repr(text)[1:-1])}</code>&nbsp;{share:.0%}" for text, share in entry["tokens"])
    places = "".join(f"<br><small>{html.escape(a)}<mark>{html.escape(b)}</mark>{html.escape(c)}</small>"
                     for a, b, c in entry["snippets"])
    return tokens + places

  parts, omitted = [], 0
  for name in records.domains:
    shown = records.latest.get(f"examples/{name}", {"examples": {}, "layers": 0})
    omitted = max(omitted, shown["layers"] - len(shown["examples"]))
    for layer, experts in shown["examples"].items():
      rows = "".join(f"<tr><th>{i}</th><td>{cell(entry)}</td></tr>" for i, entry in enumerate(experts))
      parts.append(f"<details><summary>{html.escape(name)}, layer {layer}</summary><table>{rows}</table></details>")
  if not parts:
    return ""
  rest = f" {omitted} more layers are in <code>latest/examples/</code>." if omitted else ""
  return ("<h2>What the experts read</h2><p>The tokens that tell an expert from the others, with their share of what it reads, "
          f"and two places in the text.{rest}</p>" + "".join(parts))


def _facts(runs: dict[str, Records], descriptions: dict[str, Description]) -> str:
  """A column a run."""
  def number(value: float, form: str = ".4f") -> str:
    return format(value, form) if math.isfinite(value) else "not finite"

  columns = []
  for run, records in runs.items():
    train = records.train
    facts = descriptions[run].facts | {
        "steps": f"{train.steps[-1] + 1:,}", "tokens": f"{np.nansum(train.column('tokens')):,.0f}",
        "training loss, nats a token": number(train.last("loss")), "balance": number(train.last("balance")),
        "skipped steps": number(train.last("skipped_steps"), ".0f")}
    facts |= {f"{name}, validation, bits a byte": number(records.tables[f"eval/{name}"].last("bits_per_byte"))
              for name in records.domains}
    if "speed" in records.tables:
      facts["tokens a second, median"] = f"{np.nanmedian(records.tables['speed'].column('tokens_per_second')):,.0f}"
    columns.append(facts)
  keys = list(dict.fromkeys(key for facts in columns for key in facts))
  head = "<tr><th></th>" + "".join(f"<th>{html.escape(run)}</th>" for run in runs) + "</tr>" if len(runs) > 1 else ""
  return f"<table class=figures>{head}{_rows(keys, columns, '')}</table>"


def _rows(keys, columns: list[dict[str, str]], missing: str) -> str:
  """A table row a key, a cell a column."""
  return "".join(f"<tr><th>{html.escape(key)}</th>" + "".join(
      f"<td>{html.escape(column.get(key, missing))}</td>" for column in columns) + "</tr>" for key in keys)


def _flat(values: dict | None, prefix: str = "") -> dict[str, str]:
  """`model.router.top_k` -> its value as JSON."""
  found = {}
  for key, value in (values if isinstance(values, dict) else {}).items():
    found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
  return found


def _config_table(configs: dict[str, dict[str, str]]) -> str:
  """The fields in which the runs differ."""
  different = _different(configs)
  if not different:
    return "<p>Their configs are equal.</p>"
  head = "<tr><th>config</th>" + "".join(f"<th>{html.escape(run)}</th>" for run in configs) + "</tr>"
  rows = _rows(different, list(configs.values()), "-")
  return f"<h2>What differs in their configs</h2><table class=figures>{head}{rows}</table>"


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
