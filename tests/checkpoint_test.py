"""Checkpoints: what is restored equals what was saved, or is refused; failures lose nothing."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from moe import checkpoint
from moe import config
from moe import hugging_face_files
from moe import sharding
from moe import step as step_lib
from moe import stored
from tests import small

DATA = {"fingerprint": {"seed": 0}, "shards": {"0": {"index": 3}}}


def mesh_of(run, count):
  return sharding.make_mesh(run.mesh, jax.devices()[:count])


@pytest.fixture(scope="module")
def run():
  return small.run(mesh={"data": 2, "fsdp": 2, "expert": 2})


@pytest.fixture(scope="module")
def state(run):
  """A state on eight devices, after one step so that the optimizer's moments are not zero."""
  with jax.set_mesh(mesh_of(run, 8)) as _:
    mesh = mesh_of(run, 8)
    batch = jax.device_put(small.batch(), sharding.batch_sharding(mesh))
    return step_lib.jit_train_step(run, mesh)(step_lib.init_state(run, mesh), batch)[0]


def saver(folder, **options):
  return checkpoint.Checkpointer(folder, config.Checkpoint(**options))


def saved(folder, state, run, step=1):
  with_ = saver(folder)
  assert with_.save(step, state, DATA, run, "# gin") == []
  assert with_.close() == []


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("mesh, count", [
    ({"data": 2, "fsdp": 2, "expert": 2}, 8), ({"fsdp": 4}, 4), ({}, 1), ({"expert": 4, "tensor": 2}, 8)])
def test_restores_bit_equal_onto_another_mesh(tmp_path, run, state, mesh, count):
  saved(tmp_path, state, run)
  other = small.run(mesh={"data": 1, **mesh})
  abstract = step_lib.abstract_state(other, mesh_of(other, count))
  restored = saver(tmp_path).restore(abstract, other)
  assert restored.step == 1 and restored.data == DATA and restored.skipped == []
  assert_equal(restored.state, state)
  assert all(x.sharding == a.sharding for x, a in zip(jax.tree.leaves(restored.state), jax.tree.leaves(abstract)))


def test_digest_sees_every_bit_and_no_sharding(run):
  x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
  base = checkpoint.digests({"x": jnp.array(x)})
  mesh = mesh_of(run, 8)
  for spec in (("batch", None), ("expert_embed", "experts")):
    placed = jax.device_put(x, jax.NamedSharding(mesh, sharding.spec(*spec)))
    assert checkpoint.digests({"x": placed}) == base
  for bit in range(32):
    flipped = x.copy()
    flipped.view(np.uint32)[5, 7] ^= np.uint32(1) << np.uint32(bit)
    assert checkpoint.digests({"x": jnp.array(flipped)}) != base, bit
  swapped = x.copy()
  swapped[[0, 1]] = swapped[[1, 0]]
  assert checkpoint.digests({"x": jnp.array(swapped)}) != base
  zeros = [checkpoint.digests({"x": jnp.zeros(n)}) for n in (3, 4)]
  assert zeros[0] != zeros[1]
  for dtype in (jnp.bfloat16, jnp.int32, jnp.uint32, jnp.int8):
    assert checkpoint.digests({"x": jnp.ones(3, dtype)}) != checkpoint.digests({"x": jnp.zeros(3, dtype)})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8])
def test_digests_of_files_are_those_of_the_devices(dtype, monkeypatch):
  for shape in ((), (1,), (5,), (3, 1, 7), (64, 9)):
    x = np.random.default_rng(1).integers(-100, 100, shape).astype(dtype)
    whole = checkpoint.digests({"x": jnp.array(x)})["x"]
    assert stored.digest(iter([((0,) * x.ndim, x)])) == whole
    if x.ndim and len(x) > 1:
      cut = [((0,) + (0,) * (x.ndim - 1), x[:2]), ((2,) + (0,) * (x.ndim - 1), x[2:])]
      assert stored.digest(iter(cut)) == whole


