"""What is said about routing, against plain NumPy and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe.routing import analysis


def information_by_hand(a, b):
  """Mutual information of two labellings of the same items, nats."""
  total, n = 0.0, len(a)
  for x in set(a):
    for y in set(b):
      both = sum(p == x and q == y for p, q in zip(a, b)) / n
      if both:
        total += both * np.log(both / (sum(p == x for p in a) / n) / (sum(q == y for q in b) / n))
  return total


def test_information_between_choices():
  rng = np.random.default_rng(0)
  experts = rng.integers(0, 4, (3, 2, 50, 2))
  experts[1, ..., 0] = (experts[0, ..., 0] + 1) % 4  # layer 1 repeats layer 0 under other names
  mask = np.arange(50)[None] < np.array([[50], [31]])
  joint = np.asarray(analysis.joint_counts(jnp.array(experts), jnp.array(mask), 4))
  assert joint[0, 2].sum() == 81
  first = experts[..., 0][:, mask]
  got = analysis.mutual_information(joint)
  for i in range(3):
    for j in range(3):
      np.testing.assert_allclose(got[i, j], information_by_hand(first[i], first[j]), atol=1e-6)
  np.testing.assert_allclose(got[0, 1], got[0, 0], atol=1e-6)


@pytest.mark.parametrize("length", [24, 300])
def test_information_between_probabilities(length):
  """The definition of RMoE's appendix, token by token; with many tokens a row, every third."""
  rng = np.random.default_rng(0)
  p = rng.dirichlet(np.full(6, 0.3), (2, 2, length)).astype(np.float32)
  mask = np.arange(length)[None] < np.array([[length], [length // 2]])
  total, tokens = analysis.probability_information(jnp.array(p), jnp.array(mask))
  stride = 1 if length == 24 else 3
  edges, want = np.linspace(0, 1, 100), np.zeros((2, 2))
  places = [(b, s) for b in range(2) for s in range(0, length, stride) if mask[b, s]]
  assert int(tokens) == len(places)
  for b, s in places:
    labels = [np.digitize(p[layer, b, s], edges) for layer in range(2)]
    want += [[information_by_hand(x, y) for y in labels] for x in labels]
  np.testing.assert_allclose(total, want, rtol=2e-5)


def test_effective_experts_and_collapse():
  counts = np.array([[10, 10, 10, 10, 10, 10, 10, 10], [40, 40, 0, 0, 0, 0, 0, 0], [30, 30, 10, 10, 0, 0, 0, 0]])
  np.testing.assert_allclose(analysis.effective_experts(counts)[:2], [8, 2])
  assert analysis.collapsed_layers(counts, 2) == [1]
  assert analysis.collapsed_layers(counts[:1], 2) == []
  assert analysis.collapsed_layers(np.array([[5, 5]]), 2) == []  # every expert is always taken


def test_a_collapse_is_named_once_until_it_has_passed():
  even, skewed = np.full((2, 8), 10), np.array([[10] * 8, [40, 40, 0, 0, 0, 0, 0, 0]])
  watch = analysis.CollapseWatch(top_k=2, steps=3)
  said = [watch.push(counts) for counts in [even, even, skewed, even, even] + [skewed] * 6 + [even] * 3 + [skewed] * 3]
  assert [(step, layers) for step, layers in enumerate(said) if layers] == [(7, [1]), (16, [1])]


def test_specialisation():
  alike = np.array([[[5, 5, 5, 5]], [[10, 10, 10, 10]]])
  apart = np.array([[[5, 5, 0, 0]], [[0, 0, 10, 10]]])
  np.testing.assert_allclose(analysis.specialisation(alike), [0], atol=1e-12)
  np.testing.assert_allclose(analysis.specialisation(apart), [1])
  assert 0.05 < analysis.specialisation(alike + apart)[0] < 0.95
  np.testing.assert_array_equal(analysis.specialisation(alike[:1]), [0])


def test_examples_prefer_what_an_expert_reads_and_others_do_not():
  ids = np.array([[1, 2, 1, 3, 1, 2, 1, 3, 0, 0]])
  mask = ids > 0
  experts = np.where(ids == 3, 1, 0)[None, ..., None]
  experts[0, 0, 0, 0] = 1  # expert 1 also reads one of the frequent 1s
  shown = analysis.examples(experts, ids, mask, 3, lambda x: "".join(map(str, x)), context=2)
  assert [text for text, _ in shown[0][1]["tokens"]] == ["3", "1"]
  assert shown[0][1]["tokens"][0][1] == 0.667
  assert shown[0][2] == {"tokens": [], "snippets": []}
  assert ["21", "3", "12"] in shown[0][1]["snippets"]
