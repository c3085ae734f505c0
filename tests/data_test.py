"""Data: exact resume, any number of hosts, packing, windows, and damaged files."""

import json
import os
import pathlib
import threading
import time

import numpy as np
import pytest

from moe import config
from moe import hardware
from moe.data import embedded
from moe.data import evaluation
from moe.data import pipeline
from moe.data import records
from moe.data import rows as rows_lib
from moe.data import tokenizers
from moe.data.records import DataError, Document
from tools import build_data


@pytest.fixture(scope="module")
def domains(tmp_path_factory) -> tuple[config.Domain, ...]:
  """Two domains of short random documents in different alphabets."""
  made, rng = [], np.random.default_rng(0)
  for name, alphabet, weight in (("upper", "ABCDEF ", 3.0), ("lower", "abcdefgh\n", 1.0)):
    docs = [Document("".join(rng.choice(list(alphabet), rng.integers(3, 120))), name, f"{name}/{i}") for i in range(80)]
    folder = tmp_path_factory.mktemp("data") / name
    records.write_domain(folder, {"train": docs[:60], "validation": docs[60:70], "test": docs[70:]}, shards=2)
    made.append(config.Domain(name=name, path=str(folder), weight=weight))
  return tuple(made)


def data(domains, **changes) -> config.Data:
  return config.Data(**{"domains": domains, "batch_sequences": 8, "sequence_tokens": 32, "virtual_shards": 4, **changes})


def take(loader, count):
  return [next(loader) for _ in range(count)]


def assert_batches_equal(a, b):
  for left, right in zip(a, b, strict=True):
    for x, y in zip(left, right, strict=True):
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("packing, shards", [("concat", 0), ("concat", 3), ("concat", 20), ("best_fit", 0), ("best_fit", 12)])
@pytest.mark.parametrize("position", [0, 23])
def test_resume_is_exact_through_json(domains, packing, position, shards):
  options = data(domains, packing=packing, virtual_shards=shards)
  loader = pipeline.Loader(options, seed=1)
  take(loader, position)
  state = json.loads(json.dumps(loader.state()))
  want = take(loader, 40)  # of more than one window
  again = pipeline.Loader(options, seed=1)
  again.restore(state)
  assert_batches_equal(take(again, 40), want)
  again.restore(state)  # a replay, in the middle of the run
  assert_batches_equal(take(again, 3), want[:3])


def test_resume_needs_the_tuple_repair(tmp_path, monkeypatch):
  """The negative control: a plain JSON round trip makes grain's concat packer lose a document without a word, where rows end
  with documents, so that the packer has no rest of one."""
  texts = [f"document number {i:03} of one row ." for i in range(50)]
  train = [Document(text[:31], "even", text) for text in texts]
  records.write_domain(tmp_path / "even", {"train": train})
  options = data((config.Domain(name="even", path=str(tmp_path / "even")),))
  loader = pipeline.Loader(options, seed=1)
  take(loader, 20)
  state = json.loads(json.dumps(loader.state()))
  want = take(loader, 40)
  for repaired in (True, False):
    if not repaired:
      monkeypatch.setattr(rows_lib, "_tuples_restored", lambda state: state)
    again = pipeline.Loader(options, seed=1)
    again.restore(state)
    if repaired:
      assert_batches_equal(take(again, 40), want)
    else:
      with pytest.raises(AssertionError):
        assert_batches_equal(take(again, 40), want)


# Which rows and columns of a batch of eight each host has; hosts may share rows, and have them in any pattern.
HOSTS = {
    "one": [(range(8), slice(0, 32))], "two": [(range(4), slice(0, 32)), (range(4, 8), slice(0, 32))],
    "four": [(range(i, i + 2), slice(0, 32)) for i in (0, 2, 4, 6)],
    "tensor": [(range(8), slice(0, 32))] * 2, "context": [(range(8), slice(0, 16)), (range(8), slice(16, 32))],
    "both": [((0, 1, 4, 5), slice(0, 16)), ((2, 3, 6, 7), slice(0, 16)),
             ((0, 1, 4, 5), slice(16, 32)), ((2, 3, 6, 7), slice(16, 32))],
}


@pytest.mark.parametrize("shards", [0, 4, 5, 13])
@pytest.mark.parametrize("before, after", [("one", "two"), ("tensor", "four"), ("four", "context"), ("both", "one"),
                                           ("context", "both")])
