"""What a snapshot costs beside Orbax on this machine: `python -m tools.bench.snapshot [--gb=0.2,1,4] [--hosts=4] [--no_orbax]`

In one run, in turn: (1) this machine's memory copy, digest and parity speeds; (2) a state of that size in JAX on one host:
the stall of a snapshot (with the fingerprint's time apart) and the time to its commit, beside Orbax's asynchronous save of the
same state (blocking time, time to the finished checkpoint); (3) snapshot processes of several hosts: time from the last byte
written to `prepared`. CPU only; on an accelerator the copy is from the device, which nothing here measures.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe import checkpoint
from moe import command_line
from moe import gin_config
from moe.snapshot import client
from moe.snapshot import copies
from moe.snapshot import memory
from moe.snapshot import parity
from moe.snapshot import wire
from tools import local_keeper

def best(function, repeats: int = 5) -> float:
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - begin)
  return min(seconds)


def speeds(size: int = 256 << 20) -> dict[str, float]:
  """GB/s of one thread over warm memory."""
  a, b = np.full(size, 3, np.uint8), np.full(size, 5, np.uint8)
  table = {
      "memory copy": best(lambda: np.copyto(a, b)),
      "xxh3 digests": best(lambda: memory.digests(b, memory.MAX_CHUNK)),
      "XOR (m = 1)": best(lambda: parity.accumulate(a, 1, b)),
      f"Reed-Solomon row ({parity.backend()})": best(lambda: parity.accumulate(a, 29, b)),
      "Reed-Solomon row (numpy)": best(lambda: parity.accumulate(a, 29, b, "numpy"), 1),
      "fold": best(lambda: [parity.fold(b[i : i + memory.MAX_CHUNK]) for i in range(0, size, memory.MAX_CHUNK)])}
  return {name: size / 1e9 / seconds for name, seconds in table.items()}


def state_of(gb: float) -> dict[str, jax.Array]:
  rows = max(round(gb * 1e9 / 4 / 1024 / 8), 1)
  return {f"w{i}": jax.random.normal(jax.random.key(i), (rows, 1024)) for i in range(8)}  # nothing to compress


def one_host(gb: float, repeats: int) -> dict:
  """Snapshots and Orbax saves of one state, by turns."""
  state = state_of(gb)
  step_seconds = best(lambda: jax.block_until_ready(jax.tree.map(lambda x: x + 1, state)), 2)
  folder = wire.socket_folder()
  host = local_keeper.Host(0, folder)
  local_keeper.configure([host], 0)
  os.environ[command_line.SUPERVISED] = json.dumps({"socket": host.path, "generation": 1, "step": None, "host": 0, "hosts": 1,
                                                    "beat_fd": -1, "parent": os.getppid()})
  run = gin_config.resolve([gin_config.CONFIGS / "run" / "quickstart.gin"]).run
  snapshots = client.Snapshots()
  snapshots._every = 1
  begin = time.perf_counter()
  snapshots.attach(state, run)
  faulted = time.perf_counter() - begin
  snapshots._every = 1
  snapshots.warm(state)
  fingerprint = best(lambda: jax.block_until_ready(checkpoint.start_digests(state)), 2)
  manager = ocp.CheckpointManager(f"{folder}/orbax", options=ocp.CheckpointManagerOptions(max_to_keep=1))
  rows: dict[str, list[float]] = {name: [] for name in ("stall", "commit", "orbax block", "orbax total")}
  resident = []
  for step in range(1, repeats + 1):
    begin = time.perf_counter()
    (_, fields), = snapshots.take(step, state, dict)
    prepared = host.hear("prepared", seconds=120)
    rows["commit"].append(time.perf_counter() - begin)
    host.control.send({"do": "commit", "step": prepared["prepared"]})
    snapshots.wait(step)
    rows["stall"].append(fields["stall_seconds"])
    begin = time.perf_counter()
    manager.save(step, args=ocp.args.PyTreeSave(state))
    rows["orbax block"].append(time.perf_counter() - begin)
    manager.wait_until_finished()
    rows["orbax total"].append(time.perf_counter() - begin)
    resident.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * memory.PAGE / 1e9)
  manager.close()
  host.keeper._forget()
  shutil.rmtree(folder)
  del os.environ[command_line.SUPERVISED]
  middle = {name: statistics.median(values[1:] or values) for name, values in rows.items()}
  return {"gb": gb, "allocate": faulted, "fingerprint": fingerprint, "sweep": step_seconds, **middle,
          "resident_first_gb": resident[0], "resident_last_gb": resident[-1]}


def needed_gb(gb: float, hosts: int, m: int) -> float:
  """Memory of all the snapshots' copies and parity on this machine."""
  shape = copies.geometry(parity.Code(hosts, m), round(gb * 1e9 / hosts))
  return 2 * hosts * (shape.data_bytes + shape.parity_bytes) / 1e9


