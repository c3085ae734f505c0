"""The TPU compiler as witness: steps compile for topologies that are not here, with the collectives they should have.

Nothing runs on a TPU. Needs libtpu, so `bash tools/dev.sh tpu`; elsewhere skipped.
"""

import json
import os
import pathlib
import re
import shutil

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("libtpu", reason="libtpu is in the environment of tools/dev.sh tpu only (Python >= 3.12)")

from moe import config  # noqa: E402
from moe import gin_config  # noqa: E402
from moe import hardware  # noqa: E402
from moe import sharding  # noqa: E402
from moe import step as step_lib  # noqa: E402
from moe.kernels import cross_entropy  # noqa: E402
from tools import compile_check  # noqa: E402
from tools import hlo  # noqa: E402
from tools.bench import host_rows  # noqa: E402
from tests import small  # noqa: E402

pytestmark = [pytest.mark.tpu, pytest.mark.slow]

RUN = dict(batch=16, length=256, model={
    "vocab_size": 1024, "d_model": 512, "num_layers": 4, "compute_dtype": "bfloat16",
    "attention": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64}, "experts": {"num_experts": 16, "d_expert": 512}})


def compiled(topology: str, mesh: dict, **changes) -> tuple[config.Run, object]:
  devices = compile_check.devices_of(topology)
  run = small.change(small.run(**RUN, mesh=mesh), **changes)
  return run, step_lib.compile_step(run, sharding.make_mesh(run.mesh, devices))


def collectives(text: str) -> dict[str, list[str]]:
  """Collective -> result shapes, in the compiled program."""
  found: dict[str, list[str]] = {}
  pattern = r"= \(?([a-z0-9]+\[[\d,]*\])[^=]*? (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\("
  for shape, name in re.findall(pattern, text):
    found.setdefault(name, []).append(shape)
  return found


@pytest.mark.parametrize("topology, mesh", [
    ("v5e:2x4", {"data": 2, "fsdp": 2, "expert": 2}), ("v5p:2x2x1", {"fsdp": 2, "expert": 2}),
    ("v6e:2x4", {"fsdp": 2, "expert": 2, "tensor": 2})], ids=lambda v: v if isinstance(v, str) else "")
def test_steps_compile_and_fit(topology, mesh):
  run, program = compiled(topology, mesh)
  memory = program.memory_analysis()
  assert 0 < memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16e9
  found = collectives(program.as_text())
  assert "all-gather" in found


def test_every_host_of_a_pod_loads_what_its_devices_hold():
  """Eleven pods, and those of the run configs: rows and columns of every device are in its host's part; and an equal run of
  rows for each process number, the negative control, is not what the hosts hold."""
  meshes = [(sharding.make_mesh(config.Mesh(**sizes), compile_check.devices_of(topology)), None)
            for topology, sizes in host_rows.PODS]
  for path in sorted((gin_config.CONFIGS / "run").glob("*.gin")):
    if "quickstart" not in path.stem:
      run = gin_config.resolve([path]).run
      meshes.append((sharding.make_mesh(run.mesh, compile_check.devices_of(*compile_check.pod([path], None))), run))
  wrong_by_number = 0
  for mesh, run in meshes:
    parts = sharding.parts("batch", mesh)
    shape = (run.data.batch_sequences, run.data.sequence_tokens) if run else (max(parts, 2), 4096)
    hosts = host_rows.hosts_of(mesh, shape).values()
    assert all(host.complete for host in hosts)
    # No host loads a row that none of its devices holds: at most each device's rows.
    assert all(len(host.part.rows) <= host.devices * shape[0] // parts for host in hosts)
    wrong_by_number += not all(host.by_number for host in hosts)
  assert len(meshes) >= 25 and wrong_by_number >= 8


def test_expert_gradients_leave_by_reduce_scatter():
  """Weights are gathered over fsdp inside the shard_map, so the gradients of gate, up and down are reduce-scattered, an
  eighth to each device, and none of the gathered size is all-reduced."""
  run, program = compiled("v5e:2x4", {"fsdp": 8})
  e, d, f = run.model.experts.num_experts, run.model.d_model, run.model.experts.d_expert
  found = collectives(program.as_text())
  assert sorted(found["reduce-scatter"]) == sorted([f"bf16[{e},{d // 8},{f}]"] * 2 + [f"bf16[{e},{f // 8},{d}]"])
  assert not [shape for shape in found["all-reduce"] if shape.endswith(f"[{e},{d},{f}]")]


WIDE = {"remat": "full", "d_model": 1024, "attention": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 128},
        "experts": {"num_experts": 4, "d_expert": 4096, "backend": "ragged_dot"}}