def test_the_hosts_change_nothing(domains, before, after, shards):
  """Each host's rows and columns, before and after a resume on other hosts, are those of one host throughout."""
  options = data(domains, virtual_shards=shards)
  want = take(pipeline.Loader(options, 1), 24)

  def check(loaders, parts, batches):
    for whole in batches:
      for loader, (rows, columns) in zip(loaders, parts):
        assert_batches_equal([next(loader)], [[field[list(rows), columns] for field in whole]])

  first = [pipeline.Loader(options, 1, *part) for part in HOSTS[before]]
  check(first, HOSTS[before], want[:18])
  state = json.loads(json.dumps(pipeline.merge_states([loader.state() for loader in first])))
  second = [pipeline.Loader(options, 1, *part) for part in HOSTS[after]]
  for loader in second:
    loader.restore(state)
  check(second, HOSTS[after], want[18:])


@pytest.mark.parametrize("shards", [0, 5])
def test_the_batch_may_change_without_losing_a_row(domains, shards):
  """A position counts rows: batches of 8, then of 12, then of 3 give the same rows as batches of 8 throughout."""
  options = data(domains, virtual_shards=shards)
  rows = np.concatenate([batch[0] for batch in take(pipeline.Loader(options, 1), 12)])
  loader, given = pipeline.Loader(options, 1), []
  for size, count in ((8, 3), (12, 4), (3, 5)):
    state = json.loads(json.dumps(loader.state()))
    loader = pipeline.Loader(data(domains, virtual_shards=shards, batch_sequences=size), 1)
    loader.restore({**state, "fingerprint": state["fingerprint"]} if given else pipeline.Loader(options, 1).state())
    given += [batch[0] for batch in take(loader, count)]
  given = np.concatenate(given)
  np.testing.assert_array_equal(given, rows[: len(given)])


def test_a_host_opens_the_shards_of_its_rows_only(domains):
  """By default there are as many shards as rows, so that no host reads what another one needs."""
  loader = pipeline.Loader(data(domains), 1, [2, 3])
  take(loader, 20)
  assert set(loader.state()["shards"]) == {"2", "3"}


def test_the_order_of_an_earlier_version_is_refused(domains):
  loader = pipeline.Loader(data(domains), 1)
  state = loader.state()
  del state["fingerprint"]["order"]  # as it was before it had a version
  with pytest.raises(DataError, match="order 1 of the rows and this version of the code has order 2.*--init_from"):
    loader.restore(state)


def test_batches_are_made_ahead_and_not_too_many(domains, monkeypatch):
  """By a thread that ends with its loader; what is made ahead is bounded in batches and in bytes."""
  made = []
  monkeypatch.setattr(pipeline._Shards, "row", lambda self, number: made.append(number) or np.zeros((4, 32), np.int32))
  for bound, most in ((1 << 20, 8 + 2), (2 * 4 * 4 * 8 * 32, 2 + 2)):  # in the queue, in the thread's hands, and given out
    made.clear()
    monkeypatch.setattr(pipeline, "_AHEAD_BYTES", bound)
    loader = pipeline.Loader(data(domains), 1)
    assert loader.state()["rows"] == 0 and not made
    loader.start()
    next(loader)
    deadline = time.monotonic() + 10
    while len(made) < 8 * (most - 1) and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.3)
    assert 8 * (most - 1) <= len(made) <= 8 * most
    threads = [thread for thread in threading.enumerate() if thread.name == "batches"]
    del loader
    for thread in threads:
      thread.join(timeout=5)
      assert not thread.is_alive()


def test_an_error_in_the_thread_is_the_callers(domains, monkeypatch):
  def torn(self, number):
    if number >= 16:
      raise RuntimeError("record 7 is torn")
    return np.zeros((4, 32), np.int32)

  monkeypatch.setattr(pipeline._Shards, "row", torn)
  loader = pipeline.Loader(data(domains), 1)
  take(loader, 2)
  for _ in range(2):
    with pytest.raises(DataError, match="training data cannot be read: record 7 is torn"):
      next(loader)
  loader.close()
  with pytest.raises(ValueError, match="the loader is closed"):
    next(loader)


