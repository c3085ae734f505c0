"""Text to ids: bytes in the ByT5 layout, or a `tokenizer.json` of Hugging Face, as a function of the text alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
from typing import Any, Protocol
from collections.abc import Iterable

from etils import epath
import numpy as np
import tokenizers as hf_tokenizers

from moe.data.records import DataError
from moe.errors import storage_errors

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# Names of the end-of-document token in common files, where no tokenizer_config.json says which one it is.
_END = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]", "<|eos|>")
# What a vocabulary may hold under these names is never text, even where the file does not mark it as special.
_CONTROL = (*_END, "<s>", "<bos>", "[BOS]", "<|bos|>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<pad>", "[PAD]",
            "<|pad|>", "<unk>", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<mask>")
_EXAMPLE = 40  # characters on each side, of a text that does not come back
_MIN_BPE = 258  # the 256 bytes, padding and end of document


class Tokenizer(Protocol):
  vocab_size: int  # the largest id + 1: ids are below it, and there may be holes
  eos: int  # ends a document
  bos: int  # stands before a document's first token
  digest: str  # of what the ids of a text depend on, wherever the file lies

  def encode(self, text: str) -> np.ndarray:
    """[n] int32, of any text; no control id such as eos, bos or padding."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids; control ids give nothing."""


class ByteTokenizer:
  """Bytes of the UTF-8 text, shifted by 3: pad 0, eos 1, unk 2 (ByT5, arXiv 2105.13626).

  >>> ByteTokenizer().encode("A").tolist()
  [68]
  """

  vocab_size = 259
  eos = bos = 1
  digest = "byte"

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3

  def decode(self, ids) -> str:
    return bytes(int(i) - 3 for i in ids if 3 <= int(i) < 259).decode(errors="replace")


