"""Compiles the train step and the evaluation step of a run for a pod that is not here, and says what the compiler knows:
static, never TPU speed.

    python -m tools.compile_check --gin_file=configs/run/mixtral_8x7b_v6e_64.gin                # its own topology
    python -m tools.compile_check --gin_file=... --topology=v5p:4x4x4 --slices=2 --json
    python -m tools.compile_check --gin_file=... --only=train         # one of the two steps: a large model compiles for minutes
    python -m tools.compile_check --gin_file=... --search             # the best layouts for this model and pod
    python -m tools.compile_check --gin_file=... --golden=FILE        # writes the budget of this run, or compares with it
    python -m tools.compile_check --gin_file=... --record             # writes the figures into the run config's head

Fits or not and by how much, HBM by kind and the largest arrays by name, FLOPs and the MFU that the predicted step would have,
collectives by kind and mesh axes, the predicted step time (tools/hlo.py has the model), seconds to compile. The evaluation step
runs beside the trainer's optimizer state, which is counted in. Needs libtpu (`bash tools/dev.sh tpu` makes such an
environment), no TPU. Exit code 1: does not fit, or over its budget; 2: cannot compile.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import sys
import time

import jax

from moe import checkpoint
from moe import config
from moe import experts
from moe import gin_config
from moe import hardware
from moe import model as model_lib
from moe import preflight
from moe import sharding
from moe import sizes
from moe import step as step_lib
from moe.data import records
from moe.kernels import attention
from moe.terminal import progress
from tools import hlo
from tools import layout_search

# Steps of other programs that were timed on a TPU and published, and what the same model predicts of them, compiled here.
PUBLISHED = pathlib.Path(__file__).parent / "published_steps.json"


# libtpu looks for the TPU of the machine that it runs on, before it makes the one that it is asked for. Without these it finds
# none, and says so in lines that look like a failure (`E0000 ... unexpected worker hostname`).
_NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost",
           "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}


def must_have_libtpu() -> None:
  """Raises config.ConfigError where it is not installed."""
  if importlib.util.find_spec("libtpu") is None:
    raise config.ConfigError("the TPU compiler, libtpu, is not installed here: pip install 'jax[tpu]' (it needs no TPU; "
                             "Python >= 3.12 for the pair of versions that the budgets are for)")


def devices_of(topology: str, slices: int = 1):
  """The devices of a topology such as `v5p:4x4x4`, `slices` times, with the links that close its rings: without them the
  compiler gathers by all-reduces of twice the bytes.

  Raises:
    config.ConfigError: a topology of no known chip, no topology at all, or no libtpu.
  """
  from jax.experimental import topologies
  named = hardware.topology(topology)
  must_have_libtpu()
  for name, value in _NO_TPU.items():
    os.environ.setdefault(name, value)
  wrap = hardware.rings(named.chip, named.shape)
  return topologies.get_topology_desc(topology, platform="tpu", num_slices=slices, wrap=(*wrap, False)[:3]).devices


def _local_bytes(tree) -> int:
  """Bytes of abstract arrays on one device; not those in the host's memory."""
  total = 0
  for x in jax.tree.leaves(tree):
    if x.sharding.memory_kind == "pinned_host":
      continue
    size = x.dtype.itemsize
    for n in x.sharding.shard_shape(x.shape):
      size *= n
    total += size
  return total


STEPS = ("train", "eval")


