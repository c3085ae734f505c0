"""Trains a run: `python -m moe.train --gin_file=configs/run/x.gin --gin.Train.steps=100 --run_dir=...`

Read `train` from top to bottom; nothing imports this file.
"""

from __future__ import annotations

import sys

from moe import hardware
from moe import run_dir as run_dir_lib

if __name__ == "__main__":
  if "--supervise" in sys.argv:
    from moe.snapshot import supervisor

    sys.exit(supervisor.main())
  if finished := run_dir_lib.finished(sys.argv[1:]):
    print(finished)
    sys.exit()
  hardware.use_huge_pages()  # starts the program again, so before the imports that take seconds

# ruff: noqa: E402
import argparse
import contextlib
import dataclasses
import inspect
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import time
import traceback
from typing import NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from moe import checkpoint as checkpoint_lib
from moe import command_line
from moe import config
from moe import evaluate
from moe import experts
from moe import generate
from moe import gin_config
from moe import hugging_face_files
from moe import metrics as metrics_lib
from moe import preflight
from moe import schedules
from moe import sharding
from moe import sizes
from moe import step as step_lib
from moe import terminal
from moe.config import ConfigError
from moe.data import pipeline
from moe.data import tokenizers
from moe.data.records import DataError
from moe.errors import storage_errors
from moe.kernels import plan as kernel_plan
from moe.routing import analysis
from moe.snapshot import client as snapshot_client

OK, USAGE, DATA, CHECKPOINT, NUMERICS, CRASH, INTERRUPTED, PREEMPTED = 0, 2, 3, 4, 5, 13, 130, 143
_RATE_JUMP = 0.02  # of the learning rate at a resume, from which on it is said
_MAX_SKIPPED_STEPS = 20  # in a row, by the guard of moe/step.py, before going back to the snapshot or giving up

class Preempted(Exception):
  """SIGTERM arrived and the state is saved."""


class Interrupted(Preempted):
  """Ctrl-C, and the state is saved."""


class NumericsError(Exception):
  """Steps are skipped and it does not stop."""


