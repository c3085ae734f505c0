"""tools.inspect_checkpoint: what it says is true, and every damage is one line with the right exit code."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorstore as ts

from moe import checkpoint
from moe import config
from moe import sizes
from moe import stored
from moe.errors import UserError
from tests import small
from tests.hugging_face_test import Arrays
from tools import inspect_checkpoint
from tools import leaf_names
from tools import weight_health

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hugging_face"
RUN = small.run(model={"router": {"bias_update_rate": 0.01}})


def values(run=RUN, seed=0) -> dict[str, np.ndarray]:
  """Parameters as the model has them, second moments of the experts, and a step."""
  import jax

  from moe import sharding
  from moe import step as step_lib

  rng = np.random.default_rng(seed)
  abstract = step_lib.abstract_state(run, sharding.make_mesh(config.Mesh(), jax.devices()[:1]))
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params):
    found[f"params.{checkpoint.leaf_name(path)}"] = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
  down = "layers.experts.moe.down"
  found[f"opt_state.1.nu.{down}"] = np.square(found[f"params.{down}"])
  found["step"] = np.int32(7)
  return found


VALUES: dict = {}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  VALUES.update(values())
  folder = tmp_path_factory.mktemp("run")
  for step in (3, 7):
    checkpoint.write(folder / "checkpoints" / str(step), Arrays(VALUES), RUN, chunk_bytes=700)
  return folder


def said(capsys, *argv) -> tuple[int, object]:
  code = inspect_checkpoint.main([str(a) for a in argv] + ["--json"])
  return code, json.loads(capsys.readouterr().out)


def other(tmp_path, **changes) -> pathlib.Path:
  checkpoint.write(tmp_path / "other" / "checkpoints" / "7", Arrays({**VALUES, **changes}), RUN)
  return tmp_path / "other"


# ---------------------------------------------------------------------------------------------------------- what it says


def test_ls_at_every_level(run_dir, capsys):
  for path in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / "7", run_dir / "checkpoints" / "7" / "state"):
    code, told = said(capsys, "ls", path)
    assert code == 0 and told["step"] == 7
    found = {leaf["name"]: (tuple(leaf["shape"]), leaf["dtype"], leaf["bytes"]) for leaf in told["leaves"]}
    assert found == {name: (x.shape, x.dtype.name, x.nbytes) for name, x in VALUES.items()}
  assert said(capsys, "ls", run_dir)[1]["steps"] == [{"step": s, "read_back": "not read back"} for s in (3, 7)]
  chunk = next(leaf["chunk"] for leaf in said(capsys, "ls", run_dir)[1]["leaves"] if leaf["name"] == "params.embedding")
  assert np.prod(chunk) * 4 <= 700


def test_summary_is_the_formula_and_the_tree(run_dir, capsys):
  _, told = said(capsys, "summary", run_dir)
  s = sizes.sizes(RUN.model)
  assert told["state"]["params"]["elements"] == told["parameters"]["total"] == s.total
  assert told["parameters"]["active"] == s.active
  assert told["tokens_seen"] == 7 * RUN.tokens_per_step
  assert told["state"]["opt_state"]["bytes"] == VALUES["opt_state.1.nu.layers.experts.moe.down"].nbytes


def test_summary_and_experts_of_a_hugging_face_model(capsys):
  _, told = said(capsys, "summary", GOLDEN / "deepseek_v3")
  assert told["parameters"]["total"] == told["state"]["params"]["elements"]
  code, told = said(capsys, "experts", GOLDEN / "deepseek_v3")
  assert code == 0 and len(told["layers"]) == 2 and told["layers"][0]["bias"] is not None


def test_tree_adds_up(run_dir, capsys):
  rows = {row["name"]: row for row in said(capsys, "tree", run_dir, "--depth=9")[1]}
  assert rows["params"]["bytes"] == sum(x.nbytes for name, x in VALUES.items() if name.startswith("params."))
  assert rows["params.layers.experts.moe.gate"]["elements"] == VALUES["params.layers.experts.moe.gate"].size


def test_stats_are_numpys(run_dir, capsys):
  code, rows = said(capsys, "stats", run_dir)
  assert code == 0 and len(rows) == len(VALUES)
  for row in rows:
    x = np.asarray(VALUES[row["name"]], np.float64)
    np.testing.assert_allclose([row["norm"], row["mean"], row["max_abs"]],
                               [np.linalg.norm(x.ravel()), x.mean(), np.abs(x).max()], rtol=1e-5, atol=1e-7)
  _, rows = said(capsys, "stats", run_dir, "--experts", "--filter=*moe.up")
  x = VALUES["params.layers.experts.moe.up"]
  assert [row["name"] for row in rows][9] == "params.layers.experts.moe.up[1,1]" and len(rows) == x.shape[0] * x.shape[1]
  np.testing.assert_allclose(rows[9]["norm"], np.linalg.norm(x[1, 1]), rtol=1e-5)


def test_experts_are_numpys(run_dir, capsys):
  code, told = said(capsys, "experts", run_dir)
  assert code == 0 and told["troubles"] == []
  router, gate = VALUES["params.layers.experts.moe.router.weight"], VALUES["params.layers.experts.moe.gate"]
  np.testing.assert_allclose(told["layers"][1]["router_norms"], np.linalg.norm(router[1], axis=0), rtol=1e-5)
  (i, j), cosine = told["layers"][0]["closest"]
  unit = gate[0].reshape(gate.shape[1], -1)
  unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
  np.testing.assert_allclose(cosine, unit[i] @ unit[j], rtol=1e-5)


def test_sick_experts_are_named(run_dir, tmp_path, capsys):
  gate, router = (VALUES[f"params.layers.experts.moe.{n}"].copy() for n in ("gate", "router.weight"))
  moment = VALUES["opt_state.1.nu.layers.experts.moe.down"].copy()
  rng = np.random.default_rng(5)
  gate[1, 6] = 1.7 * gate[1, 2] + rng.normal(0, 0.02, gate[1, 2].shape)
  router[0, :, 3] = 0
  moment[1, 4] = 0
  sick = other(tmp_path, **{"params.layers.experts.moe.gate": gate, "params.layers.experts.moe.router.weight": router,
                            "opt_state.1.nu.layers.experts.moe.down": moment})
  code, told = said(capsys, "experts", sick)
  assert code == 1 and len(told["troubles"]) == 3
  text = " ".join(told["troubles"])
  assert "layer 0, expert 3: router column all but zero" in text and "layer 1: experts 2 and 6 are alike" in text
  assert "layer 1, expert 4: no gradient" in text
  assert inspect_checkpoint.main(["experts", str(sick), f"--png={tmp_path}/x.png"]) == 1
  assert (tmp_path / "x.png").stat().st_size > 5000


@pytest.mark.parametrize("factor, what, part", [
    (40.0, "router column", "router.weight"), (1 / 40, "router column", "router.weight"), (9.0, "matrices", "down")])
def test_an_outlier_is_sick(run_dir, tmp_path, capsys, factor, what, part):
  name = f"params.layers.experts.moe.{part}"
  changed = VALUES[name].copy()
  place = (1, 2) if part == "down" else (1, slice(None), 2)
  changed[place] *= factor
  code, told = said(capsys, "experts", other(tmp_path, **{name: changed}))
  assert code == 1 and len(told["troubles"]) == 1
  assert told["troubles"][0].startswith(f"layer 1, expert 2: {what} of ") and "the layer's median" in told["troubles"][0]


def test_outliers_are_few_among_healthy_norms():
  """Negative control: norms that vary by a third, between layers by 8; and one that is 3.9 times its median."""
  rng = np.random.default_rng(0)
  norms = np.exp(rng.normal(0, 0.3, (60, 64))) * np.exp(rng.uniform(0, 2, (60, 1)))
  assert not any(weight_health._outliers(norms))
  for experts in (3, 4, 8):
    norms = np.ones((2, experts))
    norms[1, 0] = 3.9
    assert weight_health._outliers(norms) == [[], []]
    norms[1, 0] = 4.1
    assert weight_health._outliers(norms) == [[], [0]]
  assert weight_health._outliers(np.array([[1.0, np.nan, 0.0, 1.0]])) == [[]]  # named as dead and not finite
  assert weight_health._outliers(np.full((1, 2), np.nan)) == [[]]


def test_the_load_of_the_run_stands_beside(run_dir, tmp_path, capsys):
  """Windows before the checkpoint's step count, those after it do not, and what a resume repeated counts once."""
  folder = tmp_path / "run"
  shutil.copytree(run_dir, folder)

  def counts(*idle):
    row = np.full((2, 8), 100)
    row[:, 1] = 500
    row[1, list(idle)] = 0
    return row.tolist()

  windows = [(0, 0, counts()), (1, 1, counts(3)), (2, 2, counts(3)), (2, 2, counts(3)), (3, 6, counts(3)), (7, 7, counts(4))]
  with open(folder / "metrics.jsonl", "w") as file:
    for first, step, table in windows:
      file.write(json.dumps({"kind": "load", "step": step, "first_step": first, "expert_counts": table}) + "\n")
  code, told = said(capsys, "experts", folder)
  load = told["layers"][0]["load"]
  assert (load["first_step"], load["last_step"]) == (0, 6) and load["counts"][1] == 4 * 500
  assert code == 0 and not told["troubles"]  # expert 3 was chosen in step 0
  assert said(capsys, "experts", folder / "checkpoints" / "3")[1]["layers"][1]["load"]["counts"][3] == 100
  (folder / "metrics.jsonl").write_text("".join((folder / "metrics.jsonl").read_text().splitlines(keepends=True)[1:]))
  code, told = said(capsys, "experts", folder)
  assert code == 1 and told["troubles"] == ["layer 1, expert 3: chosen by no token in steps 1 to 6"]
  inspect_checkpoint.main(["experts", str(folder), f"--png={tmp_path}/x.png"])
  assert "its load in steps 1 to 6" in capsys.readouterr().out


