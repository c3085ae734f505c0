"""Evaluation: what is scored and counted is each token of the text once, however windows are packed and devices laid out."""

import dataclasses
import itertools
import json
import math
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests import small

from moe import config
from moe import evaluate
from moe import model as model_lib
from moe import sharding
from moe import step as step_lib
from moe.data import evaluation
from moe.data import records
from moe.data import tokenizers

BYTES = tokenizers.ByteTokenizer()
EXACT = ("tokens", "bytes", "expert_counts")
FIGURES = ("bits_per_byte", "loss", "accuracy", "router_entropy", "top_k_weight", "router_z")


def domain_of(folder, lengths) -> config.Domain:
  """Documents of random letters, as many as there are lengths."""
  rng = np.random.default_rng(0)
  texts = ["".join(rng.choice(list("abcdefgh "), n)) for n in lengths]
  documents = [records.Document(text, "d", str(i)) for i, text in enumerate(texts)]
  records.write_domain(folder, {"train": [], "validation": documents, "test": []})
  return config.Domain(name="d", path=str(folder))


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> config.Domain:
  """Documents shorter and longer than a row of 32 tokens."""
  return domain_of(tmp_path_factory.mktemp("data") / "d", [3, 40, 0, 11, 90, 7, 31, 32, 5, 20, 64, 13, 2, 50])


def evaluated(run: config.Run, domain: config.Domain, **options) -> tuple[dict, list]:
  """The evaluation of random parameters on the run's mesh."""
  mesh = sharding.make_mesh(run.mesh, jax.devices()[: math.prod(dataclasses.astuple(run.mesh))])
  with jax.set_mesh(mesh):
    params = small.params(step_lib.abstract_state(run, mesh).params)
    return evaluate.evaluate_domain(run, mesh, step_lib.jit_eval_step(run, mesh), params, domain, BYTES, **options)


def score(run: config.Run, domain: config.Domain, **options) -> dict:
  return evaluated(run, domain, **options)[0]


def small_run(**changes) -> config.Run:
  return small.change(small.run(batch=8, length=32, model={"vocab_size": 384}), **changes)


def assert_same_figures(a: dict, b: dict, rtol: float):
  for key in EXACT:
    np.testing.assert_array_equal(a[key], b[key], key)
  for key in FIGURES:
    np.testing.assert_allclose(a[key], b[key], rtol=rtol, err_msg=key)


# -------------------------------------------------------------------------------------------------------- windows, packing


def rows_of(batches):
  """(fields of one segment) of all rows of batches, in order."""
  for window, _ in batches:
    for row in range(len(window.inputs)):
      for segment in range(1, window.segment_ids[row].max() + 1):
        at = np.flatnonzero(window.segment_ids[row] == segment)
        np.testing.assert_array_equal(at, np.arange(at[0], at[-1] + 1))
        yield evaluation.Window(*(field[row, at] for field in window))


@pytest.mark.parametrize("packed", [True, False])
def test_every_token_is_scored_once_in_windows_that_are_not_cut(domain, packed):
  """The windows in the rows are exactly the documents' windows, whatever their order."""
  documents = list(records.read_documents(pathlib.Path(domain.path), "validation"))
  want = [w for d in documents for w in evaluation.windows(BYTES.encode(d.text), BYTES.eos, 32)]
  got = list(rows_of(evaluation.batches(domain.path, "validation", BYTES, 32, 4, packed=packed)))

  def content(window):
    return window.inputs.tolist(), window.targets.tolist(), window.positions.tolist(), window.scored.tolist()

  assert sorted(map(content, got)) == sorted(map(content, want))
  assert all(w.positions[0] == 0 for w in want)
  assert sum(w.scored.sum() for w in got) == sum(len(d.text) + 1 for d in documents)


def test_bytes_add_up_and_batches_are_full(domain):
  batches = list(evaluation.batches(domain.path, "validation", BYTES, 32, 4))
  assert all(window.inputs.shape == (4, 32) for window, _ in batches)
  text = sum(len(d.text.encode()) for d in records.read_documents(pathlib.Path(domain.path), "validation"))
  np.testing.assert_allclose(sum(size for _, size in batches), text, rtol=1e-12)


def forward_tokens(path: str, length: int, batch: int, **options) -> tuple[float, float]:
  """(tokens of all batches, tokens of the windows), for each scored token."""
  forward = windows = scored = 0
  for window, _ in evaluation.batches(path, "validation", BYTES, length, batch, **options):
    forward += window.inputs.size
    windows += np.count_nonzero(window.segment_ids)
    scored += window.scored.sum()
  return forward / scored, windows / scored