def test_a_checkpoint_is_good_when_it_was_read_back(tmp_path, run, state):
  one = saver(tmp_path)
  assert one.save(1, state, DATA, run, "# gin") == []
  assert one.close() == [] and one.good(1)
  assert list(stored.find(tmp_path / "1").source.leaves) == sorted(checkpoint.digests(state))
  assert stored.wrong(tmp_path / "1") == []
  two = saver(tmp_path)
  assert two.save(2, state, DATA, run, "# gin") == [] and two.wait() == []
  path = tmp_path / "2" / "digests" / "metadata"
  side = json.loads(path.read_text())
  side["leaves"]["params.embedding"] = "0" * 16
  path.write_text(json.dumps(side))
  problems = two.close()
  assert problems == ["checkpoint 2 does not read back as it was saved: params.embedding"] and not two.good(2)


def misread(one):
  """The checkpoint under way, whose digests are changed before it is read back; what is said then."""
  assert one.wait() == []
  path = one._folder / str(one._last) / "digests" / "metadata"
  side = json.loads(path.read_text())
  side["leaves"]["w"] = "0" * 16
  path.write_text(json.dumps(side))
  return one.read_back()


def test_what_does_not_read_back_is_saved_again_but_not_for_ever(tmp_path, run, monkeypatch):
  """And the last good one stays, whatever `keep_last` says."""
  monkeypatch.setattr(checkpoint, "_MAX_AGAIN", 2)
  state = {"w": jnp.arange(8.0)}
  one = saver(tmp_path, keep_last=1)
  assert one.save(1, state, DATA, run, "") == [] and one.read_back() == []
  assert one.again() == (False, [])  # nothing wrong
  for step in (2, 3, 4):
    assert one.save(step, state, DATA, run, "") == []
    assert misread(one) == [f"checkpoint {step} does not read back as it was saved: w"]
    wanted, (said,) = one.again()
    assert wanted == (step < 4) and "the newest good one is 1" in said and one.again() == (False, [])
  assert "so were the 2 before" in said and one.steps() == [1, 4]
  assert one.save(6, state, DATA, run, "") == [] and one.read_back() == []
  assert one.save(7, state, DATA, run, "") == [] and misread(one) and one.again()[0]  # a good one between: counted anew
  assert one.save(8, state, DATA, run, "") == [] and misread(one) and one.save(9, state, DATA, run, "") == []
  wanted, (said,) = one.again()  # heard of when the next one is there already
  assert not wanted and "checkpoint 8 is damaged" in said and "one of step 9 by now" in said
  assert one.close() == [] and one.good(9) and saver(tmp_path).steps() == [6, 9]


def test_a_damaged_checkpoint_is_replaced(tmp_path, run):
  """The same step again, and one that a restore passed over and that would stand in the way of those before it."""
  state = {"w": jax.device_put(jnp.arange(8.0), jax.devices()[0])}
  one = saver(tmp_path)
  assert one.save(1, state, DATA, run, "") == [] and one.save(5, state, DATA, run, "") == []
  assert misread(one) and one.again()[0]
  assert one.save(5, state, DATA, run, "") == [] and one.read_back() == [] and one.good(5)
  assert one.save(5, state, DATA, run, "") == [] and one._unread is None  # a good one is not written again
  assert one.save(9, state, DATA, run, "") == [] and misread(one) and one.close() == []
  two = saver(tmp_path)
  restored = two.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state), run)
  assert restored.step == 5 and "checkpoint 9 is damaged" in restored.skipped[0]
  assert two.save(8, state, DATA, run, "") == [] and two.close() == [] and two.steps() == [5, 8] and two.good(8)


def test_hosts_that_see_different_steps_choose_the_same(monkeypatch):
  """One listing fails, or is late: what not all have is nobody's choice."""
  def rows(mine):
    other = np.full_like(mine, -1)
    other[:2] = [5, 10]
    return np.stack([mine, other])

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", rows)
  assert checkpoint._on_all_hosts([5, 10, 15]) == [5, 10]
  assert checkpoint._on_all_hosts([15]) == [] and checkpoint._on_all_hosts([]) == []