def train(arguments: argparse.Namespace, resolved: gin_config.Resolved) -> None:
  """One run, from the resolved config to the report."""
  run, clock, snapshots = resolved.run, metrics_lib.Goodput(), snapshot_client.Snapshots()

  # ------------------------------------------------------------------------------------------------ devices and mesh
  if arguments.multihost:
    jax.distributed.initialize(*command_line.hosts(arguments.multihost), **_coordination(arguments))
  first_host = jax.process_index() == 0
  mesh = sharding.make_mesh(run.mesh)
  profile = command_line.profile_window(arguments.profile_steps)

  # ------------------------------------------------------------------------------------- what it will need, opened now
  inputs = preflight.open_inputs(run, mesh)
  loader, tokenizer = inputs.loader, inputs.tokenizer
  abstract = step_lib.abstract_state(run, mesh)
  of_source = checkpoint_lib.check_source(arguments.init_from, abstract.params, run) if arguments.init_from else []
  notes = [*resolved.notes, *inputs.notes, *of_source]
  if arguments.dry_run:
    _say_dry_run(run, mesh, notes, tokenizer)
    return

  # ---------------------------------------------------------------------------------------------------- run directory
  run_dir = run_dir_lib.choose(arguments.run_dir, jax.process_count())
  # Under a supervisor the directory is its own, for all of its trainers.
  owned = first_host and command_line.SUPERVISED not in os.environ
  owner = run_dir_lib.Owner(run_dir) if owned else contextlib.nullcontext()
  saver = checkpoint_lib.Checkpointer(run_dir / "checkpoints", run.checkpoint)
  _check_resume(arguments.resume, run_dir, saver)
  recorder = metrics_lib.Recorder(run_dir, active=first_host, **dataclasses.asdict(run.observers))
  recorder.terminal.say(_summary(run, mesh, f"run {run_dir}"))
  notes += filter(None, [hardware.use_compile_cache()])
  for note in notes:
    recorder.terminal.say(f"note: {note}")
  snapshots.watch(run_dir)

  peak, peak_source = hardware.peak_flops(list(mesh.devices.flat))  # before set_mesh: it uses the devices one by one
  batch_sharding = sharding.batch_sharding(mesh)
  batch_shape = (run.data.batch_sequences, run.data.sequence_tokens)
  host_part = sharding.host_part(batch_sharding, batch_shape)

  with owner, jax.set_mesh(mesh), contextlib.closing(recorder), contextlib.closing(loader), saver:
    # -------------------------------------------------------------------------------------------------- state, restored
    for line in snapshots.attach(abstract, run):
      recorder.terminal.say(line)
    with clock.measure("restore"):
      restored = _restore(snapshots, saver, abstract, run, recorder)
    if restored is not None:
      state, start = restored.state, restored.step
      _check_batch(restored.data, run)
      loader.restore(restored.data)
      recorder.terminal.say(f"resumed at step {start}, every leaf equal to what was saved")
      for note in _rate_notes(run_dir, run, start):
        recorder.terminal.say(f"note: {note}")
      recorder.event("restore", step=start)
    else:
      state, start = step_lib.init_state(run, mesh), 0
      if arguments.init_from:
        source_step, params = checkpoint_lib.restore_params(arguments.init_from, abstract.params)
        state = step_lib.TrainState(state.step, params, state.opt_state, state.guard)
        recorder.terminal.say(f"parameters from {arguments.init_from} (step {source_step})")
    if first_host:  # after the restore: a config that is refused never ran
      try:
        _write_description(run_dir, run, resolved)
        tokenizers.save(tokenizer, run_dir / "tokenizer")  # the tools take this copy: the file itself may change
        hugging_face_files.keep(run, run_dir, arguments.init_from)
        (run_dir / "DONE").unlink(missing_ok=True)
      except storage_errors() as error:
        raise ConfigError(f"{run_dir} cannot be written: {error}; make room there, or choose another --run_dir") from error
    loader.start()  # beside the compile
    snapshots.warm(state)
    recorder.event("start", step=start, devices=len(mesh.devices.flat), hosts=jax.process_count())

    # ------------------------------------------------------------------------------------------------------- programs
    train_step, eval_step = step_lib.jit_train_step(run, mesh), step_lib.jit_eval_step(run, mesh)
    flops = sizes.flops_per_token(run.model, run.data.sequence_tokens)
    preemption = _Preemption(arguments.multihost is not None)
    pending, skipped = [], 0  # metrics not yet fetched; steps skipped in a row
    watch = analysis.CollapseWatch(run.model.router.top_k)

    def save(step: int) -> None:
      snapshots.beat("save", step)
      recorder.flush()
      with clock.measure("save"):
        data = pipeline.merge_states(_gather(loader.state()))
        problems = saver.save(step, state, data, run, resolved.operative)
      for problem in problems:
        recorder.alarm(problem, step=step)
      recorder.event("save", step=step)

    def leave(step: int) -> None:
      save(step)
      for problem in saver.wait():
        recorder.alarm(problem)
      recorder.event("preempted", step=step)
      if first_host:
        (run_dir / "PREEMPTED").write_text(f"{step}\n")
      raise preemption.error(f"saved at step {step} in {run_dir}; the same command resumes")

    def evaluate_all(step: int, limit: int | None) -> dict[str, dict]:
      snapshots.beat("evaluate", step)
      results = {}
      with clock.measure("evaluate"):
        for domain in inputs.evaluated:
          with recorder.terminal.progress(f"evaluating {domain.name}", limit, "batches") as work:

            def stop(work=work) -> bool:
              work.advance()
              return preemption.reached()

            scored = evaluate.evaluate_domain(run, mesh, eval_step, state.params, domain, tokenizer, limit_batches=limit,
                                              stop=stop)
          if scored is None:
            leave(step)
          results[domain.name] = scored
      if not results:
        return {}
      for name, (result, shown) in results.items():
        recorder.metrics(f"eval/{name}", step, result)
        recorder.data(f"examples/{name}", step, examples=shown)
      results = {name: result for name, (result, _) in results.items()}
      recorder.terminal.say(f"eval at step {step}: " + ", ".join(
          f"{name} {result['bits_per_byte']:.4f} bits/byte" for name, result in results.items()))
      for line in evaluate.routing_table(results, run.model):
        recorder.terminal.say(line)
      return results

    # ------------------------------------------------------------------------------------------------------------ loop
    window_start, window_step = time.monotonic(), start
    done, replay = start, None  # what a replay is compared with, where one is under way
    while done < run.train.steps:
      step = done
      snapshots.beat("compile" if step == start else "step", step)
      if profile and step == profile[0]:
        jax.profiler.start_trace(str(run_dir / "profile"))
      with clock.measure("data"):
        wait_start = time.monotonic()
        host_batch = next(loader)
        data_wait_seconds = time.monotonic() - wait_start
        batch = step_lib.Batch(*[sharding.global_array(field, host_part, batch_sharding, batch_shape) for field in host_batch])
      if step == start:
        with clock.measure("compile and first step"), recorder.terminal.waiting("compiling, then the first step"):
          state, values = jax.block_until_ready(train_step(state, batch))
      else:
        with clock.measure("step"):
          state, values = train_step(state, batch)
      read = loader.domain_tokens() if first_host else {}
      pending.append({**values, "data_wait_seconds": data_wait_seconds,
                      **{f"domain_tokens/{name}": tokens for name, tokens in read.items()}})
      done = step + 1
      if step == start:
        seconds = time.time() - hardware.process_start()
        recorder.terminal.say(f"first step after {seconds:.1f} s")
        recorder.event("first_step", step=step, seconds=seconds)
        window_start, window_step = time.monotonic(), done

      if done % run.train.log_every_steps == 0 or done == run.train.steps or step == start:
        with clock.measure("step"):
          fetched = jax.device_get(pending)
        pending = []
        for offset, record in enumerate(fetched):
          at = done - len(fetched) + offset
          skipped = 0 if record["accepted"] else skipped + 1
          if skipped:
            recorder.alarm(f"step {at} skipped: loss {record['loss']:.4g}, gradient norm {record['gradient_norm']:.4g}",
                           step=at)
          recorder.metrics("train", at, record)
          if run.model.router.gate != "soft" and (layers := watch.push(record["expert_counts"])):
            names = ", ".join(map(run.model.moe_layer_name, layers))
            recorder.alarm(f"routing has collapsed in {names}: few experts take nearly all "
                           "tokens; raise Router.balance_coef, or lower the learning rate", step=at, layers=layers)
        if skipped >= _MAX_SKIPPED_STEPS and replay is None and (found := snapshots.rewound(abstract)):
          recorder.alarm(f"{skipped} steps in a row were skipped: back to the snapshot of step {found.step}, for one replay")
          recorder.event("rewind", step=done, to=found.step)
          replay = _Replay(done, checkpoint_lib.digests(state))
          state, done, skipped = found.state, found.step, 0
          loader.restore(found.data)
          continue
        if skipped >= _MAX_SKIPPED_STEPS or (replay and done >= replay.until):
          same = replay and checkpoint_lib.digests(state) == replay.fingerprints
          if replay:
            recorder.event("replayed", step=done, same=same)
          if skipped >= _MAX_SKIPPED_STEPS or same:
            recorder.event("failed", step=at)
            (run_dir / "FAILED").write_text(f"steps skipped in a row up to step {at}\n")
            raise NumericsError(
                f"{_MAX_SKIPPED_STEPS} steps in a row up to step {at} were skipped, the last with loss {record['loss']:.4g}, "
                f"gradient norm {record['gradient_norm']:.4g}; "
                + ("a replay from the last snapshot gave the same bits, so the data or the model is at fault and not the "
                   "hardware; " if same else "") + "lower Optimizer.learning_rate, or resume from an earlier checkpoint")
          recorder.alarm(f"the replay up to step {done} came out differently: suspect the hardware; training goes on from it")
          replay = None
        if done > window_step:
          seconds = (time.monotonic() - window_start) / (done - window_step)
          rate = run.tokens_per_step / seconds
          speed = {"seconds_per_step": seconds, "tokens_per_second": rate, "mfu": flops * rate / peak}
          recorder.metrics("speed", at, {**speed, **{f"goodput/{k}": v for k, v in clock.table().items()}})
          shown = {**record, **speed, "bits_per_byte": _bits_per_byte(record, host_batch, tokenizer)}
          if mesh.devices.flat[0].platform == "cpu":
            del shown["mfu"]  # of a peak that nobody knows
          left = (run.train.steps - done) * seconds
          recorder.terminal.status(metrics_lib.status_fields(done, run.train.steps, shown, left), done, run.train.steps)
          window_start, window_step = time.monotonic(), done

      for problem in saver.poll():
        recorder.alarm(problem, step=done)
      if profile and done == profile[1]:
        jax.block_until_ready(values)
        jax.profiler.stop_trace()
      preempted = preemption.reached()
      with clock.measure("snapshot"):  # none while steps are skipped: a rewind should go before them
        for name, fields in [] if skipped else snapshots.take(done, state, loader.state, due=preempted):
          recorder.event(name, step=done, **fields)
          if name == "unprotected":
            recorder.alarm(f"no snapshot of step {done}: {fields['reason']}", step=done)
      if preempted:
        leave(done)
      if run.train.eval_every_steps and done % run.train.eval_every_steps == 0 and done < run.train.steps:
        evaluate_all(done, run.train.eval_batches)
        window_start, window_step = time.monotonic(), done
      due = run.checkpoint.every_steps and done % run.checkpoint.every_steps == 0
      again, problems = saver.again() if done % run.train.log_every_steps == 0 else (False, [])
      for problem in problems:
        recorder.alarm(problem, step=done)
      if (due or again) and done < run.train.steps:
        save(done)
        window_start, window_step = time.monotonic(), done

    # ------------------------------------------------------------------------------------------------------------- end
    save(run.train.steps)
    results = evaluate_all(run.train.steps, run.train.final_eval_batches or None)
    again = True
    while again:
      problems = saver.read_back()
      again, found = saver.again()
      for problem in problems + found:
        recorder.alarm(problem)
      if again:
        save(run.train.steps)
    recorder.event("end", step=run.train.steps, goodput=clock.table(), peak_flops=peak, peak_source=peak_source)
    saved = saver.steps()

  if first_host:
    recorder.terminal.close()
    _say_comparison(recorder.terminal, inputs.evaluated, results)
    if jax.process_count() == 1 and not run.model.lookahead:  # else the parameters are spread over hosts: tools.sample
      _say_sample(recorder.terminal, run, state.params, tokenizer)
    from moe import report  # matplotlib: not while a recovery waits

    recorder.terminal.say("\n" + report.write_at_the_end(run_dir))
  if run.train.steps not in saved:
    raise checkpoint_lib.CheckpointError(
        f"all {run.train.steps} steps are done, but the last checkpoint could not be saved; there are {saved or 'none'}: make "
        "room, and the same command goes on from the newest")
  if first_host:
    for stale in ("PREEMPTED", "FAILED"):
      (run_dir / stale).unlink(missing_ok=True)
    (run_dir / "DONE").write_text(f"{run.train.steps}\n")