def check(run: config.Run, topology: str, slices: int = 1, options: dict | None = None, keep: str | None = None,
          step: str = "train") -> dict:
  """Everything that is printed of one step, as the JSON has it.

  Args:
    options: of the compiler (`jax.stages.Lowered.compile`).
    keep: a file for the compiled program's text.
    step: train | eval.

  Raises:
    config.ConfigError: the run does not fit the mesh, or the topology is of no known chip.
  """
  devices = devices_of(topology, slices)
  chip = hardware.topology(topology).chip
  mesh = sharding.make_mesh(dataclasses.replace(run.mesh, slice=slices), devices)
  sharding.check_run(run, mesh)
  state = step_lib.abstract_state(run, mesh)
  of_train = step == "train"
  tokens = run.tokens_per_step if of_train else step_lib.eval_rows(run, mesh) * run.data.sequence_tokens
  # A forward pass is a third of a step's FLOPs.
  flops_per_token = sizes.flops_per_token(run.model, run.data.sequence_tokens) / (1 if of_train else 3)
  flops = flops_per_token * tokens / len(devices)
  parameters, optimizer = _local_bytes(state.params), _local_bytes(state.opt_state)
  beside = 0 if of_train else optimizer  # held by the trainer while the evaluation runs, but no argument of its step
  result = {
      "step": step, "topology": topology, "slices": slices, "devices": len(devices), "jax": jax.__version__,
      "libtpu": importlib.metadata.version("libtpu"), "attention": attention_backends(run, mesh),
      "mesh": {a: n for a, n in mesh.shape.items() if n > 1}, "tokens_per_step": tokens, "flops": flops}
  begin = time.perf_counter()
  try:
    lowered = step_lib.lower_train_step(run, mesh) if of_train else step_lib.lower_eval_step(run, mesh)
    compiled = lowered.compile(compiler_options=options or {})
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    result["compile_seconds"] = time.perf_counter() - begin
    return {**result, "fits": False, **_out_of_memory(str(error), state, chip, beside)}
  result["compile_seconds"] = time.perf_counter() - begin
  compiled_text = compiled.as_text()
  if keep:
    pathlib.Path(keep).write_text(compiled_text)
  memory, program = compiled.memory_analysis(), hlo.parse(compiled_text)
  walked = hlo.walk(program, chip, mesh, experts.filled_rows(run, mesh))
  arguments = memory.argument_size_in_bytes
  peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes + beside  # the compiler counts the host's in
  low, high, rows = error_bar(walked.seconds)
  return {
      **result, "fits": peak <= chip.hbm_bytes,
      "hbm": {"peak_bytes": peak, "limit_bytes": chip.hbm_bytes, "parameters": parameters, "optimizer": optimizer,
              "other_arguments": arguments + beside - parameters - optimizer, "temporaries": memory.temp_size_in_bytes,
              "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
              "activations_saved": hlo.stacked_bytes(program, run.model.num_moe_layers, max(run.model.scan_unroll, 1)),
              "code": memory.generated_code_size_in_bytes,
              "largest": [{"bytes": b, "shape": s, "source": n} for b, s, n in hlo.largest(program)]},
      "collectives": hlo.summary(walked.collectives),
      "overlapped_share": hlo.overlapped_share(walked.collectives),
      "step_seconds": {"predicted": walked.seconds, "low": low, "high": high, "validated_rows": rows,
                       "compute": walked.compute, "memory": walked.memory, "network": walked.network,
                       "network_exposed": walked.exposed, "host": walked.host, "host_exposed": walked.host_exposed},
      "unknown_trips": walked.unknown_trips, "mfu": flops / walked.seconds / chip.flops,
      "tokens_per_second_per_device": tokens / len(devices) / walked.seconds}


def inputs_notes(run: config.Run, topology: str, slices: int = 1) -> list[str]:
  """What the trainer would say of the run's data and tokenizer; where they are not on this machine, that, and no error: what
  is compiled does not depend on them.

  Raises:
    config.ConfigError: the run does not fit the mesh, or the tokenizer the model.
  """
  mesh = sharding.make_mesh(dataclasses.replace(run.mesh, slice=slices), devices_of(topology, slices))
  try:
    inputs = preflight.open_inputs(run, mesh)
  except records.DataError as error:
    return [f"the run would not start on this machine: {error}"]
  inputs.loader.close()
  return list(inputs.notes)


def attention_backends(run: config.Run, mesh) -> dict[str, str]:
  """What computes the attention of the model, and of a pre-gate's, on the mesh's devices."""
  models = {"layers": run.model}
  if run.model.router.pre_gate.d_model:
    models["pre_gate"] = model_lib.pre_gate_model(run.model)
  platform, shards = mesh.devices.flat[0].platform, sharding.parts("sequence", mesh)
  return {name: attention.describe(model.attention, run.data.sequence_tokens, platform, shards)
          for name, model in models.items()}


def error_bar(seconds: float) -> tuple[float, float, int]:
  """(low, high, rows): the range of published over predicted seconds, over all rows of `PUBLISHED`, and 1."""
  ratios = [row["published_seconds"] / row["predicted_seconds"] for row in json.loads(PUBLISHED.read_text())]
  return seconds * min([1.0, *ratios]), seconds * max([1.0, *ratios]), len(ratios)


def _smaller(run: config.Run, topology: str, slices: int, options) -> dict | None:
  """The same run in twice as many micro-batches, and so on, until it fits: its report; None where the batch cannot be cut."""
  count = 2 * run.train.micro_batches
  try:
    half = dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batches=count))
    result = check(half, topology, slices, options)
  except config.ConfigError:
    return None
  return {**result, "micro_batches": count} if result["fits"] else _smaller(half, topology, slices, options)