@pytest.mark.slow
def test_a_hundred_flipped_bits_in_the_files(tmp_path, run, state):
  """At random places of all array files: noticed, or the values read are the same (bytes nobody reads)."""
  saved(tmp_path, state, run)
  folder, rng, noticed = tmp_path / "1", np.random.default_rng(0), 0
  files = [p for p in (folder / "state").rglob("*") if p.is_file() and p.stat().st_size and p.name != "commit_success.txt"]
  sizes = np.array([p.stat().st_size for p in files], float)
  for _ in range(100):
    path = files[rng.choice(len(files), p=sizes / sizes.sum())]
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    try:
      bad = stored.wrong(folder)
    except stored.Unreadable:
      bad = ["unreadable"]
    if not bad:  # then what is restored is what was saved, or it is refused for what lies beside the arrays
      try:
        assert_equal(saver(tmp_path).restore(step_lib.abstract_state(run, mesh_of(run, 8)), run).state, state)
      except checkpoint.CheckpointError:
        bad = ["refused"]
    noticed += bool(bad)
    path.write_bytes(whole)
  assert noticed > 20, noticed  # the others hit bytes that nothing reads, as the comparison above shows


def test_the_reader_needs_no_jax(tmp_path, run, state):
  saved(tmp_path, state, run)
  code = "import sys; from moe import stored; assert stored.wrong(sys.argv[1]) == []; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code, str(tmp_path / "1")], check=True, cwd=pathlib.Path(__file__).parents[1])
  with pytest.raises(stored.Unreadable):
    stored.wrong(tmp_path / "7")


def test_a_flipped_bit_on_disk_is_refused_and_the_older_checkpoint_taken(tmp_path, run, state):
  """Orbax restores a flipped bit of array data without an error: the digests are what refuses it."""
  saved(tmp_path, state, run, 1)
  saved(tmp_path, state, run, 2)
  array = tensorstore.open({"driver": "zarr", "path": "params.embedding/", "kvstore": {
      "driver": "ocdbt", "base": f"file://{tmp_path}/2/state"}}).result()
  value = array[3, 4].read().result()
  array[3, 4].write((value.view(np.uint32) ^ np.uint32(1)).view(np.float32)).result()
  abstract = step_lib.abstract_state(run, mesh_of(run, 8))
  restored = saver(tmp_path).restore(abstract, run)
  assert restored.step == 1
  assert restored.skipped == ["checkpoint 2 is damaged: the digest of params.embedding does not match"]
  assert_equal(restored.state, state)


@pytest.mark.parametrize("item", ["data", "config", "digests"])
def test_changed_side_files_are_refused(tmp_path, run, state, item):
  saved(tmp_path, state, run)
  path = tmp_path / "1" / item / "metadata"
  text = path.read_text()
  other = json.dumps({"leaves": {}, "sides": {}}) if item == "digests" else text.replace("3", "4", 1)
  for bad in (text[: len(text) // 2], other):
    path.write_text(bad)
    with pytest.raises(checkpoint.CheckpointError, match="checkpoint 1 is damaged"):
      saver(tmp_path).restore(step_lib.abstract_state(run, mesh_of(run, 8)), run)


@pytest.mark.parametrize("removed", ["state/_METADATA", "state/manifest.ocdbt", "state"])
def test_missing_files_are_refused(tmp_path, run, state, removed):
  saved(tmp_path, state, run)
  path = tmp_path / "1" / removed
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  with pytest.raises(checkpoint.CheckpointError, match="checkpoint 1 is damaged"):
    saver(tmp_path).restore(step_lib.abstract_state(run, mesh_of(run, 8)), run)


def test_another_model_is_refused_with_the_difference(tmp_path, run, state):
  saved(tmp_path, state, run)
  other = small.run(model={"vocab_size": 128})
  with pytest.raises(checkpoint.CheckpointError, match="holds another model: vocab_size: 64 -> 128"):
    saver(tmp_path).restore(step_lib.abstract_state(other, mesh_of(other, 1)), other)
  same = small.run(model={"scan_unroll": 0, "remat": "full", "dropout": 0.1})  # how it is computed may change
  assert saver(tmp_path).restore(step_lib.abstract_state(same, mesh_of(same, 1)), same).step == 1


def test_parameters_alone(tmp_path, run, state):
  saved(tmp_path / "checkpoints", state, run, 5)
  one = small.run()
  abstract = step_lib.abstract_state(one, mesh_of(one, 1)).params
  for path in (tmp_path, tmp_path / "checkpoints" / "5"):
    step, params = checkpoint.restore_params(path, abstract)
    assert step == 5
    assert_equal(params, state.params)
  assert checkpoint.read_run_config(tmp_path) == json.loads(json.dumps(config.to_dict(run)))
  for changes, part in [({"vocab_size": 128}, "no usable parameters"), ({"attention": {"qkv_bias": True}}, "it has no")]:
    other = small.run(model=changes)
    with pytest.raises(checkpoint.CheckpointError, match=part):
      checkpoint.restore_params(tmp_path, step_lib.abstract_state(other, mesh_of(other, 1)).params)
  with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint"):
    checkpoint.restore_params(tmp_path / "nothing", abstract)


def test_retention(tmp_path, run, state):
  with_ = saver(tmp_path, keep_last=2, keep_every_steps=10)
  for step in (5, 10, 15, 20, 25):
    assert with_.save(step, state, DATA, run, "") == []
  with_.close()
  assert saver(tmp_path).steps() == [10, 20, 25]


def test_arrays_are_cut_into_chunks(tmp_path, run, state, monkeypatch):
  monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 4096)
  saved(tmp_path, state, run)
  import orbax.checkpoint as ocp
  from etils import epath
  tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(tmp_path) / "1" / "state").tree
  gate = tree["params"]["layers"]["experts"]["moe"]["gate"]
  assert np.prod(gate.storage.chunk_shape) * 4 <= 4096 < np.prod(gate.shape) * 4


