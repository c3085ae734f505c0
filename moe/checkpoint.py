"""Checkpoints: Orbax saves state, data position and config; a digest of every leaf proves what is restored.

Orbax does not notice a flipped bit in array data, so each save carries a digest of every leaf, computed on the
devices before the save and again after the restore. The digest is a sum over elements modulo 2^32, hence the same for
every sharding, and a checkpoint restores onto any mesh.

A failed save (a full disk, say) raises an alarm and training goes on; the last good checkpoint stays. A checkpoint is good
when another process has read it back and found every digest (`moe/stored.py`); one that is not is saved again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from moe import config
from moe import stored
from moe.errors import UserError, storage_errors

_CHUNK_BYTES = 64 << 20  # largest piece of an array that is written, and so read, at once
_SMALLEST_CHUNK_BYTES = 1 << 20
_TEMPORARY = "*.orbax-checkpoint-tmp"
_MAX_AGAIN = 3  # saves in a row because the one before did not read back: a broken store is not written to for ever


class CheckpointError(UserError):
  """A checkpoint that is missing, damaged or of another model; one line of cause and remedy."""


class Restored(NamedTuple):
  step: int
  state: Any
  data: dict  # position of the loader
  skipped: list[str]  # newer checkpoints that could not be used, with the reason


# --------------------------------------------------------------------------------------------------------- digests


def _leaf_digest(x: jax.Array) -> jax.Array:
  """[2] uint32. Every element's bits are multiplied by an odd number that depends on its place, and summed.

  An odd factor is invertible modulo 2^32, so any change within one element changes the sum; changes in several, or a
  permutation, go unseen with probability 2^-64.
  """
  x = jax.device_put(x, jax.memory.Space.Device)  # moments may live in the host's memory
  bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
  bits = bits.astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    place = (place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)) * np.uint32(0x9E3779B1)
    place ^= place >> 15
  sums = []
  for factor in (0x85EBCA77, 0xC2B2AE3D):
    mixed = place * np.uint32(factor)
    mixed ^= mixed >> 13
    sums.append(jnp.sum((bits + np.uint32(1)) * (mixed | np.uint32(1)), dtype=jnp.uint32))
  return jnp.stack(sums)


def digests(tree: Any) -> dict[str, str]:
  """Leaf name -> 16 hex digits, the same on every host and for every sharding."""
  return finish_digests(start_digests(tree))


def start_digests(tree: Any) -> Any:
  """Starts them on the devices; the tree may be donated afterwards."""
  meshes = [x.sharding.mesh for x in jax.tree.leaves(tree) if isinstance(x.sharding, jax.NamedSharding)]
  everywhere = jax.NamedSharding(meshes[0], jax.P()) if meshes else None  # every host reads every digest
  return _digest_program(everywhere)(tree)


def finish_digests(started: Any) -> dict[str, str]:
  leaves = jax.tree_util.tree_leaves_with_path(started)
  return {leaf_name(path): "".join(f"{int(word):08x}" for word in np.asarray(value)) for path, value in leaves}


@functools.cache
def _digest_program(out_sharding):
  return jax.jit(lambda tree: jax.tree.map(_leaf_digest, tree), out_shardings=out_sharding)


def leaf_name(path) -> str:
  """Path entries joined by dots, as in the checkpoint's own metadata."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def _seal(values: dict) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ save, restore


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
  """Which checkpoints stay: the last ones, the multiples, and the newest that is known to be good."""

  def __init__(self, options: config.Checkpoint, good: Callable[[int], bool]):
    rules = [ocp.checkpoint_managers.LatestN(options.keep_last)]
    if options.keep_every_steps:
      rules.append(ocp.checkpoint_managers.EveryNSteps(options.keep_every_steps))
    self._rules, self._good = ocp.checkpoint_managers.AnyPreservationPolicy(rules), good

  def should_preserve(self, checkpoints, *, context):
    kept = self._rules.should_preserve(checkpoints, context=context)
    try:
      newest = next((info for info in reversed(checkpoints) if self._good(info.step)), None)
    except storage_errors():  # nobody knows
      return [True] * len(kept)
    return [stays or info is newest for stays, info in zip(kept, checkpoints)]


