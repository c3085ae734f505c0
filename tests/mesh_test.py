"""Any factorisation of eight devices gives the single-device loss, gradients and balance loss; dispatch, overflow, refusals."""

import functools
import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests import mesh_hosts
from tests import small

from moe import config
from moe import exchange
from moe import experts
from moe import hooks
from moe import sharding

STRONG = {"balance_coef": 1.0, "z_loss_coef": 0.1}
CAPACITY = {"capacity_factor": 0.5, "d_shared": 16, "shared_gate": True}
LOOKAHEAD = {"allow_lookahead": True, "balance_coef": 0.0}
DROPLESS = {"dispatch": "all_to_all"}

# Mesh, router, experts. The gates take turns with the meshes, so that each is on one that splits experts and sequences.
CASES = {
    "context": ({"context": 4, "data": 2}, {}, {}),
    "to_all": ({"expert": 4, "tensor": 2}, {}, DROPLESS),
    "to_all_overflow": ({"expert": 8}, {}, {**DROPLESS, "buffer_factor": 1.0}),
    "to_all_everything": ({"fsdp": 2, "expert": 2, "context": 2}, {}, {**DROPLESS, "overlap_degree": 2}),
    "to_all_capacity": ({"expert": 2, "context": 2, "tensor": 2}, {}, {**DROPLESS, **CAPACITY, "overlap_degree": 4}),
    "to_all_two_degrees": ({"expert": 4, "context": 2}, {}, {**DROPLESS, "overlap_degree": 1, "backward_degree": 4}),
    "gather_two_degrees": ({"expert": 2, "fsdp": 2, "tensor": 2}, {},
                           {"dispatch": "all_gather", "overlap_degree": 4, "backward_degree": 2}),
    "gather_chunks": ({"slice": 2, "expert": 2, "tensor": 2}, {}, {"dispatch": "all_gather", "overlap_degree": 4}),
    "ring": ({"expert": 4, "tensor": 2}, {}, {"dispatch": "ring"}),
    "ring_capacity": ({"fsdp": 2, "expert": 2, "context": 2}, {}, {"dispatch": "ring", **CAPACITY}),
    "gather_context_capacity": ({"fsdp": 2, "context": 2, "tensor": 2}, {}, CAPACITY),
    "sigmoid": ({"expert": 4, "context": 2}, {"gate": "sigmoid", "bias_update_rate": 0.01}, {**DROPLESS, "overlap_degree": 2}),
    "cosine": ({"data": 2, "expert": 4}, {"gate": "cosine", "cosine_width": 8}, {**DROPLESS, "buffer_factor": 1.2}),
    "expert_choice": ({"expert": 2, "context": 2, "tensor": 2}, {"gate": "expert_choice", **LOOKAHEAD},
                      {**DROPLESS, "capacity_factor": 1.0}),
    "soft": ({"fsdp": 2, "expert": 2, "context": 2}, {"gate": "soft", "soft_slots": 2, **LOOKAHEAD}, {}),
    "recurrent": ({"slice": 2, "context": 2, "expert": 2}, {"recurrent": {"cell": "gru", "width": 8}}, DROPLESS),
}
ADAM = 5e-5  # it divides by a root, which doubles the relative error of a small gradient
FAST = ("to_all_overflow", "ring")


def compare(mesh, router, block):
  model = {"router": {**STRONG, **router}, "experts": block}
  want_balance, want_nll, want, _ = small.objective_and_gradients(small.run(model=model), small.batch())
  balance, nll, got, _ = small.objective_and_gradients(small.run(model=model, mesh=mesh), small.batch())
  np.testing.assert_allclose(nll, want_nll, rtol=1e-5)
  np.testing.assert_allclose(balance, want_balance, rtol=1e-5)
  small.assert_same(want, got)


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_mesh_gives_the_single_device_loss_and_gradients(case):
  compare(*CASES[case])