def test_packers_of_many_shards_refill_at_different_times(domains, monkeypatch):
  """Rows packed for a batch, with one row a shard: after the start no batch waits for more than a few of the packers, and the
  mean is what a batch takes. With the same number of bins in every packer all of them refill at once."""
  def packed(loader_data):
    refills = np.zeros(300)
    order = rows_lib.Order.of(loader_data)
    streams = rows_lib.Streams(loader_data, 1, tokenizers.ByteTokenizer(), order)
    for shard in range(12):
      stream = streams.open(0, shard)
      for row in range(300):
        before = stream._packed_batch is None
        next(stream)
        refills[row] += before
    return refills[80:].max()

  options = data(domains[:1], batch_sequences=12, packing="best_fit", virtual_shards=0)
  assert packed(options) <= 4
  monkeypatch.setattr(rows_lib, "_bins", lambda shard, shards: 64)
  assert packed(options) >= 7


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_rows_are_documents_shifted_by_one(domains, packing):
  tokenizer = tokenizers.ByteTokenizer()
  texts = {d.text for domain in domains for d in records.read_documents(pathlib.Path(domain.path), "train")}
  whole = tokens = 0
  for inputs, targets, segments, positions in take(pipeline.Loader(data(domains, packing=packing, sequence_tokens=128), 3), 20):
    for row in range(inputs.shape[0]):
      alphabets = set()
      for segment in range(1, segments[row].max() + 1):
        at = np.flatnonzero(segments[row] == segment)
        np.testing.assert_array_equal(at, np.arange(at[0], at[-1] + 1))
        np.testing.assert_array_equal(positions[row, at], np.arange(len(at)))
        np.testing.assert_array_equal(inputs[row, at[1:]], targets[row, at[:-1]])
        if inputs[row, at[0]] == tokenizer.eos and targets[row, at[-1]] == tokenizer.eos:
          assert tokenizer.decode(targets[row, at]) in texts
          whole += 1
        alphabets |= {c.isupper() for c in tokenizer.decode(inputs[row, at]) if c.isalpha()}
      assert len(alphabets) <= 1  # a row holds one domain
      tokens += int((segments[row] > 0).sum())
      assert not inputs[row][segments[row] == 0].any()
  assert whole > 50
  if packing == "concat":
    assert tokens == 20 * 8 * 128  # no padding but at the end of a finite set


def test_mixture_follows_the_weights(domains):
  tokenizer = tokenizers.ByteTokenizer()
  rows = [tokenizer.decode(row) for batch in take(pipeline.Loader(data(domains), 0), 100) for row in batch[0]]
  share = np.mean([any(c.isupper() for c in row) for row in rows])
  assert abs(share - 0.75) < 0.02  # of 800 rows; independent draws would have a deviation of 0.015


def test_seeds_and_epochs_give_other_orders(domains):
  a, b = (np.stack([batch[0] for batch in take(pipeline.Loader(data(domains), seed), 4)]) for seed in (0, 1))
  assert not np.array_equal(a, b)
  # Every document comes again, in another order; rows with whole documents, so that each can be found.
  one = data(domains[:1], virtual_shards=1, sequence_tokens=256, packing="best_fit")
  text = "".join(tokenizers.ByteTokenizer().decode(row) for batch in take(pipeline.Loader(one, 0), 40) for row in batch[0])
  documents = [d.text for d in records.read_documents(pathlib.Path(domains[0].path), "train") if len(d.text) > 30]
  times = [text.count(d) for d in documents]
  assert min(times) > 10 and max(times) < 2.5 * min(times)
  first = sorted(documents, key=text.index)
  later = [text.rindex(d) for d in first]
  assert later != sorted(later)


@pytest.mark.parametrize("changes, part", [({"sequence_tokens": 16}, "sequence_tokens: 32 -> 16"),
                                           ({"packing": "best_fit"}, "packing: 'concat' -> 'best_fit'"),
                                           ({"virtual_shards": 8}, "virtual_shards: 4 -> 8")])
def test_a_position_of_other_data_is_refused(domains, changes, part):
  state = pipeline.Loader(data(domains), 0).state()
  with pytest.raises(DataError, match="the data changed since the checkpoint") as error:
    pipeline.Loader(data(domains, **changes), 0).restore(state)
  assert part in str(error.value)
  with pytest.raises(DataError, match="seed: 0 -> 1"):
    pipeline.Loader(data(domains), 1).restore(state)