# ------------------------------------------------------------------------------------------------------- preparation


def _coordination(arguments: argparse.Namespace) -> dict:
  """How JAX's coordination service listens: under a supervisor on the address it is told alone, with --tls by mutual TLS."""
  found = {}
  if command_line.SUPERVISED in os.environ:
    found["coordinator_bind_address"] = command_line.hosts(arguments.multihost)[0]
  if arguments.tls:
    if "mtls_cert_file" not in inspect.signature(jax.distributed.initialize).parameters:
      raise ConfigError(f"--tls: jax {jax.__version__} has no TLS for its coordination service, jax >= 0.12 has")
    certificate, key, authority = command_line.tls(arguments.tls)
    found |= {"mtls_cert_file": certificate, "mtls_key_file": key, "mtls_ca_file": authority, "verify_secure_credentials": True}
  return found


def _say_dry_run(run: config.Run, mesh, notes: list[str], tokenizer) -> None:
  """What would be trained, on what, and what a person should know before."""
  print(_summary(run, mesh, "dry run: config, mesh and data are fine"))
  domains = preflight.domains(run, tokenizer)
  for domain in domains:
    print(f"data: {domain.line()}")
  for note in notes + preflight.repeats(domains):
    print(f"note: {note}")


def _restore(snapshots, saver, abstract, run: config.Run, recorder):
  """The newest state that equals what was saved, from the hosts' memory or from the checkpoints; None where there is none."""
  if -1 < snapshots.offered_step() >= max(saver.steps(), default=-1):
    try:
      return snapshots.restore(abstract)
    except checkpoint_lib.CheckpointError as error:
      recorder.alarm(f"memory tier refused: {error}; the checkpoints are next")
  restored = saver.restore(abstract, run)
  for problem in restored.skipped if restored else []:
    recorder.alarm(problem)
  return restored


