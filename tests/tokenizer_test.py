"""Tokenizers: ids follow from the text alone, control ids never come out of it, and what does not come back is said.

The library's own reading of each file is the negative control.
"""

import json
import pathlib

import numpy as np
import pytest
import tokenizers as library

from moe import config
from moe.data import evaluation
from moe.data import pipeline
from moe.data import records
from moe.data import rows
from moe.data import tokenizers
from moe.data.records import DataError, Document

CONTROL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TEXT = "plain text, with <b>strong</b> words and numbers 12345. " * 12
SPELLED = "price <s>$20</s> now <pad> and <|endoftext|> then <unk>[PAD]</s></s> end"


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> dict:
  """The content of a byte-level BPE's file."""
  path = tmp_path_factory.mktemp("learnt") / "bpe.json"
  tokenizers.train_bpe([TEXT, SPELLED], 320, path)
  return json.loads(path.read_text())


def written(folder: pathlib.Path, content: dict, settings: dict | None = None) -> str:
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.json").write_text(json.dumps(content))
  if settings is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return str(folder / "tokenizer.json")


def template(content, *around):
  """The post-processor of Llama, BERT and others: tokens before and after a text."""
  numbers = content["model"]["vocab"]
  text = {"Sequence": {"id": "A", "type_id": 0}}
  single = [{"SpecialToken": {"id": name, "type_id": 0}} if name else text for name in around]
  return {"type": "TemplateProcessing", "single": single, "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
          "special_tokens": {name: {"id": name, "ids": [numbers[name]], "tokens": [name]} for name in around if name}}


# ------------------------------------------------------------------------------------------- a function of the text alone


def cut(direction, length, stride):
  return {"truncation": {"direction": direction, "max_length": length, "strategy": "LongestFirst", "stride": stride}}


def padded(direction, strategy, multiple):
  return {"padding": {"strategy": strategy, "direction": direction, "pad_to_multiple_of": multiple, "pad_id": 0,
                      "pad_type_id": 0, "pad_token": "<pad>"}}


@pytest.mark.parametrize("change", [
    cut("Right", 16, 0), cut("Left", 33, 8), padded("Right", {"Fixed": 900}, None), padded("Left", "BatchLongest", 512),
    {**cut("Left", 5, 1), **padded("Left", {"Fixed": 700}, 8)}, "adds", "dropout"], ids=str)
def test_ids_follow_from_the_text_alone(learnt, tmp_path, change):
  plain = tokenizers.load(written(tmp_path / "plain", learnt))
  if change == "adds":
    change = {"post_processor": template(learnt, "</s>", None, "</s>")}
  if change == "dropout":
    change = {"model": {**learnt["model"], "dropout": 0.5}}
  other = written(tmp_path / "other", {**learnt, **change})
  want = library.Tokenizer.from_str(json.dumps(learnt)).encode(TEXT).ids
  assert any(library.Tokenizer.from_file(other).encode(TEXT).ids != want for _ in range(3))  # the library follows the file
  loaded = tokenizers.load(other)
  for _ in range(3):
    np.testing.assert_array_equal(loaded.encode(TEXT), want)
  np.testing.assert_array_equal(plain.encode(TEXT), want)
  assert loaded.digest == plain.digest  # so a run may go on with either


# ---------------------------------------------------------------------------------------------------- control tokens


def byte_level(learnt):
  return learnt


def end_is_not_special(learnt):
  return {**learnt, "added_tokens": [{**token, "special": False} for token in learnt["added_tokens"]]}


def normalised_controls(learnt):
  return {**learnt, "normalizer": {"type": "NFC"},
          "added_tokens": [{**token, "normalized": True, "lstrip": True} for token in learnt["added_tokens"]]}


def whole_words(learnt):
  """WordLevel looks words up, and </s> between spaces is one."""
  words = ["<unk>", "</s>", "<pad>", "price", "now", "and", "then", "end", "plain", "text,"]
  return {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
          "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"}}


def pieces(learnt):
  """Unigram prefers the piece with the best score, which control tokens have."""
  letters = sorted(set(SPELLED + TEXT))
  vocabulary = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["<pad>", 0.0], ["<|endoftext|>", 0.0]]
  return {"version": "1.0", "added_tokens": [{"id": 2, "content": "</s>", **CONTROL}],
          "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary + [[letter, -5.0] for letter in letters]}}


def word_pieces(learnt):
  vocabulary = ["[UNK]", "[PAD]", "</s>", *sorted(set(SPELLED)), *("##" + letter for letter in sorted(set(SPELLED)))]
  padding = {"id": 1, "content": "[PAD]", **CONTROL}
  return {"version": "1.0", "added_tokens": [padding], "pre_tokenizer": {"type": "WhitespaceSplit"},
          "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": 100, "vocab": {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}}}


