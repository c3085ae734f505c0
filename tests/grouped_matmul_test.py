"""Every backend against one float64 reference, forward and gradient, for every kind of imbalance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels import grouped_matmul as gm

CPU_BACKENDS = ("loop", "ragged_dot", "dense")
SIZES = {"even": [64, 64, 64, 64], "one_group": [256, 0, 0, 0], "empty_groups": [0, 100, 0, 156],
         "ragged": [1, 129, 3, 50], "nothing": [0, 0, 0, 0], "last_only": [0, 0, 0, 7]}


def reference(lhs, rhs, sizes):
  out, start = np.zeros((lhs.shape[0], rhs.shape[2])), 0
  for g, size in enumerate(sizes):
    out[start : start + size] = lhs[start : start + size].astype(np.float64) @ rhs[g].astype(np.float64)
    start += size
  return out


def reference_gradients(lhs, rhs, sizes, cotangent):
  lhs_grad, rhs_grad, start = np.zeros(lhs.shape), np.zeros(rhs.shape), 0
  for g, size in enumerate(sizes):
    rows = slice(start, start + size)
    lhs_grad[rows] = cotangent[rows].astype(np.float64) @ rhs[g].T
    rhs_grad[g] = lhs[rows].T.astype(np.float64) @ cotangent[rows]
    start += size
  return lhs_grad, rhs_grad


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", SIZES)
def test_equals_reference(backend, name):
  rng, sizes = np.random.default_rng(0), SIZES[name]
  lhs, rhs = rng.normal(size=(256, 24)).astype(np.float32), rng.normal(size=(4, 24, 40)).astype(np.float32)
  cotangent = rng.normal(size=(256, 40)).astype(np.float32)
  out, pull = jax.vjp(lambda l, r: gm.grouped_matmul(l, r, jnp.array(sizes, jnp.int32), backend=backend), lhs, rhs)
  # float32 sums of 24 to 256 terms of size 1: a few units in the last place of the largest partial sum.
  np.testing.assert_allclose(out, reference(lhs, rhs, sizes), atol=2e-5)
  for got, want in zip(pull(cotangent), reference_gradients(lhs, rhs, sizes, cotangent)):
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 127, 128, 129, 300])
def test_loop_with_any_number_of_rows(rows):
  rng = np.random.default_rng(rows)
  sizes = rng.multinomial(rows, [0.5, 0.1, 0.4]).astype(np.int32)
  lhs, rhs = rng.normal(size=(rows, 8)).astype(np.float32), rng.normal(size=(3, 8, 8)).astype(np.float32)
  out = gm.grouped_matmul(jnp.array(lhs), jnp.array(rhs), jnp.array(sizes), backend="loop")
  np.testing.assert_allclose(out, reference(lhs, rhs, sizes), atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bfloat16_accumulates_in_float32(backend):
  lhs, rhs = jnp.ones((4, 1024), jnp.bfloat16), jnp.ones((1, 1024, 2), jnp.bfloat16)
  out = gm.grouped_matmul(lhs, rhs, jnp.array([4], jnp.int32), backend=backend)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(out, np.float32), 1024.0)  # a bfloat16 sum of ones stops at 256


def test_refuses_shapes_and_names():
  lhs, rhs, sizes = jnp.ones((4, 3)), jnp.ones((2, 5, 2)), jnp.array([2, 2])
  with pytest.raises(ValueError, match=r"lhs \(4, 3\), rhs \(2, 5, 2\)"):
    gm.grouped_matmul(lhs, rhs, sizes, backend="loop")
  with pytest.raises(ValueError, match="no backend 'fast'"):
    gm.grouped_matmul(lhs, jnp.ones((2, 3, 2)), sizes, backend="fast")


@pytest.mark.parametrize("rows, contract, columns, groups, mebibytes, want", [
    (65536, 2048, 1408, 64, 16, (128, 2048, 1408)),  # all of k
    (16384, 4096, 14336, 8, 16, (256, 4096, 512)),
    # All of k fits with 128 columns only, which read the rows 32 times: by the static twin 18.2 ms on v5p, and this 9.8.
    (16384, 14336, 4096, 8, 16, (256, 1024, 2048)),
    (16384, 14336, 4096, 8, 32, (256, 1024, 4096)),
    (64, 128, 128, 4, 0, (128, 128, 128))])  # nothing fits
def test_tile_of_the_ragged_dot(rows, contract, columns, groups, mebibytes, want):
  m, k, n = gm.tiling(rows, contract, columns, groups, mebibytes << 20)
  assert (m, k, n) == want and contract % k == columns % n == 0