def test_short_documents_leave_no_row_empty(tmp_path):
  """19 of 20 documents fit in a window. One a row, they would leave most of it empty: the control."""
  lengths = np.random.default_rng(0).lognormal(np.log(60), 1.0, 1000).astype(int)
  assert 0.95 < np.mean(lengths < 512) < 1
  path = domain_of(tmp_path / "d", lengths).path
  forward, floor = forward_tokens(path, 512, 4)
  assert floor <= forward <= 1.05 * floor and forward <= 1.1
  assert forward_tokens(path, 512, 4, packed=False)[0] > 3


@pytest.mark.parametrize("length, batch", [(256, 16), (512, 8), (4096, 1)])
def test_forward_tokens_of_the_embedded_text(length, batch):
  forward, floor = forward_tokens("embedded:kjv", length, batch)
  assert floor <= forward <= 1.05 * floor


def part(tokens: int) -> evaluation._Part:
  window = next(evaluation.windows(np.zeros(tokens - 1, np.int32), 1, tokens))
  return evaluation._Part(window, float(tokens))


def test_the_buffer_is_bounded(monkeypatch):
  """Windows are read only as rows go out, and rows that are packed piece by piece are as full as rows packed at once."""
  sizes = np.random.default_rng(0).integers(1, 100, 2000)

  def rows(windows, tokens):
    """(number of rows, the most windows and the most tokens that were held)."""
    monkeypatch.setattr(evaluation, "_BUFFER_WINDOWS", windows)
    monkeypatch.setattr(evaluation, "_BUFFER_TOKENS", tokens)
    held = np.zeros(2, np.int64)

    def parts():
      for size in sizes:
        held[:] += 1, size
        yield part(size)

    count, most = 0, held.copy()
    for row in evaluation.packed_rows(parts(), 100):
      most = np.maximum(most, held)
      assert sum(part.tokens for part in row) <= 100
      held[:] -= len(row), sum(part.tokens for part in row)
      count += 1
    assert not held.any()
    return count, *most

  whole, *_ = rows(10**6, 10**9)
  by_windows, windows, _ = rows(64, 10**9)
  by_tokens, _, tokens = rows(10**6, 5_000)
  assert windows <= 64 and tokens < 5_100
  assert max(by_windows, by_tokens) < 1.03 * whole


def test_a_limit_takes_the_first_documents():
  """Not the short ones of the whole split, which would fill gaps best."""
  read = []

  def parts():
    for i in itertools.count():
      read.append(i)
      yield part(20 if i % 2 else 70)._replace(text_bytes=float(i))

  rows = list(evaluation.packed_rows(parts(), 100, most=10))
  assert len(rows) == 10 and max(read) < 2 * 10 * 100 / (70 + 20) + 2  # no further than what the rows could hold
  taken = sorted(part.text_bytes for row in rows for part in row)
  assert np.isin(np.arange(18), taken).all()


def test_a_limit_in_batches(domain):
  batches = list(evaluation.batches(domain.path, "validation", BYTES, 32, 2))
  limited = list(evaluation.batches(domain.path, "validation", BYTES, 32, 2, limit=2))
  assert len(limited) == 2 < len(batches)
  more = list(evaluation.batches(domain.path, "validation", BYTES, 32, 2, limit=len(batches) + 3))
  assert sum(w.scored.sum() for w, _ in more) == sum(w.scored.sum() for w, _ in batches)


# -------------------------------------------------------------------------------------------------------- sums over batches


def summed(values: np.ndarray) -> step_lib.Total:
  zero = jnp.zeros(values.shape[1:], values.dtype)
  total, _ = jax.lax.scan(lambda total, value: (step_lib._added(total, value), None), step_lib.Total(zero, zero), values)
  return total


def test_integers_do_not_overflow():
  values = np.random.default_rng(0).integers(0, 1 << 30, (40, 3), np.int32)
  assert np.abs(values.sum(0, dtype=np.int32) - values.sum(0, dtype=np.int64)).min() > 0  # the control
  np.testing.assert_array_equal(summed(values).on_host(), values.sum(0, dtype=np.int64))


