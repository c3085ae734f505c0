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


def test_joint_counts_block_by_block():
  """`total` gets each layer's block with all layers, and what it returns is kept: here twice the half of one axis."""
  rng = np.random.default_rng(0)
  experts, mask = jnp.array(rng.integers(0, 4, (3, 2, 50, 2))), jnp.array(rng.random((2, 50)) < 0.7)
  whole = np.asarray(analysis.joint_counts(experts, mask, 4))
  assert whole.dtype == np.int32 and (whole.sum((2, 3)) == int(mask.sum())).all()
  half = analysis.joint_counts(experts, mask, 4, lambda block: 2 * block[:, 2:])
  np.testing.assert_array_equal(half, 2 * whole[:, :, 2:])


@pytest.mark.parametrize("parts", [2, 3])
def test_information_of_rows_that_are_cut(parts):
  """Devices with a part of each row sample the places that one with whole rows does, though the stride (3) does not divide a
  part. Without the offset, the control, they take others."""
  rng = np.random.default_rng(0)
  length = 300
  p = jnp.array(rng.dirichlet(np.full(6, 0.3), (2, 2, length)).astype(np.float32))
  mask = jnp.array(rng.random((2, length)) < 0.8)
  want, tokens = analysis.probability_information(p, mask)
  size = length // parts

  def of_part(i, offset):
    at = slice(i * size, (i + 1) * size)
    return analysis.probability_information(p[:, :, at], mask[:, at], length, offset)

  got = [of_part(i, i * size) for i in range(parts)]
  assert sum(float(n) for _, n in got) == float(tokens)
  np.testing.assert_allclose(sum(total for total, _ in got), want, rtol=1e-5)
  if size % 3:
    wrong = sum(of_part(i, 0)[0] for i in range(parts))
    assert np.abs(np.asarray(wrong / want) - 1).max() > 1e-3


def test_information_of_counts_in_float32():
  """On the device it is worked out in float32: as in float64 to 1e-6 nats, for counts beyond what float32 holds exactly too."""
  joint = np.random.default_rng(0).integers(0, 1 << 26, (3, 16, 16))
  joint[1] = np.diag(np.arange(16))
  joint[2] = 0
  got = analysis.mutual_information(jnp.array(joint, jnp.float32))
  np.testing.assert_allclose(got, analysis.mutual_information(joint), atol=1e-6)


def test_effective_experts_and_collapse():
  counts = np.array([[10, 10, 10, 10, 10, 10, 10, 10], [40, 40, 0, 0, 0, 0, 0, 0], [30, 30, 10, 10, 0, 0, 0, 0]])
  np.testing.assert_allclose(analysis.effective_experts(counts)[:2], [8, 2])
  assert analysis.collapsed_layers(counts, 2) == [1]
  assert analysis.collapsed_layers(counts[:1], 2) == []
  assert analysis.collapsed_layers(np.array([[5, 5]]), 2) == []  # every expert is always taken


def test_no_collapse_where_every_token_takes_every_expert():
  """Even loads, of which exp(entropy) comes out below E for some E, by rounding."""
  even = {experts: np.full((2, experts), 7) for experts in range(1, 300)}
  assert any((analysis.effective_experts(counts) < experts).any() for experts, counts in even.items())  # the control
  for experts, counts in even.items():
    assert analysis.collapsed_layers(counts, experts) == []
    assert analysis.collapsed_layers(counts, max(experts - 1, 1)) == []
  watch = analysis.CollapseWatch(top_k=3, steps=3)
  assert [watch.push(even[3]) for _ in range(5)] == [[]] * 5


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


def examples_by_hand(experts, ids, mask, num_experts, tokens=6, snippets=2):
  """Tokens and places of each layer and expert, one by one."""
  rows, columns = np.nonzero(mask)
  kinds, kind = np.unique(ids[rows, columns], return_inverse=True)
  overall = np.bincount(kind)
  result = []
  for first in experts[:, rows, columns, 0]:
    for expert in range(num_experts):
      mine = np.flatnonzero(first == expert)
      n = np.bincount(kind[mine], minlength=len(kinds))
      score = n * np.log(np.maximum(n, 1) * len(kind) / np.maximum(overall * max(len(mine), 1), 1))
      best = [i for i in np.argsort(-score, kind="stable")[:tokens] if n[i]]
      places = mine[np.isin(kind[mine], best)][:: max(len(mine) // snippets, 1)][:snippets]
      result.append(([(str(kinds[i]), round(n[i] / len(mine), 3)) for i in best],
                     [str(ids[rows[p], columns[p]]) for p in places]))
  return result


@pytest.mark.parametrize("num_experts, kinds", [(3, 4), (8, 30), (40, 12)])
def test_examples_expert_by_expert(num_experts, kinds):
  """All experts at once as one by one; some tokens have no expert (E), some experts no token, some kinds are rare."""
  rng = np.random.default_rng(0)
  ids = np.minimum(rng.zipf(1.5, (4, 60)), kinds)
  mask = np.arange(60)[None] < rng.integers(5, 61, (4, 1))
  experts = rng.integers(0, num_experts + 1, (3, 4, 60, 2))
  shown = analysis.examples(experts, ids, mask, num_experts, lambda x: " ".join(map(str, x)))
  got = [([tuple(token) for token in expert["tokens"]], [token for _, token, _ in expert["snippets"]])
         for layer in shown for expert in layer]
  assert got == examples_by_hand(experts, ids, mask, num_experts)


def test_snippets_end_with_their_document():
  ids, segments = np.array([[5, 6, 7, 8, 9, 0]]), np.array([[1, 1, 2, 2, 3, 0]])
  mask = np.array([[False, True, True, False, True, False]])  # a part is context only
  shown = analysis.examples(np.zeros((1, 1, 6, 1), int), ids, mask, 1, lambda x: "".join(map(str, x)), segment_ids=segments,
                            snippets=3)
  assert shown[0][0]["snippets"] == [["5", "6", ""], ["", "7", "8"], ["", "9", ""]]
