"""Small runs and batches that the tests share."""

import dataclasses
import functools
import math

import jax
import numpy as np

from moe import config
from moe import sharding
from moe import step as step_lib
from moe.data import embedded
from moe.data import records
from moe.model import Batch


def model(**changes) -> config.Model:
  """A two-layer model that compiles in seconds; `changes` replace fields, with a dict for a nested config."""
  base = config.Model(
      vocab_size=64, num_layers=2, d_model=16, compute_dtype="float32",
      attention=config.Attention(num_heads=4, num_kv_heads=2, head_dim=8),
      experts=config.Experts(num_experts=8, d_expert=16), router=config.Router(top_k=2),
      init_std=config.InitStd(embedding=0.5, weight=0.2, residual=0.2, router=0.3))
  return change(base, **changes)


def change(value, **changes):
  nested = {k: change(getattr(value, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
  return dataclasses.replace(value, **nested)


def run(batch=8, length=16, **changes) -> config.Run:
  data = config.Data(domains=(config.Domain(name="kjv", path="embedded:kjv"),), batch_sequences=batch,
                     sequence_tokens=length, virtual_shards=1)
  base = config.Run(model=model(), data=data, train=config.Train(steps=10))
  return change(base, **changes)


def params(abstract, seed=0):
  """Random parameters of these shapes and shardings: norm scales round 1, the rest with deviation 0.3. Quicker than
  compiling an initialisation, and no scale is exactly 1, so a forgotten one shows."""
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    value = rng.normal(size=x.shape).astype(np.float32)
    value = 1 + 0.2 * value if path[-1].key.endswith("scale") else 0.3 * value
    if x.sharding is None:
      return jax.device_put(value)
    return jax.make_array_from_callback(x.shape, x.sharding, lambda index: value[index])  # also on several hosts

  return jax.tree_util.tree_map_with_path(leaf, abstract)


def batch(rows=8, length=16, vocab=64, seed=0, padding=True) -> Batch:
  """Random tokens; each row holds two documents of random length and, with `padding`, an uneven tail of padding."""
  rng = np.random.default_rng(seed)
  fields = np.zeros((4, rows, length), np.int32)
  fields[:2] = rng.integers(0, vocab, (2, rows, length))
  for row in range(rows):
    end = int(rng.integers(length // 3, length + 1)) if padding else length
    cut = int(rng.integers(1, end))
    fields[2, row, :cut], fields[2, row, cut:end] = 1, 2
    fields[3, row, :cut], fields[3, row, cut:end] = np.arange(cut), np.arange(end - cut)
    fields[:2, row, end:] = 0
  return Batch(*fields)


def place(batch, mesh):
  """A whole batch on the mesh, by the trainer's way: each host passes the part that its devices hold."""
  rows, shape = sharding.batch_sharding(mesh), batch.inputs.shape
  part = sharding.host_part(rows, shape)
  return jax.tree.map(lambda x: sharding.global_array(x[part.rows, part.columns], part, rows, shape), batch)


def objective_and_gradients(run, batch, seed=0):
  """(balance, nll, gradients) of one step on the run's mesh, with parameters that do not depend on the mesh."""
  mesh = sharding.make_mesh(run.mesh, jax.devices()[: math.prod(dataclasses.astuple(run.mesh))])
  with jax.set_mesh(mesh):
    placed = place(batch, mesh)
    step = jax.jit(functools.partial(step_lib.loss_and_gradients, run))
    grads, sums = step(params(step_lib.abstract_state(run, mesh).params), placed, jax.random.key(seed))
    return np.asarray(sums["balance"]), float(sums["nll"]), jax.device_get(grads), sums


def whole_step(run, batch, whole=jax.device_get):
  """(balance, nll, gradients, updated parameters) of one optimizer step on the run's mesh; `whole` brings them to the host."""
  mesh = sharding.make_mesh(run.mesh, jax.devices()[: math.prod(dataclasses.astuple(run.mesh))])
  with jax.set_mesh(mesh):
    placed = place(batch, mesh)
    state = step_lib.init_state(run, mesh)
    state = dataclasses.replace(state, params=params(step_lib.abstract_state(run, mesh).params))
    grads, sums = jax.jit(functools.partial(step_lib.loss_and_gradients, run))(state.params, placed, jax.random.key(0))
    updated = step_lib.jit_train_step(run, mesh)(state, placed)[0].params
    return tuple(map(whole, (sums["balance"], sums["nll"], grads, updated)))


def assert_same(a, b, rtol=2e-5):
  """Gradients equal up to float32 reassociation: relative to the largest entry of each leaf."""
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
    scale = max(np.abs(x).max(), 1e-6)
    np.testing.assert_allclose(x / scale, y / scale, atol=rtol, err_msg=jax.tree_util.keystr(path))


def difference(a, b):
  return max(np.abs(x - y).max() / np.abs(x).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def write_corpus(folder, held_out: int = 2):
  """A domain of a few chapters, `held_out` of them each for validation and test, so that scoring takes a second."""
  docs = list(records.read_documents(embedded.resolve("embedded:kjv"), "validation"))
  records.write_domain(folder, {"train": docs[:40], "validation": docs[40 : 40 + held_out],
                                "test": docs[40 + held_out : 40 + 2 * held_out]})
  return folder
