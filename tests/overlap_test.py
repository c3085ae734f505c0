"""The schedule model of FSMoE: closed form, schedules played, fit and partition."""

import numpy as np
import pytest

from tools import overlap

# Testbed B of FSMoE (arXiv 2501.10714, Table of constants; ms and elements): B = 4, L = 1024, M = 1024, H = 4096, k f = 2.4.
TOKENS = 2.4 * 4 * 1024 * 1024


def paper_layer(n_esp=4, gemms=2):
  line = overlap.Line
  return overlap.Layer(line(1.75e-1, 3.06e-7), line(3.20e-2, 1.68e-7), line(3.91e-2, 1.67e-7),
                       line(gemms * 9.24e-2, gemms * 4.42e-11), TOKENS / n_esp, TOKENS, TOKENS, TOKENS * 4096 / n_esp)


def test_numbers_of_the_paper():
  """The example worked from its constants: milliseconds at r = 1 and 4, and the best degree beside a reduction of 5 ms."""
  layer = paper_layer()
  assert [round(overlap.seconds(layer, r), 2) for r in (1, 4)] == [6.43, 4.39]
  assert [round(overlap.seconds(layer.backward(), r), 2) for r in (1, 4)] == [7.53, 4.95]
  assert overlap.best_degree(layer.backward(), reduction=5.0, allowed=(1, 2, 4, 8)) == 2
  assert round(overlap.seconds(layer.backward(), 2, 5.0), 2) == 7.24


def random_layer(rng):
  lines = [overlap.Line(*rng.uniform(0, 1, 2)) for _ in range(4)]
  return overlap.Layer(*lines, *rng.uniform(0.1, 10, 4))


def test_the_closed_form_is_the_schedule_or_below():
  """FSMoE's four cases are each a chain of the schedule, so never above it; and one of them nearly always is the longest."""
  rng, equal = np.random.default_rng(0), 0
  for _ in range(400):
    layer, r, reduction = random_layer(rng), int(rng.integers(1, 9)), float(rng.choice([0.0, rng.uniform(0, 20)]))
    closed, played = overlap.seconds(layer, r, reduction), overlap.simulate(layer, r, reduction)
    assert closed <= played * (1 + 1e-12)
    equal += closed >= played * (1 - 1e-12)
    assert played <= closed * 1.6
  assert equal > 200


def test_no_schedule_beats_its_streams():
  rng = np.random.default_rng(1)
  for _ in range(200):
    layer, r = random_layer(rng), int(rng.integers(1, 9))
    a, g, s, e = layer.chunk(r)
    for early in (False, True):
      played = overlap.simulate(layer, r, early=early)
      assert played >= max(2 * r * a, r * (g + s), r * e, 2 * a + g + s + e) * (1 - 1e-12)
      assert played <= r * (2 * a + g + s + e) * (1 + 1e-12)  # nothing overlapped


def test_one_chunk_overlaps_nothing():
  layer = paper_layer()
  assert overlap.simulate(layer, 1) == pytest.approx(sum(layer.chunk(1)) + layer.chunk(1)[0])


def test_best_degree_is_the_least():
  rng = np.random.default_rng(2)
  for _ in range(50):
    layer = random_layer(rng)
    best = overlap.best_degree(layer)
    assert all(overlap.seconds(layer, best) <= overlap.seconds(layer, r) for r in range(1, 9))
  assert overlap.best_degree(paper_layer()) > 1
  assert overlap.best_degree(paper_layer(), reduction=1e6) == 1  # all of the time is the reduction's


def test_fit_recovers_a_planted_line():
  rng = np.random.default_rng(3)
  sizes = np.arange(1, 25) * 2.0**18
  line, r2 = overlap.fit(sizes, (2e-4 + 3e-10 * sizes) * (1 + 0.01 * rng.normal(size=24)))
  assert line.alpha == pytest.approx(2e-4, rel=0.1) and line.beta == pytest.approx(3e-10, rel=0.02) and r2 > 0.99
  with pytest.raises(ValueError, match="two sizes"):
    overlap.fit([4, 4], [1, 1])


def test_partition_takes_no_gradient_before_it_exists():
  layers, reduce = [paper_layer().backward()] * 6, overlap.Line(0.5, 1e-6)
  gradients = [3e6, 0.0, 5e6, 1e6, 2e6, 1e6]
  taken = overlap.partition(layers, gradients, reduce, [0.2] * 6)
  assert taken[0] == 0 and sum(taken) > 0
  assert all(sum(taken[:i + 1]) <= sum(gradients[:i]) + 1e-6 for i in range(6))
  degree = overlap.best_degree(layers[0])
  for layer, units in zip(layers, taken):  # what is taken hides: the layer takes no longer, but for what the dense part hides
    extra = overlap.seconds(layer, degree, reduce.of(units)) - overlap.seconds(layer, degree)
    assert extra <= 0.2 + 1e-9
  assert overlap.partition(layers, gradients, overlap.Line(1e9, 1.0), [0.0] * 6) == [0] * 6  # slack shorter than alpha