def _out_of_memory(text: str, state, chip: hardware.Chip, beside: int = 0) -> dict:
  """What the compiler says when memory runs out: how much it wanted, and the largest allocations where it lists them; else
  the largest of the state's arrays. `beside`: bytes of the state that are no argument of the step."""
  used = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", text)
  unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  number = lambda word: int(float(word.rstrip("KMGT")) * unit.get(word[-1], 1))
  largest = []
  for part in re.split(r"\n\s*\d+\. Size: ", text)[1:13]:
    shape, source = re.search(r"Shape: (\S+)", part), re.search(r'op_name="([^"]*)"', part)
    largest.append({"bytes": number(part.split()[0]), "shape": shape[1].split("{")[0] if shape else "",
                    "source": source[1] if source else ""})
  if not largest:
    leaves = [(_local_bytes(x), str(x.shape), checkpoint.leaf_name(path))
              for path, x in jax.tree_util.tree_leaves_with_path(state)]
    largest = [{"bytes": b, "shape": s, "source": n} for b, s, n in sorted(leaves, reverse=True)[:6]]
  temporaries = re.search(r"total memory required for HLO temporaries \(([\d.]+[KMGT]?)\)", text)
  if used:
    wanted = number(used[1]) + beside
  else:
    wanted = number(temporaries[1]) + _local_bytes(state) if temporaries else None
  return {"hbm": {"peak_bytes": wanted, "limit_bytes": chip.hbm_bytes, "largest": largest},
          "problem": "" if wanted else " ".join(text.split())[:300]}


_REMEDY = ("what to change: more micro-batches (Train.micro_batches), Model.remat = 'full', a larger fsdp or expert axis "
           "(parameters and optimizer), a larger context axis (activations), a smaller Experts.buffer_factor (receive buffers)")


_WIDTH = 72  # of an array's name in the report