def merged(learnt):
  """A BPE without a pre-tokenizer whose merges make </s> out of text."""
  letters = sorted(set(SPELLED + TEXT))
  vocabulary = ["<unk>", "</s>", *letters, "</", "s>"]
  return {"version": "1.0", "added_tokens": [{"id": 1, "content": "</s>", **CONTROL}],
          "model": {"type": "BPE", "unk_token": "<unk>", "vocab": {piece: i for i, piece in enumerate(vocabulary)},
                    "merges": [["<", "/"], ["s", ">"], ["</", "s>"]]}}


KINDS = [byte_level, end_is_not_special, normalised_controls, whole_words, pieces, word_pieces, merged]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [SPELLED, "</s>", "a </s> b", "</s></s>", "x<pad>", "now </s> [PAD] <s> end"])
def test_control_ids_never_come_out_of_text(learnt, tmp_path, kind, text):
  path = written(tmp_path, kind(learnt))
  loaded, plain = tokenizers.load(path), library.Tokenizer.from_file(path)
  ids = loaded.encode(text)
  numbers = plain.get_vocab(with_added_tokens=True)
  unknown = numbers.get("<unk>", numbers.get("[UNK]")) if kind in (whole_words, word_pieces, pieces, merged) else None
  controls = {numbers[name] for name in ("</s>", "<s>", "<pad>", "[PAD]", "<|endoftext|>") if name in numbers}
  assert not controls - {unknown} & set(ids.tolist())
  assert loaded.eos == numbers["</s>"] and loaded.eos not in ids
  if kind in (byte_level, end_is_not_special, normalised_controls):
    assert loaded.decode(ids) == text
    assert loaded.decode([loaded.eos, *ids, loaded.eos]) == text
  if kind is not word_pieces and "</s>" in text.split():  # the library makes it the end of a document
    assert numbers["</s>"] in plain.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_has_the_librarys_ids(learnt, tmp_path, kind):
  path = written(tmp_path, kind(learnt))
  for text in ("plain text, and then the end", "price 20 now", "numbers 12345.", ""):
    want = library.Tokenizer.from_file(path).encode(text, add_special_tokens=False).ids
    np.testing.assert_array_equal(tokenizers.load(path).encode(text), want)


def test_added_tokens_that_are_text_stay_tokens(learnt, tmp_path):
  spaces = {"id": len(learnt["model"]["vocab"]), "content": " " * 9, **CONTROL, "special": False}
  loaded = tokenizers.load(written(tmp_path, {**learnt, "added_tokens": learnt["added_tokens"] + [spaces]},
                                   {"eos_token": "</s>", "pad_token": "!"}))  # as GPT-2's and CLIP's users do
  assert loaded.encode("a" + " " * 9 + "b").tolist().count(spaces["id"]) == 1
  assert loaded.decode(loaded.encode("wow!" + " " * 9 + "x!")) == "wow!" + " " * 9 + "x!"
  assert len(loaded.encode("!")) == 1


# ---------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("hole", [7, 1000])
@pytest.mark.parametrize("of_vocabulary", [True, False])
def test_ids_with_a_hole(learnt, tmp_path, hole, of_vocabulary):
  """The end of a document has an id beyond a hole, in the vocabulary or as an added token only."""
  number = len(learnt["model"]["vocab"]) + hole
  model = {**learnt["model"], "vocab": {name: i for name, i in learnt["model"]["vocab"].items() if name != "</s>"}}
  if of_vocabulary:
    model["vocab"]["</s>"] = number
  end = {"id": number, "content": "</s>", **CONTROL}
  content = {**learnt, "model": model, "added_tokens": [learnt["added_tokens"][0], end]}
  loaded = tokenizers.load(written(tmp_path, content))
  assert loaded.eos == number and loaded.vocab_size == number + 1
  assert library.Tokenizer.from_str(json.dumps(content)).get_vocab_size() < number  # the count is no bound of the ids
  assert loaded.token(number) == "</s>" and loaded.token(number - 1) is None
  assert loaded.decode([number - 1, *loaded.encode(SPELLED), number]) == SPELLED


def test_ids_that_the_library_would_change_are_refused(learnt, tmp_path):
  content = json.loads(json.dumps(pieces(learnt)))
  content["added_tokens"].append({"id": 500, "content": "<x>", **CONTROL})
  with pytest.raises(DataError, match=r"the added token with id 500 would get id \d+"):
    tokenizers.load(written(tmp_path, content))


# -------------------------------------------------------------------------------------------------- beginning and end


def with_bos(learnt):
  number = len(learnt["model"]["vocab"])
  model = {**learnt["model"], "vocab": {**learnt["model"]["vocab"], "<s>": number, "<|im_end|>": number + 1}}
  added = [{"id": number, "content": "<s>", **CONTROL}, {"id": number + 1, "content": "<|im_end|>", **CONTROL}]
  return {**learnt, "model": model, "added_tokens": learnt["added_tokens"] + added}