def test_layers_are_named_as_the_model_has_them(tmp_path, capsys):
  run = small.run(model={"num_layers": 5, "num_dense_layers": 1, "moe_every": 2, "d_ff": 32})
  checkpoint.write(tmp_path / "checkpoints" / "1", Arrays(values(run)), run)
  told = said(capsys, "experts", tmp_path)[1]
  assert [layer["name"] for layer in told["layers"]] == ["layer 2 (MoE layer 1 of 2)", "layer 4 (MoE layer 2 of 2)"]
  told = said(capsys, "experts", GOLDEN / "deepseek_v3")[1]
  assert told["layers"][0]["name"] == "layer 1 (MoE layer 1 of 2)"


@pytest.mark.parametrize("text, names", [
    ("first moment", []), ("second moment", ["opt_state.1.nu.layers.experts.moe.down"]),
    ("exp_avg_sq", ["opt_state.1.nu.layers.experts.moe.down"]), ("nu", ["opt_state.1.nu.layers.experts.moe.down"]),
    ("k_proj", ["params.layers.experts.attention.k"]), ("attention.k", ["params.layers.experts.attention.k"]),
    ("lm_head", ["params.head"]), ("router", ["params.layers.experts.moe.router.selection_bias",
                                              "params.layers.experts.moe.router.weight"]),
    ("layers.*.k", ["params.layers.experts.attention.k"]), ("step,params.head", ["params.head", "step"]),
    ("query,attention value", ["params.layers.experts.attention.q", "params.layers.experts.attention.v"]),
    ("*moe.up", ["params.layers.experts.moe.up"])])