def short_source(source: str) -> str:
  """The end of where an array comes from, which says most: whole parts of the path, without what JAX's transformations add.

  >>> short_source("jit(train_step)/transpose(jvp(Transformer))/while/body/closed_call/layers/experts/moe/dot_general")
  'layers/experts/moe/dot_general (backward)'
  """
  if not source:
    return "(made by the compiler)"
  parts = [part for part in source.split("/")
           if part not in ("while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "shard_map", "pjit")
           and not re.fullmatch(r"(?:\w+\()+[^()]*\)+", part)]
  suffix = " (backward)" if "transpose(" in source else ""
  kept = parts[-1:] or [source.rpartition("/")[2]]
  for part in reversed(parts[:-1]):
    if len("/".join([part, *kept])) > _WIDTH:
      return f".../{'/'.join(kept)}{suffix}"
    kept.insert(0, part)
  return "/".join(kept) + suffix


def text(result: dict) -> str:
  """The report for people."""
  gb = lambda n: f"{n / 1e9:.2f} GB"
  hbm = result["hbm"]
  mesh = " x ".join(f"{a} {n}" for a, n in result["mesh"].items())
  name = {"train": "train step", "eval": "evaluation step"}[result["step"]]
  lines = [f"{result['topology']}" + (f" x {result['slices']} slices" if result["slices"] > 1 else "")
           + f", {name}: {result['devices']} devices, mesh {mesh}; {result['tokens_per_step']:,} tokens a step; compiled in "
           f"{result['compile_seconds']:.0f} s (jax {result['jax']}, libtpu {result['libtpu']}), not run"]
  lines += [f"  attention of the {of.replace('_', '-')}: {backend}" for of, backend in result["attention"].items()]
  largest = [f"    {gb(b['bytes']):>9s}  {b['shape']:<28s} {short_source(b['source'])}" for b in hbm["largest"]]
  if not result["fits"]:
    if hbm["peak_bytes"] is None:
      lines.append(f"  DOES NOT FIT: {result['problem']}")
    else:
      lines.append(f"  DOES NOT FIT: {gb(hbm['peak_bytes'])} of {gb(hbm['limit_bytes'])}, "
                   f"{gb(hbm['peak_bytes'] - hbm['limit_bytes'])} too many; the largest:")
    lines += [*largest, "  " + _REMEDY]
    if result.get("smaller"):
      lines += [f"  Train.micro_batches = {result['smaller']['micro_batches']} makes it fit:", text(result["smaller"])]
    return "\n".join(lines)
  seconds, share = result["step_seconds"], result["overlapped_share"]
  lines += [
      f"  fits: {gb(hbm['peak_bytes'])} of {gb(hbm['limit_bytes'])} at the peak; "
      f"parameters {gb(hbm['parameters'])}, optimizer {gb(hbm['optimizer'])}, temporaries {gb(hbm['temporaries'])}, of which "
      f"saved by layer {gb(hbm['activations_saved'])}"
      + (f"; in the host's memory {gb(hbm['host'])}" if hbm["host"] else ""),
      "  largest arrays:", *largest,
      f"  collectives (bytes sent by a device in a step; {share:.0%} of them beside other work by the model):"]
  for row in result["collectives"]:
    lines.append(f"    {row['kind']:18s} over {' x '.join(row['axes']) or '?':16s} {gb(row['bytes']):>10s} in "
                 f"{row['count']:5d}, {row['asynchronous_share']:.0%} asynchronous, {row['exposed_seconds'] * 1e3:.1f} of "
                 f"{row['seconds'] * 1e3:.1f} ms exposed")
  bar = f"{seconds['low']:.3f} to {seconds['high']:.3f} by {seconds['validated_rows']} published step(s)"
  lines.append(f"  static estimate of a step: {seconds['predicted']:.3f} s ({bar}): compute {seconds['compute']:.3f}, memory "
               f"{seconds['memory']:.3f}, network {seconds['network']:.3f} of which exposed {seconds['network_exposed']:.3f}"
               + (f", host {seconds['host']:.3f} of which exposed {seconds['host_exposed']:.3f}" if seconds["host"] else "")
               + (f"; {result['unknown_trips']} loops of unknown length counted once" if result["unknown_trips"] else ""))
  lines.append(f"  {result['flops'] / 1e12:.1f} model TFLOPs a device; MFU at that step {result['mfu']:.1%}; "
               f"{result['tokens_per_second_per_device']:,.0f} tokens/s a device")
  return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- budget


def budget(result: dict) -> dict:
  """What may not grow under the same (jax, libtpu, topology): bytes at the peak, and bytes of each collective."""
  return {"peak_bytes": result["hbm"]["peak_bytes"],
          **{f"{row['kind']} over {' x '.join(row['axes'])}": int(row["bytes"]) for row in result["collectives"]}}


def budget_key(result: dict) -> str:
  key = f"jax {result['jax']}, libtpu {result['libtpu']}, {result['topology']} x {result['slices']}"
  return f"{key}, evaluation" if result.get("step") == "eval" else key


def over_budget(result: dict, path: pathlib.Path, name: str, slack: float = 1.01) -> list[str]:
  """What grew over the recorded budget; a run without one under this key is recorded."""
  recorded = json.loads(path.read_text()) if path.exists() else {}
  now, entry = budget(result), recorded.setdefault(name, {})
  before = entry.get(budget_key(result))
  if before is None:
    entry[budget_key(result)] = now
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    return []
  return [f"{what}: {value:,} bytes, budget {before.get(what, 0):,}" for what, value in now.items()
          if value > slack * before.get(what, 0)]


def record(result: dict, path: pathlib.Path) -> None:
  """Writes what was found into the head of a run config, under its line `# For v6e:8x8`, in the place of an older record.

  Raises:
    config.ConfigError: the run config is for another topology, or names none.
  """
  _must_be_for(path, result["topology"], result["slices"])
  hbm, seconds = result["hbm"], result["step_seconds"]
  head = (f"# Compiled, not run (jax {result['jax']}, libtpu {result['libtpu']}, {datetime.date.today()}): "
          f"{hbm['peak_bytes'] / 1e9:.2f} of {hbm['limit_bytes'] / 1e9:.2f} GB; "
          f"{result['overlapped_share']:.0%} of the collectives' bytes beside other work;\n"
          f"# static estimate of a step {seconds['predicted']:.2f} s ({seconds['low']:.2f} to {seconds['high']:.2f} by "
          f"{seconds['validated_rows']} published steps), MFU {result['mfu']:.0%}.\n")
  path.write_text(re.sub(r"^(# For .*\n)(# Compiled, not run.*\n(# static estimate.*\n)?)?", lambda line: line[1] + head,
                         path.read_text(), count=1, flags=re.MULTILINE))


def _must_be_for(path: pathlib.Path, topology: str, slices: int) -> None:
  named = topology_in(path)
  if named != (topology, slices):
    raise config.ConfigError(f"{path} is for {named[0]} x {named[1]}, this record for {topology} x {slices}: leave "
                             "--topology and --slices to the file, or change its line `# For`")


def pod(gin_files: list[str], topology: str | None, slices: int | None = None) -> tuple[str, int]:
  """(topology, slices) as given; without a topology what the last of the files says in its head.

  Raises:
    config.ConfigError: neither names one.
  """
  if topology is not None:
    return topology, slices or 1
  if not gin_files:
    raise config.ConfigError("neither --topology nor --gin_file is given; a run config names its topology in its head")
  named, count = topology_in(gin_config.find(gin_files[-1]))
  return named, slices or count


def topology_in(path: pathlib.Path) -> tuple[str, int]:
  """The topology that a run config names in its head: `# For v6e:8x8` or `# For v5p:4x4x4, 2 slices`.

  Raises:
    config.ConfigError: it names none.
  """
  found = re.search(r"^# For ([\w]+:[\dx]+)(?:, (\d+) slices)?", path.read_text(), re.MULTILINE)
  if not found:
    raise config.ConfigError(f"{path} names no topology in a line `# For v5p:4x4x4`; pass --topology")
  return found[1], int(found[2] or 1)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  gin_config.add_arguments(parser)
  parser.add_argument("--topology", help="such as v5p:4x4x4; default: the one the run config names")
  parser.add_argument("--slices", type=int, help="slices of that topology; default: as the run config says, else 1")
  parser.add_argument("--only", choices=STEPS, help="compile one of the two steps; default: both")
  parser.add_argument("--xla", action="append", default=[], metavar="NAME=VALUE", help="an option of the compiler")
  parser.add_argument("--golden", type=pathlib.Path, help="file of budgets, to record in or to compare with")
  parser.add_argument("--record", action="store_true", help="write memory and estimate into the head of the run config")
  parser.add_argument("--hlo", metavar="FILE", help="keep the compiled text of the train step, and of the other as FILE.eval")
  parser.add_argument("--search", nargs="?", type=float, const=1200.0, metavar="SECONDS",
                      help="rank all legal layouts by a closed form, compile the best 8, as many as begin in this time (1200)")
  parser.add_argument("--json", action="store_true")
  arguments, rest = parser.parse_known_args(argv)
  jax.config.update("jax_platforms", "cpu")
  try:
    must_have_libtpu()
    run = gin_config.from_arguments(arguments, rest).run
    topology, slices = pod(arguments.gin_file, arguments.topology, arguments.slices)
    run_config = gin_config.find(arguments.gin_file[-1]) if arguments.gin_file else gin_config.QUICKSTART
    if arguments.record and not arguments.gin_file:
      raise config.ConfigError("--record writes into a run config; name it by --gin_file")
    if arguments.record and arguments.only == "eval":
      raise config.ConfigError("--record writes the train step's figures; leave out --only=eval")
    if arguments.record:  # before the minutes of a compile
      _must_be_for(run_config, topology, slices)
    if arguments.search:
      rows = layout_search.search(run, topology, slices, len(devices_of(topology)), check, arguments.search)
      print(json.dumps(rows) if arguments.json else layout_search.text(rows))
      return 0 if any(row["fits"] for row in rows) else 1
    options = dict(o.split("=", 1) for o in arguments.xla)
    for note in inputs_notes(run, topology, slices):
      print(f"note: {note}", file=sys.stderr)
    results = {}
    for step in [arguments.only] if arguments.only else STEPS:
      keep = f"{arguments.hlo}.eval" if arguments.hlo and step == "eval" else arguments.hlo
      with progress(f"compiles the {step} step for {topology}"):
        result = results[step] = check(run, topology, slices, options, keep, step)
      if step == "train" and not result["fits"]:
        with progress("it does not fit; compiles it with more micro-batches"):
          result["smaller"] = _smaller(run, topology, slices, options)
      elif step == "train" and arguments.record:
        record(result, run_config)
      if not arguments.json:
        print(text(result), flush=True)
  except (config.ConfigError, jax.errors.JaxRuntimeError, ValueError) as error:
    print(f"compile_check: {' '.join(str(error).split())[:600]}", file=sys.stderr)
    return 2
  if arguments.json:
    first, *others = results.values()
    print(json.dumps({**first, "evaluation": others[0]} if others else first))
  if not all(result["fits"] for result in results.values()):
    return 1
  grown = []
  if arguments.golden:
    name = run_config.stem
    grown = [f"{step}: {line}" for step, result in results.items() for line in over_budget(result, arguments.golden, name)]
  for line in grown:
    print(f"  over its budget: {line}")
  return 1 if grown else 0


if __name__ == "__main__":
  sys.exit(main())