def walked(topology, mesh, **changes):
  run, program = compiled(topology, mesh, data={"sequence_tokens": 4096}, **changes)
  sizes = dict(sharding.make_mesh(run.mesh, compile_check.devices_of(topology)).shape)
  return hlo.walk(hlo.parse(program.as_text()), hardware.topology(topology).chip, sizes)


@pytest.mark.parametrize("topology", ["v6e:2x4", "v5p:2x2x2"])
def test_collectives_run_beside_the_matmuls(topology):
  """Where there are SparseCores: weights are gathered and their gradients reduce-scattered asynchronously, and no expert
  matrix is all-reduced. Without the options, the control, little is asynchronous but the pieces of windowed matmuls."""
  matrix = 2 * 4 * 1024 * 4096 * 4  # bytes of one kind of the experts' gradients in bfloat16, all layers
  for offload in (True, False):
    walk = walked(topology, {"fsdp": 8}, model=WIDE, train={"offload_collectives": offload})
    moved = {k: sum(c.bytes for c in walk.collectives if c.kind == k) for k in ("all-gather", "reduce-scatter", "all-reduce")}
    started = sum(c.bytes for c in walk.collectives if c.asynchronous) / sum(c.bytes for c in walk.collectives)
    assert walk.unknown_trips == 0
    if offload:
      assert moved["all-reduce"] < 0.05 * matrix and moved["reduce-scatter"] > 3 * matrix * 7 / 8
      # All but the first gather of a matrix in each pass of a layer, behind which nothing stands; on v6e less than that.
      first = 2 * 4 * (2 * 4 * 1024 * 4096) * 7 / 8 / sum(c.bytes for c in walk.collectives)
      assert started > 0.9 and hlo.overlapped_share(walk.collectives) > (0.9 if topology == "v6e:2x4" else 0.999 - first)
      assert "collective-permute" not in {c.kind for c in walk.collectives}  # no matmul cut into pieces
    else:
      assert started < 0.3


def matmuls_beside(program, kind):
  """Experts' matmuls that stand between the start and the end of a transfer in the schedule."""
  count = 0
  for name in hlo.reached(program):
    under_way = set()
    for i in program.computations[name]:
      if i.operation == f"{kind}-start":
        under_way.add(i.name)
      elif i.operation == f"{kind}-done":
        under_way.discard(i.operands[0])
      elif "ragged_dot" in i.source and i.operation == "custom-call":
        count += bool(under_way)
  return count


def test_dispatch_runs_beside_the_experts():
  """With two chunks the ragged all-to-all of one is under way while the other's experts compute, forward and backward."""
  matmuls = {}
  for degree in (1, 2):
    experts = {**WIDE["experts"], "num_experts": 16, "overlap_degree": degree}
    _, program = compiled("v5p:2x2x2", {"expert": 8}, data={"sequence_tokens": 1024}, model={**WIDE, "experts": experts})
    matmuls[degree] = matmuls_beside(hlo.parse(program.as_text()), "ragged-all-to-all")
  # One chunk: only weight gradients, which wait for no transfer of the rows' gradient.
  assert matmuls[2] >= 2 * matmuls[1] > 0, matmuls


def test_remat_repeats_no_way_back():
  """Five ragged transfers a layer: there and back, there again, and the gradients of both; the router's gates meet the rows
  at the experts, so nothing needs what came back."""
  walk = walked("v5p:2x2x2", {"expert": 8}, model={**WIDE, "experts": {**WIDE["experts"], "num_experts": 16}})
  assert sum(c.count for c in walk.collectives if c.kind == "ragged-all-to-all") == 5 * RUN["model"]["num_layers"]


def test_hops_of_a_ring_run_beside_the_experts():
  experts = {**WIDE["experts"], "dispatch": "ring", "buffer_factor": 4.0}  # room for all: no second form of each turn
  hops = [c for c in walked("v5p:2x2x1", {"expert": 4}, model={**WIDE, "experts": experts}).collectives
          if c.kind == "collective-permute" and c.axes == ("expert",)]
  assert hops and all(c.asynchronous for c in hops)
  assert sum(c.exposed for c in hops) < 0.3 * sum(c.seconds for c in hops)