def test_leaves_are_found_by_what_they_are(run_dir, capsys, text, names):
  if names:
    assert sorted(leaf["name"] for leaf in said(capsys, "ls", run_dir, f"--filter={text}")[1]["leaves"]) == names
  else:
    with pytest.raises(UserError, match="has no leaf"):
      inspect_checkpoint.main(["ls", str(run_dir), f"--filter={text}"])


def test_plain_names():
  assert leaf_names.plain("opt_state.1.mu.layers.experts.attention.k") == "first moment of attention key, layers with experts"
  assert leaf_names.plain("params.layers.dense_0.dense.up") == "feed-forward up, dense layers between (0)"
  assert leaf_names.plain("model.layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate.weight"  # not ours
  shown = [leaf_names.plain(name) for name in VALUES]
  assert len(set(shown)) == len(shown)


def test_likeness_by_random_sums_finds_the_pair_among_many():
  """Of 64 experts of 96 x 80, two with cosine 0.8: the sketch must put the pair among the eight that are computed."""
  rng = np.random.default_rng(2)
  x = rng.normal(size=(1, 64, 96, 80)).astype(np.float32)
  x[0, 50] = 0.8 * x[0, 7] + 0.6 * x[0, 50]
  name = "params.layers.experts.moe.gate"
  source = Arrays({name: x})
  pairs = weight_health._closest_pairs(source, name, 0, weight_health._sketches(source, name)[0])
  assert pairs[0][:2] == (7, 50) and abs(pairs[0][2] - 0.8) < 0.03


@pytest.mark.parametrize("text, index", [
    ("params.layers.experts.moe.gate[1,2,3:5,:4]", (1, 2, slice(3, 5), slice(0, 4))), ("step", ()),
    ("params.embedding[-1]", (-1,)), ("params.embedding[-3:,5]", (slice(-3, None), 5))])
def test_cat(run_dir, capsys, tmp_path, text, index):
  expected = np.asarray(VALUES[text.partition("[")[0]])[index]
  np.testing.assert_allclose(said(capsys, "cat", run_dir, text)[1]["values"], expected)
  inspect_checkpoint.main(["cat", str(run_dir), text, f"--out={tmp_path}/x.npy"])
  np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)


