"""compile_check without a compiler: budgets, the error bar, what it reads from a config and from the compiler's refusal."""

import json
import pathlib
import shutil

import jax
import pytest
from tests import small

from moe import config
from moe import experts
from moe import gin_config
from moe import hardware
from moe import sharding
from moe import step as step_lib
from tools import compile_check
from tools import overlap

RESULT = {"jax": "1", "libtpu": "2", "topology": "v5p:2x2x1", "slices": 1, "hbm": {"peak_bytes": 1000},
          "collectives": [{"kind": "all-gather", "axes": ["fsdp"], "bytes": 500.0}]}


def test_budget_fails_when_something_grows(tmp_path):
  path = tmp_path / "budget.json"
  assert compile_check.over_budget(RESULT, path, "run") == []  # records
  assert compile_check.over_budget(RESULT, path, "run") == []
  more = {**RESULT, "hbm": {"peak_bytes": 1100}, "collectives": [
      *RESULT["collectives"], {"kind": "all-reduce", "axes": ["data"], "bytes": 7.0}]}
  assert compile_check.over_budget(more, path, "run") == [
      "peak_bytes: 1,100 bytes, budget 1,000", "all-reduce over data: 7 bytes, budget 0"]
  assert compile_check.over_budget({**more, "libtpu": "3"}, path, "run") == []  # another key
  assert len(json.loads(path.read_text())["run"]) == 2


def test_each_step_has_a_budget_of_its_own(tmp_path):
  path = tmp_path / "budget.json"
  for step, peak in ("train", 1000), ("eval", 700):
    assert compile_check.over_budget({**RESULT, "step": step, "hbm": {"peak_bytes": peak}}, path, "run") == []
  assert compile_check.over_budget({**RESULT, "step": "eval", "hbm": {"peak_bytes": 900}}, path, "run") == [
      "peak_bytes: 900 bytes, budget 700"]
  assert sorted(json.loads(path.read_text())["run"]) == [
      "jax 1, libtpu 2, v5p:2x2x1 x 1", "jax 1, libtpu 2, v5p:2x2x1 x 1, evaluation"]


@pytest.mark.parametrize("source, shown", [
    ("params.layers.experts.moe.gate", "params.layers.experts.moe.gate"), ("", "(made by the compiler)"),
    ("jit(train_step)/jvp(Transformer)/while/body/closed_call/layers/moe/dot_general", "layers/moe/dot_general"),
    ("jit(train_step)/transpose(jvp(Transformer))/checkpoint/rematted_computation/layers/add", "layers/add (backward)"),
    ("jit(f)/while/body", "body"),
    ("a_long_name_of_a_scope/" * 9 + "the_operation", ".../a_long_name_of_a_scope/a_long_name_of_a_scope/the_operation"),
    ("x" * 200, "x" * 200)])
def test_names_of_arrays_keep_their_end(source, shown):
  assert compile_check.short_source(source) == shown


def test_without_libtpu_it_is_one_line(monkeypatch, capsys):
  monkeypatch.setattr(compile_check.importlib.util, "find_spec", lambda name: None)
  assert compile_check.main(["--gin_file=configs/run/quickstart.gin", "--topology=v5p:2x2x1"]) == 2
  assert capsys.readouterr().err.count("\n") == 1
  with pytest.raises(config.ConfigError, match="pip install 'jax"):
    overlap.main(["--gin_file=configs/run/rmoe_24_v5e_8.gin"])


def test_a_run_config_names_its_pod_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert compile_check.pod(["configs/run/rmoe_24_v5e_8.gin"], None) == ("v5e:2x4", 1)
  with pytest.raises(config.ConfigError, match="names no topology"):
    compile_check.pod(["configs/run/quickstart.gin"], None)


@pytest.mark.parametrize("flags, compiled", [
    ([], ["train", "eval"]), (["--only=train"], ["train"]), (["--only=eval"], ["eval"])])
