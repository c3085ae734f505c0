"""Data: exact resume, any number of hosts, packing, windows, tokenizers, and damaged files."""

import json
import pathlib

import numpy as np
import pytest

from moe import config
from moe.data import embedded
from moe.data import evaluation
from moe.data import pipeline
from moe.data import records
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


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("position", [0, 1, 7, 23])
def test_resume_is_exact_through_json(domains, packing, position):
  options = data(domains, packing=packing)
  loader = pipeline.Loader(options, seed=1)
  take(loader, position)
  state = json.loads(json.dumps(loader.state()))
  want = take(loader, 12)
  again = pipeline.Loader(options, seed=1)
  again.restore(state)
  assert_batches_equal(take(again, 12), want)


def test_resume_needs_the_tuple_repair(domains, monkeypatch):
  """The negative control: a plain JSON round trip makes grain's concat packer lose documents without a word."""
  options = data(domains)
  loader = pipeline.Loader(options, seed=1)
  state = json.loads(json.dumps(loader.state()))
  want = take(loader, 12)
  monkeypatch.setattr(pipeline, "_exact", lambda state: state)
  again = pipeline.Loader(options, seed=1)
  again.restore(state)
  with pytest.raises(AssertionError):
    assert_batches_equal(take(again, 12), want)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 4), (4, 1)])
def test_the_number_of_hosts_changes_nothing(domains, before, after):
  """Global batches before and after a resume on another number of hosts equal those of one host throughout."""
  options = data(domains)

  def hosts(count):
    return [pipeline.Loader(options, 1, host, count) for host in range(count)]

  def global_batches(loaders, count):
    return [tuple(np.concatenate(fields) for fields in zip(*(next(loader) for loader in loaders))) for _ in range(count)]

  want = take(pipeline.Loader(options, 1), 10)
  first = hosts(before)
  assert_batches_equal(global_batches(first, 5), want[:5])
  state = json.loads(json.dumps(pipeline.merge_states([loader.state() for loader in first])))
  second = hosts(after)
  for loader in second:
    loader.restore(state)
  assert_batches_equal(global_batches(second, 5), want[5:])


def test_shards_must_split_over_hosts(domains):
  with pytest.raises(config.ConfigError, match="virtual_shards = 4 does not split over 3 hosts"):
    pipeline.Loader(data(domains), 0, 0, 3)


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
  assert abs(share - 0.75) < 0.02  # grain interleaves deterministically; only the start of each shard's cycle rounds


def test_seeds_and_epochs_give_other_orders(domains):
  a, b = (np.stack([batch[0] for batch in take(pipeline.Loader(data(domains), seed), 4)]) for seed in (0, 1))
  assert not np.array_equal(a, b)
  one = data(domains[:1], virtual_shards=1)
  text = "".join(tokenizers.ByteTokenizer().decode(row) for batch in take(pipeline.Loader(one, 0), 60) for row in batch[0])
  documents = [d.text for d in records.read_documents(pathlib.Path(domains[0].path), "train") if len(d.text) > 30]
  first = sorted(documents, key=text.index)
  later = [text.find(d, text.index(d) + 1) for d in first]
  assert min(later) > 0 and later != sorted(later)  # every document comes again, in another order


@pytest.mark.parametrize("changes, part", [({"sequence_tokens": 16}, "sequence_tokens: 32 -> 16"),
                                           ({"packing": "best_fit"}, "packing: 'concat' -> 'best_fit'")])
def test_a_position_of_other_data_is_refused(domains, changes, part):
  state = pipeline.Loader(data(domains), 0).state()
  with pytest.raises(DataError, match="the data changed since the checkpoint") as error:
    pipeline.Loader(data(domains, **changes), 0).restore(state)
  assert part in str(error.value)
  with pytest.raises(DataError, match="seed: 0 -> 1"):
    pipeline.Loader(data(domains), 1).restore(state)


def test_a_damaged_position_is_refused(domains):
  loader = pipeline.Loader(data(domains), 0)
  state = loader.state()
  del state["shards"]["2"]
  with pytest.raises(DataError, match="virtual shard 2 is damaged"):
    loader.restore(state)


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


# ------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("text", ["", "plain", "tabs\t and  spaces\n\n", "Ünïcode ∑ 漢字 🙂", "\x00\x7f"])
def test_tokenizers_are_lossless(text, tmp_path):
  path = tmp_path / "bpe.json"
  tokenizers.train_bpe(["the quick brown fox " * 20, "jumps over the dog " * 20], 300, path)
  for tokenizer in (tokenizers.ByteTokenizer(), tokenizers.load(str(path))):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and (ids < tokenizer.vocab_size).all() and tokenizer.eos not in ids
    assert tokenizer.decode([tokenizer.eos, *ids, tokenizer.eos]).replace("</s>", "") == text


def test_byte_ids_are_those_of_byt5():
  assert tokenizers.ByteTokenizer().encode("Aé").tolist() == [0x41 + 3, 0xC3 + 3, 0xA9 + 3]


def test_bad_tokenizers(tmp_path):
  with pytest.raises(DataError, match="cannot be read"):
    tokenizers.load(str(tmp_path / "none.json"))


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


def test_build_data_formats(tmp_path, capsys):
  from pyarrow import parquet, table
  texts = [f"document {i}: Ünïcode" for i in range(200)]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": t}) + "\n" for t in texts))
  parquet.write_table(table({"content": texts}), tmp_path / "a.parquet")
  for i, text in enumerate(texts):
    (tmp_path / f"{i:03}.txt").write_text(text)
  found = {}
  for kind, pattern in (("text", "*.txt"), ("jsonl", "a.jsonl"), ("parquet", "a.parquet")):
    out = tmp_path / kind
    assert build_data.main(["--domain=d", f"--output={out}", f"--format={kind}", "--field=content", "--held_out=0.1",
                            str(tmp_path / pattern)]) == 0
    found[kind] = {s: [d.text for d in records.read_documents(out, s)] for s in records.SPLITS}
    assert build_data.main(["--verify", str(out)]) == 0
  assert found["text"] == found["jsonl"] == found["parquet"]
  assert sorted(t for split in found["text"].values() for t in split) == sorted(texts)
  assert 5 < len(found["text"]["validation"]) < 40
  with pytest.raises(DataError, match="exists already"):
    build_data.main(["--domain=d", f"--output={tmp_path / 'text'}", str(tmp_path / "*.txt")])


def test_build_data_mistakes(tmp_path):
  (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
  (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
  base = ["--domain=d", f"--output={tmp_path / 'out'}"]
  jsonl = ["--format=jsonl", str(tmp_path / "bad.jsonl")]
  for extra, message in [(jsonl, r"bad.jsonl:2 has no text field 'text' \(it has txt\)"),
                         ([str(tmp_path / "latin.txt")], "latin.txt cannot be read as text"),
                         ([str(tmp_path / "none*.txt")], "no file matches")]:
    with pytest.raises(DataError, match=message):
      build_data.main(base + extra)
    assert not (tmp_path / "out").exists()


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
