"""The same models compiled for the same TPU topologies from MaxText and from here, read by one model (tools/hlo.py); a table.

    PYTHON_OF_MAXTEXT -m tools.bench.beside_maxtext [--row=mixtral_v6e_fsdp ...] [--out=FILE.json]

Runs in MaxText's environment, beside this project's requirements (`pip install maxtext[tpu]==0.2.5 gin-config grain`, with
Python 3.12), so that both programs meet the same jax and libtpu. Both: sequences of 4096, AdamW with float32 state, bfloat16
compute, remat full; then ours as in `OTHERWISE`. Nothing runs on a TPU: memory is the compiler's, seconds
are a static estimate. One to three minutes a program.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Ours otherwise. For less memory the inputs of the layers go to the host's, or two fifths of the moments; for a shorter step
# every second layer's weights are gathered beside the work of the one before, and one half of the experts' exchange runs beside
# the work on the other.
_OFFLOAD, _MOMENTS = {"Model.remat": '"offload"'}, {"Optimizer.offload": 0.4}
_LAYERS, _CHUNKS = {"Model.scan_unroll": 2}, {"Experts.overlap_degree": 2}
OTHERWISE = {"fsdp": {"ours, offload": _OFFLOAD, "ours, moments": _MOMENTS, "ours, two layers a turn": _LAYERS,
                      "ours, two layers a turn, moments": _LAYERS | _MOMENTS},
             "expert": {"ours, two chunks": _CHUNKS, "ours, two chunks, offload": _CHUNKS | _OFFLOAD,
                        "ours, two chunks, offload, moments": _CHUNKS | _OFFLOAD | _MOMENTS}}


class Row(NamedTuple):
  peer_topology: str
  topology: str
  model: str  # MaxText's name
  size: str  # configs/size
  devices: int
  sequences: int  # a device
  mesh: dict[str, int]  # fsdp, expert
  filled: float = 1.0  # share of MaxText's receive buffers that loads fill where they are even; its kernels skip the rest
  settings: tuple[str, ...] = ()  # MaxText's, beside those of maxtext_program


# With four sequences a device MaxText's ragged exchange of Mixtral does not fit v6e (33.3 of 31.2 GiB). Its ring of experts
# does, with buffers that drop what is beyond 1.5 times the mean.
_RING = ("use_ring_of_experts=true", "use_tokamax_gmm=true", "use_gmm_v2=true", "use_ragged_sort=true",
         "ragged_buffer_factor=1.5")
_V6E = "v6e-64", "v6e:8x8", "mixtral-8x7b", "mixtral_8x7b", 64
_V5P = "v5p-128", "v5p:4x4x4", "mixtral-8x7b", "mixtral_8x7b", 64
_SMALL = "v6e-16", "v6e:4x4", "deepseek2-16b", "deepseek_v2_lite", 16
ROWS = {
    "mixtral_v6e_fsdp": Row(*_V6E, 4, {"fsdp": 64}),
    "mixtral_v6e_fsdp_1": Row(*_V6E, 1, {"fsdp": 64}),
    "mixtral_v6e_expert": Row(*_V6E, 2, {"fsdp": 8, "expert": 8}, 1 / 4),
    "mixtral_v6e_ring": Row(*_V6E, 4, {"fsdp": 8, "expert": 8}, 1 / 1.5, _RING),
    "mixtral_v5p_fsdp": Row(*_V5P, 4, {"fsdp": 64}),
    "mixtral_v5p_expert": Row(*_V5P, 4, {"fsdp": 16, "expert": 4}, 1 / 4),
    "deepseek2_v6e_fsdp": Row(*_SMALL, 1, {"fsdp": 16}),
    "deepseek2_v6e_expert": Row(*_SMALL, 1, {"fsdp": 4, "expert": 4}, 1 / 4),
    "qwen3_v5p_expert": Row("v5p-32", "v5p:2x2x4", "qwen3-30b-a3b", "qwen3_30b_a3b", 16, 2, {"fsdp": 2, "expert": 8}, 1 / 8),
}


def peer(row: Row) -> dict:
  axes = [f"ici_{axis}_parallelism={n}" for axis, n in row.mesh.items()]
  done = _run(["-m", "tools.bench.maxtext_program", f"--topology={row.peer_topology}", f"--filled={row.filled}", "--",
               f"model_name={row.model}", f"per_device_batch_size={row.sequences}", *axes, *row.settings])
  found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
  return json.loads(found[0][7:]) if found else _problem(done)


def ours(row: Row, changes: dict[str, str]) -> dict:
  values = {"Model.remat": '"full"', "Data.sequence_tokens": 4096, "Data.batch_sequences": row.sequences * row.devices,
            "Train.steps": 1000, **{f"Mesh.{axis}": n for axis, n in row.mesh.items()}, **changes}
  files = [f"--gin_file=configs/{name}.gin" for name in ("base", f"size/{row.size}", "data/embedded")]
  done = _run(["-m", "tools.compile_check", *files, *(f"--gin.{name}={value}" for name, value in values.items()),
               f"--topology={row.topology}", "--json"])
  found = [line for line in done.stdout.splitlines() if line.startswith("{")]
  return json.loads(found[0]) if found else _problem(done)


def _run(command: list[str]):
  return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1200)


def _problem(done) -> dict:
  refusals = [line for line in (done.stdout + done.stderr).splitlines()
              if re.search("RESOURCE_EXHAUSTED|Error|^compile_check: ", line) and "worker hostname" not in line]
  return {"problem": " ".join((refusals or done.stderr.splitlines() or ["no result"])[-1].split())[:200]}


def facts(result: dict) -> dict | None:
  """What the table compares; None where there is no program."""
  hbm = result.get("hbm", result)
  if "problem" in result or result.get("fits") is False or not hbm.get("peak_bytes"):
    return None
  network = sum(row["bytes"] for row in result["collectives"])
  return {"peak": hbm["peak_bytes"], "seconds": result["step_seconds"]["predicted"], "network": network,
          "asynchronous": sum(r["bytes"] * r["asynchronous_share"] for r in result["collectives"]) / network,
          "overlapped": result["overlapped_share"], "compile": result["compile_seconds"]}


def table(results: dict[str, dict]) -> str:
  """Markdown: one line for each program; ours with the ratio to the peer's."""
  lines = ["| row | program | peak HBM, GB | static estimate of a step, s | sent over links, GB | asynchronous | hidden |",
           "|---|---|---|---|---|---|---|"]
  for name, programs in results.items():
    base = facts(programs["MaxText"])
    for program, result in programs.items():
      f = facts(result)
      if f is None:
        lines.append(f"| {name} | {program} | does not compile or fit: {result.get('problem', 'memory')[:80]} | | | | |")
        continue
      ratio = lambda key: f" ({f[key] / base[key]:.2f})" if base and program != "MaxText" else ""
      lines.append(f"| {name} | {program} | {f['peak'] / 1e9:.2f}{ratio('peak')} | {f['seconds']:.2f}{ratio('seconds')} | "
                   f"{f['network'] / 1e9:.0f} | {f['asynchronous']:.0%} | {f['overlapped']:.0%} |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--row", action="append", choices=ROWS, help="repeat for several; default: all")
  parser.add_argument("--out", type=pathlib.Path, help="keep the results here, and take those that are there already")
  arguments = parser.parse_args()
  results = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
  for name in arguments.row or ROWS:
    programs, row = results.setdefault(name, {}), ROWS[name]
    otherwise = OTHERWISE["expert" if "expert" in row.mesh else "fsdp"]
    makers = {"MaxText": lambda: peer(row), "ours": lambda: ours(row, {}),
              **{program: functools.partial(ours, row, changes) for program, changes in otherwise.items()}}
    for program, make in makers.items():
      if program not in programs:
        programs[program] = make()
        print(f"{name}, {program}: {facts(programs[program]) or programs[program].get('problem')}", file=sys.stderr, flush=True)
        if arguments.out:
          arguments.out.write_text(json.dumps(results, indent=1))
  print(table({name: results[name] for name in arguments.row or ROWS}))


if __name__ == "__main__":
  main()
