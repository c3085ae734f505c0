"""Virtual shards: endless streams of packed rows, mixed and shuffled, with exact state.

Row g of a run is row g // V of virtual shard g mod V. A shard has every V-th document of each domain's shuffled epochs, a
packer for each domain, and an order of its own:

    documents -> tokens -> packed rows of each domain -> mixed (mixture.py) -> shuffled within windows

All of it follows from the seed and the shard's number, so it does not matter which host opens a shard.
grain's experimental packers are imported here and nowhere else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
from grain import experimental
import numpy as np

from moe import config
from moe.data import embedded
from moe.data import mixture
from moe.data import records

VERSION = 2  # of the order of rows; a position of another version means nothing
WINDOW_BATCHES = 16  # rows are shuffled within as many batches, so that few rows of one document meet in one batch
FIELDS = ("inputs", "targets", "inputs_segment_ids", "inputs_positions")
_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # reading in threads is three times slower here
_PACKING_BINS = 64  # open rows of a best-fit packer, on average over the shards; 97% full at 64


class Order(NamedTuple):
  """What the order of rows depends on besides data and seed: fixed when a run begins, and kept with its position."""

  virtual_shards: int  # V
  window_rows: int  # W, rows of one shard that are shuffled together

  @classmethod
  def of(cls, data: config.Data) -> Order:
    """The order of a run that begins with this config."""
    shards = data.virtual_shards or data.batch_sequences
    rows_per_batch = -(-data.batch_sequences // shards)
    return cls(shards, WINDOW_BATCHES * rows_per_batch)

  def places(self, seed: int, shard: int, window: int) -> np.ndarray:
    """[window_rows] int64: which of the rows that fill a window is given out first, second, and so on."""
    return mixture.permutation(self.window_rows, seed, shard, window, 3)

  def rows_before(self, shard: int, position: int) -> int:
    """Rows of a shard among the first `position` rows of the run."""
    return max(-((shard - position) // self.virtual_shards), 0)


def domains_of(rows: range, order: Order, data: config.Data, seed: int) -> np.ndarray:
  """Which domain each of these rows of the run is of, [n] int64 indices into `data.domains`; nothing is read."""
  weights = tuple(domain.weight for domain in data.domains)
  places = functools.cache(order.places)  # rows of a batch share windows, and windows blocks
  blocks = functools.cache(functools.partial(mixture.block, weights, seed))
  found = np.zeros(len(rows), np.int64)
  for i, number in enumerate(rows):
    index, shard = divmod(number, order.virtual_shards)
    window, place = divmod(index, order.window_rows)
    filled = window * order.window_rows + int(places(seed, shard, window)[place])
    block, place = divmod(filled, mixture.BLOCK_ROWS)
    found[i] = blocks(shard, order.virtual_shards, block)[place]
  return found


class VirtualShard:
  """The rows of one virtual shard, from a given state on.

  While one window is given out in random order, the next one is filled, a row for a row. So each row costs the same, and
  what must be read again after a restore is two windows at most.
  """

  def __init__(self, shard: int, order: Order, data: config.Data, seed: int,
               open_stream: Callable[[int, int], grain.DatasetIterator], state: dict[str, Any] | None = None):
    """Opens nothing yet.

    Args:
      shard: its number, in range(order.virtual_shards).
      order: of the run.
      data: gives the weights of the domains.
      seed: of the run.
      open_stream: (domain, shard) -> the packed rows of this domain.
      state: from `state_before`; None: the first row.
    """
    self._shard, self._order, self._seed = shard, order, seed
    self._weights = [domain.weight for domain in data.domains]
    self._open_stream = open_stream
    self._streams: dict[int, grain.DatasetIterator] = {}
    first = state or {"window": 0, "streams": {}}
    # Window -> the streams' states before its first row: all that the position of a row depends on.
    self._starts = {first["window"]: first["streams"]}
    self._mixed = self._given = first["window"] * order.window_rows  # rows taken from the streams, and given out
    self._window: list[np.ndarray | None] = []
    self._filling: list[np.ndarray | None] = []
    self._block = -1, np.zeros(0, int)  # number and domains of the block of `mixture` that is under way
    for domain, stream_state in first["streams"].items():
      self._stream(int(domain)).set_state(_tuples_restored(stream_state))

  def row(self, index: int) -> np.ndarray:
    """Row `index` of the shard, [4, S] int32 in the order of FIELDS. Rows before it that were not asked for are passed over.

    Raises:
      IndexError: rows after it were asked for already.
    """
    if index < self._given:
      raise IndexError(f"row {index} of virtual shard {self._shard} was passed: the next one is {self._given}")
    while self._given < index:
      self._give()
    return self._give()

  def state_before(self, index: int) -> dict[str, Any]:
    """Plain JSON values from which row `index` can be made again; it must not have been forgotten."""
    window = max(start for start in list(self._starts) if start <= index // self._order.window_rows)
    return {"window": window, "streams": self._starts[window]}

  def forget_before(self, index: int) -> None:
    """Drops the states that rows from `index` on do not need."""
    needed = self.state_before(index)["window"]
    for window in [start for start in list(self._starts) if start < needed]:
      del self._starts[window]

  def _give(self) -> np.ndarray:
    window, place = divmod(self._given, self._order.window_rows)
    if place == 0:
      while len(self._filling) < self._order.window_rows:  # the first window only: later ones are full by now
        self._fill()
      self._window, self._filling = self._filling, []
      self._places = self._order.places(self._seed, self._shard, window)
    self._fill()
    self._given += 1
    row, self._window[self._places[place]] = self._window[self._places[place]], None
    return row

  def _fill(self) -> None:
    window, place = divmod(self._mixed, self._order.window_rows)
    if place == 0 and window not in self._starts:
      states = {str(domain): stream.get_state() for domain, stream in self._streams.items()}
      self._starts[window] = json.loads(json.dumps(states))
    block, place = divmod(self._mixed, mixture.BLOCK_ROWS)
    domain = int(self._domains_of(block)[place])
    row = next(self._stream(domain))
    self._mixed += 1
    # One copy: a packer's rows are views of all its bins, which would stay in memory with any of them.
    self._filling.append(np.stack([row[field] for field in FIELDS]).astype(np.int32, copy=False))

  def _domains_of(self, block: int) -> np.ndarray:
    if self._block[0] != block:
      domains = mixture.block(self._weights, self._seed, self._shard, self._order.virtual_shards, block)
      self._block = block, domains
    return self._block[1]

  def _stream(self, domain: int) -> grain.DatasetIterator:
    if domain not in self._streams:
      self._streams[domain] = self._open_stream(domain, self._shard)
    return self._streams[domain]


class Streams:
  """Opens the packed rows of a domain for a shard. The files of a domain are opened once for all shards."""

  def __init__(self, data: config.Data, seed: int, tokenizer, order: Order):
    """Checks the files.

    Raises:
      records.DataError
    """
    self._data, self._seed, self._tokenizer, self._order = data, seed, tokenizer, order
    sources = [records.open_split(embedded.resolve(domain.path), "train") for domain in data.domains]
    self._documents = [grain.MapDataset.source(source).seed(seed + i).shuffle().repeat() for i, source in enumerate(sources)]

  def open(self, domain: int, shard: int) -> grain.DatasetIterator:
    """Packed rows of one domain for one virtual shard, without end."""
    data, shards = self._data, self._order.virtual_shards
    documents = self._documents[domain][shard::shards]
    tokens = documents.map(functools.partial(_tokenize, self._tokenizer)).to_iter_dataset(_READ)
    lengths = {"inputs": data.sequence_tokens, "targets": data.sequence_tokens}
    if data.packing == "concat":
      return iter(experimental.ConcatThenSplitIterDataset(tokens, length_struct=lengths))
    pieces = experimental.FlatMapIterDataset(tokens, _Pieces(data.sequence_tokens))
    bins = _bins(shard, shards)
    shuffle_seed = int(np.random.SeedSequence([self._seed % 2**64, domain, shard, 4]).generate_state(1)[0] >> 1)
    return iter(experimental.BestFitPackIterDataset(pieces, length_struct=lengths, num_packing_bins=bins, seed=shuffle_seed))


def _bins(shard: int, shards: int) -> int:
  """Bins of a shard's best-fit packer: between 48 and 80.

  A packer fills all its bins at once and then gives them out. With different numbers of bins the shards fill theirs at
  different times, so that no batch waits for all of them.
  """
  return _PACKING_BINS * 3 // 4 + _PACKING_BINS // 2 * shard // shards


def _tokenize(tokenizer, record: bytes) -> dict[str, np.ndarray]:
  ids = tokenizer.encode(records.Document.decode(record).text)
  return {"inputs": np.concatenate([[tokenizer.bos], ids]).astype(np.int32),
          "targets": np.concatenate([ids, [tokenizer.eos]]).astype(np.int32)}


class _Pieces(experimental.FlatMapTransform):
  """Cuts a document into pieces of at most one row, which best-fit packing wants."""

  max_fan_out = 1 << 20

  def __init__(self, length: int):
    self._length = length

  def flat_map(self, element):
    total = len(element["inputs"])
    return [{k: v[i : i + self._length] for k, v in element.items()} for i in range(0, total, self._length)]


def _tuples_restored(state):
  """JSON turns the tuples of grain's concat packer into lists, which it then takes for other values: it would drop a
  document without a word. Turns them back."""
  if isinstance(state, dict):
    return {key: {name: tuple(cut) for name, cut in value.items()} if key == "remainder_slices" else _tuples_restored(value)
            for key, value in state.items()}
  return [_tuples_restored(item) for item in state] if isinstance(state, list) else state