class BpeTokenizer:
  """A `tokenizer.json` of the Hugging Face tokenizers library.

  What the file says about truncation, padding, dropout and tokens to add is left out, so that ids follow from the text alone.
  Control tokens are given names that no text spells: `</s>` in a page of HTML is five characters of text.
  """

  def __init__(self, path: str, bos: str = ""):
    """Reads it, and the tokenizer_config.json beside it where there is one.

    Args:
      path: of a tokenizer.json, or of a folder with one.
      bos: the token that stands before a document; empty: the tokenizer's own, else its end-of-document token.

    Raises:
      DataError: unreadable, no end-of-document token, or no such bos.
    """
    self.source = _located(path)
    self._text = _read(self.source)
    self._config_text = _read(self.source.parent / _CONFIG, optional=True)
    content = _parsed(self.source, self._text)
    settings = _parsed(self.source.parent / _CONFIG, self._config_text) if self._config_text else {}
    _loaded(self.source, content)  # tells whether it is one
    plain = _of_text_alone(content)
    self.digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    numbers = _numbers(content)
    self._names = {number: name for name, number in numbers.items()}
    self.vocab_size = max(self._names, default=-1) + 1
    self.eos, self.eos_source = self._end(settings, numbers)
    self.bos, self.bos_source = self._beginning(bos, settings, content, numbers)
    controls = _control_names(content, settings, numbers) | {self._names[self.eos], self._names[self.bos]}
    prepared = _unspellable(plain, controls, numbers, self.digest)
    self._tokenizer = _loaded(self.source, prepared)
    self._tokenizer.encode_special_tokens = True
    _check_numbers(self.source, self._tokenizer, prepared)

  def _end(self, settings: dict, numbers: dict[str, int]) -> tuple[int, str]:
    named = _name(settings.get("eos_token"))
    if named is not None:
      if named not in numbers:
        raise DataError(f"{self.source.parent / _CONFIG} names {named!r} as eos_token, but {self.source} has no such token")
      return numbers[named], f"eos_token of {_CONFIG}"
    for name in _END:
      if name in numbers:
        return numbers[name], f"its name {name}"
    raise DataError(f"tokenizer {self.source} has no end-of-document token; one of {', '.join(_END)} must be in it, or a "
                    f"{_CONFIG} beside it must name one as eos_token")

  def _beginning(self, wanted: str, settings: dict, content: dict, numbers: dict[str, int]) -> tuple[int, str]:
    if wanted:
      if wanted not in numbers:
        raise DataError(f"Data.bos = {wanted!r} is no token of {self.source}; leave it empty for the tokenizer's own")
      return numbers[wanted], "Data.bos"
    named, added = _name(settings.get("bos_token")), settings.get("add_bos_token")
    if added and named is not None:
      if named not in numbers:
        raise DataError(f"{self.source.parent / _CONFIG} names {named!r} as bos_token, but {self.source} has no such token")
      return numbers[named], f"bos_token of {_CONFIG}"
    # Where no word is said about it, what the file's post_processor puts before a text tells.
    if added is None and content.get("post_processor"):
      whole = _loaded(self.source, {**content, "truncation": None, "padding": None})
      before = before_text(whole)
      if len(before) == 1:
        return numbers[whole.id_to_token(before[0])], f"the post_processor of {_FILE}"
    return self.eos, "the end-of-document token"

  def encode(self, text: str) -> np.ndarray:
    return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def token(self, number: int) -> str | None:
    """The text that stands for an id, control tokens included; None where there is no such id."""
    return self._names.get(int(number))

  def decode(self, ids) -> str:
    return self._tokenizer.decode([int(i) for i in ids if int(i) in self._names])

  def save(self, folder) -> epath.Path:
    """Writes the files as they were read; gives the path to load it from."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(self._text)
    if self._config_text:
      (folder / _CONFIG).write_text(self._config_text)
    return folder / _FILE


def load(name: str, bos: str = "") -> Tokenizer:
  """`byte`, or the path of a tokenizer.json; `bos` as config.Data.bos.

  Raises:
    DataError
  """
  if name != "byte":
    return BpeTokenizer(name, bos)
  if bos:
    raise DataError(f"Data.bos = {bos!r}, but the byte tokenizer has no named tokens; leave it empty")
  return ByteTokenizer()


def save(tokenizer: Tokenizer, folder) -> str:
  """Keeps a tokenizer's files in a folder, which may be gs://; gives the name to `load` it by.

  Raises:
    OSError: the folder cannot be written.
  """
  return "byte" if isinstance(tokenizer, ByteTokenizer) else str(tokenizer.save(folder))


def described(tokenizer: Tokenizer) -> str:
  """Which tokens end and begin a document, and who says so, in one line."""
  if isinstance(tokenizer, ByteTokenizer):
    return "byte tokenizer: 259 ids, documents end and begin with id 1"
  return (f"{tokenizer.source}: {tokenizer.vocab_size} ids, documents end with {tokenizer.token(tokenizer.eos)!r} "
          f"(id {tokenizer.eos}, by {tokenizer.eos_source}) and begin with {tokenizer.token(tokenizer.bos)!r} "
          f"(id {tokenizer.bos}, by {tokenizer.bos_source})")


def round_trip(tokenizer: Tokenizer, texts: Iterable[str], most: int = 64) -> str | None:
  """What a tokenizer does not give back of some texts, in one line with an example; None where all of them come back.

  Args:
    tokenizer: to try.
    texts: of the corpus; the first `most` are tried.
    most: texts, at most.
  """
  tried, lost, example = 0, 0, ""
  for text in itertools.islice(texts, most):
    tried += 1
    back = tokenizer.decode(tokenizer.encode(text))
    if back != text:
      lost += 1
      example = example or _difference(text, back)
  if not lost:
    return None
  return (f"the tokenizer does not give back {lost} of {tried} texts ({example}), so bits per byte leave out what it loses and "
          "are not comparable with those of other tokenizers or of gzip")


def _difference(text: str, back: str) -> str:
  at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
  begin = max(at - _EXAMPLE // 4, 0)
  return f"{text[begin : begin + _EXAMPLE]!r} comes back as {back[begin : begin + _EXAMPLE]!r}"


def before_text(tokenizer: hf_tokenizers.Tokenizer) -> list[int]:
  """What the file's own post-processor puts before a text."""
  text = tokenizer.encode("a", add_special_tokens=False).ids
  framed = tokenizer.encode("a", add_special_tokens=True).ids
  return next((framed[:i] for i in range(len(framed)) if framed[i : i + len(text)] == text), [])


def train_bpe(texts: Iterable[str], vocab_size: int, path: pathlib.Path) -> None:
  """Learns a lossless byte-level BPE and writes its tokenizer.json.

  Raises:
    DataError: vocab_size has no room for the bytes, or the file cannot be written.
  """
  if vocab_size < _MIN_BPE:
    raise DataError(f"--vocab_size={vocab_size} is below {_MIN_BPE}: the 256 bytes, padding and the end of a document")
  tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
  tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf_tokenizers.decoders.ByteLevel()
  trainer = hf_tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=["<pad>", "</s>"], show_progress=False,
      initial_alphabet=hf_tokenizers.pre_tokenizers.ByteLevel.alphabet())
  path = pathlib.Path(path).expanduser()
  try:
    # Opened before it learns for minutes, so that a place that cannot be written is told first.
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    with open(scratch, "w", encoding="utf-8") as file:
      tokenizer.train_from_iterator(texts, trainer)
      file.write(tokenizer.to_str(pretty=True))
    scratch.replace(path)
  except OSError as error:
    raise DataError(f"the tokenizer cannot be written to {path}: {error.strerror or error}") from error


# --------------------------------------------------------------------------------------------- the content of a file