def _check_batch(data: dict, run: config.Run) -> None:
  """Refuses to go on with batches of another size: the loader could, but the schedule counts tokens by steps of one size."""
  before = data.get("batch_sequences", run.data.batch_sequences)
  if before != run.data.batch_sequences:
    raise ConfigError(f"the checkpoint's steps have Data.batch_sequences = {before}, this run's {run.data.batch_sequences}: "
                      f"the learning rate counts tokens by steps of one size; set it to {before}, or take --init_from")


def _check_resume(mode: str, run_dir: epath.Path, saver: checkpoint_lib.Checkpointer) -> None:
  steps = saver.steps()
  if mode == "must" and not steps:
    raise checkpoint_lib.CheckpointError(f"--resume=must, but {run_dir} holds no checkpoint")
  if mode == "never" and (steps or run_dir_lib.holds_a_run(run_dir)):
    held = f"checkpoints of steps {steps}" if steps else "the records of a run"
    raise checkpoint_lib.CheckpointError(f"--resume=never, but {run_dir} holds {held}; choose another --run_dir, nothing is "
                                         "overwritten")


def _rate_notes(run_dir: epath.Path, run: config.Run, step: int) -> list[str]:
  """What to say where the learning rate jumps at a resume, because the schedule is not the one the run had until then."""
  try:  # of the start before this one
    before = config.from_dict(config.Run, json.loads((run_dir / "config.json").read_text()))
  except (*storage_errors(), ValueError, ConfigError):  # there is none, or one of an older version
    return []
  old, new = (float(schedules.learning_rate(r.optimizer, r.tokens_per_step, r.train.steps)(step)) for r in (before, run))
  if math.isclose(old, new, rel_tol=_RATE_JUMP, abs_tol=1e-12):
    return []
  changed = config.differences(config.to_dict(before.optimizer), config.to_dict(run.optimizer), "optimizer")
  changed += config.differences(before.train.steps, run.train.steps, "train.steps")
  return [f"the learning rate of step {step} was to be {old:.3g} and is {new:.3g}: the schedule changed "
          f"({'; '.join(changed)}); to train on from a decayed run, begin a new one from its parameters: --init_from with "
          "another --run_dir"]


