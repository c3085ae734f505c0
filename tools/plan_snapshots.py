"""What snapshots cost and save on a pod: `python -m tools.plan_snapshots --hosts=256 --state_gb=4200 [...]`

Survival of a failure window, memory, network and the best interval for the erasure code, for replication and for checkpoints
alone: closed forms (papers: REFT section 5.4 of the notes; Gemini; Young 1974, Daly 2006) beside a Monte Carlo of the same
failures. All from the figures given; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import NamedTuple

import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from moe.snapshot import leader
from moe.snapshot import parity


class Scheme(NamedTuple):
  name: str
  groups: list[int]  # hosts in each group
  tolerated: int  # hosts a group may lose
  copies: float  # of a host's share, held in memory beside its own, for one snapshot
  network: float  # of a host's share, sent for a snapshot


def schemes(hosts: int, group_hosts: int, parity_hosts: int) -> list[Scheme]:
  """The code as configured, the same number of losses by whole copies, and no redundancy in memory."""
  sizes = [len(g) for g in leader.groups(hosts, group_hosts, parity_hosts)]
  code = parity.Code(min(sizes), parity_hosts)
  copies = parity_hosts + 1
  replicas = [copies] * (hosts // copies)
  if hosts % copies and replicas:
    replicas[-1] += hosts % copies
  return [Scheme(f"{code.k}+{code.m} code", sizes, parity_hosts, code.m / code.k, parity_hosts),
          Scheme(f"{copies} copies", replicas or [hosts], parity_hosts, parity_hosts, parity_hosts),
          Scheme("one copy", [1] * hosts, 0, 0, 0)]


def survival(groups: list[int], tolerated: int, p: float) -> float:
  """Probability that no group loses more than it tolerates, when each host is lost with probability p.

  >>> round(survival([8] * 64, 1, 0.02), 3)
  0.514
  """
  log = 0.0
  for n in groups:
    log += math.log(max(sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(tolerated + 1)), 1e-300))
  return math.exp(log)


def simulated_survival(groups: list[int], tolerated: int, p: float, trials: int, seed: int = 0) -> tuple[float, float]:
  """(share of trials survived, standard error), by drawing the hosts that are lost."""
  rng = np.random.default_rng(seed)
  lost = rng.binomial(np.array(groups), p, (trials, len(groups)))
  share = float((lost <= tolerated).all(axis=1).mean())
  return share, math.sqrt(max(share * (1 - share), 1 / trials) / trials)


def interval(cost_seconds: float, mtbf_seconds: float) -> float:
  """Seconds between saves that lose least: sqrt(2 x cost x time between failures) (Young 1974, first order)."""
  return math.sqrt(2 * cost_seconds * mtbf_seconds)


def lost_share(cost_seconds: float, every_seconds: float, mtbf_seconds: float, recovery_seconds: float) -> float:
  """Share of the time that goes into saving, into work done twice and into recovery."""
  return cost_seconds / every_seconds + (every_seconds / 2 + recovery_seconds) / mtbf_seconds


def uncovered(groups: list[int], tolerated: int, p: float) -> float:
  """Probability that a host's loss is not covered: `tolerated` or more others of its group are lost in the window too."""
  if not tolerated:
    return 1.0
  hosts = sum(groups)
  fine = [sum(math.comb(n - 1, i) * p**i * (1 - p) ** (n - 1 - i) for i in range(tolerated)) for n in groups]
  return sum(n / hosts * (1 - f) for n, f in zip(groups, fine))


