"""Random kills, for as long as one likes: `python -m tools.soak [--kills=200] [--hosts=4] [--parity=1] [--out=FILE.json]`.

Real supervisors, leader, snapshot processes and sockets; the trainer is one of a second's start (below) whose state at a step
is known, so that every recovery is checked to the bit against what it must be. Killed, with SIGKILL, at random moments: a
trainer, a snapshot process, a whole host, or as many hosts at once as the parity covers, or one more. Whatever was committed
must come back, unless more hosts are gone than the parity covers; then nothing may.

`--train` soaks the real trainer instead, on CPU: some fifteen seconds a kill; losses and the last state are compared with an
undisturbed run.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import socket
import sys
import tempfile
import time

import numpy as np

from moe import command_line
from moe.snapshot import memory
from moe.snapshot.wire import Link, WireError
from tools import local_job

_EVERY = 3  # steps between snapshots
_STEP_SECONDS = 0.01


# ------------------------------------------------------------------------------------------------------- the light trainer


def known_state(host: int, step: int, size: int) -> np.ndarray:
  """[size] uint8, what host `host` holds at a step."""
  return np.random.Generator(np.random.Philox(key=[host, step])).integers(0, 256, size, np.uint8)


def light_trainer(run_dir: str) -> int:
  """Steps of nothing, in lockstep with the other hosts through a shared file; snapshots as the real trainer takes them."""
  settings = json.loads(os.environ[command_line.SUPERVISED])
  memory.die_with_parent(settings["parent"])
  host, hosts, generation = settings["host"], settings["hosts"], settings["generation"]
  sizes = [200_000 + 10_000 * h for h in range(hosts)]
  try:
    link, slots, found = _attach(settings, sizes)
  except (OSError, RuntimeError) as error:
    print(f"no snapshot process: {error}", flush=True)
    return 13
  begin = settings["step"] or 0
  if settings["step"] is not None:
    held = slots[found["committed"] or 0][: sizes[host]]
    if found["step"] != begin:  # lost after the proof: as the real trainer, out, and a new round decodes it
      return 13
    if not np.array_equal(held, known_state(host, begin, sizes[host])):
      print(f"WRONG STATE: host {host}, step {begin}", flush=True)
      return 4
  print(f"good {host} {begin}", flush=True)
  path = pathlib.Path(run_dir) / f"board-{generation}"  # the step of every host
  while host and not (path.exists() and path.stat().st_size == 8 * hosts):
    time.sleep(0.005)
  board = np.memmap(path, np.int64, "r+" if host else "w+", shape=hosts)
  step = begin
  while True:
    os.write(settings["beat_fd"], (json.dumps({"phase": "step", "step": step}) + "\n").encode())
    step += 1
    board[host] = step
    while board.min() < step:
      time.sleep(0.001)
    time.sleep(_STEP_SECONDS)
    if step % _EVERY:
      continue
    try:
      if link is None:  # the snapshot process died; its successor
        link, slots, _ = _attach(settings, sizes)
      answer = _ask(link, generation, {"do": "begin", "step": step})
      if "slot" in answer:
        slots[answer["slot"]][: sizes[host]] = known_state(host, step, sizes[host])
        _ask(link, generation, {"do": "ready", "step": step, "header": json.dumps({"step": step})})
    except (OSError, RuntimeError):
      link = None


def _ask(link: Link, generation: int, message: dict) -> dict:
  try:
    link.send({**message, "generation": generation})
    while (answer := link.receive()[0]).keys() == {"committed"}:
      pass
  except WireError as error:
    raise RuntimeError(str(error)) from error
  if "refused" in answer:
    raise RuntimeError(answer["refused"])
  return answer


def _attach(settings: dict, sizes: list[int]):
  sock = socket.socket(socket.AF_UNIX)
  sock.connect(settings["socket"])
  link = Link(sock, 60.0)
  answer = _ask(link, settings["generation"], {"do": "attach", "layout": "soak", "sizes": sizes, "slots": 2})
  return link, memory.received(sock, answer["slots"]), answer


# ---------------------------------------------------------------------------------------------------------------- the soak


def phase(job: local_job.Job) -> str:
  """What the job is doing, by its last event."""
  told = [e for e in job.events() if e["event"] in ("failure", "recovery", "trainers", "commit", "degraded")]
  last = told[-1] if told else None
  if last is None or last["event"] in ("failure", "recovery"):
    return "recovering"
  if last["event"] == "trainers":
    return "starting"
  return "degraded" if last["event"] == "degraded" else "training"


def strike(job: local_job.Job, rng: random.Random, parity: int) -> tuple[str, list[int] | None]:
  """Kills something; (what, hosts whose memory is gone, or None when there was nothing to kill)."""
  what = rng.choices(["trainer", "keeper", "host", "hosts", "too many"], [50, 15, 20, 8, 7 if job.hosts > parity + 1 else 0])[0]
  count = {"hosts": parity, "too many": parity + 1}.get(what, 1)
  victims = rng.sample(range(job.hosts), max(count, 1))
  kind = what if what in ("trainer", "keeper") else "host"
  struck = [h for h in victims if job.kill(h, kind)]
  if not struck:
    return what, None
  if kind == "host":
    time.sleep(rng.random())
    for host in struck:
      job.start(host)
  return what, struck if kind != "trainer" else []


def settled(job: local_job.Job, after: int, seconds: float = 120.0) -> list[dict]:
  """Waits until what was killed was noticed and a snapshot is committed again; the events since event number `after`."""
  def done():
    new = job.events()[after:]
    noticed = [i for i, e in enumerate(new) if e["event"] in ("failure", "degraded", "recovery", "trainers")]
    return any(e["event"] == "commit" for e in new[noticed[-1] :]) if noticed else None

  job.wait_for(done, seconds)
  return job.events()[after:]


def soak(kills: int, hosts: int, parity: int, seed: int, run_dir: str) -> dict:
  rng, table, wrong = random.Random(seed), collections.Counter(), []
  changes = {"Snapshot.parity_hosts": parity, "Snapshot.same_failures": 1_000_000, "Snapshot.every_steps": _EVERY}
  begin, number = time.monotonic(), 0
  with local_job.Job(run_dir, hosts, changes, trainer="tools.soak") as job:
    settled(job, 0)
    while number < kills:
      # One kill, or a few that fall into each other's recovery; then all is judged together.
      at, struck, lost = len(job.events()), [], set()
      committed = job.events("commit")[-1]["step"]
      while True:
        time.sleep(rng.expovariate(2.0))
        now = phase(job)
        what, gone = strike(job, rng, parity)
        if gone is not None:
          number += 1
          struck.append((what, now))
          lost |= set(gone)
        if struck and rng.random() < 0.7:
          break
      new = settled(job, at)
      tiers = [e for e in new if e["event"] == "recovery"]
      fresh = any(e["event"] == "trainers" and e["step"] is None for e in new)  # nothing of what was committed came back
      outcome = "from the start" if fresh else tiers[-1]["tier"] if tiers else "no restart"
      if fresh and len(lost) <= parity:
        wrong.append(f"kills {struck} of hosts {sorted(lost)} lost step {committed}")
      if not fresh and tiers and tiers[0]["step"] < committed:
        wrong.append(f"kills {struck} went back to step {tiers[0]['step']} from {committed}")
      for what, now in struck:
        table[what, now, f"{outcome}{'' if len(struck) == 1 else ', several kills'}"] += 1
      print(f"{number}/{kills} {struck} memory of {sorted(lost) or 'none'} lost: {outcome}", flush=True)
    logs = "".join((job.run_dir / f"log-{h}.txt").read_text() for h in range(hosts))
  wrong += [line for line in logs.splitlines() if "WRONG STATE" in line]
  return {"kills": number, "hosts": hosts, "parity_hosts": parity, "seconds": round(time.monotonic() - begin, 1),
          "wrong": wrong, "restores_checked": logs.count("good "), "table": [[*key, n] for key, n in sorted(table.items())]}


def soak_training(kills: int, hosts: int, seed: int, run_dir: str) -> dict:
  rng, steps = random.Random(seed), 10 * kills + 20
  changes = {"Train.steps": steps, "Snapshot.same_failures": 1_000_000}
  begin = time.monotonic()
  with local_job.Job(f"{run_dir}/control", hosts, changes, trainer="moe.train") as control:
    control.finish(seconds=3600)
  done = 0
  with local_job.Job(f"{run_dir}/soak", hosts, changes, trainer="moe.train") as job:
    for _ in range(kills):
      reached = job.last_step()
      job.wait_for(lambda last=reached: job.last_step() > last or job.last_step() >= steps - 2, 600.0)
      time.sleep(rng.random())
      done += job.kill(rng.randrange(hosts))
    job.finish(seconds=3600)
  same = (local_job.losses(job.run_dir) == local_job.losses(control.run_dir)
          and local_job.final_digests(job.run_dir, steps) == local_job.final_digests(control.run_dir, steps))
  return {"kills": done, "hosts": hosts, "seconds": round(time.monotonic() - begin, 1),
          "wrong": [] if same else ["losses or the last state differ from the undisturbed run"],
          "recoveries": [e["tier"] for e in job.events("recovery")]}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=200)
  parser.add_argument("--hosts", type=int, default=4)
  parser.add_argument("--parity", type=int, default=1)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--train", action="store_true", help="the real trainer")
  parser.add_argument("--run_dir", help="default: a temporary folder")
  parser.add_argument("--out", type=pathlib.Path)
  arguments = parser.parse_args(argv)
  run_dir = arguments.run_dir or tempfile.mkdtemp(prefix="moe-soak-")
  result = (soak_training(arguments.kills, arguments.hosts, arguments.seed, run_dir) if arguments.train else
            soak(arguments.kills, arguments.hosts, arguments.parity, arguments.seed, run_dir))
  print(json.dumps({key: value for key, value in result.items() if key != "table"}, indent=1))
  for row in result.get("table", []):
    print("  {:10} while {:12} -> {:28} {}".format(*row))
  if arguments.out:
    arguments.out.write_text(json.dumps(result) + "\n")
  return 1 if result["wrong"] else 0


if __name__ == "__main__":
  if command_line.SUPERVISED in os.environ:
    sys.exit(light_trainer(next(a for a in sys.argv if a.startswith("--run_dir=")).partition("=")[2]))
  sys.exit(main())