def _write_description(run_dir: epath.Path, run: config.Run, resolved: gin_config.Resolved) -> None:
  """config.gin, config.json, command.txt and env.json, of this start."""
  git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=os.path.dirname(__file__), capture_output=True, text=True)
  counted, devices = sizes.sizes(run.model), jax.devices()
  environment = {"python": sys.version, "jax": jax.__version__, "devices": [str(device) for device in devices],
                 "device_kind": devices[0].device_kind, "hosts": jax.process_count(), "commit": git.stdout.strip() or None,
                 "parameters": counted.total, "active_parameters": counted.active}
  run_dir_lib.keep_start(run_dir, {
      "config.gin": resolved.operative, "config.json": json.dumps(config.to_dict(run), indent=1) + "\n",
      "command.txt": shlex.join(sys.orig_argv) + "\n", "env.json": json.dumps(environment, indent=1) + "\n"})


def _summary(run: config.Run, mesh, title: str) -> str:
  s, r = sizes.sizes(run.model), run.model.router
  axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  kernels = "einsum" if r.gate == "soft" else kernel_plan.describe(experts.kernel_choice(run, mesh))
  lines = [
      title,
      f"model: {s.total / 1e6:.2f} M parameters, {s.active / 1e6:.2f} M active a token; {run.model.num_layers} layers, "
      f"{run.model.experts.num_experts} experts, {_gate(r)}, "
      + (f"capacity factor {run.model.experts.capacity_factor}" if run.model.experts.capacity_factor else "dropless"),
      f"step: {run.data.batch_sequences} x {run.data.sequence_tokens} = {run.tokens_per_step:,} tokens in "
      f"{run.train.micro_batches} micro-batch(es), "
      f"{sizes.flops_per_token(run.model, run.data.sequence_tokens) * run.tokens_per_step / 1e9:,.1f} GFLOP",
      f"mesh: {axes} on {len(mesh.devices.flat)} {mesh.devices.flat[0].platform} device(s), {jax.process_count()} host(s)",
      f"experts' kernels: {kernels}",
      f"balance: {r.balance_scope}, coefficient {r.balance_coef}"
      + (f", selection bias moved by {r.bias_update_rate} a step" if r.bias_update_rate else ""),
  ]
  if run.model.lookahead:
    lines.append(f"WARNING: {run.model.lookahead} lets later tokens decide about earlier ones; the loss of a causal model is "
                 "too good where it is used, and decoding differs from training")
  if run.model.blind_router:
    lines.append(f"WARNING: {run.model.blind_router} gives the one chosen expert weight 1 whatever its score, so the loss of "
                 "the language model teaches the router nothing; set Router.renormalize = False")
  if run.model.attention.window_tokens == 1:
    lines.append("WARNING: Attention.window_tokens = 1 lets a token see itself alone, so queries and keys never learn; set it "
                 "to 0 for all tokens, or to at least 2")
  if r.balance_scope == "step" and run.train.micro_batches > 1:
    lines.append("        exact over the step: one more forward pass of every micro-batch, a third of the step's FLOPs more")
  return "\n".join(lines)


