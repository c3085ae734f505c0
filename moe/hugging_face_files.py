"""The files of a Hugging Face directory beside its tensors: config, tokenizer, chat template, settings of generation.

What `tools.import_hf` finds of them lies in `<run_dir>/hf`, as it was. A run that trains on from an import reads its tokenizer
there, and `tools.export_hf` takes everything else from the tokenizer's folder: so nothing is lost on the way, and what the
trainer does not understand (a chat template, a second end of turn) is still there at the end.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from typing import Any

from etils import epath
import tokenizers as hf_tokenizers

from moe import config
from moe import hugging_face
from moe import stored
from moe.data import tokenizers
from moe.errors import UserError

FOLDER = "hf"  # below a run directory

# Names below the directory. Weights are converted, code is not carried, and a model card describes the model that was.
_CARRIED = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
            "chat_template*", "additional_chat_templates/*", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
            "tekken.json", "LICENSE*", "NOTICE*")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def carry(source, target) -> list[str]:
  """Copies the files beside the tensors; the names that were there.

  Args:
    source: a Hugging Face directory, or the `hf` folder of a run.
    target: made where it is missing; files of these names are overwritten.
  """
  source, target = epath.Path(source), epath.Path(target)
  names = [path.name for path in source.iterdir() if not path.is_dir()]
  templates = source / "additional_chat_templates"
  if templates.is_dir():
    names += [f"{templates.name}/{path.name}" for path in templates.iterdir()]
  carried = [name for name in sorted(names) if any(fnmatch.fnmatchcase(name, pattern) for pattern in _CARRIED)]
  for name in carried:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_bytes((source / name).read_bytes())
  return carried


class Kept:
  """What is known of the Hugging Face model that a run came from, or of the one whose tokenizer it reads.

  Attributes:
    folder: where its files lie; None where there are none, or none that fit the run's tokenizer.
    config: its config.json, {} where there is none.
    descended: whether the run's parameters have the shapes of that model, so that its settings are the run's too.
    same: whether they mean the same too, so that its config.json describes the run as it stands.
    note: why a folder that was given is not taken; empty otherwise.
  """

  def __init__(self, run: config.Run, folder=None):
    self.folder, self.note = epath.Path(folder) if folder else None, ""
    if self.folder is not None and not self.folder.is_dir():
      raise UserError(f"{self.folder} is no directory of Hugging Face files")
    if self.folder is not None and not self._fits(run.data.tokenizer):
      self.note = f"the run's tokenizer {run.data.tokenizer!r} is not the one in {self.folder}: nothing is taken from there"
      self.folder = None
    self.config = self._json("config.json")
    self.descended = self.same = False
    if self.config.get("model_type") in hugging_face.FAMILIES:
      self._compare(run.model)

  def _fits(self, name: str) -> bool:
    if name == "byte" or not (self.folder / "tokenizer.json").exists():
      return name == "byte" and not (self.folder / "tokenizer.json").exists()  # an import without a tokenizer.json says 'byte'
    return tokenizers.load(name).digest == tokenizers.load(str(self.folder)).digest

  def _compare(self, model: config.Model) -> None:
    try:
      described = hugging_face.read_config(self.config)
    except UserError:  # of a model that we have no form for, whose tokenizer alone is used
      return
    sizes = (hugging_face.axis_sizes(model), model.num_layers, model.tie_embeddings)
    self.descended = sizes == (hugging_face.axis_sizes(described), described.num_layers, described.tie_embeddings)
    self.same = self.descended and hugging_face.same_model(model, described)

  def _json(self, name: str) -> dict[str, Any]:
    found = stored.read_json(self.folder / name) if self.folder else None
    if found is not None and not isinstance(found, dict):
      raise stored.Unreadable(f"{self.folder / name} holds a {type(found).__name__}, not an object")
    return found or {}

  @functools.cached_property
  def generation(self) -> dict[str, Any]:
    """generation_config.json of a model from which the run descends, else {}."""
    return self._json("generation_config.json") if self.descended else {}

  @functools.cached_property
  def tokenizer_config(self) -> dict[str, Any]:
    return self._json("tokenizer_config.json")

  def ids(self, tokenizer: tokenizers.Tokenizer) -> dict[str, int | list[int] | None]:
    """bos_token_id, eos_token_id and pad_token_id for config.json: as they were, else the tokenizer's own."""
    if self.descended:
      return {name: self.config[name] for name in _IDS if name in self.config}
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": self._pad(tokenizer)}

  def _pad(self, tokenizer: tokenizers.Tokenizer) -> int | None:
    if isinstance(tokenizer, tokenizers.ByteTokenizer):
      return 0
    token = _content(self.tokenizer_config.get("pad_token"))
    return _read(tokenizer.source).token_to_id(token) if token else None

  def stops(self, tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Ids of which each ends a text, as transformers takes them."""
    for settings in (self.generation, self.config if self.descended else {}):
      found = settings.get("eos_token_id")
      if found is not None:
        return tuple(found) if isinstance(found, list) else (found,)
    return (tokenizer.eos,)

  def start(self, tokenizer: tokenizers.Tokenizer) -> list[int]:
    """What stands before a text: what the trainer puts before a document, or, for an import, what transformers puts."""
    if self._raw is None:
      return [tokenizer.bos]
    if (self.tokenizer_config.get("tokenizer_class") or "").removesuffix("Fast") == "LlamaTokenizer":
      # The one class whose option outweighs tokenizer.json, in transformers 4; 5 takes the file alone.
      return [self.first(tokenizer)] if self.tokenizer_config.get("add_bos_token", True) else []
    return tokenizers.before_text(self._raw)

  def encode(self, text: str, tokenizer: tokenizers.Tokenizer, start: bool = True) -> list[int]:
    """The ids of a text for a model that is asked, as transformers gives them for an import: there `<turn>` in a prompt is the
    control token of that name, where training takes it for text; and a text that says its own beginning gets no second one."""
    ids = tokenizer.encode(text).tolist() if self._raw is None else self._raw.encode(text, add_special_tokens=False).ids
    before = self.start(tokenizer) if start else []
    return ids if before and ids[: len(before)] == before else before + ids

  @functools.cached_property
  def _raw(self) -> hf_tokenizers.Tokenizer | None:
    """An import's tokenizer as transformers uses it; None where the trainer's own says how texts are read."""
    if not self.descended or not (self.folder / "tokenizer.json").exists():
      return None
    raw = _read(self.folder / "tokenizer.json")
    raw.no_padding()
    raw.no_truncation()
    raw.encode_special_tokens = bool(self.tokenizer_config.get("split_special_tokens"))
    return raw

  def first(self, tokenizer: tokenizers.Tokenizer) -> int:
    """What an empty text begins with, even where nothing stands before others: transformers' bos_token, else eos."""
    named = _content(self.tokenizer_config.get("bos_token"))
    number = self._raw.token_to_id(named) if self._raw and named else None
    return tokenizer.bos if number is None else number


def of(run: config.Run, run_folder=None, given=None) -> Kept:
  """Looks at `given`, else at `<run_folder>/hf`, else beside the run's tokenizer.json, or the copy of it that the run keeps."""
  own = tokenizer_of(run, run_folder)
  places = [] if run_folder is None else [epath.Path(run_folder) / FOLDER]
  if own != "byte":
    places += [_folder_of(run.data.tokenizer), _folder_of(own)]
  run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=own))
  if given is not None:
    return Kept(run, given)
  found = [Kept(run, place) for place in places if place.is_dir()]
  return next((kept for kept in found if kept.folder is not None), found[0] if found else Kept(run))