def test_what_does_not_fit_is_told(capsys):
  arguments = ["--gin_file=configs/run/mixtral_8x7b_v6e_64.gin", "--topology=v5e:2x2", "--gin.Mesh.fsdp=4",
               "--gin.Model.num_layers=1", "--gin.Data.batch_sequences=32"]
  assert compile_check.main(arguments) == 1
  told = capsys.readouterr().out
  assert "DOES NOT FIT" in told and "GB too many" in told and "state.params" in told and "Train.micro_batches = " in told


@pytest.mark.parametrize("topology, fused", [("v5e:2x4", True), ("v6e:2x4", False)])
def test_kernels_are_in_the_step(topology, fused):
  """The chooser's kernels, forward and backward, under shard_map on a mesh; attention is splash on both chips."""
  run, program = compiled(topology, {"data": 2, "fsdp": 2, "expert": 2})
  text = program.as_text()
  names = ("experts_hidden", "experts_combine", "experts_hidden_gradient", "experts_weight_gradient")
  assert all((name in text) == fused for name in names), topology
  assert ("ragged_dot_tiling" in text) != fused
  assert "splash_mha" in text


def test_a_large_vocabulary_is_never_whole(monkeypatch):
  def holds_all():
    run, program = compiled("v5e:2x4", {"data": 4, "tensor": 2}, model={"vocab_size": 131072},
                            data={"sequence_tokens": 1024})
    rows, length = run.data.batch_sequences // 4, run.data.sequence_tokens
    return re.search(rf"(f32|bf16)\[{rows},{length},{131072 // 2}\]", program.as_text()) is not None

  assert not holds_all()
  monkeypatch.setattr(cross_entropy, "_LOGITS_BYTES", 1 << 40)  # the control: in one piece
  assert holds_all()


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 4}], ids=str)
def test_micro_batches_with_a_large_vocabulary_compile(mesh):
  compiled("v5e:2x2", mesh, train={"micro_batches": 2}, model={"vocab_size": 131072}, data={"sequence_tokens": 2048})


def test_exact_step_scope_compiles():
  compiled("v5e:2x2", {"data": 4}, train={"micro_batches": 4}, model={"router": {"balance_scope": "step"}})


@pytest.mark.parametrize("router, experts", [
    ({"recurrent": {"cell": "gru"}}, {}), ({"pre_gate": {"d_model": 128, "d_ff": 128}}, {}),
    ({"gate": "sigmoid", "num_groups": 4, "top_groups": 2, "bias_update_rate": 0.001}, {"capacity_factor": 1.25}),
    ({"gate": "noisy"}, {"capacity_factor": 1.0, "drop_policy": "random", "capacity_group": "microbatch"}),
    ({"gate": "expert_choice", "allow_lookahead": True, "balance_coef": 0.0}, {}),
    ({"gate": "soft", "allow_lookahead": True, "balance_coef": 0.0}, {})],
    ids=["gru", "pre_gate", "deepseek_v3", "noisy_random", "expert_choice", "soft"])
def test_routers_compile(router, experts):
  compiled("v5e:2x4", {"data": 2, "fsdp": 2, "expert": 2}, model={"router": router, "experts": experts})


BUDGETS = pathlib.Path(__file__).parent / "golden" / "compile_budgets.json"


# How the names of those begin that compile for more than five minutes.
_LONG = ("deepseek_v3", "palm")


def turn(names: list[str]) -> list[str]:
  """All of them, or where CI says so (MOE_BUDGET_TURN) one of those that compile in minutes."""
  at = os.environ.get("MOE_BUDGET_TURN")
  short = [name for name in names if not name.startswith(_LONG)]
  return names if at is None else [short[int(at) % len(short)]]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", turn(sorted(json.loads(BUDGETS.read_text()))))
def test_run_config_keeps_its_budget(name, tmp_path, record_property):
  """Neither HBM nor a collective has grown since the budget was recorded (compile_check --golden=FILE), same versions."""
  path = gin_config.CONFIGS / "run" / f"{name}.gin"
  result = compile_check.check(gin_config.resolve([path]).run, *compile_check.topology_in(path))
  record_property("compile_seconds", round(result["compile_seconds"]))
  assert result["fits"]
  if compile_check.budget_key(result) not in json.loads(BUDGETS.read_text())[name]:
    pytest.skip(f"no budget of {name} under {compile_check.budget_key(result)}")
  copy = shutil.copy(BUDGETS, tmp_path)
  assert compile_check.over_budget(result, pathlib.Path(copy), name) == []