def test_floats_keep_what_rounding_leaves():
  """20,000 batches: as in float64, where float32 is off by a part in 10,000 and more."""
  values = np.random.default_rng(0).random((20_000, 2), np.float32) * 1e6
  want = values.astype(np.float64).sum(0)
  np.testing.assert_allclose(summed(values).on_host(), want, rtol=1e-12)
  plain, _ = jax.lax.scan(lambda total, value: (total + value, None), jnp.zeros(2), values)
  assert np.abs(np.asarray(plain, np.float64) / want - 1).max() > 1e-6  # the control


# ---------------------------------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def with_examples(domain) -> tuple[dict, list]:
  return evaluated(small_run(), domain)


@pytest.fixture(scope="module")
def on_one_device(with_examples) -> dict:
  return with_examples[0]


ROUTERS = {
    "softmax": {}, "sigmoid": {"gate": "sigmoid", "bias_update_rate": 0.001},
    "gru": {"recurrent": {"cell": "gru", "width": 8}}, "pre_gate": {"pre_gate": {"d_model": 16, "d_ff": 16, "num_heads": 2}}}


@pytest.mark.parametrize("router", ["softmax", *(pytest.param(r, marks=pytest.mark.slow) for r in ROUTERS if r != "softmax")])
def test_packed_rows_score_like_one_window_a_row(domain, router, monkeypatch):
  run = small_run(model={"router": ROUTERS[router], "attention": {"window_tokens": 20}})
  packed = score(run, domain)
  monkeypatch.setattr(step_lib, "packs_evaluation", lambda model: False)
  alone = score(run, domain)
  assert packed["forward_tokens"] < 0.8 * alone["forward_tokens"] and packed["window_tokens"] == alone["window_tokens"]
  assert_same_figures(packed, alone, 1e-6)
  for key in ("information_choices", "information_probabilities"):  # rows this short are sampled whole
    np.testing.assert_allclose(packed[key], alone[key], rtol=1e-5, atol=1e-5)


SHARED = {
    "capacity": {"experts": {"capacity_factor": 1.0}},
    "capacity_of_batch": {"experts": {"capacity_factor": 1.0, "capacity_group": "microbatch"}},
    "expert_choice": {"router": {"gate": "expert_choice", "allow_lookahead": True, "balance_coef": 0.0}},
    "soft": {"router": {"gate": "soft", "allow_lookahead": True, "balance_coef": 0.0}}}


@pytest.mark.parametrize("shared", SHARED)
def test_rows_that_share_something_are_not_packed(shared):
  assert not step_lib.packs_evaluation(small.model(**SHARED[shared]))
  assert step_lib.packs_evaluation(small.model())


@pytest.mark.slow
@pytest.mark.parametrize("shared", SHARED)
def test_rows_that_share_something_hold_one_window(domain, shared, monkeypatch):
  """There the neighbours in a row change a token's fate: forced to pack, the control, the score is another."""
  run = small_run(model=SHARED[shared])
  alone = score(run, domain)
  batches = list(evaluation.batches(domain.path, "validation", BYTES, 32, 8, packed=False))
  assert alone["forward_tokens"] == len(batches) * 8 * 32
  monkeypatch.setattr(step_lib, "packs_evaluation", lambda model: True)
  assert abs(score(run, domain)["loss"] / alone["loss"] - 1) > 1e-5


def test_routing_is_that_of_scored_tokens(domain, on_one_device):
  """Against the model run on the windows, its choices and scores summed in NumPy over scored tokens; with the overlapping
  context, the control, a part of the text would count twice."""
  run, got = small_run(), on_one_device
  mesh = sharding.make_mesh(run.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = small.params(step_lib.abstract_state(run, mesh).params)
    apply = jax.jit(model_lib.build(run.model).apply)
    counts, entropy, weight, tokens = np.zeros((2, 8), np.int64), np.zeros(2), np.zeros(2), 0
    for window, _ in evaluation.batches(domain.path, "validation", BYTES, 32, 8, packed=False):
      out = apply({"params": params}, *window[:1], *window[2:4])
      p = np.asarray(out.probabilities, np.float64)[:, window.scored]  # [L, T, E]
      chosen = np.eye(8)[np.asarray(out.experts)[:, window.scored]].sum(2)
      counts += chosen.sum(1).astype(np.int64)
      entropy -= (p * np.log(p)).sum((1, 2))
      weight += (p * chosen).sum((1, 2))
      tokens += window.scored.sum()
  np.testing.assert_array_equal(got["expert_counts"], counts)
  np.testing.assert_allclose(got["router_entropy"], entropy / tokens, rtol=1e-6)
  np.testing.assert_allclose(got["top_k_weight"], weight / tokens, rtol=1e-6)
  assert (got["expert_counts"].sum(-1) == 2 * got["tokens"]).all()
  assert got["window_tokens"] > 1.3 * got["tokens"]


@pytest.mark.parametrize("mesh", [
    {"fsdp": 2, "expert": 2, "context": 2}, pytest.param({"data": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow)], ids=lambda mesh: "-".join(mesh))
def test_the_mesh_changes_nothing(domain, mesh, on_one_device):
  got = score(small_run(mesh=mesh), domain)
  assert_same_figures(got, on_one_device, 2e-6)
  for key in ("information_choices", "information_probabilities"):
    np.testing.assert_allclose(got[key], on_one_device[key], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"context": 2}, {"fsdp": 2}], ids=lambda mesh: "-".join(mesh))