def _folder_of(tokenizer: str) -> epath.Path:
  path = epath.Path(tokenizer).expanduser()
  return path if path.is_dir() else path.parent


def tokenizer_of(run: config.Run, run_folder=None) -> str:
  """The copy that a run keeps: the file that its config names may have changed, or be elsewhere."""
  if run.data.tokenizer == "byte" or run_folder is None:
    return run.data.tokenizer
  kept = epath.Path(run_folder) / "tokenizer" / "tokenizer.json"
  return str(kept) if kept.exists() else run.data.tokenizer


def name_of(tokenizer: tokenizers.Tokenizer, number: int) -> str:
  """The text that stands for an id in the files written here."""
  known = byte_tokenizer().id_to_token if isinstance(tokenizer, tokenizers.ByteTokenizer) else tokenizer.token
  return known(number)


def keep(run: config.Run, run_dir, init_from=None) -> Kept:
  """Copies what `of` finds into `<run_dir>/hf`, so that a run does not depend on the folder that it began from."""
  found = of(run, run_folder(init_from) if init_from else None)
  if found.folder is not None:
    carry(found.folder, epath.Path(run_dir) / FOLDER)
  return found


def run_folder(path) -> epath.Path | None:
  """The run directory that a path of a run, a checkpoint or an item of one lies in; None where it is of none.

  By the names alone: a damaged newest checkpoint, behind which a whole one lies, is the reader's to pass over.
  """
  path = stored.absolute(path)
  if (path / "checkpoints").is_dir():
    return path
  return next((folder.parent for folder in (path, path.parent, path.parent.parent) if folder.name == "checkpoints"), None)