@pytest.mark.parametrize("settings, knob, frame, bos, eos", [
    (None, "", None, "</s>", "</s>"),
    ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, "", None, "<s>", "</s>"),
    ({"bos_token": {"content": "<s>"}, "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True}, "", None, "<s>",
     "<|im_end|>"),
    ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, "", ("<s>", None), "</s>", "</s>"),
    ({"bos_token": "<s>", "eos_token": "</s>"}, "", ("<s>", None, "</s>"), "<s>", "</s>"),
    ({"bos_token": "<s>"}, "", (None, "</s>"), "</s>", "</s>"),  # only an end is added
    (None, "", ("<s>", None), "<s>", "</s>"),
    ({"bos_token": "<s>", "add_bos_token": True}, "</s>", None, "</s>", "</s>"),
    (None, "<pad>", None, "<pad>", "</s>"),
    ({"bos_token": None, "eos_token": "<|im_end|>"}, "", None, "<|im_end|>", "<|im_end|>"),
])
def test_beginning_and_end_are_the_tokenizers_own(learnt, tmp_path, settings, knob, frame, bos, eos):
  content = with_bos(learnt)
  if frame:
    content["post_processor"] = template(content, *frame)
  loaded = tokenizers.load(written(tmp_path, content, settings), knob)
  assert (loaded.token(loaded.bos), loaded.token(loaded.eos)) == (bos, eos)
  assert repr(bos) in tokenizers.described(loaded) and loaded.bos_source in tokenizers.described(loaded)
  assert loaded.bos not in loaded.encode(SPELLED) and loaded.eos not in loaded.encode(SPELLED + "<|im_end|>")


@pytest.mark.parametrize("settings, knob, message", [
    ({"eos_token": "<end>"}, "", "names '<end>' as eos_token, but .* has no such token"),
    ({"bos_token": "<begin>", "add_bos_token": True}, "", "names '<begin>' as bos_token"),
    (None, "<begin>", "Data.bos = '<begin>' is no token"),
])
def test_a_token_that_is_not_there(learnt, tmp_path, settings, knob, message):
  with pytest.raises(DataError, match=message):
    tokenizers.load(written(tmp_path, learnt, settings), knob)
  with pytest.raises(DataError, match="the byte tokenizer has no named tokens"):
    tokenizers.load("byte", "<s>")


@pytest.fixture
def domain(tmp_path) -> config.Domain:
  documents = [Document(f"{TEXT[:i]}.", "d", str(i)) for i in range(20, 60)]
  records.write_domain(tmp_path / "domain", {"train": documents, "validation": documents[:4]})
  return config.Domain(name="d", path=str(tmp_path / "domain"))


def loader(domain, tokenizer: str, **changes) -> pipeline.Loader:
  data = config.Data(domains=(domain,), batch_sequences=2, sequence_tokens=64, tokenizer=tokenizer, **changes)
  return pipeline.Loader(data, 0)