def test_a_mesh_over_hosts_changes_nothing(domain, mesh, on_one_device, tmp_path):
  """Two hosts of one device, also where the axis between them does not split the rows, or splits each row."""
  out = tmp_path / "out.json"
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  hosts = [subprocess.Popen([sys.executable, "-m", "tests.evaluation_hosts", str(port), "2", str(i), json.dumps(mesh),
                             domain.path, str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
           for i in range(2)]
  texts = [host.communicate(timeout=280)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0], texts[0][-3000:]
  got = json.loads(out.read_text())
  assert_same_figures(got, on_one_device, 2e-6)
  assert got["examples"] == [2, 0]  # layers; only the first host makes them


def test_batches_are_of_the_rows_that_a_device_wants(domain):
  """A micro-batch of more tokens is cut; a limit counts micro-batches all the same."""
  run = small_run(data={"batch_sequences": 1024}, train={"micro_batches": 2})
  mesh = sharding.make_mesh(config.Mesh(fsdp=2), jax.devices()[:2])
  assert step_lib.eval_rows(run, mesh) == 2 * 4096 // 32 < 512
  assert step_lib.eval_rows(small.change(run, model={"experts": {"capacity_factor": 1.0}}), mesh) == 512
  assert step_lib.eval_rows(small_run(), mesh) == 8
  assert step_lib.eval_rows(small.change(run, data={"sequence_tokens": 8192}), mesh) == 2


def test_limit_counts_micro_batches(domain, monkeypatch):
  monkeypatch.setattr(step_lib, "_EVAL_TOKENS", 32)  # a row a batch
  run = small_run(data={"batch_sequences": 4})
  limited = score(run, domain, limit_batches=2)
  assert limited["forward_tokens"] == 2 * 4 * 32 and limited["tokens"] < 2 * 4 * 32


# --------------------------------------------------------------------------------------------------- what the devices hold


def test_no_device_holds_what_is_split_over_all():
  """On eight devices, by the compiled program: neither the experts chosen nor the joint counts are whole anywhere, and the
  information between probabilities is of a device's own rows."""
  run = small.run(batch=16, length=256, mesh={"fsdp": 4, "expert": 2}, model={"experts": {"num_experts": 16}, "num_layers": 3})
  mesh = sharding.make_mesh(run.mesh, jax.devices())
  sums = step_lib.abstract_eval_sums(run, mesh)
  assert sums["joint"].high.sharding.shard_shape((3, 3, 16, 16)) == (3, 3, 2, 16)
  text = step_lib.compile_eval_step(run, mesh).as_text()
  assert "[3,3,16,16]" not in text  # joint counts
  assert "[3,16,256,2]" not in text and "[3,2,256,2]" in text  # experts chosen: a device has two rows of sixteen
  sampled = 2 * 128
  assert f"[{sampled},3,16]" in text  # bins of the sampled tokens: of two rows
  assert f"[{8 * sampled},3,16]" not in text and "[3,16,128,16]" not in text


def test_examples_stay_within_a_document(domain, with_examples):
  """Windows of other documents are neighbours in the row, but not in the text that is shown."""
  shown = with_examples[1]
  assert len(shown) == 2 and len(shown[0]) == 8
  texts = [document.text for document in records.read_documents(pathlib.Path(domain.path), "validation")]
  places = ["".join(place) for layer in shown for expert in layer for place in expert["snippets"]]
  assert len(places) > 10
  assert all(any(place.replace("</s>", "") in text for text in texts) for place in places)
