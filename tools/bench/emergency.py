"""Snapshots beside Orbax emergency checkpointing: `python -m tools.bench.emergency [--mb=16,200]`

Four hosts, each a process on this machine; a state known at every step, so that what comes back is compared to the bit. Both
keep it in memory every 5 steps and in files every 20. In turn: blocking and total time of a save; the steps lost to one
schedule of kills; one flipped bit in what a host keeps; and a mesh of one data-parallel replica, where every shard is
distinct. CPU only: nothing here measures a copy from an accelerator.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe import checkpoint
from moe import command_line
from moe import config
from moe import gin_config
from moe import jsonl
from moe.snapshot import client
from tools import local_job

HOSTS, EVERY, PERSIST, STEPS, STEP_SECONDS = 4, 5, 20, 60, 0.25
_HANGS_SECONDS = 90.0  # after which a job that takes no step is started again without its memory
_SETTINGS = "MOE_BENCH_EMERGENCY"  # environment of a trainer: JSON
# (a step, what dies there). Hosts 0 and 1 are the first replica, which Orbax keeps in files only; 2 and 3 the second.
SCHEDULE = ((13, "trainer", 1), (28, "host", 3), (39, "host", 0), (52, "trainer", 2))


# ------------------------------------------------------------------------------------------------------------- the trainer


class Ours:
  """Snapshots in the hosts' memory, and checkpoints behind."""

  def __init__(self, abstract, mesh, run_dir: str):
    run = gin_config.resolve([gin_config.CONFIGS / "run" / "quickstart.gin"]).run
    self._run = dataclasses.replace(run, snapshot=dataclasses.replace(run.snapshot, every_steps=EVERY, group_hosts=HOSTS))
    self._abstract, self._snapshots = abstract, client.Snapshots()
    self._saver = checkpoint.Checkpointer(f"{run_dir}/checkpoints", config.Checkpoint())
    self._snapshots.attach(abstract, self._run)
    self.beat = lambda step: self._snapshots.beat("step", step)

  def restore(self):
    if self._snapshots.offered_step() >= max(self._saver.steps(), default=0):
      try:
        found = self._snapshots.restore(self._abstract)
        return found.step, found.state
      except checkpoint.CheckpointError as error:
        print(error, flush=True)
    found = self._saver.restore(self._abstract, self._run)
    return (found.step, found.state) if found else None

  def save(self, step: int, state) -> None:
    self._snapshots.take(step, state, dict)
    if step % PERSIST == 0:
      self._saver.save(step, state, {}, self._run, "")

  def wait(self, step: int) -> None:
    self._snapshots.wait(step)

  def close(self) -> None:
    self._saver.close()

  def flip(self) -> None:
    """One bit of what this host keeps of the last step."""
    copies = self._snapshots._ask({"do": "status"})[0]["copies"]
    self._snapshots._slots[[c["status"] for c in copies].index("committed")][100_000] ^= 4