class Checkpointer:
  """The checkpoints of one run, in `<run_dir>/checkpoints/<step>`."""

  def __init__(self, folder, options: config.Checkpoint):
    self._folder = epath.Path(folder)
    self._folder.mkdir(parents=True, exist_ok=True)
    self._sweep()
    self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(
        preservation_policy=_Kept(options, self.good),
        # Its own clean-up runs in a thread whose failure would fail every later save.
        cleanup_tmp_directories=False,
        # Otherwise a directory that cannot be made leaves threads that block the exit for minutes.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False)))
    self._unread: int | None = None  # the last step saved, while it has not been read back
    self._reader: subprocess.Popen | None = None
    self._damaged: set[int] = set()  # steps that are known to be
    self._last, self._misread = -1, 0  # the last step saved; checkpoints in a row whose part here did not read back
    self._news = -1  # such a one that the other hosts have not heard of

  def steps(self) -> list[int]:
    """Those that every host sees: a listing may fail for a moment on one of them, and all must choose the same."""
    return _on_all_hosts(sorted(self._manager.all_steps(read=True)))

  def _forget_failed(self, sweep: bool) -> list[str]:
    """After a failed save: what is there is listed anew, and what the save left is removed; says what of that fails."""
    try:
      self._manager.reload()
      if sweep:
        self._sweep()
      return []
    except Exception as error:  # the store is still away
      return [f"the checkpoints could not be listed: {_one_line(error)}"]

  def good(self, step: int) -> bool:
    """Whether every part of it was read back and found equal, by as many hosts as there were."""
    parts = [path.name.rpartition("-of-")[2] for path in stored.listed(self._folder / str(step), "good.*")]
    return any(parts.count(of) >= int(of) for of in parts)

  def poll(self) -> list[str]:
    """Has a finished save read back, by a process beside this one; what went wrong since the last call."""
    if self._reader is None and self._unread is not None and not self._manager.is_saving_in_progress():
      folder = self._folder / str(self._unread)
      self._reader = subprocess.Popen(
          [sys.executable, "-m", "moe.stored", str(folder), str(jax.process_index()), str(jax.process_count())],
          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=pathlib.Path(__file__).parents[1])
    if self._reader is None or self._reader.poll() is None:
      return []
    step, said, code = self._unread, self._reader.communicate()[0].strip(), self._reader.returncode
    self._reader = self._unread = None
    if code in (1, 2):
      self._misread, self._news = self._misread + 1, step
      return [f"checkpoint {step} does not read back as it was saved: {said}"]
    if not code:
      self._misread = 0
    return [f"checkpoint {step} could not be read back, and is not known to be good: {said}"] if code else []

  def again(self) -> tuple[bool, list[str]]:
    """All hosts call it together, for each reads its part back when it comes to it.

    Returns:
      (whether to save again because the last checkpoint did not read back on some host, what to say of it)
    """
    found, counts = all_hosts(self._news), all_hosts(self._misread)
    step, self._news = max(found), -1
    if step < 0:
      return False, []
    self._damaged.add(step)
    hosts, count, good = [h for h, n in enumerate(found) if n == step], max(counts), None
    with contextlib.suppress(*storage_errors()):
      good = next((step for step in sorted(self._manager.all_steps(), reverse=True) if self.good(step)), None)
    wanted = step == self._last and count <= _MAX_AGAIN
    return wanted, [
        f"checkpoint {step} is damaged, by host(s) {', '.join(map(str, hosts))}; "
        + (f"saved again at once ({count} of {_MAX_AGAIN})" if wanted else f"there is one of step {self._last} by now"
           if step < self._last else f"so were the {_MAX_AGAIN} before, so the next is saved when it is due")
        + (f"; the newest good one is {good}" if good is not None else "; none is known to be good")]

  def save(self, step: int, state: Any, data: dict, run: config.Run, operative: str) -> list[str]:
    """Starts a save in the background.

    Returns:
      What went wrong with the save before this one, or at the start of this one; [] if nothing.
    """
    problems = self.wait()
    listed = _on_all_hosts(sorted(self._manager.all_steps()))  # as it remembers: a store that is away stops nothing
    if step in listed and step not in self._damaged:
      return problems
    self._stop_reading()  # it is slower than the saves come
    side = {"data": copy.deepcopy(data), "digests": digests(state),
            "config": {"format": stored.FORMAT, "run": config.to_dict(run), "operative": operative}}
    side = json.loads(json.dumps(side))
    side["digests"] = {"leaves": side["digests"], "sides": {key: _seal(side[key]) for key in ("data", "config")}}
    arguments = ocp.args.Composite(
        state=_save_arguments(state),
        **{key: ocp.args.JsonSave(value) for key, value in side.items()})
    try:
      for old in sorted(self._damaged & set(listed)):
        if old >= step:  # Orbax saves nothing at or before the newest
          self._manager.delete(old)
          self._damaged.discard(old)
      if not self._manager.save(step, args=arguments):
        problems.append(f"checkpoint {step} was not accepted: a newer one exists")
      else:
        self._unread = self._last = step
    except Exception as error:  # Orbax raises many types here; none may end the run
      problems += [f"checkpoint {step} could not be saved: {_one_line(error)}", *self._forget_failed(sweep=False)]
    return problems

  def wait(self) -> list[str]:
    """Waits for the save in progress. Returns what went wrong, after which the last good checkpoint is the newest."""
    problems = []
    for _ in range(8):  # an early error may leave the writer running; only a quiet wait means it has ended
      try:
        self._manager.wait_until_finished()
        self._manager._checkpointer.wait_until_finished()
        break
      except Exception as error:
        problems.append(f"a checkpoint could not be saved: {_one_line(error)}")
    if problems:
      self._unread = None
      problems[1:] = self._forget_failed(sweep=True)
    return problems

  def restore(self, abstract_state: Any, run: config.Run) -> Restored | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Args:
      abstract_state: shapes, dtypes and shardings to restore to, of any mesh.
      run: its model must be that of the checkpoint.

    Raises:
      CheckpointError: the model differs, or no checkpoint is whole.
    """
    skipped = []
    for step in reversed(self.steps()):
      try:
        state, data = _read(self._folder / str(step), abstract_state, run)
      except _Damaged as error:
        skipped.append(f"checkpoint {step} is damaged: {error}")
        self._damaged.add(step)
        continue
      return Restored(step, state, data, skipped)
    if skipped:
      raise CheckpointError("; ".join(skipped) + f"; no checkpoint in {self._folder} is whole "
                            "(--resume=never starts afresh in another --run_dir)")
    return None

  def read_back(self) -> list[str]:
    """Waits for the save in progress and until it is read back. Returns as `wait`."""
    problems = self.wait()
    problems += self.poll()  # starts the reading of the last one
    if self._reader:
      self._reader.wait()
      problems += self.poll()
    return problems

  def close(self) -> list[str]:
    """Waits and closes; needed on every way out, or a save under way is lost at exit. Returns as `wait`."""
    problems = self.read_back()
    self._manager.close()
    return problems

  def _stop_reading(self) -> None:
    if self._reader:
      self._reader.kill()
      self._reader.communicate()
    self._reader = self._unread = None

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if kind is not None:
      self._stop_reading()
    self.close()

  def _sweep(self) -> None:
    """Removes what interrupted saves left behind; runs only while no save is under way."""
    if jax.process_index() == 0:
      for path in stored.listed(self._folder, _TEMPORARY):
        shutil.rmtree(path, ignore_errors=True) if "://" not in str(path) else path.rmtree()


def write(folder, source: stored.Source, run: config.Run | dict, chunk_bytes: int = _CHUNK_BYTES) -> None:
  """A step directory from arrays that need not fit into memory: each goes through a file first, then Orbax saves all.

  Args:
    folder: `<run_dir>/checkpoints/<step>`; must not exist.
    source: the arrays, names as in a state of ours.
    run: the config kept beside them.
    chunk_bytes: largest chunk of an array.

  Raises:
    CheckpointError: the folder exists.
  """
  folder = stored.absolute(folder)
  if folder.exists():
    raise CheckpointError(f"{folder} exists; nothing is overwritten, choose another place")
  folder.parent.mkdir(parents=True, exist_ok=True)
  local = None if "://" in str(folder) else folder.parent
  state, sums = {}, {}
  with tempfile.TemporaryDirectory(dir=local, prefix="writing-") as spool:
    for i, (name, leaf) in enumerate(source.leaves.items()):
      sums[name], array = _spooled(source, leaf, f"{spool}/{i}")
      *parents, last = name.split(".")
      place = functools.reduce(lambda tree, key: tree.setdefault(key, {}) if isinstance(tree, dict) else tree, parents, state)
      if not isinstance(place, dict) or last in place:
        raise CheckpointError(f"{name} cannot be both a leaf and a branch of others; choose other names")
      place[last] = array
    kept = run if isinstance(run, dict) else config.to_dict(run)
    side = {"data": {}, "config": {"format": stored.FORMAT, "run": kept, "operative": ""}}
    side = json.loads(json.dumps(side))
    side["digests"] = {"leaves": sums, "sides": {key: _seal(side[key]) for key in ("data", "config")}}
    handler = ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(save_concurrent_gb=1),
                                             **{key: ocp.JsonCheckpointHandler() for key in side})
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(folder, args=ocp.args.Composite(
          state=_save_arguments(state, chunk_bytes), **{key: ocp.args.JsonSave(value) for key, value in side.items()}))


def _spooled(source: stored.Source, leaf: stored.Leaf, path: str) -> tuple[str, np.ndarray]:
  """(digest, the leaf as an array whose memory is a file)."""
  dtype = stored.dtype_of(leaf.dtype)
  if not leaf.size:
    return stored.digest(iter(())), np.zeros(leaf.shape, dtype)
  with open(path, "wb") as file:
    os.posix_fallocate(file.fileno(), 0, leaf.bytes)  # a full disk is an error here, and a signal later
  array = np.memmap(path, dtype, "r+", shape=leaf.shape or (1,))

  def passing():
    for begin, block in stored.blocks(source, leaf.name):
      array[tuple(slice(b, b + n) for b, n in zip(begin, block.shape)) if leaf.shape else 0] = block
      yield begin, block

  found = stored.digest(passing())
  array.flush()
  return found, np.asarray(array if leaf.shape else array[0])


def _save_arguments(state: Any, chunk_bytes: int = _CHUNK_BYTES):
  def pieces(x) -> ocp.SaveArgs:
    """Large stacks are cut between layers and experts, so that who wants one expert reads one."""
    alone = x.nbytes > chunk_bytes and math.prod(x.shape[-2:]) * x.dtype.itemsize >= _SMALLEST_CHUNK_BYTES
    return ocp.SaveArgs(chunk_byte_size=chunk_bytes, shard_axes=tuple(range(x.ndim - 2)) if alone else ())

  return ocp.args.PyTreeSave(state, save_args=jax.tree.map(pieces, state))


class _Damaged(Exception):
  pass


def all_hosts(value: int) -> list[int]:
  """Every host's value, on every host."""
  if jax.process_count() == 1:
    return [value]
  return [int(v) for v in multihost_utils.process_allgather(np.int32(value))]


def _on_all_hosts(steps: list[int]) -> list[int]:
  """The newest 64 steps that every host has in its list."""
  if jax.process_count() == 1:
    return steps
  mine = np.full(64, -1, np.int32)
  mine[: len(steps[-64:])] = steps[-64:]
  rows = multihost_utils.process_allgather(mine)
  return sorted(set.intersection(*({int(v) for v in row} for row in rows)) - {-1})


def _read_sides(folder: epath.Path) -> dict:
  try:
    side = {key: json.loads((folder / key / "metadata").read_text()) for key in ("data", "config", "digests")}
  except Exception as error:  # whatever it is, the other hosts must hear of it
    raise _Damaged(_one_line(error)) from error
  for key in ("data", "config"):
    if side["digests"].get("sides", {}).get(key) != _seal(side[key]):
      raise _Damaged(f"the digest of its {key} does not match")
  return side


def _read(folder: epath.Path, abstract_state, run: config.Run):
  side, problem = {}, None
  try:
    side = _read_sides(folder)
  except _Damaged as error:
    problem = error
  if not _on_all_hosts([] if problem else [0]):  # one host cannot read it: none goes on to the array data
    raise problem or _Damaged("another host cannot read it")
  different = config.differences(_shape_config(side["config"]["run"]), _shape_config(config.to_dict(run)))
  if different:
    raise CheckpointError(f"{folder} holds another model: " + "; ".join(different)
                          + " (use the config of the run, or another --run_dir)")
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      state = checkpointer.restore(folder / "state", args=ocp.args.PyTreeRestore(
          item=abstract_state, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state)))
  except Exception as error:  # a damaged file raises anything from KeyError to bare Exception
    raise _Damaged(_one_line(error)) from error
  _verify(state, side["digests"]["leaves"])
  return state, side["data"]