def test_which_steps_are_compiled(flags, compiled, monkeypatch, capsys):
  """Both, or the one that is asked for; JSON has the evaluation step within the train step's."""
  steps = []

  def check(run, topology, slices, options, keep, step):
    steps.append(step)
    return {**RESULT, "step": step, "fits": step == "train"}

  monkeypatch.setattr(compile_check, "check", check)
  monkeypatch.setattr(compile_check, "inputs_notes", lambda run, topology, slices: [])  # needs libtpu's devices
  monkeypatch.setattr(compile_check.importlib.util, "find_spec", lambda name: True)
  code = compile_check.main(["--gin_file=configs/run/quickstart.gin", "--topology=v5p:2x2x1", "--json", *flags])
  result = json.loads(capsys.readouterr().out)
  assert steps == compiled and result["step"] == compiled[0] and ("evaluation" in result) == (len(compiled) == 2)
  assert code == (0 if compiled == ["train"] else 1)  # of all that were compiled, one does not fit


def test_data_that_is_elsewhere_is_a_note(monkeypatch, tmp_path):
  """What is compiled does not depend on it; a tokenizer that does not fit the model is an error."""
  monkeypatch.setattr(compile_check, "devices_of", lambda topology, slices: jax.devices()[:1])
  flags = ["--gin.Mesh.data=1", '--gin.kjv/Domain.path="/nowhere"']
  path = gin_config.CONFIGS / "run" / "quickstart.gin"
  notes = compile_check.inputs_notes(gin_config.resolve([path], flags).run, "v5e:1x1")
  assert len(notes) == 1 and "would not start on this machine: /nowhere is not a data directory" in notes[0]
  whole = gin_config.resolve([path], flags[:1]).run
  assert not any("would not start" in note for note in compile_check.inputs_notes(whole, "v5e:1x1"))
  with pytest.raises(config.ConfigError, match="259 ids but Model.vocab_size = 64"):
    compile_check.inputs_notes(gin_config.resolve([path], [*flags[:1], "--gin.Model.vocab_size=64"]).run, "v5e:1x1")


def test_error_bar_is_the_range_of_the_published_rows():
  rows = json.loads(compile_check.PUBLISHED.read_text())
  low, high, count = compile_check.error_bar(2.0)
  assert count == len(rows) >= 1 and low <= 2.0 <= high
  assert high == max(2.0 * r["published_seconds"] / r["predicted_seconds"] for r in rows)


def test_topology_of_a_config(tmp_path):
  path = tmp_path / "a.gin"
  path.write_text("# A run.\n# For v5p:4x4x4, 2 slices\n")
  assert compile_check.topology_in(path) == ("v5p:4x4x4", 2)
  path.write_text("# A run.\n")
  with pytest.raises(config.ConfigError, match="names no topology .* pass --topology"):
    compile_check.topology_in(path)
  with pytest.raises(config.ConfigError, match="of no known chip; known: v4, v5e, v5p"):
    compile_check.check(small.run(), "v3:2x2")


def test_record_in_the_head_of_a_config(tmp_path):
  """Under the line of the topology, once, whatever stood there; nothing else of the file changes."""
  path = tmp_path / "a.gin"
  path.write_text("# A run.\n# For v5p:4x4x4\n\nMesh.fsdp = 64\n")
  result = {"topology": "v5p:4x4x4", "slices": 1, "jax": "1", "libtpu": "2", "hbm": {"peak_bytes": 4e9, "limit_bytes": 8e9},
            "overlapped_share": 0.5, "mfu": 0.25,
            "step_seconds": {"predicted": 2.0, "low": 1.0, "high": 3.0, "validated_rows": 3}}
  compile_check.record({**result, "libtpu": "1"}, path)
  compile_check.record(result, path)
  lines = path.read_text().splitlines()
  assert lines[:2] == ["# A run.", "# For v5p:4x4x4"] and lines[4:] == ["", "Mesh.fsdp = 64"]
  assert lines[2].startswith("# Compiled, not run (jax 1, libtpu 2, ")
  assert lines[2].endswith("4.00 of 8.00 GB; 50% of the collectives' bytes beside other work;")
  assert lines[3] == "# static estimate of a step 2.00 s (1.00 to 3.00 by 3 published steps), MFU 25%."
  with pytest.raises(config.ConfigError, match="is for v5p:4x4x4 x 1, this record for v5p:4x4x4 x 2"):
    compile_check.record({**result, "slices": 2}, path)