def _gate(router: config.Router) -> str:
  """The router in a few words: `sigmoid top 2, gru over depth`."""
  how = f"{router.gate} gate, top {router.top_k}" if router.gate != "soft" else f"soft gate, {router.soft_slots} slots"
  if router.recurrent.cell != "none":
    return f"{how}, {router.recurrent.cell} over depth"
  return f"{how}, pre-gated" if router.pre_gate.d_model else how


# --------------------------------------------------------------------------------------------------------------- loop


class _Replay(NamedTuple):
  """Steps done twice from one snapshot: equal bits blame the data or the model, other bits the hardware."""

  until: int
  fingerprints: dict[str, str]


class _Preemption:
  """SIGTERM or Ctrl-C on any host; all hosts agree on the place in the program at which they save."""

  def __init__(self, multihost: bool):
    self._multihost, self._signal, self._asked = multihost, None, 0
    if multihost:  # jax.distributed has installed its own handler
      return
    signal.signal(signal.SIGTERM, self._note)
    # The supervisor turns a Ctrl-C, which the terminal sends to both, into SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN if command_line.SUPERVISED in os.environ else self._note)

  def _note(self, signum, frame):
    self._signal = signum
    if signum == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one does not wait

  def error(self, text: str) -> Preempted:
    """What ends the program."""
    return Interrupted(f"Ctrl-C: {text}") if self._signal == signal.SIGINT else Preempted(f"SIGTERM: {text}")

  def reached(self) -> bool:
    """Whether to stop here. All hosts ask it equally often: the number of the question is the place."""
    self._asked += 1
    return multihost_utils.reached_preemption_sync_point(self._asked) if self._multihost else self._signal is not None


