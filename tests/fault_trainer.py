"""moe.train without its last evaluation and report, and with a fault in it.

MOE_TEST_KILL=PHASE:STEP says which, on host 1 where there is one; with MOE_TEST_ONCE=FILE only once in the job:

    digest, copy, ready, save   SIGKILL to itself inside that part of the step
    restore                     SIGKILL at the step, and again while it restores
    exception, sleep            before the step
    nan, spike                  from that step on no finite loss; a loss that doubles with every step, for the guard
    misread                     one leaf of the checkpoint is not what its digest says, in the part that this host reads back
    flip, garbage               a bit of the committed slot; a slot that differs from the state; then SIGKILL
"""

import json
import os
import signal
import sys
import time
from unittest import mock

from moe import checkpoint
from moe import command_line
from moe import hardware
from moe import report
from moe import train
from moe.snapshot import client

PHASE, _, _STEP = os.environ.get("MOE_TEST_KILL", "none:0").partition(":")
STEP = int(_STEP)
NOW = {"step": -1}


def first(what: str = "") -> bool:
  """True; with MOE_TEST_ONCE only the first time in the whole job."""
  path = os.environ.get("MOE_TEST_ONCE")
  if path is None:
    return True
  try:
    os.close(os.open(path + what, os.O_CREAT | os.O_EXCL))
    return True
  except FileExistsError:
    return False


def die() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner, name: str, before=lambda *_: None, after=lambda *_: None) -> None:
  """`before` and `after` get the positional arguments."""
  real = getattr(owner, name)

  def function(*arguments, **named):
    before(*arguments)
    result = real(*arguments, **named)
    after(*arguments)
    return result

  setattr(owner, name, function)


def install(settings: dict) -> None:
  if settings["host"] != min(1, settings["hosts"] - 1):
    return
  wrap(client.Snapshots, "take", before=lambda self, step, *_: NOW.update(step=step))

  def strike(*_):
    if NOW["step"] == STEP and first():
      die()

  def damaged(self, step, *_):
    if NOW["step"] == STEP and first():
      assert self.wait(step), "not committed"
      copies = self._ask({"do": "status"})[0]["copies"]
      self._slots[[c["status"] for c in copies].index("committed")][1000] ^= 4
      die()

  def garbage(self, state, slot):
    if NOW["step"] == STEP:
      slot[1000] ^= 4

  def stopped(self, phase, step):
    if phase == "step" and step == STEP and first():
      if PHASE == "exception":
        raise ValueError(f"thrown at step {step}")
      time.sleep(3600)

  def misread(self, step, *_):
    if step == STEP and first():
      self.wait()
      path = self._folder / str(step) / "digests" / "metadata"
      side = json.loads(path.read_text())
      side["leaves"][sorted(side["leaves"])[settings["host"]]] = "0" * 16
      path.write_text(json.dumps(side))

  if PHASE == "digest":
    wrap(checkpoint, "start_digests", after=strike)
  elif PHASE == "copy":
    wrap(client, "_shard", after=strike)
  elif PHASE == "ready":
    wrap(client.Snapshots, "_copy", after=strike)
  elif PHASE == "save":
    wrap(checkpoint.Checkpointer, "save", after=strike)
  elif PHASE == "misread":
    wrap(checkpoint.Checkpointer, "save", after=misread)
  elif PHASE == "restore":
    wrap(client.Snapshots, "take", after=strike)
    wrap(client.Snapshots, "_read", before=lambda *_: first("-restore") and die())
  elif PHASE in ("exception", "sleep"):
    wrap(client.Snapshots, "beat", after=stopped)
  elif PHASE == "flip":
    wrap(client.Snapshots, "take", after=damaged)
  elif PHASE == "garbage":
    wrap(client.Snapshots, "_copy", after=garbage)
    wrap(client.Snapshots, "take", after=lambda self, step, *_: NOW["step"] == STEP and self.wait(step) and first() and die())
  elif PHASE in ("nan", "spike"):
    train.step_lib.jit_train_step = broken_step(train.step_lib.jit_train_step)


def broken_step(real):
  """The train step, which is broken from STEP on; with MOE_TEST_ONCE until the steps are replayed."""
  import jax

  latest = [-1]

  def make(run, mesh):
    program, spiking = real(run, mesh), real(run, mesh)

    def step(state, batch):
      at = int(state.step)
      cured = at < latest[0] and "MOE_TEST_ONCE" in os.environ
      latest[0] = 1 << 30 if cured else max(at, latest[0])
      if at < STEP or cured:
        return program(state, batch)
      if PHASE == "spike":
        with mock.patch.object(train.step_lib, "_judge", doubling(train.step_lib._judge)):  # traced with it
          return spiking(state, batch)
      kept = jax.tree.map(lambda x: x.copy(), state)
      _, values = program(state, batch)
      guard = type(kept.guard)(kept.guard.losses, kept.guard.norms, kept.guard.seen, kept.guard.skipped + 1)
      return type(kept)(kept.step + 1, kept.params, kept.opt_state, guard), {
          **values, "loss": values["loss"] * float("nan"), "accepted": values["accepted"] & False}

    return step

  return make


def doubling(real):
  """The guard's rule, which is shown 16, 32, 64 ... times the loss from STEP on."""
  def judge(sigmas, guard, loss, norm):
    return real(sigmas, guard, loss * 2.0 ** (guard.seen - STEP + 4), norm)

  return judge


def without_the_end() -> None:
  train.evaluate.evaluate_domain = lambda run, mesh, step, params, domain, *_, **__: ({"bits_per_byte": 0.0}, [])
  train.evaluate.routing_table = lambda results, model: []
  train._say_comparison = train._say_sample = lambda *_, **__: None
  report.write_at_the_end = lambda run_dir: "none"


if __name__ == "__main__":
  without_the_end()
  hardware.use_huge_pages()
  install(json.loads(os.environ[command_line.SUPERVISED]))
  sys.exit(train.main())