@pytest.mark.parametrize("damage", [{"fingerprint": None}, {"rows": "many"}, {"shards": {"1": {"window": 0}}}, {"shards": None},
                                    {"shards": {"1": {"window": 0, "streams": {"0": {"rubbish": 1}}}}}], ids=str)
def test_a_damaged_position_is_refused(domains, damage):
  loader = pipeline.Loader(data(domains), 0)
  with pytest.raises(DataError, match="saved position .*is damaged|training data cannot be read"):
    loader.restore({**loader.state(), **damage})
    next(loader)


# ------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 40])
def test_windows_score_every_token_once(length):
  ids = np.arange(10, 10 + length)
  parts = list(evaluation.windows(ids, 1, 8))
  scored = [(int(t), int(i)) for w in parts for i, t, s in zip(w.inputs, w.targets, w.scored) if s]
  assert scored == [(t, i) for i, t in zip([1, *ids], [*ids, 1])]
  for window in parts[1:]:  # half a window of context before the first scored token
    assert np.flatnonzero(window.scored)[0] == 4
  assert all((w.segment_ids[w.scored] == 1).all() for w in parts)


def test_evaluation_covers_the_split(domains):
  tokenizer, path = tokenizers.ByteTokenizer(), domains[0].path
  docs = list(records.read_documents(pathlib.Path(path), "validation"))
  batches = list(evaluation.batches(path, "validation", tokenizer, 16, 4))
  assert sum(int(w.scored.sum()) for w, _ in batches) == sum(len(d.text) + 1 for d in docs)
  np.testing.assert_allclose(sum(size for _, size in batches), sum(len(d.text) for d in docs))
  assert all(w.inputs.shape == (4, 16) for w, _ in batches)
  assert len(list(evaluation.batches(path, "validation", tokenizer, 16, 4, limit=2))) == 2


# ---------------------------------------------------------------------------------------------------- embedded, files


def test_king_james():
  folder = embedded.resolve("embedded:kjv")
  splits = {s: list(records.read_documents(folder, s)) for s in records.SPLITS}
  assert sum(len(d.text.encode()) for docs in splits.values() for d in docs) == 4_404_412
  assert sum(d.text.count("\n") for docs in splits.values() for d in docs) == 31_102
  assert splits["train"][0].text.startswith("Ge1:1 In the beginning")
  assert splits["test"][-1].source == "kjv/Rev22"
  with pytest.raises(DataError, match="there is no embedded corpus 'bible'"):
    embedded.resolve("embedded:bible")


def damaged(domains, tmp_path):
  import shutil
  folder = tmp_path / "copy"
  shutil.copytree(domains[0].path, folder)
  return folder, next(folder.glob("train-00000*"))


def test_damaged_files(domains, tmp_path):
  folder, file = damaged(domains, tmp_path)
  content = file.read_bytes()

  file.write_bytes(content[: len(content) // 2])
  with pytest.raises(DataError, match="its manifest says .* truncated"):
    records.open_split(folder, "train")

  file.write_bytes(b"\0" * len(content))  # the right size, and rubbish
  with pytest.raises(DataError, match="cannot be read"):
    records.open_split(folder, "train")

  middle = content.find(b"upper", 1000) if b"upper" in content[1000:] else 70_000
  file.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
  assert build_data.main(["--verify", str(folder)]) == 1

  file.unlink()
  with pytest.raises(DataError, match="No such file"):
    records.open_split(folder, "train")
  with pytest.raises(DataError, match="has no split 'dev'"):
    records.open_split(folder, "dev")
  (folder / "manifest.json").write_text("{")
  with pytest.raises(DataError, match="manifest.json cannot be read"):
    records.open_split(folder, "train")
  with pytest.raises(DataError, match="is not a data directory"):
    records.open_split(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/proc/none"])
def test_a_cache_that_cannot_be_written_is_one_line_and_stops_no_compiling(monkeypatch, cache):
  monkeypatch.setenv("MOE_CACHE", cache)
  with pytest.raises(DataError, match="set MOE_CACHE to a folder that can be written") as caught:
    embedded.resolve("embedded:kjv")
  assert "\n" not in str(caught.value)
  assert "compiled programs are not kept" in hardware.use_compile_cache()


def test_nobody_without_a_home_has_a_cache(monkeypatch):
  monkeypatch.delenv("MOE_CACHE", raising=False)
  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
  assert hardware.cache_folder().name == f"moe-{os.getuid()}"