def _gather(state: dict) -> list[dict]:
  """The loader states of all hosts, on every host."""
  if jax.process_count() == 1:
    return [state]
  data = np.frombuffer(json.dumps(state).encode(), np.uint8)
  longest = int(np.max(multihost_utils.process_allgather(np.int32(data.size))))
  padded = np.zeros(longest, np.uint8)
  padded[: data.size] = data
  return [json.loads(row.tobytes().rstrip(b"\0")) for row in multihost_utils.process_allgather(padded)]


def _bits_per_byte(record: dict, host_batch, tokenizer) -> float:
  """Training loss in bits per byte, with the bytes a token of this batch's first rows."""
  targets, segments = host_batch[1][:2], host_batch[2][:2]
  text = tokenizer.decode(targets[segments > 0])
  return float(record["loss"]) / math.log(2) * (segments > 0).sum() / max(len(text.encode()), 1)


# ---------------------------------------------------------------------------------------------------------------- end


def _say_comparison(terminal, domains: tuple[config.Domain, ...], results: dict[str, dict]) -> None:
  for domain in domains:
    table = evaluate.compressors(domain)
    ours = results[domain.name]["bits_per_byte"]
    terminal.say(f"\n{domain.name}, validation, bits per byte      this model {ours:.3f}")
    if table:
      terminal.say("          alone   after the training text   whole text")
      for name, (alone, primed, whole) in table.items():
        terminal.say(f"  {name:6s} {alone:6.3f}   {primed:23.3f}   {whole:10.3f}")


def _say_sample(terminal, run: config.Run, params, tokenizer, count: int = 300) -> None:
  prompt = np.array([tokenizer.bos], np.int32)
  made = generate.sample(run.model, params, prompt, count, vocab_size=tokenizer.vocab_size, seed=run.train.seed)
  terminal.say("\nsample:\n" + tokenizer.decode(made.ids))


# --------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code; every user's error is one line."""
  terminal.prepare_streams()
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # TensorStore's writers, after a failed save
  arguments, rest = command_line.parse(sys.argv[1:] if argv is None else argv)
  supervised, resolved = command_line.SUPERVISED in os.environ, None
  try:
    resolved = gin_config.from_arguments(arguments, rest)
    if arguments.print_config:
      print(resolved.operative)
      return OK
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
      hosts = (command_line.hosts(arguments.multihost or "auto") or (None, 1))[1]
      jax.config.update("jax_num_cpu_devices", max(hardware.cpu_devices(resolved.run.mesh) // hosts, 1))
    train(arguments, resolved)
    return OK
  except tuple(_CODES) as error:
    if arguments.traceback:
      raise
    said = resolved.located(error) if resolved and isinstance(error, ConfigError) else error
    terminal.complain(f"{_CODES[type(error)][1]}: {said}")
    code = _CODES[type(error)][0]
  except KeyboardInterrupt:
    terminal.complain("stopped by Ctrl-C; the same command goes on from the last checkpoint")
    code = INTERRUPTED
  except Exception:
    if not supervised:
      raise
    traceback.print_exc()
    code = CRASH
  if supervised:  # jax's way out waits minutes for the other hosts, which wait for this one
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


_CODES = {
    ConfigError: (USAGE, "config error"), DataError: (DATA, "data error"), NumericsError: (NUMERICS, "numerics error"),
    checkpoint_lib.CheckpointError: (CHECKPOINT, "checkpoint error"), Preempted: (PREEMPTED, "preempted"),
    Interrupted: (INTERRUPTED, "stopped"),
}


def console() -> None:
  """The program: `moe-train`, or `python -m moe.train`."""
  if "--supervise" in sys.argv:  # a process without JAX, which this one has loaded
    os.execv(sys.executable, [sys.executable, "-m", "moe.train", *sys.argv[1:]])
  hardware.use_huge_pages()
  sys.exit(main())


if __name__ == "__main__":
  console()
