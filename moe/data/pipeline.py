"""The training loader: documents -> shuffled -> tokenised -> packed -> mixed -> batches, with exact state.

The batch is cut into a fixed number of virtual shards. Each has its own documents, packers and state, and each host
owns an equal run of them, so the sequence of global batches is the same for any number of hosts that divides them.
grain's experimental packers are imported here and nowhere else.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import grain
from grain import experimental
import numpy as np

from moe import config
from moe.data import embedded
from moe.data import records
from moe.data import tokenizers
from moe.data.records import DataError

_KEYS = ("inputs", "targets", "inputs_segment_ids", "inputs_positions")
_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # reading in threads is three times slower here
_PACKING_BINS = 64  # open rows of a best-fit packer; 97% full at 64


class Loader:
  """An endless iterator over this host's part of the global batches.

  `next()` gives a tuple (inputs, targets, segment_ids, positions), each [B / hosts, S] int32. Targets follow inputs
  within a document; the first input of a document is the end-of-document id. A row holds documents of one domain.
  """

  def __init__(self, data: config.Data, seed: int, host: int = 0, hosts: int = 1):
    """Opens the files.

    Raises:
      DataError: unreadable data.
      config.ConfigError: the virtual shards do not split over the hosts.
    """
    if data.virtual_shards % hosts:
      raise config.ConfigError(f"Data.virtual_shards = {data.virtual_shards} does not split over {hosts} hosts")
    self._tokenizer = tokenizers.load(data.tokenizer)
    owned = data.virtual_shards // hosts
    self._shards = range(host * owned, (host + 1) * owned)
    self._fingerprint = _fingerprint(data, seed, self._tokenizer)
    self._iterators = [iter(_virtual_shard(data, seed, self._tokenizer, v)) for v in self._shards]

  @property
  def vocab_size(self) -> int:
    return self._tokenizer.vocab_size

  def __iter__(self):
    return self

  def __next__(self) -> tuple[np.ndarray, ...]:
    try:
      parts = [next(iterator) for iterator in self._iterators]
    except RuntimeError as error:
      raise DataError(f"training data cannot be read: {error}") from error
    return tuple(np.concatenate([part[key] for part in parts]).astype(np.int32) for key in _KEYS)

  def state(self) -> dict[str, Any]:
    """This host's position as plain JSON values: {"fingerprint", "shards": {index: state}}."""
    return {"fingerprint": self._fingerprint,
            "shards": {str(v): json.loads(json.dumps(it.get_state())) for v, it in zip(self._shards, self._iterators)}}

  def restore(self, state: dict[str, Any]) -> None:
    """Continues bit-exactly after `state`, which may come from another number of hosts (merge their shards).

    Raises:
      DataError: the data config or the files are not those of the state, or it is damaged.
    """
    changed = config.differences(state.get("fingerprint"), json.loads(json.dumps(self._fingerprint)))
    if changed:
      raise DataError("the data changed since the checkpoint, so its position means nothing: " + "; ".join(changed)
                      + " (start afresh with --init_from to keep only the parameters)")
    for v, iterator in zip(self._shards, self._iterators):
      try:
        iterator.set_state(_exact(state["shards"][str(v)]))
      except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"the saved position of virtual shard {v} is damaged: {error!r}") from error


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
  """One state that any host can restore from, out of the hosts' own."""
  return {"fingerprint": states[0]["fingerprint"], "shards": {k: v for s in states for k, v in s["shards"].items()}}


def _virtual_shard(data: config.Data, seed: int, tokenizer, shard: int) -> grain.IterDataset:
  rows = [_rows(data, domain, seed + i, tokenizer, shard) for i, domain in enumerate(data.domains)]
  mixed = rows[0]
  if len(rows) > 1:
    mixed = grain.IterDataset.mix(rows, [domain.weight for domain in data.domains])
  return mixed.batch(data.batch_sequences // data.virtual_shards, drop_remainder=True)


def _rows(data: config.Data, domain: config.Domain, seed: int, tokenizer, shard: int) -> grain.IterDataset:
  """Packed rows of one domain for one virtual shard, without end."""
  source = records.open_split(embedded.resolve(domain.path), "train")
  documents = grain.MapDataset.source(source).seed(seed).shuffle().repeat()[shard :: data.virtual_shards]
  tokens = documents.map(functools.partial(_tokenize, tokenizer)).to_iter_dataset(_READ)
  lengths = {"inputs": data.sequence_tokens, "targets": data.sequence_tokens}
  if data.packing == "concat":
    return experimental.ConcatThenSplitIterDataset(tokens, length_struct=lengths)
  pieces = experimental.FlatMapIterDataset(tokens, _Pieces(data.sequence_tokens))
  return experimental.BestFitPackIterDataset(pieces, length_struct=lengths, num_packing_bins=_PACKING_BINS, seed=seed)


def _tokenize(tokenizer, record: bytes) -> dict[str, np.ndarray]:
  ids = tokenizer.encode(records.Document.decode(record).text)
  return {"inputs": np.concatenate([[tokenizer.eos], ids]).astype(np.int32),
          "targets": np.concatenate([ids, [tokenizer.eos]]).astype(np.int32)}


class _Pieces(experimental.FlatMapTransform):
  """Cuts a document into pieces of at most one row, which best-fit packing wants."""

  max_fan_out = 1 << 20

  def __init__(self, length: int):
    self._length = length

  def flat_map(self, element):
    total = len(element["inputs"])
    return [{k: v[i : i + self._length] for k, v in element.items()} for i in range(0, total, self._length)]


def _fingerprint(data: config.Data, seed: int, tokenizer) -> dict[str, Any]:
  """All that the meaning of a position depends on. grain itself accepts a wrong state without a word."""
  def digests(path):
    manifest = records.read_manifest(embedded.resolve(path))
    return [entry["sha256"] for entry in manifest["splits"]["train"]["files"]]

  return {
      "domains": [[d.name, d.weight, digests(d.path)] for d in data.domains], "seed": seed,
      "batch_sequences": data.batch_sequences, "sequence_tokens": data.sequence_tokens, "packing": data.packing,
      "virtual_shards": data.virtual_shards, "tokenizer": data.tokenizer, "vocab_size": tokenizer.vocab_size,
      "grain": grain.__version__ if hasattr(grain, "__version__") else "",
  }


def _exact(state):
  """JSON turns the tuples of grain's concat packer into lists, which it then takes for other values: it would drop a
  document without a word. Turns them back."""
  if isinstance(state, dict):
    return {key: {name: tuple(cut) for name, cut in value.items()} if key == "remainder_slices" else _exact(value)
            for key, value in state.items()}
  return [_exact(item) for item in state] if isinstance(state, list) else state