def random_case(seed: int):
  """A factorisation of 8 and how the experts are reached."""
  rng = np.random.default_rng(seed)
  sizes = dict.fromkeys(("slice", "data", "fsdp", "expert", "context", "tensor"), 1)
  for _ in range(3):
    sizes[str(rng.choice(list(sizes)))] *= 2
  if sizes["tensor"] > 2:  # two key/value heads
    sizes["fsdp"] *= sizes["tensor"] // 2
    sizes["tensor"] = 2
  block = {"dispatch": str(rng.choice(["all_gather", "all_to_all", "ring"])), "buffer_factor": float(rng.choice([1.0, 1.5])),
           **(CAPACITY if rng.random() < 0.4 else {})}
  if block["dispatch"] != "ring":
    block |= {"overlap_degree": int(rng.choice([1, 2, 4])), "backward_degree": int(rng.choice([0, 2]))}
  return sizes, {"top_k": int(rng.choice([1, 2, 4]))}, block


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_factorisations(seed):
  compare(*random_case(seed))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "expert": 4}, {"slice": 2, "context": 2, "tensor": 2}], ids=str)
def test_updated_parameters(mesh):
  """One whole step, optimizer and clipping included."""
  model = {"router": STRONG, "experts": DROPLESS}
  want, got = (small.whole_step(small.run(mesh=sizes, model=model), small.batch())[-1] for sizes in ({}, mesh))
  small.assert_same(want, got, rtol=ADAM)