def _shape_config(run: dict) -> dict:
  """The parts of a config that a state belongs to: the model, less how it is computed."""
  computed = ("scan_unroll", "remat", "compute_dtype", "dropout")
  return {key: value for key, value in json.loads(json.dumps(run))["model"].items() if key not in computed}


def _verify(state, expected: dict[str, str], prefix: str = "") -> None:
  found = digests(state)
  wrong = [name for name, value in found.items() if expected.get(prefix + name) != value]
  if wrong:
    raise _Damaged(f"the digest of {', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''} does not match")


def restore_params(path, abstract_params: Any) -> tuple[int, Any]:
  """The parameters alone, for --init_from and for the tools.

  Args:
    path: a run directory (its newest whole checkpoint is taken) or a step directory.
    abstract_params: shapes, dtypes and shardings wanted.

  Returns:
    (step, parameters)

  Raises:
    CheckpointError: nothing there, other shapes, or damaged.
  """
  problems = []
  for folder in step_folders(path):
    try:
      expected = json.loads((folder / "digests" / "metadata").read_text())["leaves"]
      kept = stored.Orbax(folder / "state").leaves

      def as_stored(path, leaf):
        """A converted checkpoint may have another dtype; the digests are of that."""
        found = kept.get("params." + leaf_name(path))
        return jax.ShapeDtypeStruct(leaf.shape, stored.dtype_of(found.dtype) if found else leaf.dtype, sharding=leaf.sharding)

      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        item = {"params": jax.tree_util.tree_map_with_path(as_stored, abstract_params)}
        params = checkpointer.restore(folder / "state", args=ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True))["params"]
      missing = [leaf_name(p) for p, leaf in jax.tree_util.tree_leaves_with_path(params) if not isinstance(leaf, jax.Array)]
      if missing:  # Orbax gives the abstract leaf back where the checkpoint has none
        raise _Damaged(f"it has no {', '.join(missing[:3])}: it is of another model")
      _verify(params, expected, "params.")
      return int(folder.name), jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), params, abstract_params)
    except Exception as error:
      problems.append(f"{folder}: {_one_line(error)}")
  raise CheckpointError(f"no usable parameters in {path}: " + "; ".join(problems))