def test_cat_means_the_parameter_not_its_moments(run_dir, capsys):
  told = said(capsys, "cat", run_dir, "moe.down[0,1]")[1]
  assert told["name"] == "params.layers.experts.moe.down[0,1]"
  np.testing.assert_allclose(told["values"], VALUES["params.layers.experts.moe.down"][0, 1])
  assert said(capsys, "cat", run_dir, "second moment[0,1]")[1]["name"] == "opt_state.1.nu.layers.experts.moe.down[0,1]"


def test_diff(run_dir, tmp_path, capsys):
  assert said(capsys, "diff", run_dir / "checkpoints" / "3", run_dir) == (0, {
      "a": str(run_dir / "checkpoints" / "3"), "b": str(run_dir / "checkpoints" / "7"), "differences": []})
  head = VALUES["params.head"].copy()
  head[2, 3] += 0.01
  changes = {"params.head": head, "params.embedding": VALUES["params.embedding"][:, :8],
             "params.extra": np.zeros(3, np.float32), "step": np.int32(7)}
  code, told = said(capsys, "diff", run_dir, other(tmp_path, **changes))
  assert code == 1
  found = {row["name"]: row["what"] for row in told["differences"]}
  assert set(found) == {"params.head", "params.embedding", "params.extra"}
  assert found["params.head"].startswith("1 of ") and "shape" in found["params.embedding"]
  assert "only in" in found["params.extra"]
  assert said(capsys, "diff", run_dir, tmp_path / "other", "--atol=0.02", "--filter=params.head")[0] == 0


def test_nan_equals_nan_and_inf_shows(run_dir, tmp_path, capsys):
  head = VALUES["params.head"].copy()
  head[0, 0] = np.nan
  sick = other(tmp_path, **{"params.head": head})
  assert said(capsys, "diff", sick, sick)[0] == 0
  assert said(capsys, "diff", run_dir, sick, "--atol=1e9")[0] == 1
  code = inspect_checkpoint.main(["stats", str(sick), "--json"])
  captured = capsys.readouterr()
  assert code == 1 and captured.err == "not finite: params.head\n"
  assert [row["name"] for row in json.loads(captured.out) if row["nan"]] == ["params.head"]


def test_an_expert_of_nan_is_named_alone(run_dir, tmp_path, capsys):
  up, router = (VALUES[f"params.layers.experts.moe.{n}"].copy() for n in ("up", "router.weight"))
  up[0, 3, 1, 1] = np.nan
  router[1, :, 5] = np.inf
  sick = other(tmp_path, **{"params.layers.experts.moe.up": up, "params.layers.experts.moe.router.weight": router})
  code, told = said(capsys, "experts", sick)
  assert code == 1 and told["troubles"] == [
      "layer 0, expert 3: matrices not finite", "layer 1, expert 5: router column not finite"]
  assert inspect_checkpoint.main(["experts", str(sick)]) == 1