def plan(a: argparse.Namespace) -> dict:
  """All figures of the table. Raises ValueError for groups that cannot be."""
  share = a.state_gb / a.hosts
  job_mtbf = a.host_mtbf_hours * 3600 / a.hosts
  p = 1 - math.exp(-((a.window_minutes / 60 / a.host_mtbf_hours) ** a.weibull_shape))
  stall = share / a.copy_gb_s
  persist = a.state_gb / a.store_gb_s
  persist_every = max(interval(a.persist_stall_seconds, job_mtbf), persist)
  rows = []
  for scheme in schemes(a.hosts, a.group_hosts, a.parity_hosts):
    found, error = simulated_survival(scheme.groups, scheme.tolerated, p, a.trials)
    behind = share * (2 / a.hash_gb_s + scheme.network / a.network_gb_s)  # digests on both sides, then the network
    # A second snapshot cannot begin before the first is through.
    every = max(interval(stall, job_mtbf), behind + stall)
    back = a.host_loss_share * uncovered(scheme.groups, scheme.tolerated, p)  # failures that fall back to the checkpoints
    rows.append({
        "scheme": scheme.name, "tolerates": scheme.tolerated, "host_memory_gb": 2 * share * (1 + scheme.copies),
        "network_gb": share * scheme.network, "behind_seconds": behind,
        "survival": survival(scheme.groups, scheme.tolerated, p), "simulated": found, "error": error, "every_seconds": every,
        "lost": lost_share(stall, every, job_mtbf, a.restart_seconds) + back * (persist_every / 2 + persist) / job_mtbf
        + a.persist_stall_seconds / persist_every})
  rows.append({"scheme": "checkpoints", "tolerates": a.hosts, "host_memory_gb": share, "network_gb": share,
               "behind_seconds": persist, "survival": 1.0, "simulated": 1.0, "error": 0.0, "every_seconds": persist_every,
               "lost": lost_share(a.persist_stall_seconds, persist_every, job_mtbf, a.restart_seconds + persist)})
  return {"hosts": a.hosts, "state_gb": a.state_gb, "job_mtbf_hours": job_mtbf / 3600, "loss_probability": p,
          "stall_seconds": stall, "rows": rows}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.plan_snapshots", description=__doc__.splitlines()[0])
  parser.add_argument("--hosts", type=int, required=True)
  parser.add_argument("--state_gb", type=float, required=True, help="of the whole job; 12 bytes a parameter with AdamW")
  parser.add_argument("--group_hosts", type=int, default=8)
  parser.add_argument("--parity_hosts", type=int, default=1)
  parser.add_argument("--host_mtbf_hours", type=float, default=20_000.0, help="of one host")
  parser.add_argument("--window_minutes", type=float, default=10.0, help="from a loss to the next snapshot of the replacement")
  parser.add_argument("--weibull_shape", type=float, default=1.0)
  parser.add_argument("--copy_gb_s", type=float, default=10.0, help="from the devices to a host's memory")
  parser.add_argument("--hash_gb_s", type=float, default=20.0)
  parser.add_argument("--network_gb_s", type=float, default=6.0, help="of a host, that snapshots may use")
  parser.add_argument("--store_gb_s", type=float, default=20.0, help="of the whole job, to the persistent store")
  parser.add_argument("--persist_stall_seconds", type=float, default=2.0)
  parser.add_argument("--host_loss_share", type=float, default=0.25, help="of the failures; the others leave memory alone")
  parser.add_argument("--restart_seconds", type=float, default=120.0)
  parser.add_argument("--trials", type=int, default=20_000)
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args(argv)
  try:
    result = plan(arguments)
  except ValueError as error:
    print(f"plan_snapshots: {error}")
    return 2
  if arguments.json:
    print(json.dumps(result, indent=1))
    return 0
  print(f"{arguments.hosts} hosts, {arguments.state_gb:g} GB of state, a failure every {result['job_mtbf_hours']:.1f} h;\n"
        f"a host is lost within {arguments.window_minutes:g} min with p = {result['loss_probability']:.2g}, a snapshot stalls "
        f"{result['stall_seconds']:.2f} s\n")
  table = rich_table.Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
  for name in ("", "may lose", "GB/host", "GB sent", "takes s", "survives", "drawn", "every s", "lost"):
    table.add_column(name, justify="left" if not name else "right", no_wrap=True)
  for r in result["rows"]:
    table.add_row(r["scheme"], str(r["tolerates"]), f"{r['host_memory_gb']:.1f}", f"{r['network_gb']:.1f}",
                  f"{r['behind_seconds']:.1f}", f"{r['survival']:.5f}", f"{r['simulated']:.4f}",
                  f"{r['every_seconds']:.0f}", f"{r['lost']:.2%}")
  rich_console.Console().print(table)
  print("\nmay lose: hosts of a group; GB/host: memory for two snapshots; survives: one window, by the\n"
        "closed form and as drawn; every: the interval that loses least; lost: time in saves, work done\n"
        "twice and restarts")
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