def check_source(path, abstract_params: Any, run: config.Run) -> list[str]:
  """Compares a run's model with the one that --init_from takes its parameters of, before anything is read.

  Args:
    path: a run directory or a step directory.
    abstract_params: of the run.
    run: that is to begin.

  Returns:
    A note for what differs though every array fits: the parameters then mean something else.

  Raises:
    CheckpointError: nothing there, or arrays of other shapes.
  """
  kept, leaves = read_run_config(path), _newest_leaves(path)
  different = config.differences(_shape_config(kept), _shape_config(config.to_dict(run)), "model")
  wanted = {"params." + leaf_name(place): leaf.shape for place, leaf in jax.tree_util.tree_leaves_with_path(abstract_params)}
  wrong = [f"{name}: {leaves[name].shape if name in leaves else '(absent)'} -> {tuple(shape)}" for name, shape in wanted.items()
           if name not in leaves or tuple(leaves[name].shape) != tuple(shape)]
  if wrong:
    raise CheckpointError(f"--init_from={path} is of a model with other arrays: " + "; ".join(different or wrong[:3]))
  different += config.differences(kept["data"]["tokenizer"], run.data.tokenizer, "data.tokenizer")
  return [f"the run differs from the one that --init_from takes the parameters of: {line}" for line in different]