@pytest.mark.slow
def test_four_processes_give_the_same(tmp_path):
  """Four hosts of two devices, joined over loopback, against one device: loss, balance, gradients and updated parameters."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  mesh, out = {"fsdp": 2, "expert": 2, "context": 2}, tmp_path / "whole.npz"
  hosts = [subprocess.Popen([sys.executable, "-m", "tests.mesh_hosts", str(port), "4", str(i), json.dumps(mesh), str(out)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(4)]
  texts = [host.communicate(timeout=280)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [0] * 4, texts[0][-3000:]
  want = small.whole_step(small.run(model=mesh_hosts.MODEL), small.batch())
  leaves, structure = jax.tree.flatten(want)
  with np.load(out) as saved:
    balance, nll, grads, updated = jax.tree.unflatten(structure, [saved[f"arr_{i}"] for i in range(len(leaves))])
  np.testing.assert_allclose(balance, want[0], rtol=1e-5)
  np.testing.assert_allclose(nll, want[1], rtol=1e-5)
  small.assert_same(want[2], grads)
  small.assert_same(want[3], updated, rtol=ADAM)


# ---------------------------------------------------------------------------------------------------------- exchange


def on_axis(function, members, *arrays):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:members]), ("expert",))
  split = jax.P("expert")
  with jax.set_mesh(mesh):
    return jax.jit(jax.shard_map(function, in_specs=split, out_specs=split, check_vma=False))(*arrays)


@pytest.mark.parametrize("bound, first", [(64, 0), (8, 0), (8, 8), (8, 24)])
def test_rows_arrive_where_they_should_and_come_back(bound, first):
  """Against a queue written out on the host; every window."""
  members, owned, most = 4, 2, 16
  rng = np.random.default_rng(1)
  counts = rng.multinomial(most, [0.3, 0.3, 0.1, 0.1, 0.1, 0.0, 0.05, 0.05], members)
  rows = np.zeros((members, most, 2), np.float32)  # (source, place), sorted by expert
  rows[..., 0], rows[..., 1] = np.arange(members)[:, None] + 1, np.arange(most)

  def device(rows, counts):
    everyone = jax.lax.all_gather(counts, "expert", tiled=True)
    ways = exchange.Ways(everyone[None], bound, "expert")
    got = exchange.send(rows, ways, first)
    order, inverse, sizes = ways.received(first)
    return got, order, inverse, sizes, exchange.send_back(got, ways, first, most)

  got, order, inverse, sizes, back = (np.asarray(a) for a in on_axis(
      device, members, rows.reshape(-1, 2), jnp.asarray(counts, jnp.int32)))
  start = np.cumsum(counts, 1) - counts
  returned = np.zeros_like(rows)
  for d in range(members):
    queue = [(s, start[s, e] + i, e - d * owned) for s in range(members) for e in range(d * owned, (d + 1) * owned)
             for i in range(counts[s, e])][first:first + bound]
    want = np.zeros((bound, 2))
    for i, (s, place, _) in enumerate(queue):
      want[i] = rows[s, place]
      returned[s, place] = rows[s, place]
    np.testing.assert_array_equal(got.reshape(members, bound, 2)[d], want)
    local = [e for *_, e in queue]
    np.testing.assert_array_equal(sizes.reshape(members, owned)[d], np.bincount(local, minlength=owned))
    by_expert = order.reshape(members, bound)[d][:len(local)]
    np.testing.assert_array_equal(by_expert, np.argsort(local, kind="stable"))
    np.testing.assert_array_equal(inverse.reshape(members, bound)[d][by_expert], np.arange(len(local)))
  np.testing.assert_array_equal(back.reshape(rows.shape), returned)


def test_exchange_gradient_is_the_way_back():
  """<send(x), y> = <x, gradient(y)>, for what fits and what does not."""
  counts, rng = jnp.array([[5, 3], [1, 7]], jnp.int32), np.random.default_rng(0)
  x, y = (jnp.asarray(rng.normal(size=(2 * n, 3)), jnp.float32) for n in (8, 6))

  def device(x, y, counts):
    ways = exchange.Ways(jax.lax.all_gather(counts, "expert", tiled=True)[None], 6, "expert")
    out, pull = jax.vjp(lambda x: exchange.send(x, ways, 2), x)
    return out, pull(y)[0]

  out, grad = on_axis(device, 2, x, y, counts)
  np.testing.assert_allclose(jnp.vdot(out, y), jnp.vdot(x, grad), rtol=1e-6)
  assert np.abs(np.asarray(grad)).sum() > 0


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather", "ring"])
def test_the_overflow_is_needed_and_runs(dispatch):
  """All tokens to one expert: far more than there is room for, and the result is the one-device result; with the longer way
  taken away it is not."""
  e = config.Experts(num_experts=4, d_expert=8, backend="dense", dispatch=dispatch, buffer_factor=1.0)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 32, 16)), jnp.float32)
  gates, chosen = jnp.ones((4, 32, 1)), jnp.full((4, 32, 1), 2, jnp.int32)
  weights = experts.Weights(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 16, 8), (4, 16, 8), (4, 8, 16))))

  def run(x, weights):
    return experts.apply_experts(x, experts.make_plan(chosen, e), gates, weights, activation="swiglu", experts=e)

  want = run(x, weights)
  with jax.set_mesh(sharding.make_mesh(config.Mesh(expert=4), jax.devices()[:4])) as _:
    got = jax.jit(run)(x, weights)
    lost = run_without_overflow(run, x, weights, 2 if dispatch == "all_to_all" else 1)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert np.abs(np.asarray(lost) - np.asarray(want)).max() > 0.1


def run_without_overflow(run, x, weights, branch: int):
  original = jax.lax.cond
  try:
    jax.lax.cond = lambda *args: args[branch](*args[3:])
    return jax.jit(lambda *a: run(*a))(x, weights)
  finally:
    jax.lax.cond = original


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_hooks_see_each_chunk_in_order_and_may_change_it(dispatch):
  """Traced only: one layer in two chunks."""
  e = config.Experts(num_experts=4, d_expert=8, backend="dense", dispatch=dispatch, overlap_degree=2, buffer_factor=4.0)
  seen = []
  watch = {p: functools.partial(lambda p, x: seen.append((p, x.shape)), p) for p in hooks.POINTS}
  weights = experts.Weights(*(jnp.ones(s) for s in ((4, 16, 8), (4, 16, 8), (4, 8, 16))))

  def layer(x):
    plans = experts.make_plan(jnp.zeros((4, 8, 1), jnp.int32), e)
    return experts.apply_experts(x, plans, jnp.ones((4, 8, 1)), weights, activation="swiglu", experts=e)

  with jax.set_mesh(sharding.make_mesh(config.Mesh(expert=4), jax.devices()[:4])):
    with hooks.installed(**watch):
      jax.eval_shape(layer, jnp.ones((4, 8, 16)))
    names, chunk = [p for p, _ in seen], list(hooks.POINTS[1:5])
    assert names == ["before_layer", *chunk, *chunk, "after_layer"]
    assert seen[0][1] == seen[-1][1] == (4, 8, 16) and seen[1][1] == seen[4][1] == (4, 16)  # 8 tokens a device, in halves
    assert seen[2][1] == (16, 16)  # what arrives: the group's tokens, or a buffer of four times the mean
    with hooks.installed(before_layer=lambda x: 0 * x):
      assert not np.asarray(jax.jit(lambda x: layer(x))(jnp.ones((4, 8, 16)))).any()
    assert np.asarray(jax.jit(lambda x: layer(x))(jnp.ones((4, 8, 16)))).any()
    with hooks.installed(after_dispatch=lambda x: x[:1]), pytest.raises(ValueError, match="return the same shape and dtype"):
      jax.eval_shape(lambda x: layer(x), jnp.ones((4, 8, 16)))
  with pytest.raises(ValueError, match="'dispatch' is no point of the expert layer; the points are before_layer"):
    with hooks.installed(dispatch=None):
      pass


def test_hooks_of_the_ring():
  """One before_dispatch and one after_combine around a turn for each device; traced only."""
  e, seen = config.Experts(num_experts=4, d_expert=8, backend="dense", dispatch="ring"), []
  weights = experts.Weights(*(jnp.ones(s) for s in ((4, 16, 8), (4, 16, 8), (4, 8, 16))))

  def layer(x):
    plans = experts.make_plan(jnp.zeros((4, 8, 1), jnp.int32), e)
    return experts.apply_experts(x, plans, jnp.ones((4, 8, 1)), weights, activation="swiglu", experts=e)

  with jax.set_mesh(sharding.make_mesh(config.Mesh(expert=4), jax.devices()[:4])):
    with hooks.installed(**{p: functools.partial(lambda p, x: seen.append((p, x.shape)), p) for p in hooks.POINTS}):
      jax.eval_shape(layer, jnp.ones((4, 8, 16)))
  turn = [("after_dispatch", (8, 16)), ("before_combine", (8, 16))]
  assert seen[1:-1] == [("before_dispatch", (8, 16)), *4 * turn, ("after_combine", (8, 16))]


# ------------------------------------------------------------------------------------------------------------- rules


def test_rules_are_checked():
  with pytest.raises(KeyError, match="'colour' has no rule in sharding.TABLE"):
    sharding.spec("colour")
  with pytest.raises(ValueError, match=r"\('heads', 'hidden'\) collide on mesh axes"):
    sharding.spec("heads", "hidden")
  with pytest.raises(config.ConfigError, match="overlap_degree = 2 and backward_degree = 0: dispatch = 'ring' has one chunk"):
    config.Experts(num_experts=4, d_expert=8, dispatch="ring", overlap_degree=2)
  with pytest.raises(config.ConfigError, match="reserved for pipeline stages"):
    config.Mesh(stage=2)
  run = small.run(length=12, mesh={"context": 4, "tensor": 2})
  with pytest.raises(config.ConfigError, match="sequence_tokens = 12 is not divisible by the mesh's context x tensor = 8"):
    sharding.check_run(run, sharding.make_mesh(run.mesh))


def test_layout_by_size():
  mesh = sharding.make_mesh(config.Mesh(expert=4, tensor=2))
  block = config.Experts(num_experts=8, d_expert=16)
  assert experts.layout(mesh, 8, 64, 2, block).dispatch == "all_gather"  # CPU
  device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=None, platform="tpu")
  tpu = mesh.abstract_mesh.update(abstract_device=device)
  assert experts.layout(tpu, 8, 64, 2, block).dispatch == "all_to_all"
  block = config.Experts(num_experts=8, d_expert=16, dispatch="all_to_all")
  assert experts.layout(mesh, 8, 64, 2, block).bound == 1.5 * 8 * 64 // 8 * 2
  assert experts.layout(mesh, 8, 1, 2, config.Experts(num_experts=8, d_expert=16)).summed == ("tensor",)  # decoding


def test_rows_of_nobody_may_hold_anything():
  """A kernel need not write the rows past the last group; NaN there reaches neither the result nor a gradient."""
  rows = jnp.full((4, 3), jnp.nan).at[:2].set(1.0)
  plan = experts.Plan(jnp.array([0, 2, 1, 3]), jnp.array([0, 2, 1, 3]), jnp.array([2]))
  out, pull = jax.vjp(lambda rows: experts._sum(rows, plan, 2), rows)
  assert np.isfinite(out).all() and np.isfinite(pull(out)[0]).all()
  assert np.isfinite(jax.vjp(lambda x: experts._to_experts(x, plan, 2), jnp.ones((2, 3)))[1](rows)[0]).all()