def test_debris_of_a_killed_save_is_swept(tmp_path, run, state):
  saved(tmp_path, state, run)
  (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  (tmp_path / "3").mkdir()  # a deletion cut short leaves a gutted directory that still counts as a step
  again = saver(tmp_path)
  assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()
  restored = again.restore(step_lib.abstract_state(run, mesh_of(run, 8)), run)
  assert restored.step == 1 and "checkpoint 3 is damaged" in restored.skipped[0]


def test_a_failed_save_is_reported_and_the_next_one_works(tmp_path, run, state, monkeypatch):
  with_ = saver(tmp_path)
  assert with_.save(1, state, DATA, run, "") == []
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")
  with monkeypatch.context() as patch:
    patch.setattr(with_._manager, "save", full)
    assert "checkpoint 2 could not be saved: [Errno 28] No space left on device" in with_.save(2, state, DATA, run, "")[-1]
  assert with_.steps() == [1]
  assert with_.save(3, state, DATA, run, "") == []
  assert with_.close() == [] and saver(tmp_path).steps() == [1, 3]


@pytest.fixture
def tiny_disk(tmp_path):
  """A file system of 4 MB; needs the right to mount."""
  folder = tmp_path / "disk"
  folder.mkdir()
  if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]).returncode:
    pytest.skip("mounting a small file system needs root")
  yield folder
  subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(tiny_disk, run, state):
  """A real full disk in the middle of a save: the alarm, the good checkpoint stays, and saving works again after."""
  with_ = saver(tiny_disk)
  assert with_.save(1, state, DATA, run, "") == [] and with_.wait() == []
  ballast = pathlib.Path(tiny_disk / "ballast")
  free = shutil.disk_usage(tiny_disk).free
  ballast.write_bytes(b"\0" * (free - 40_000))
  problems = with_.save(2, state, DATA, run, "") + with_.wait()
  assert problems and "could not be saved" in problems[0]
  assert with_.steps() == [1]
  ballast.unlink()
  assert with_.save(3, state, DATA, run, "") == [] and with_.close() == []
  restored = saver(tiny_disk).restore(step_lib.abstract_state(run, mesh_of(run, 8)), run)
  assert restored.step == 3
  assert_equal(restored.state, state)


def test_a_damaged_newest_checkpoint_hides_no_whole_one(tmp_path, run, state):
  """From --init_from, and from the tools that look for the run's tokenizer: both take the one before."""
  abstract = step_lib.abstract_state(run, mesh_of(run, 8)).params
  for step in (1, 2):
    saved(tmp_path / "checkpoints", state, run, step)
  shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
  assert checkpoint.check_source(tmp_path, abstract, run) == []
  assert checkpoint.restore_params(tmp_path, abstract)[0] == 1
  assert hugging_face_files.run_folder(tmp_path) == epath.Path(tmp_path)
  assert hugging_face_files.run_folder(tmp_path / "checkpoints" / "1" / "state") == epath.Path(tmp_path)
  shutil.rmtree(tmp_path / "checkpoints" / "1" / "state")
  with pytest.raises(checkpoint.CheckpointError, match="no usable parameters"):
    checkpoint.check_source(tmp_path, abstract, run)
