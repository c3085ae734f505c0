"""The chunked loss equals the plain one, value and gradient, on one device and with the vocabulary split over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe import config
from moe import sharding
from moe.kernels import cross_entropy


def inputs(rows=4, length=24, width=16, vocabulary=56, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(rows, length, width)), dtype)
  head = jnp.asarray(rng.normal(size=(width, vocabulary)), dtype)
  return hidden, head, jnp.asarray(rng.integers(0, vocabulary, (rows, length)), jnp.int32)


def objective(chunks):
  def value(hidden, head, targets):
    loss = cross_entropy.token_loss(hidden, head, targets, chunks)
    weight = jnp.cos(jnp.arange(loss.nll.size).reshape(loss.nll.shape))  # each token its own gradient
    return jnp.sum(weight * loss.nll) + 0.1 * jnp.sum(jnp.square(loss.log_z)), loss

  return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


def assert_equal(got, want, tolerance):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize("length, chunks", [(24, 2), (24, 24), (23, 4), (23, 7)])
def test_equals_plain(length, chunks):
  """Also where the last chunk is padded: by one token, and by a whole chunk and more."""
  arguments = inputs(length=length)
  # float32 sums of at most 96 terms in another order: some units in the last place of the largest entry.
  assert_equal(objective(chunks)(*arguments), objective(1)(*arguments), 1e-6)


def test_plain_equals_float64():
  hidden, head, targets = inputs()
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  loss = cross_entropy.plain(hidden, head, targets)
  np.testing.assert_allclose(loss.log_z, log_z, rtol=1e-6)
  chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
  np.testing.assert_allclose(loss.nll, log_z - chosen, atol=1e-5)
  np.testing.assert_array_equal(loss.hit, logits.argmax(-1) == targets)


@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "expert": 2}], ids=str)
def test_equals_plain_on_a_mesh(mesh):
  arguments = inputs(rows=8)
  want = objective(1)(*arguments)
  mesh = sharding.make_mesh(config.Mesh(**mesh))
  with jax.set_mesh(mesh):
    rows, head = (NamedSharding(mesh, sharding.spec(*names)) for names in (("batch",), ("embed", "vocab")))
    got = objective(5)(*(jax.device_put(a, s) for a, s in zip(arguments, (rows, head, rows))))
  assert_equal(got, want, 2e-6)


def test_large_logits_do_not_overflow():
  hidden, head, targets = inputs()
  got = objective(4)(1e3 * hidden, head, targets)
  assert np.isfinite(np.asarray(jax.tree.leaves(got)[0])).all()
  assert_equal(got, objective(1)(1e3 * hidden, head, targets), 1e-5)


def test_no_array_holds_all_logits():
  arguments = inputs(rows=2, length=32, vocabulary=4096)
  text = {chunks: objective(chunks).lower(*arguments).as_text() for chunks in (1, 8)}
  assert "2x32x4096" in text[1]  # the control
  assert "2x32x4096" not in text[8]


def test_chunks_by_size():
  assert cross_entropy.chunks_for(8, 256, 512) == 1
  assert cross_entropy.chunks_for(8, 4096, 129_280) == 32  # 128 tokens of 8 rows
  assert cross_entropy.chunks_for(8, 4096, 4096) == 8  # 64 MiB
  assert cross_entropy.chunks_for(1000, 6, 129_280) == 6
  assert cross_entropy.chunks_for(2000, 6, 129_280) == 6  # no room for one token of each row
  with pytest.raises(ValueError, match="24 tokens into 25 chunks; use 1 to 24"):
    cross_entropy.token_loss(*inputs(), 25)


@pytest.mark.parametrize("length", [4093, 4099, 4098, 8191, 3000])
def test_a_length_with_few_divisors_takes_few_chunks(length):
  """Primes, twice a prime, and a length that divides well; 128 tokens of 8 rows are within the bound."""
  chunks = cross_entropy.chunks_for(8, length, 129_280)
  assert -(-length // chunks) <= 128
  assert chunks < 2 * length / 128 + 1
  assert (length % chunks == 0) == (length == 3000)
