"""The TPU compiler as witness: steps compile for topologies that are not here, with the collectives they should have.

Nothing runs on a TPU. Needs libtpu, so `bash tools/dev.sh tpu`; elsewhere skipped.
"""

import re

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("libtpu", reason="libtpu is in the environment of tools/dev.sh tpu only (Python >= 3.12)")

from jax.experimental import topologies  # noqa: E402

from moe import config  # noqa: E402
from moe import sharding  # noqa: E402
from moe import step as step_lib  # noqa: E402
from moe.kernels import cross_entropy  # noqa: E402
from tests import small  # noqa: E402

pytestmark = [pytest.mark.tpu, pytest.mark.slow]

RUN = dict(batch=16, length=256, model={
    "vocab_size": 1024, "d_model": 512, "num_layers": 4, "compute_dtype": "bfloat16",
    "attention": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64}, "experts": {"num_experts": 16, "d_expert": 512}})


def compiled(topology: str, mesh: dict, **changes) -> tuple[config.Run, object]:
  devices = topologies.get_topology_desc(topology, platform="tpu").devices
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


def test_expert_gradients_leave_by_reduce_scatter():
  """Weights are gathered over fsdp inside the shard_map, so the gradients of gate, up and down are reduce-scattered, an
  eighth to each device, and none of the gathered size is all-reduced."""
  run, program = compiled("v5e:2x4", {"fsdp": 8})
  e, d, f = run.model.experts.num_experts, run.model.d_model, run.model.experts.d_expert
  found = collectives(program.as_text())
  assert sorted(found["reduce-scatter"]) == sorted([f"bf16[{e},{d // 8},{f}]"] * 2 + [f"bf16[{e},{f},{d // 8}]"])
  assert not [shape for shape in found["all-reduce"] if shape.endswith(f"[{e},{d},{f}]")]


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
    run, program = compiled("v5e:2x4", {"data": 4, "tensor": 2}, model={"vocab_size": 131072})
    rows, length = run.data.batch_sequences // 4, run.data.sequence_tokens
    return re.search(rf"(f32|bf16)\[{rows},{length},{131072 // 2}\]", program.as_text()) is not None

  assert not holds_all()
  monkeypatch.setattr(cross_entropy, "_LOGITS_BYTES", 1 << 40)  # the control: in one piece
  assert holds_all()


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