def _located(path: str) -> epath.Path:
  place = epath.Path(path).expanduser()
  try:
    return place / _FILE if place.is_dir() else place
  except (*storage_errors(), ImportError):
    return place  # reading it tells what is wrong


def _read(path: epath.Path, optional: bool = False) -> str:
  try:
    if optional and not path.exists():
      return ""
    return path.read_text(encoding="utf-8")
  except (*storage_errors(), ImportError, UnicodeDecodeError) as error:
    raise DataError(f"tokenizer {path} cannot be read: {error}; give 'byte' or the path of a {_FILE}") from error


def _parsed(path: epath.Path, text: str) -> dict[str, Any]:
  try:
    content = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise DataError(f"tokenizer {path} cannot be read: {error}; give 'byte' or the path of a {_FILE}") from error
  if not isinstance(content, dict):
    raise DataError(f"tokenizer {path} holds a {type(content).__name__}, not an object; give 'byte' or the path of a {_FILE}")
  return content


def _loaded(path, content: dict[str, Any]) -> hf_tokenizers.Tokenizer:
  try:
    return hf_tokenizers.Tokenizer.from_str(json.dumps(content))
  except Exception as error:  # the library raises bare Exception
    raise DataError(f"tokenizer {path} cannot be read: {error}; give 'byte' or the path of a {_FILE}") from error


def _numbers(content: dict[str, Any]) -> dict[str, int]:
  """Token -> id, of a file that the library reads."""
  vocabulary = content["model"]["vocab"]
  if isinstance(vocabulary, dict):
    numbers = dict(vocabulary)
  else:
    numbers = {name: number for number, (name, _) in enumerate(vocabulary)}
  return numbers | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}


def _check_numbers(path, tokenizer: hf_tokenizers.Tokenizer, prepared: dict[str, Any]) -> None:
  """The library numbers added tokens anew where the file's numbers do not suit it, and only logs it."""
  for token in prepared["added_tokens"]:
    found = tokenizer.token_to_id(token["content"])
    if found != token["id"]:
      raise DataError(f"tokenizer {path}: the added token with id {token['id']} would get id {found} in the tokenizers "
                      "library; ids of added tokens must be those of the vocabulary, or follow it")


def _name(token: Any) -> str | None:
  """The text of a token in a tokenizer_config.json: a string, or an object with its content."""
  return token.get("content") if isinstance(token, dict) else token


def _of_text_alone(content: dict[str, Any]) -> dict[str, Any]:
  """The file without what makes ids depend on anything but the text: lengths, chance, tokens to add."""
  model = {key: value for key, value in content["model"].items() if key not in ("dropout", "alpha", "nbest_size")}
  return {**content, "truncation": None, "padding": None, "post_processor": None, "model": model}


def _control_names(content: dict[str, Any], settings: dict[str, Any], numbers: dict[str, int]) -> set[str]:
  """Tokens that no text may become: those marked as special, and those that the files use as such.

  Added tokens that are not special (runs of spaces, for one) are text.
  """
  added = {token["content"]: token for token in content.get("added_tokens") or ()}
  names = {name for name, token in added.items() if token.get("special")}
  padding = content.get("padding") or {}
  roles = [_name(settings.get(role)) for role in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")]
  # A role may be given to an ordinary character ('!' as padding), which then stays text.
  names |= {name for name in (*roles, padding.get("pad_token")) if name in added}
  names |= {name for name in _CONTROL if name in numbers}
  return names & set(numbers)


def _unspellable(plain: dict[str, Any], controls: set[str], numbers: dict[str, int], digest: str) -> dict[str, Any]:
  """The file with other names for control tokens, in its vocabulary too: models look words up there (WordLevel), or prefer
  them (Unigram). U+FFFE is no character, and the digest makes it a name that nobody writes by chance."""
  renamed = {name: f"\ufffe{digest[:16]}:{numbers[name]}\ufffe" for name in controls}
  model = dict(plain["model"])
  vocabulary = model["vocab"]
  added = [token for token in plain.get("added_tokens") or () if token["content"] not in controls]
  if isinstance(vocabulary, dict):
    # With all added tokens, so that the library keeps ids that leave a hole.
    model["vocab"] = {renamed.get(name, name): number for name, number in vocabulary.items()}
    model["vocab"] |= {token["content"]: token["id"] for token in added} | {renamed[name]: numbers[name] for name in controls}
  else:
    model["vocab"] = [[renamed.get(name, name), score] for name, score in vocabulary]
  if model.get("unk_token") in renamed:
    model["unk_token"] = renamed[model["unk_token"]]
  if model.get("merges"):
    # A merge that has a control token as a part or a result would look its old name up.
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & controls]
  marked = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
  added += [{"id": numbers[name], "content": renamed[name], **marked} for name in controls]
  return {**plain, "model": model, "added_tokens": sorted(added, key=lambda token: token["id"])}