def test_documents_begin_with_bos_everywhere(learnt, tmp_path, domain):
  path = written(tmp_path, with_bos(learnt), {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
  tokenizer = tokenizers.load(path)
  record = Document("plain", "d", "x").encode()
  tokens = rows._tokenize(tokenizer, record)
  assert tokens["inputs"][0] == tokenizer.bos != tokenizer.eos == tokens["targets"][-1]
  inputs, _, _, positions = next(loader(domain, path, packing="best_fit"))
  assert set(inputs[(positions == 0) & (inputs > 0)]) == {tokenizer.bos}
  assert set(next(loader(domain, path, packing="best_fit", bos="</s>"))[0][:, 0]) == {tokenizer.eos}
  for window, _ in evaluation.batches(domain.path, "validation", tokenizer, 64, 2):
    begins = (window.positions == 0) & (window.segment_ids > 0)
    assert set(window.inputs[begins]) == {tokenizer.bos}
    assert tokenizer.bos not in window.targets


# -------------------------------------------------------------------------------------------------- whose tokenizer


def test_a_run_goes_on_with_the_same_tokenizer_elsewhere_and_no_other(learnt, tmp_path, domain):
  here = written(tmp_path / "here", learnt)
  first = loader(domain, here)
  next(first)
  state = first.state()
  want = next(first)
  (tmp_path / "there").mkdir()
  (tmp_path / "there" / "tokenizer.json").write_text(json.dumps(learnt, indent=3, sort_keys=True) + "\n")
  moved = loader(domain, str(tmp_path / "there" / "tokenizer.json"))
  moved.restore(state)
  for a, b in zip(next(moved), want, strict=True):
    np.testing.assert_array_equal(a, b)
  # Another one under the same name: two pieces have changed places.
  names = list(learnt["model"]["vocab"])
  swapped = dict(zip(names[:50] + [names[51], names[50]] + names[52:], range(len(names))))
  written(tmp_path / "here", {**learnt, "model": {**learnt["model"], "vocab": swapped}})
  with pytest.raises(DataError, match="the data changed since the checkpoint.*tokenizer"):
    loader(domain, here).restore(state)
  written(tmp_path / "here", learnt, {"bos_token": "<pad>", "add_bos_token": True})
  with pytest.raises(DataError, match="bos: 1 -> 0"):
    loader(domain, here).restore(state)


@pytest.mark.parametrize("settings", [None, {"eos_token": "<pad>", "bos_token": "</s>", "add_bos_token": True}])
def test_a_kept_tokenizer_is_the_same(learnt, tmp_path, settings):
  loaded = tokenizers.load(written(tmp_path / "a", learnt, settings))
  kept = tokenizers.load(tokenizers.save(loaded, tmp_path / "run" / "tokenizer"))
  assert (kept.digest, kept.eos, kept.bos, kept.vocab_size) == (loaded.digest, loaded.eos, loaded.bos, loaded.vocab_size)
  assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
  assert tokenizers.load(str(tmp_path / "run" / "tokenizer")).digest == loaded.digest  # a folder will do
  assert tokenizers.save(tokenizers.load("byte"), tmp_path / "bytes") == "byte"


# ------------------------------------------------------------------------------------------------------- what is lost


@pytest.mark.parametrize("change, text, example", [
    ({"normalizer": {"type": "Lowercase"}}, "Plain Text", "'Plain Text' comes back as 'plain text'"),
    ({"normalizer": {"type": "NFKC"}}, "half \u00bd", "'half \u00bd' comes back as 'half 1\u20442'"),
    ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, "  text ", "comes back as 'text'"),
    ("words", "plain text, lost", "comes back as"),
], ids=str)
def test_what_does_not_come_back_is_said(learnt, tmp_path, change, text, example):
  content = whole_words(learnt) if change == "words" else {**learnt, **change}
  lossy = tokenizers.load(written(tmp_path / "lossy", content))
  note = tokenizers.round_trip(lossy, ["text,"] * 2 + [text])
  assert "1 of 3 texts" in note and example in note and "not comparable" in note and "\n" not in note
  for lossless in (tokenizers.load(written(tmp_path / "plain", learnt)), tokenizers.load("byte")):
    assert tokenizers.round_trip(lossless, [text, SPELLED, "Ünïcode ∑ 漢字 🙂\r\n\x00"]) is None


@pytest.mark.parametrize("text", [
    "", "plain", "tabs\t and  spaces\n\n", "Ünïcode ∑ 漢字 🙂", "\x00\x7f", "\ufeffmark\r\r\n", SPELLED])
def test_our_tokenizers_are_lossless(learnt, tmp_path, text):
  for tokenizer in (tokenizers.ByteTokenizer(), tokenizers.load(written(tmp_path, learnt))):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and (ids < tokenizer.vocab_size).all() and tokenizer.eos not in ids
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text


def test_byte_ids_are_those_of_byt5():
  assert tokenizers.ByteTokenizer().encode("Aé").tolist() == [0x41 + 3, 0xC3 + 3, 0xA9 + 3]


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("content", [
    "", "{", "[]", "[1, 2]", "null", '{"model": {}}', '{"model": {"type": "BPE", "vocab": {}}}', "[" * 9999])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
  path = tmp_path / "bad.json"
  with pytest.raises(DataError, match="bad.json cannot be read"):
    tokenizers.load(str(path))
  path.write_text(content)
  with pytest.raises(DataError, match=r"tokenizer .*bad.json (cannot be read|holds a|has no end)"):
    tokenizers.load(str(path))


def test_a_damaged_config_beside_it(learnt, tmp_path):
  path = written(tmp_path, learnt)
  (tmp_path / "tokenizer_config.json").write_bytes(b'{"eos_token": "\xff')
  with pytest.raises(DataError, match="tokenizer_config.json cannot be read"):
    tokenizers.load(path)


def test_learning_refuses_what_cannot_be(tmp_path):
  with pytest.raises(DataError, match="--vocab_size=257 is below 258"):
    tokenizers.train_bpe([TEXT], 257, tmp_path / "small.json")
  (tmp_path / "file").write_text("")

  def unread():
    raise AssertionError("texts are read before the place is known to be writable")
    yield

  for place in (tmp_path / "file" / "t.json", tmp_path):
    with pytest.raises(DataError, match="the tokenizer cannot be written to"):
      tokenizers.train_bpe(unread() if place != tmp_path else [TEXT], 300, place)
  tokenizers.train_bpe([TEXT], 258, tmp_path / "new" / "t.json")
  assert tokenizers.load(str(tmp_path / "new" / "t.json")).vocab_size == 258