def test_out_of_memory():
  run = small.run(mesh={"fsdp": 8})
  state = step_lib.abstract_state(run, sharding.make_mesh(run.mesh))
  chip = hardware.CHIPS["v5e"]
  early = compile_check._out_of_memory(
      "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (46.95G) exceeds available HBM (15.75G).", state, chip)
  assert early["hbm"]["peak_bytes"] == int(46.95 * 2**30) + compile_check._local_bytes(state)
  assert early["hbm"]["largest"][0]["source"].startswith("params.layers.experts.moe.")
  late = compile_check._out_of_memory("""RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded.
  1. Size: 4.00G
     Operator: op_name="jit(train_step)/dot"
     Shape: bf16[8,4096]{1,0}
  2. Size: 512.00M
     Shape: f32[7]{0}
""", state, chip)
  assert late["hbm"]["peak_bytes"] == int(20.5 * 2**30)
  assert late["hbm"]["largest"] == [{"bytes": 4 << 30, "shape": "bf16[8,4096]", "source": "jit(train_step)/dot"},
                                    {"bytes": 512 << 20, "shape": "f32[7]", "source": ""}]


@pytest.mark.tpu
@pytest.mark.slow
def test_evaluation_step_of_a_pod(tmp_path):
  """Compiled for TPU: it fits beside the optimizer state, which is counted in, and no collective moves what should stay where
  it is. Its text says which step it is and what computes attention."""
  pytest.importorskip("libtpu", reason="libtpu is in the environment of tools/dev.sh tpu only (Python >= 3.12)")
  model = {"vocab_size": 1024, "d_model": 512, "num_layers": 4, "compute_dtype": "bfloat16",
           "attention": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64}, "experts": {"num_experts": 64, "d_expert": 512}}
  run = small.run(batch=64, length=512, model=model, mesh={"fsdp": 4, "expert": 2})
  result = compile_check.check(run, "v5e:2x4", step="eval", keep=str(tmp_path / "step.hlo"))
  state = step_lib.abstract_state(run, sharding.make_mesh(run.mesh, compile_check.devices_of("v5e:2x4")))
  optimizer = compile_check._local_bytes(state.opt_state)
  assert result["fits"] and result["hbm"]["optimizer"] == optimizer > 0
  assert result["hbm"]["peak_bytes"] > optimizer + result["hbm"]["parameters"]
  assert result["tokens_per_step"] == 64 * 512
  program = (tmp_path / "step.hlo").read_text()
  assert "[4,4,64,64]" not in program and "[4,64,512,2]" not in program  # joint counts, experts chosen: whole nowhere
  text = compile_check.text(result)
  assert "evaluation step: 8 devices" in text and "attention of the layers: splash" in text


BUDGETS = pathlib.Path(__file__).parent / "golden" / "compile_budgets.json"


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name, keys in sorted(json.loads(BUDGETS.read_text()).items())
                                  if any(key.endswith(", evaluation") for key in keys)])
def test_evaluation_step_keeps_its_budget(name, tmp_path, record_property):
  """Neither HBM nor a collective has grown since it was recorded (compile_check --only=eval --golden=FILE), same versions."""
  pytest.importorskip("libtpu", reason="libtpu is in the environment of tools/dev.sh tpu only (Python >= 3.12)")
  path = gin_config.CONFIGS / "run" / f"{name}.gin"
  result = compile_check.check(gin_config.resolve([path]).run, *compile_check.topology_in(path), step="eval")
  record_property("compile_seconds", round(result["compile_seconds"]))
  assert result["fits"]
  if compile_check.budget_key(result) not in json.loads(BUDGETS.read_text())[name]:
    pytest.skip(f"no budget of {name} under {compile_check.budget_key(result)}")
  copy = shutil.copy(BUDGETS, tmp_path)
  assert compile_check.over_budget(result, pathlib.Path(copy), name) == []


@pytest.mark.parametrize("mesh, block, share", [
    ({"expert": 8}, {"dispatch": "all_gather"}, 1 / 1.5), ({"expert": 8}, {"dispatch": "ring"}, 1 / 1.5),
    ({"expert": 8}, {"dispatch": "all_to_all"}, 1 / 1.5),
    ({"fsdp": 8}, {}, 1)])
def test_filled_rows(mesh, block, share):
  run = small.run(length=192, mesh=mesh, model={"experts": block})
  assert experts.filled_rows(run, sharding.make_mesh(run.mesh, jax.devices())) == pytest.approx(share)
