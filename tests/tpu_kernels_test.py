"""Every TPU kernel compiles for every chip, within its budget of bundles, spills and code; and the static instrument works.

Nothing runs on a TPU. The budgets in golden/tpu_kernels.json belong to one pair of jax and libtpu; with another pair they are
not compared. `python -m tests.tpu_kernels_test` records them again, to be looked at before it is committed.
"""

import json
import pathlib

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("libtpu", reason="libtpu is in the environment of tools/dev.sh tpu only (Python >= 3.12)")

from importlib.metadata import version  # noqa: E402

from moe.kernels import plan  # noqa: E402
from tools.bench import static_compiler  # noqa: E402
from tools.bench import static_model  # noqa: E402
from tools.bench import static_programs  # noqa: E402

pytestmark = [pytest.mark.tpu, pytest.mark.slow, pytest.mark.timeout(600)]

SHAPE = plan.Shape(2048, 4, 16, 16, 1024, 512)
SMALL = SHAPE._replace(tokens=512)  # v4 has 16 MiB of vector memory
BUDGETS = pathlib.Path(__file__).parent / "golden" / "tpu_kernels.json"
CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


def measured(chip: str) -> dict[str, static_compiler.Report]:
  shape = SMALL if chip == "v4" else SHAPE
  blocks, problem = plan.fit(shape, plan.VECTOR_MEMORY[chip])
  assert blocks is not None, problem
  programs = {name: ("tools.bench.static_programs", "kernel", {"name": name, "shape": shape, "blocks": blocks})
              for name in static_programs.KERNELS}
  return static_compiler.measure(static_compiler.TOPOLOGIES[chip], programs, "bundles")


def key(chip: str) -> str:
  return f"jax {version('jax')}, libtpu {version('libtpu')}, {chip}"


def figures(report: static_compiler.Report) -> dict[str, int]:
  return {"bundles": report.bundles, "spills": report.spills, "code_bytes": report.code_bytes}


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_within_its_budget(chip, record_property):
  reports = measured(chip)
  record_property("compile_seconds", {name: round(r.compile_seconds or 0, 1) for name, r in reports.items()})
  assert {name: r.problem for name, r in reports.items() if r.problem} == {}
  budgets = json.loads(BUDGETS.read_text()).get(key(chip))
  if budgets is None:
    pytest.skip(f"no budget for {key(chip)}; record it with python -m tests.tpu_kernels_test")
  grown = {f"{name} {what}": (value, budgets[name][what]) for name, report in reports.items()
           for what, value in figures(report).items() if value > budgets[name][what]}
  assert not grown, "(measured, budget); record again if it is meant: python -m tests.tpu_kernels_test"
  for report in reports.values():
    assert report.vmem_bytes <= plan.VECTOR_MEMORY[chip] and report.slots["MXU"] > 0


def test_a_program_that_cannot_compile_is_reported(tmp_path):
  """And the ones after it are still measured."""
  path = tmp_path / "spec.py"
  path.write_text("""
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
def make():
  spec = jax.ShapeDtypeStruct((4096, 8192), jnp.float32)
  copy = lambda x, o: o.__setitem__(..., x[...])
  return {"too big": (lambda x: pl.pallas_call(copy, out_shape=spec)(x), (spec,)), "fine": (lambda x: x @ x.T, (spec,))}
""")
  programs = {n: ("tools.bench.static_compiler", "from_spec_file", {"path": str(path), "name": n}) for n in ("too big", "fine")}
  reports = static_compiler.measure("v5e:1x1", programs, "bundles")
  assert "vmem" in reports["too big"].problem and reports["fine"].flops > 0 and reports["fine"].bundles > 0


def test_the_twin_reproduces_a_published_time():
  """tokamax 0.0.17, v5p, [524288, 4096] x [128, 4096, 1536], tile 128, 4096, 768: 31.372 ms; the model is within 5% there."""
  entry = {"sizes": static_model.multinomial(524288, 128), "k": 4096, "n": 1536, "tile": [128, 4096, 768]}
  seconds, = static_model.plain_estimate("v5p:1x1x1", [entry])
  assert abs(seconds / 31.372e-3 - 1) < 0.05


def test_time_of_a_kernel_is_above_its_roofs():
  blocks, _ = plan.fit(SHAPE, plan.VECTOR_MEMORY["v5p"])
  row, = static_model.kernel_estimates("v5p:1x1x1", SHAPE, blocks, ["hidden_forward"])
  assert row["seconds"] >= max(row["hbm_seconds"], row["flop_seconds"])
  assert row["cycle_seconds"] < 3 * row["flop_seconds"]  # nested loops once read as half, a runaway as many times


def test_hlo_bytes():
  text = """HloModule m

%fused (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

ENTRY %main (a: f32[1024], b: bf16[64,128]) -> f32[1024] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %b = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %near = f32[1024]{0:T(1024)S(1)} fusion(%a), kind=kLoop, calls=%fused
  %gather_fusion = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%b, %near), kind=kCustom, calls=%fused
  ROOT %out = f32[1024]{0:T(1024)} add(%near, %a)
}
"""
  # near reads a; the gather reads as many rows as come out; out reads a and is written
  assert static_compiler.hlo_bytes(text) == (4096 + 2 * 16 * 128 * 2 + 2 * 4096, 0)


if __name__ == "__main__":
  budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
  for chip in CHIPS:
    budgets[key(chip)] = {name: figures(report) for name, report in measured(chip).items()}
    print(key(chip), budgets[key(chip)], flush=True)
  BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
