"""Text to ids: bytes in the ByT5 layout, or a Hugging Face byte-level BPE."""

from __future__ import annotations

import pathlib
from typing import Protocol
from collections.abc import Iterable

from etils import epath
import numpy as np
import tokenizers as hf_tokenizers

from moe.data.records import DataError

# Names of the end-of-document token in common files.
_END = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>")


class Tokenizer(Protocol):
  vocab_size: int  # ids are below it
  eos: int  # ends a document, and stands before its first token

  def encode(self, text: str) -> np.ndarray:
    """[n] int32, without eos."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids; special ids give nothing."""


class ByteTokenizer:
  """Bytes of the UTF-8 text, shifted by 3: pad 0, eos 1, unk 2 (ByT5, arXiv 2105.13626).

  >>> ByteTokenizer().encode("A").tolist()
  [68]
  """

  vocab_size = 259
  eos = 1

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3

  def decode(self, ids) -> str:
    return bytes(int(i) - 3 for i in ids if 3 <= int(i) < 259).decode(errors="replace")


class BpeTokenizer:
  """A `tokenizer.json` of the Hugging Face tokenizers library."""

  def __init__(self, path: str):
    try:
      self._tokenizer = hf_tokenizers.Tokenizer.from_str(epath.Path(path).read_text())
    except Exception as error:  # the library raises bare Exception
      raise DataError(f"tokenizer {path} cannot be read: {error}; give 'byte' or the path of a tokenizer.json") from error
    self.vocab_size = self._tokenizer.get_vocab_size()
    found = [self._tokenizer.token_to_id(name) for name in _END if self._tokenizer.token_to_id(name) is not None]
    if not found:
      raise DataError(f"tokenizer {path} has no end-of-document token; one of {', '.join(_END)} must be in it")
    self.eos = found[0]

  def encode(self, text: str) -> np.ndarray:
    return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def token(self, number: int) -> str:
    """The text that stands for an id, special ones included."""
    return self._tokenizer.id_to_token(number)

  def decode(self, ids) -> str:
    return self._tokenizer.decode([int(i) for i in ids if int(i) < self.vocab_size])


def load(name: str) -> Tokenizer:
  """`byte`, or the path of a tokenizer.json.

  Raises:
    DataError
  """
  return ByteTokenizer() if name == "byte" else BpeTokenizer(name)


def train_bpe(texts: Iterable[str], vocab_size: int, path: pathlib.Path) -> None:
  """Learns a lossless byte-level BPE and writes its tokenizer.json."""
  tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
  tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf_tokenizers.decoders.ByteLevel()
  trainer = hf_tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=["<pad>", "</s>"], show_progress=False,
      initial_alphabet=hf_tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(str(path))
