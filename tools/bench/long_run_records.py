"""Measures the records and the report of a long run with many experts: bytes, seconds, memory.

  python -m tools.bench.long_run_records --steps=100000 --layers=58 --experts=256

Writes a run directory through the training loop's Recorder, with made-up numbers; resumes it; draws its report. Each of the
three is a process of its own, so that its largest resident memory is its own. Only the interfaces of the Recorder and of the
report are used: copied into another checkout, the script measures that one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pathlib
import resource
import shutil
import tempfile
import time

import numpy as np

_LOG_EVERY_STEPS = 10
_SCALARS = ("loss", "logit_z", "balance", "router_z", "router_entropy", "top_k_weight", "load_max", "dead_experts", "dropped",
            "gradient_norm", "learning_rate", "skipped_steps", "accepted")
_EVAL_VECTORS = ("router_entropy", "top_k_weight", "router_z")
_EVAL_MATRICES = ("information_choices", "information_probabilities")


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m tools.bench.long_run_records", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--layers", type=int, default=58)
  parser.add_argument("--experts", type=int, default=256)
  parser.add_argument("--steps", type=int, default=100_000)
  parser.add_argument("--selections", type=int, default=32_000_000, help="of experts, in a layer and step")
  parser.add_argument("--eval_every", type=int, default=500, help="steps")
  parser.add_argument("--save_every", type=int, default=500, help="steps between checkpoints, for which records are flushed")
  parser.add_argument("--domains", type=int, default=2)
  parser.add_argument("--no_examples", action="store_true", help="no texts that each expert reads")
  parser.add_argument("--out", help="keep the run directory there (default: a temporary one)")
  arguments = parser.parse_args(argv)
  run_dir = pathlib.Path(arguments.out or tempfile.mkdtemp(prefix="long-run-"))
  run_dir.mkdir(parents=True, exist_ok=True)
  try:
    for what, work in {"write": _write, "resume": _resume, "report": _report}.items():
      seconds, megabytes = _measure(work, run_dir, arguments)
      print(f"{what:8s}{seconds:8.1f} s{megabytes:8.0f} MB resident at most", flush=True)
    sizes = {path.name: _bytes(path) for path in sorted(run_dir.iterdir())}
    for name, size in sizes.items():
      print(f"{name:16s}{size / 1e6:10.1f} MB")
    total = sum(sizes.values())
    print(f"{'all':16s}{total / 1e6:10.1f} MB, {total / arguments.steps / 1e3:.2f} kB a step")
  finally:
    if not arguments.out:
      shutil.rmtree(run_dir)


def _measure(work, run_dir: pathlib.Path, arguments) -> tuple[float, float]:
  """(seconds, MB of memory) of a fresh process."""
  context = multiprocessing.get_context("spawn")
  results = context.Queue()
  process = context.Process(target=_measured, args=(results, work, run_dir, arguments))
  process.start()
  process.join()
  if process.exitcode:
    raise SystemExit(f"{work.__name__} ended with {process.exitcode}")
  return results.get()


def _measured(results, work, *arguments) -> None:
  begin = time.monotonic()
  work(*arguments)
  results.put((time.monotonic() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3))


def _write(run_dir: pathlib.Path, arguments) -> None:
  from etils import epath

  from moe import metrics

  rng = np.random.default_rng(0)
  shape = (arguments.layers, arguments.experts)
  # Drawing each step's counts anew would take longer than what is measured.
  loads = rng.dirichlet(np.full(arguments.experts, 20.0), (64, arguments.layers)) * arguments.selections
  loads = loads.astype(np.int32)
  examples = [] if arguments.no_examples else _examples(rng, *shape)
  recorder = metrics.Recorder(epath.Path(run_dir))
  for step in range(arguments.steps):
    scalars = dict(zip(_SCALARS, rng.random(len(_SCALARS), np.float32) + 1))
    recorder.metrics("train", step, {**scalars, "tokens": arguments.selections // 8, "expert_counts": loads[step % len(loads)]})
    done = step + 1
    if done % _LOG_EVERY_STEPS == 0:
      speed = {"seconds_per_step": 0.01, "tokens_per_second": 1e8, "mfu": 0.4}
      recorder.metrics("speed", step, {**speed, "goodput/step": 0.01 * done, "goodput/save": 1.0})
    if done % arguments.save_every == 0:
      recorder.flush()
    if done % arguments.eval_every == 0 or done == arguments.steps:
      for domain in range(arguments.domains):
        vectors = {key: rng.random(arguments.layers) for key in _EVAL_VECTORS}
        matrices = {key: rng.random((arguments.layers,) * 2) for key in _EVAL_MATRICES}
        score = {"bits_per_byte": 1.0, "loss": 2.0, "expert_counts": loads[(step + domain) % len(loads)].astype(np.int64)}
        recorder.metrics(f"eval/domain{domain}", done, {**score, **vectors, **matrices})
        recorder.data(f"examples/domain{domain}", done, examples=examples)
  recorder.close()


def _examples(rng, layers: int, experts: int) -> list:
  """As `analysis.examples` finds them, of words of five letters."""
  letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))

  def text(words: int) -> str:
    return "".join(rng.choice(letters, 5 * words))

  def entry() -> dict:
    return {"tokens": [[text(1), 0.123] for _ in range(6)], "snippets": [[text(14), text(1), text(14)] for _ in range(2)]}

  return [[entry() for _ in range(experts)] for _ in range(layers)]


def _resume(run_dir: pathlib.Path, arguments) -> None:
  from etils import epath

  from moe import metrics

  metrics.Recorder(epath.Path(run_dir)).close()


def _report(run_dir: pathlib.Path, arguments) -> None:
  from moe import report

  report.write(run_dir)


def _bytes(path: pathlib.Path) -> int:
  return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


if __name__ == "__main__":
  main()