def test_relative_paths(run_dir, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(run_dir)
  assert said(capsys, "stats", "checkpoints/7")[0] == 0
  monkeypatch.chdir(tmp_path)
  assert said(capsys, "convert", run_dir, "--out=here", "--params_only", "--dtype=bfloat16")[0] == 0
  assert said(capsys, "verify", "here")[0] == 0
  import jax

  from moe import sharding
  from moe import step as step_lib

  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
  _, params = checkpoint.restore_params("here", step_lib.abstract_state(RUN, mesh).params)  # as --init_from does
  head = np.asarray(params["head"])
  assert head.dtype == np.float32
  np.testing.assert_allclose(head, VALUES["params.head"], rtol=0.004)


def test_a_leaf_cannot_be_a_branch(run_dir, tmp_path):
  with pytest.raises(UserError, match="both a leaf and a branch"):
    inspect_checkpoint.main(["convert", str(run_dir), f"--out={tmp_path}/x", "--map=^params.head$=params.layers.experts"])


def test_config_and_its_differences(run_dir, tmp_path, capsys):
  assert config.from_dict(config.Run, said(capsys, "config", run_dir)[1]) == RUN
  checkpoint.write(tmp_path / "x" / "checkpoints" / "1", Arrays({"step": np.int32(1)}), small.change(RUN, train={"seed": 9}))
  assert said(capsys, "config", run_dir, tmp_path / "x") == (1, ["train.seed: 0 -> 9"])
  assert said(capsys, "config", run_dir, run_dir / "checkpoints" / "3") == (0, [])


def test_convert_there_and_back(run_dir, tmp_path, capsys):
  assert said(capsys, "convert", run_dir, f"--out={tmp_path}/a", "--unstack", "--params_only", "--map=^params=weights")[0] == 0
  names = [leaf["name"] for leaf in said(capsys, "ls", tmp_path / "a")[1]["leaves"]]
  assert "weights.layers.1.experts.moe.gate" in names and not [n for n in names if n.startswith("opt_state")]
  assert said(capsys, "verify", tmp_path / "a")[0] == 0
  assert said(capsys, "convert", tmp_path / "a", f"--out={tmp_path}/b", "--stack", "--map=^weights=params")[0] == 0
  assert said(capsys, "diff", run_dir, tmp_path / "b", "--filter=params.*")[0] == 0
  half = ("--dtype=bfloat16", "--format=safetensors", "--params_only")
  assert said(capsys, "convert", run_dir, f"--out={tmp_path}/c", *half)[0] == 0
  assert said(capsys, "diff", run_dir, tmp_path / "c", "--filter=params.*", "--rtol=0.004")[1]["differences"][0]["what"] == (
      "dtype float32 and bfloat16")
  with pytest.raises(UserError, match="not empty"):
    inspect_checkpoint.main(["convert", str(run_dir), f"--out={tmp_path}/a"])
  with pytest.raises(UserError, match="two leaves would be called x"):
    inspect_checkpoint.main(["convert", str(run_dir), f"--out={tmp_path}/d", "--map=^params.*=x"])


def test_what_is_converted_trains_on(run_dir, tmp_path):
  """restore_params, the way of --init_from, reads a written checkpoint onto a mesh."""
  import jax

  from moe import sharding
  from moe import step as step_lib

  mesh = sharding.make_mesh(config.Mesh(fsdp=2, expert=2), jax.devices()[:4])
  step, params = checkpoint.restore_params(run_dir, step_lib.abstract_state(RUN, mesh).params)
  assert step == 7
  gate = np.asarray(params["layers"]["experts"]["moe"]["gate"])
  np.testing.assert_array_equal(gate, VALUES["params.layers.experts.moe.gate"])


# ---------------------------------------------------------------------------------------------------------------- damage


def copied(run_dir, tmp_path) -> pathlib.Path:
  shutil.copytree(run_dir, tmp_path / "copy")
  return tmp_path / "copy" / "checkpoints" / "7"


def without_a_leaf(step):
  store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{step}/state/"}).result()
  for key in store.list().result():
    if key.startswith(b"params.head/"):
      store.delete_range(ts.KvStore.KeyRange(key, key + b"\0")).result()


def flipped(step):
  """One bit of the data, past what the file format itself checks."""
  array = ts.open({"driver": "auto", "kvstore": {"driver": "ocdbt", "base": f"file://{step}/state/", "path": "params.head/"}},
                  open=True).result()
  value = np.asarray(array[2, 3].read().result())
  array[2, 3].write((value.view(np.uint32) ^ np.uint32(1 << 9)).view(np.float32)).result()


def damaged_index(step):
  for path in (step / "state").rglob("d/*"):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncated(step):
  for path in (step / "state").rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def newer(step):
  path = step / "config" / "metadata"
  path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def tool(*argv) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, "-m", "tools.inspect_checkpoint", *map(str, argv)], text=True, capture_output=True,
                        cwd=pathlib.Path(__file__).parents[1])


