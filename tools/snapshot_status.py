"""The snapshots and the goodput of a run, live or ended: `python -m tools.snapshot_status RUN_DIR [--json]`

Exit code 0: protected, or ended well; 1: degraded, unprotected or failed; 2: nothing to read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from etils import epath
from rich import console as rich_console
from rich import table as rich_table

from moe import jsonl
from moe import stored
from moe.errors import storage_errors


def goodput(events: list[dict], now: float | None = None) -> dict[str, float]:
  """Seconds of a run by what they went into: between the leader's and the trainer's events.

  `lost work` are steps done again after a failure (from the last commit to the failure), `restart` is from a failure to the
  trainer's first new step; compiling, restoring, evaluations and saves are the trainer's own clocks, as far as it got to
  write them.
  """
  starts = [e for e in events if e["event"] in ("trainers", "start")]
  if not starts:
    return {}
  begin, end = starts[0]["time"], (events[-1]["time"] if now is None else now)
  found = {"lost work": 0.0, "restart": 0.0, "snapshot stall": 0.0}
  failed_at, committed_at, first_at = None, None, None
  for e in events:
    name = e["event"]
    if name in ("commit", "restore"):
      committed_at = e["time"]
    elif name == "failure":
      since = committed_at or first_at
      if failed_at is None and since is not None:
        found["lost work"] += e["time"] - since
      failed_at = failed_at or e["time"]
      committed_at = None
    elif name == "first_step":
      if failed_at is not None:
        found["restart"] += e["time"] - failed_at
      else:
        found["start and compile"] = e["time"] - begin
      failed_at, first_at, committed_at = None, e["time"], e["time"]
    elif name == "snapshot":
      found["snapshot stall"] += e["stall_seconds"]
    elif name == "end":
      for key, value in e.get("goodput", {}).items():
        if key in ("data", "save", "evaluate"):
          found[key] = found.get(key, 0.0) + value
  found["steps and the rest"] = max(end - begin - sum(found.values()), 0.0)
  return {key: round(value, 3) for key, value in found.items()}


def status(run_dir) -> dict | None:
  """None where there is nothing of a run."""
  run_dir = epath.Path(run_dir)
  events = list(jsonl.read(run_dir / "events.jsonl")) if run_dir.exists() else []
  if not events:
    return None
  ended = next((name for name in ("DONE", "PREEMPTED", "FAILED") if (run_dir / name).exists()), None)
  path = run_dir / "snapshots.json"
  live = json.loads(path.read_text()) if path.exists() else None
  count = {name: sum(e["event"] == name for e in events) for name in ("commit", "skipped", "failure", "alarm")}
  protection = "none"
  if live and live["committed"] >= 0:
    missing = [len(g["hosts"]) - len(g["holding"]) for g in live["groups"]]
    allowed = live["parity_hosts"] if live["hosts"] > 1 else 0
    protection = "full" if not any(missing) else "degraded" if max(missing) <= allowed else "lost"
  return {"run_dir": str(run_dir), "ended": ended, "protection": protection, "snapshots": live, "counts": count,
          "last_failure": next((e for e in reversed(events) if e["event"] == "failure"), None),
          "recoveries": [{"tier": e["tier"], "step": e["step"]} for e in events if e["event"] == "recovery"],
          "checkpoints": {int(p.name): stored.read_back(p) for p in reversed(stored.steps(run_dir))},
          "goodput": goodput(events, None if ended else time.time())}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.snapshot_status", description=__doc__.splitlines()[0])
  parser.add_argument("run_dir")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args(argv)
  try:
    found = status(arguments.run_dir)
  except (*storage_errors(), ValueError, KeyError) as error:
    print(f"snapshot_status: {arguments.run_dir} cannot be read: {error!r}", file=sys.stderr)
    return 2
  if found is None:
    print(f"snapshot_status: {arguments.run_dir} has no events.jsonl; give the --run_dir of a run", file=sys.stderr)
    return 2
  fine = found["ended"] not in (None, "FAILED") or (found["ended"] is None and found["protection"] == "full")
  if arguments.json:
    print(json.dumps(found, indent=1))
    return 0 if fine else 1
  console, live = rich_console.Console(highlight=False), found["snapshots"]
  how = found["ended"] or "running, or killed whole"
  console.print(f"{found['run_dir']}: {how}; protection [bold]{found['protection']}[/]")
  if live:
    age = time.time() - live["time"]
    console.print(f"last committed snapshot: step {live['committed']}, generation {live['generation']}, "
                  f"{age:.0f} s ago; {found['counts']['commit']} commits, {found['counts']['skipped']} skipped, "
                  f"{found['counts']['failure']} failures")
    table = rich_table.Table("group", "hosts", "hold the committed step", f"may lose {live['parity_hosts']}")
    for i, g in enumerate(live["groups"]):
      missing = sorted(set(g["hosts"]) - set(g["holding"]))
      table.add_row(str(i), ", ".join(map(str, g["hosts"])), f"{len(g['holding'])} of {len(g['hosts'])}",
                    "protected" if not missing else f"degraded: host {', '.join(map(str, missing))}")
    console.print(table)
  for step, state in found["checkpoints"].items():
    console.print(f"checkpoint {step}: {state}")
  if found["last_failure"]:
    f = found["last_failure"]
    recent = [f"{r['tier']} {'' if r['step'] is None else r['step']}".strip() for r in found["recoveries"][-5:]]
    console.print(f"last failure: host {f['host']}, {f['kind']} at step {f['step']} ({f['phase']}); last recoveries: "
                  + ", ".join(recent))
  total = sum(found["goodput"].values())
  if total:
    table = rich_table.Table("goodput", "seconds", "share")
    for name, seconds in sorted(found["goodput"].items(), key=lambda item: -item[1]):
      table.add_row(name, f"{seconds:.1f}", f"{seconds / total:.1%}")
    console.print(table)
  return 0 if fine else 1


if __name__ == "__main__":
  raise SystemExit(main())