def several_hosts(gb: float, hosts: int, m: int, repeats: int = 3) -> dict:
  """All hosts' keepers on this machine: from `ready` on all to `prepared` on all."""
  folder, size = wire.socket_folder(), round(gb * 1e9 / hosts)
  made = [local_keeper.Host(number, folder) for number in range(hosts)]
  local_keeper.configure(made, m)
  seconds, source = [], np.random.default_rng(0).integers(0, 256, size, np.uint8)
  for host in made:
    host.attach(1, [size] * hosts)
  for step in range(1, repeats + 1):
    for host in made:
      assert host.copied(step, source)
    begin = time.perf_counter()
    for host in made:
      host.ready(step)
    for host in made:
      message = host.hear("prepared", "skipped", seconds=120)
      assert "prepared" in message, message
    seconds.append(time.perf_counter() - begin)
    for host in made:
      host.control.send({"do": "commit", "step": step})
    while any(host.keeper.committed != step for host in made):
      time.sleep(0.01)
  for host in made:
    host.keeper._forget()
    host.close()
  shutil.rmtree(folder)
  return {"gb": gb, "hosts": hosts, "m": m, "seconds": min(seconds), "sent_gb": hosts * m * size / 1e9,
          "memory_gb": needed_gb(gb, hosts, m)}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.bench.snapshot", description=__doc__.splitlines()[0])
  parser.add_argument("--gb", default="0.2,1,4", help="sizes of the state over all hosts")
  parser.add_argument("--hosts", type=int, default=4)
  parser.add_argument("--no_orbax", action="store_true", help="the snapshot processes of several hosts alone: less memory")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--json", type=pathlib.Path)
  arguments = parser.parse_args(argv)
  found = {"speeds": speeds(), "one_host": [], "several_hosts": []}
  copy = found["speeds"]["memory copy"]
  for name, value in found["speeds"].items():
    print(f"{name:28} {value:6.2f} GB/s  {value / copy:.2f} of the memory copy", flush=True)
  sizes = list(map(float, arguments.gb.split(",")))
  for gb in [] if arguments.no_orbax else sizes:
    if 7 * gb * 1e9 > memory.available_bytes():  # 6.5 times the state is resident, Orbax and the fingerprint included
      print(f"{gb:g} GB, one host: does not fit beside Orbax in the {memory.available_bytes() / 1e9:.1f} GB left", flush=True)
      continue
    r = one_host(gb, arguments.repeats)
    found["one_host"].append(r)
    print(f"{gb:g} GB, one host: allocated in {r['allocate']:.2f} s; stall {r['stall']:.3f} s "
          f"({gb / r['stall']:.1f} GB/s, {gb / r['stall'] / copy:.2f} of the memory copy), fingerprint alone "
          f"{r['fingerprint']:.3f}; digested after {r['commit']:.3f} s | Orbax: "
          f"blocks {r['orbax block']:.3f} s, done after {r['orbax total']:.2f} s | "
          f"resident {r['resident_first_gb']:.2f} -> {r['resident_last_gb']:.2f} GB", flush=True)
  for gb in sizes:
    for m in (1, 2):
      need = needed_gb(gb, arguments.hosts, m)
      if (need + gb / arguments.hosts) * 1e9 > memory.available_bytes():
        print(f"{gb:g} GB, {arguments.hosts} hosts on this machine, m = {m}: {need:.1f} GB of snapshots do not fit in the "
              f"{memory.available_bytes() / 1e9:.1f} GB that are left", flush=True)
        continue
      s = several_hosts(gb, arguments.hosts, m)
      found["several_hosts"].append(s)
      print(f"{gb:g} GB, {arguments.hosts} hosts on this machine, m = {m}: prepared {s['seconds']:.2f} s after the copy, "
            f"{s['sent_gb']:.2f} GB sent ({s['sent_gb'] / s['seconds']:.2f} GB/s), {s['memory_gb']:.2f} GB of memory",
            flush=True)
  if arguments.json:
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  wire.TIMEOUT_SECONDS = 120.0
  raise SystemExit(main())