# ------------------------------------------------------------------------------------------------------------- writing


def write_beside(run: config.Run, kept: Kept, tokenizer: tokenizers.Tokenizer, folder: epath.Path) -> None:
  """Everything beside tensors and config.json: as an import had it, else written for the run's tokenizer."""
  if kept.folder is not None:
    settings = (folder / "config.json").read_bytes()
    carry(kept.folder, folder)
    (folder / "config.json").write_bytes(settings)
  if kept.descended:
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
      _write_tokenizer_config(_read(folder / "tokenizer.json"), tokenizer, kept, folder)
    return
  ids = {name: value for name, value in kept.ids(tokenizer).items() if value is not None}
  if tokenizer.vocab_size < run.model.vocab_size:
    # The padding of the embedding table was never a target, and sampling here leaves it out.
    ids["suppress_tokens"] = list(range(tokenizer.vocab_size, run.model.vocab_size))
  (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
  _write_tokenizer(tokenizer, kept, folder)


def _write_tokenizer(tokenizer: tokenizers.Tokenizer, kept: Kept, folder: epath.Path) -> None:
  """tokenizer.json and tokenizer_config.json, by which `encode` gives what the trainer fed: bos, then the tokens of the text.

  Every tokenizer is written as a tokenizer.json, ours of bytes too: AutoTokenizer then opens it with PreTrainedTokenizerFast
  whatever family stands in config.json, and so do servers that know no ByT5Tokenizer.
  """
  is_byte = isinstance(tokenizer, tokenizers.ByteTokenizer)
  written = byte_tokenizer() if is_byte else _read(tokenizer.source)
  written.no_padding()
  written.no_truncation()
  if tokenizers.before_text(written) != [tokenizer.bos]:
    first = name_of(tokenizer, tokenizer.bos)
    written.post_processor = hf_tokenizers.processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, tokenizer.bos)])
  (folder / "tokenizer.json").write_text(written.to_str(pretty=True))
  _write_tokenizer_config(written, tokenizer, kept, folder)


def _write_tokenizer_config(written: hf_tokenizers.Tokenizer, tokenizer: tokenizers.Tokenizer, kept: Kept,
                            folder: epath.Path) -> None:
  """tokenizer_config.json for a tokenizer.json that says by itself what stands before a text."""
  described = {key: value for key, value in kept.tokenizer_config.items()
               if key not in ("add_bos_token", "add_eos_token", "auto_map", "tokenizer_file")}
  described |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name_of(tokenizer, tokenizer.eos),
                "clean_up_tokenization_spaces": False}
  if tokenizers.before_text(written) == [tokenizer.bos]:
    described["bos_token"] = name_of(tokenizer, tokenizer.bos)
  if isinstance(tokenizer, tokenizers.ByteTokenizer):
    described |= {"pad_token": "<pad>", "unk_token": "<unk>"}
  templated = "chat_template" in described or (folder / "chat_template.jinja").exists()
  if not kept.descended and not templated:
    # The trainer never takes `</s>` in a text for the end of one; templates need such tokens to be spelled.
    described["split_special_tokens"] = True
  (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")


def byte_tokenizer() -> hf_tokenizers.Tokenizer:
  """`tokenizers.ByteTokenizer` in the form of the library: a byte-level BPE without merges, byte b being id b + 3."""
  letters = _letters()
  vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{letters[byte]: byte + 3 for byte in range(256)}}
  made = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
  made.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = hf_tokenizers.decoders.ByteLevel()
  made.add_special_tokens(["<pad>", "</s>", "<unk>"])
  return made


def _letters() -> dict[int, str]:
  """The letter by which a byte-level tokenizer writes each byte (GPT-2): printable ones as they are, the others from 256 on."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = [byte for byte in range(256) if byte not in printable]
  return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _read(path) -> hf_tokenizers.Tokenizer:
  try:
    return hf_tokenizers.Tokenizer.from_str(epath.Path(path).read_text())
  except Exception as error:  # the library raises bare Exception
    raise stored.Unreadable(f"{path} is no tokenizer.json: {error}") from error


def _content(token) -> str | None:
  """A token of tokenizer_config.json: its text, or an object that holds it."""
  return token.get("content") if isinstance(token, dict) else token