@pytest.mark.parametrize("damage, verb, code, words", [
    (without_a_leaf, "verify", 1, "1 of 16 leaves are not what was saved: params.head"),
    (flipped, "verify", 1, "1 of 16 leaves are not what was saved: params.head"),
    (damaged_index, "verify", 2, "CRC-32C"),
    (truncated, "stats", 2, "error: "),
    (newer, "ls", 2, "is of format 99; this version reads up to 1"),
    (lambda step: shutil.rmtree(step / "state"), "ls", 2, "without its state directory"),
    (lambda step: (step / "config" / "metadata").write_text("{"), "ls", 2, "is damaged"),
])
def test_damage_is_one_line(run_dir, tmp_path, damage, verb, code, words):
  step = copied(run_dir, tmp_path)
  damage(step)
  done = tool(verb, step)
  assert done.returncode == code
  told = done.stderr if done.returncode == 2 else done.stdout
  assert words in told and len(told.splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("argv, words", [
    (("ls", "/no/such/place"), "/no/such/place does not exist"),
    (("ls", "{tmp}"), "neither a run, a checkpoint nor a Hugging Face directory"),
    (("ls", __file__), "no .safetensors"),
    (("cat", "{run}", "params.hed"), "did you mean 'params.head'?"),
    (("cat", "{run}", "params.head[99]"), "outside of axis 0"),
    (("cat", "{run}", "params.head[1,2,3]"), "has 3 axes, params.head has 2"),
    (("cat", "{run}", "params.head[x]"), "neither a number nor BEGIN:END"),
    (("stats", "{run}", "--filter=nothing*"), "has no leaf 'nothing*'"),
    (("stats", "{run}", "--filter=moe.gate,nothing"), "has no leaf 'nothing'"),
    (("stats", "{run}", "--filter=,"), "no leaf of"),
    (("cat", "{run}", "moe.gate,moe.up"), "may be any of 2 leaves: params.layers.experts.moe.gate, params"),
    (("diff", "{run}", "{run}", "--filter=nothing*"), "either checkpoint has no leaf"),
    (("stats", "{run}", "--live"), "no live snapshots can be reached"),
    (("experts", "{run}/checkpoints/7/../../none"), "does not exist"),
])
def test_mistakes_are_one_line(run_dir, tmp_path, argv, words):
  with pytest.raises(UserError, match=".*") as caught:
    inspect_checkpoint.main([a.format(run=run_dir, tmp=tmp_path) for a in argv])
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_reading_loads_no_jax():
  code = "import tools.inspect_checkpoint, sys; sys.exit(any(m in sys.modules for m in ('jax', 'orbax', 'flax', 'matplotlib')))"
  assert subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[1]).returncode == 0


def test_blocks_are_whole_chunks_and_cover(run_dir):
  source = stored.find(run_dir).source
  for name, leaf in source.leaves.items():
    seen = np.zeros(leaf.shape, int)
    for begin, block in stored.blocks(source, name, block_bytes=2000):
      where = tuple(slice(b, b + n) for b, n in zip(begin, block.shape))
      assert all(b % c == 0 for b, c in zip(begin, leaf.chunk))
      seen[where] += 1
      np.testing.assert_array_equal(block, np.asarray(VALUES[name])[where])
    assert (seen == 1).all()


def test_orbax_without_ocdbt_and_zarr3(tmp_path):
  """Checkpoints of others."""
  import orbax.checkpoint as ocp

  x = np.arange(60, dtype=np.float32).reshape(6, 10)
  for name, options in (("old", {"use_ocdbt": False}), ("zarr3", {"use_zarr3": True})):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as saver:
      saver.save(tmp_path / name, args=ocp.args.PyTreeSave({"a": {"b": x}}))
    source = stored.find(tmp_path / name).source
    assert list(source.leaves) == ["a.b"]
    np.testing.assert_array_equal(stored.whole(source, "a.b"), x)