class Orbax:
  """orbax.checkpoint.experimental.emergency, with what its multi-tier set-up calls before it."""

  def __init__(self, abstract, mesh, run_dir: str):
    from absl import flags
    import orbax.checkpoint as ocp
    from orbax.checkpoint._src.multihost import multihost
    from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency

    flags.FLAGS.mark_as_parsed()
    multihost.initialize_runtime_to_distributed_ids()
    multihost.initialize_distributed_to_device_ids()
    self._ocp, self._abstract = ocp, abstract
    self._local = local_folder(run_dir, jax.process_index())
    for folder in (self._local, pathlib.Path(run_dir) / "persistent"):
      folder.mkdir(parents=True, exist_ok=True)
    self._manager = emergency.CheckpointManager(
        self._local, f"{run_dir}/persistent", mesh, abstract, options=emergency.CheckpointManagerOptions(
            local=emergency.LocalCheckpointOptions(save_interval_steps=EVERY, max_to_keep=2),
            persistent=emergency.PersistentCheckpointOptions(save_interval_steps=PERSIST, max_to_keep=2)))
    self.beat = lambda step: None

  def restore(self):
    step = self._manager.latest_step()
    if step is None:
      return None
    arguments = self._ocp.args.PyTreeRestore(
        self._abstract, restore_args=self._ocp.checkpoint_utils.construct_restore_args(self._abstract))
    step = int(step)
    found = self._manager.restore(step, args=self._ocp.args.Composite(state=arguments))
    return step, getattr(found, "state", found)

  def save(self, step: int, state) -> None:
    self._manager.save(step, args=self._ocp.args.Composite(state=self._ocp.args.PyTreeSave(state)))

  def wait(self, step: int) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()

  def flip(self) -> None:
    newest = max(self._local.iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1)
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with open(data, "r+b") as file:
      file.seek(data.stat().st_size // 2)
      byte = file.read(1)[0]
      file.seek(-1, os.SEEK_CUR)
      file.write(bytes([byte ^ 4]))


def local_folder(run_dir, host: int) -> pathlib.Path:
  """In memory; of one host."""
  return pathlib.Path("/dev/shm") / f"moe-bench-{pathlib.Path(run_dir).name}" / str(host)


def trainer(settings: dict) -> int:
  """Steps without a model: the state of a step is a function of the step."""
  arguments, _ = command_line.parse(sys.argv[1:])
  jax.distributed.initialize(*command_line.hosts(arguments.multihost), shutdown_timeout_seconds=20)
  host, run_dir = jax.process_index(), arguments.run_dir
  mesh = jax.make_mesh((settings["replicas"], HOSTS // settings["replicas"]), ("replica", "model"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)
  sharding = jax.NamedSharding(mesh, jax.P("model", None))
  rows = max(round(settings["mb"] * 1e6 / 4 / 1024 / 4) // HOSTS * HOSTS, HOSTS)

  @jax.jit
  def known(step):
    place = jnp.arange(rows * 1024, dtype=jnp.uint32).reshape(rows, 1024) * np.uint32(0x9E3779B1) + step.astype(jnp.uint32)
    return {f"w{i}": jax.lax.with_sharding_constraint(place ^ np.uint32(i * 0x5EBCA77), sharding) for i in range(4)}

  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                          jax.eval_shape(known, jnp.int32(0)))
  differing = jax.jit(lambda a, b: sum(jnp.sum(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))))
  out = open(f"{run_dir}/told-{host}.jsonl", "a", buffering=1)

  def tell(**fields):
    out.write(json.dumps(fields) + "\n")

  tier = {"ours": Ours, "orbax emergency": Orbax}[settings["system"]](abstract, mesh, run_dir)
  begin = time.perf_counter()
  found, start = tier.restore(), 0
  if found is not None:
    start, state = found
    tell(restored=start, wrong=int(differing(state, known(jnp.int32(start)))), seconds=time.perf_counter() - begin)
  for step in range(start + 1, settings["steps"] + 1):
    tier.beat(step)
    state = jax.block_until_ready(known(jnp.int32(step)))
    time.sleep(STEP_SECONDS)
    begin = time.perf_counter()
    tier.save(step, state)
    block = time.perf_counter() - begin
    if step % EVERY == 0 and (settings["wait"] or step == settings.get("flip")):
      tier.wait(step)
    tell(step=step, block=block, total=time.perf_counter() - begin)
    if step == settings.get("flip") and host == HOSTS - 1 and not os.path.exists(f"{run_dir}/flipped"):
      tier.flip()
      pathlib.Path(run_dir, "flipped").touch()
      os.kill(os.getpid(), signal.SIGKILL)
  tier.close()
  return 0


# ------------------------------------------------------------------------------------------------------------- the jobs


class Bare:
  """Trainers alone: what dies takes the job along, and all start again, as a cluster's manager would do it."""

  def __init__(self, run_dir, environment: dict[str, str]):
    self.run_dir, self._environment, self.children, self._restarts = pathlib.Path(run_dir), environment, [], 3
    self.run_dir.mkdir(parents=True)
    self._start()

  def _start(self) -> None:
    port = local_job.free_port()
    self.children = []
    for host in range(HOSTS):
      with open(self.run_dir / f"log-{host}.txt", "a") as log:
        self.children.append(subprocess.Popen(
            [sys.executable, "-m", "tools.bench.emergency", f"--run_dir={self.run_dir}",
             f"--multihost=127.0.0.1:{port},{HOSTS},{host}"], cwd=local_job.ROOT, stdout=log, stderr=log,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **self._environment}))

  def kill(self, host: int, what: str) -> None:
    self.children[host].kill()
    self._again(host if what == "host" else None)

  def _again(self, lost: int | None = None) -> None:
    for child in self.children:
      child.kill()
      child.wait()
    if lost is not None:
      shutil.rmtree(local_folder(self.run_dir, lost), ignore_errors=True)
    self._start()

  def poll(self) -> bool:
    """Whether it has ended; starts it again where a child has died by itself."""
    codes = [child.poll() for child in self.children]
    if any(code not in (None, 0) for code in codes):
      self._restarts -= 1
      if self._restarts:
        self._again()
      return not self._restarts
    return all(code == 0 for code in codes)

  def without_memory(self) -> None:
    """What an operator does with a job that hangs: everything in memory away, and again."""
    shutil.rmtree(local_folder(self.run_dir, 0).parent, ignore_errors=True)
    self._again()

  def close(self) -> None:
    for child in self.children:
      child.kill()
      child.wait()
    shutil.rmtree(local_folder(self.run_dir, 0).parent, ignore_errors=True)


class Supervised:
  """The same trainers under their supervisors."""

  def __init__(self, run_dir, environment: dict[str, str]):
    self._job = local_job.Job(run_dir, HOSTS, trainer="tools.bench.emergency", environment={**environment, "XLA_FLAGS": ""})
    self.run_dir = self._job.run_dir

  def kill(self, host: int, what: str) -> None:
    self._job.kill(host, what)
    if what == "host":
      self._job.start(host)

  def poll(self) -> bool:
    return all(p.poll() is not None for p in self._job.supervisors.values())

  def close(self) -> None:
    self._job.close()


def told(run_dir: pathlib.Path, host: int = 0) -> list[dict]:
  path = run_dir / f"told-{host}.jsonl"
  return list(jsonl.read(path)) if path.exists() else []


def slowest(run_dir: pathlib.Path) -> list[dict]:
  """Steps as the slowest host saw them: with Orbax half of the hosts have nothing to do."""
  rows = [{r["step"]: r for r in told(run_dir, host) if "step" in r} for host in range(HOSTS)]
  return [{"step": step, **{key: max(row[step][key] for row in rows if step in row) for key in ("block", "total")}}
          for step in rows[0]]


def scenario(system: str, schedule=(), *, mb: float = 4.0, replicas: int = 2, steps: int = STEPS, wait: bool = False,
             flip: int | None = None, seconds: float = 600.0) -> tuple[list[dict], list[dict]]:
  """(what host 0 told, with `wait` the steps as the slowest saw them; the kills: at which step, restored step, lost steps,
  seconds to the first new step)."""
  folder = tempfile.mkdtemp(prefix="moe-emergency-")
  settings = {"system": system, "mb": mb, "replicas": replicas, "steps": steps, "wait": wait, "flip": flip}
  job = (Supervised if system == "ours" else Bare)(f"{folder}/{system.split()[0]}", {_SETTINGS: json.dumps(settings)})
  kills, pending, deadline = [], list(schedule), time.monotonic() + seconds
  try:
    while not job.poll():
      if time.monotonic() > deadline:
        break
      time.sleep(0.02)
      records = told(job.run_dir)
      reached = max((r["step"] for r in records if "step" in r), default=0)
      if kills and "restored" not in kills[-1]:
        after = records[kills[-1]["at"] :]
        restored = next((r["restored"] for r in after if "restored" in r), None)
        new = [i for i, r in enumerate(after) if r.get("step") == (restored or 0) + 1]
        if new and (restored is None or "restored" in after[new[-1] - 1]):
          kills[-1] |= {"restored": restored or 0, "seconds": time.monotonic() - kills[-1].pop("begin")}
          kills[-1]["lost"] = kills[-1]["step"] - kills[-1]["restored"]
        elif system != "ours" and time.monotonic() - kills[-1]["begin"] > _HANGS_SECONDS * (1 + kills[-1].get("hung", 0)):
          kills[-1]["hung"] = kills[-1].get("hung", 0) + 1
          kills[-1]["at"] = len(records)
          job.without_memory()
      elif pending and records and records[-1].get("step", 0) >= pending[0][0]:
        _, what, host = pending.pop(0)
        kills.append({"what": what, "host": host, "step": reached, "at": len(records), "begin": time.monotonic()})
        job.kill(host, what)
    if max((r["step"] for r in told(job.run_dir) if "step" in r), default=0) < steps or pending:
      logs = "\n".join(p.read_text()[-2000:] for p in sorted(job.run_dir.glob("log-*.txt")))
      raise SystemExit(f"{system} did not come to step {steps}:\n{logs}")
    return slowest(job.run_dir) if wait else told(job.run_dir), kills
  finally:
    job.close()
    shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.bench.emergency", description=__doc__.splitlines()[0])
  parser.add_argument("--mb", default="16,200", help="sizes of the state, which a replica holds once")
  parser.add_argument("--json", type=pathlib.Path)
  arguments = parser.parse_args(argv)
  found: dict = {"cost": [], "kills": {}, "flip": {}, "one_replica": {}}
  systems = ("ours", "orbax emergency")
  for mb in map(float, arguments.mb.split(",")):
    for system in systems:
      records, _ = scenario(system, mb=mb, steps=6 * EVERY, wait=True)
      due = [r for r in records if r["step"] % EVERY == 0 and r["step"] % PERSIST][1:]
      row = {"system": system, "mb": mb, **{key: statistics.median(r[key] for r in due) for key in ("block", "total")}}
      found["cost"].append(row)
      print(f"{mb:g} MB, 2 replicas of 2 hosts, {system}: blocks {row['block']:.3f} s, done after {row['total']:.3f} s",
            flush=True)
  for system in systems:
    records, kills = scenario(system, SCHEDULE)
    wrong = sum(r.get("wrong", 0) for r in records)
    found["kills"][system] = kills
    for k in kills:
      print(f"{system}: {k['what']} {k['host']} killed at step {k['step']}: back at {k['restored']}, {k['lost']} steps lost, "
            f"first new step after {k['seconds']:.1f} s" + (f", hung {k['hung']} times" if k.get("hung") else ""), flush=True)
    print(f"{system}: {sum(k['lost'] for k in kills)} steps lost in all, {wrong} wrong elements restored", flush=True)
  for system in systems:
    records, _ = scenario(system, flip=3 * EVERY, steps=4 * EVERY)
    found["flip"][system] = back = next(r for r in records if "restored" in r)
    print(f"{system}: one bit flipped in what host {HOSTS - 1} keeps of step {3 * EVERY}: back at step {back['restored']}, "
          f"{back['wrong']} elements wrong", flush=True)
  for system in systems:
    _, kills = scenario(system, ((13, "trainer", 1),), replicas=1, steps=4 * EVERY)
    found["one_replica"][system] = kills
    print(f"{system}: one data-parallel replica, trainer 1 killed at step {kills[0]['step']}: back at {kills[0]['restored']}, "
          f"{kills[0]['lost']} steps lost", flush=True)
  if arguments.json:
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(trainer(json.loads(os.environ[_SETTINGS])) if _SETTINGS in os.environ else main())