def _newest_leaves(path) -> dict[str, stored.Leaf]:
  """The arrays of the newest checkpoint that can be read; `restore_params` passes the same ones over."""
  problems = []
  for folder in step_folders(path):
    try:
      return stored.Orbax(folder / "state").leaves
    except (stored.Unreadable, *storage_errors()) as error:
      problems.append(f"{folder}: {_one_line(error)}")
  raise CheckpointError(f"no usable parameters in {path}: " + "; ".join(problems))


def step_folders(path) -> list[epath.Path]:
  """The step directories of a run (newest first), or of a step directory itself.

  Raises:
    CheckpointError: there are none.
  """
  path = stored.absolute(path)
  if (path / "state").exists():
    return [path]
  found = stored.steps(path)
  if not found:
    raise CheckpointError(f"{path} holds no checkpoint; give a run directory or checkpoints/<step>")
  return found


def read_run_config(path) -> dict:
  """The resolved config (`config.to_dict`) stored in the newest readable checkpoint of a run or step directory.

  Raises:
    CheckpointError
  """
  for folder in step_folders(path):
    try:
      return json.loads((folder / "config" / "metadata").read_text())["run"]
    except (*storage_errors(), ValueError, KeyError):
      continue
  raise CheckpointError(f"no checkpoint of {path} has a readable config")


def _one_line(error: Exception) -> str:
  text = str(error).strip()
  return (text.splitlines()[0] if text else repr(error))[:300]
