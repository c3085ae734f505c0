"""The training loader: the rows of the run's batches that one host needs, made ahead by a thread, with an exact position.

Rows are counted from 0 over all steps of a run, and step n of B rows takes rows n B to (n + 1) B (rows.py says what they
are). So the batches are the same for any number of hosts, a position is one count of rows, and batches of another size go
on where the last one ended.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from moe import config
from moe.data import embedded
from moe.data import records
from moe.data import rows as rows_lib
from moe.data import tokenizers
from moe.data.records import DataError

_AHEAD_BATCHES = 8  # made ahead at most: a packer's refill takes as long as several batches ...
_AHEAD_BYTES = 256 << 20  # ... and no more than this, but always one


class Loader:
  """An endless iterator over the part of the global batches that one host needs.

  `next()` gives a tuple (inputs, targets, segment_ids, positions), each [rows, columns] int32. Targets follow inputs within
  a document; the first input of a document is the tokenizer's bos. A row holds documents of one domain.
  """

  def __init__(self, data: config.Data, seed: int, rows: Sequence[int] | None = None, columns: slice = slice(None)):
    """Checks data and tokenizer. Virtual shards are opened when their first row is needed.

    Args:
      data: what is read.
      seed: of the run.
      rows: which rows of each batch, ascending (`sharding.host_part`); None: all.
      columns: which tokens of each row.

    Raises:
      DataError: unreadable data.
    """
    self._data, self._seed, self._columns = data, seed, columns
    self._rows = list(range(data.batch_sequences)) if rows is None else [int(row) for row in rows]
    self._tokenizer = tokenizers.load(data.tokenizer, data.bos)
    self._position = 0  # rows of the run before the next batch
    self._prepare(rows_lib.Order.of(data), {})

  def __iter__(self):
    return self

  def __next__(self) -> tuple[np.ndarray, ...]:
    self.start()
    if not self._stop.alive:
      raise ValueError("the loader is closed; restore a state, or make another loader")
    batch = self._ahead.get()
    if isinstance(batch, Exception):
      self._ahead.put(batch)  # the thread has ended: another call must not wait for it
      raise DataError(f"training data cannot be read: {batch}") from batch
    self._position += self._data.batch_sequences
    self._shards.forget_before(self._position)
    return batch

  def start(self) -> None:
    """Begins to make batches ahead, where it has not begun: the first ones take longest, and the step compiles meanwhile."""
    if self._stop is not None:
      return
    batch_bytes = 4 * len(rows_lib.FIELDS) * len(self._rows) * self._data.sequence_tokens
    self._ahead = queue.Queue(max(min(_AHEAD_BATCHES, _AHEAD_BYTES // batch_bytes), 1))
    stopped = threading.Event()
    work = (self._shards, self._position, self._data.batch_sequences, self._rows, self._columns, self._ahead, stopped)
    thread = threading.Thread(target=_make_batches, args=work, daemon=True, name="batches")
    thread.start()
    # The thread knows nothing of the loader, so that it ends with it, and before the interpreter does.
    self._stop = weakref.finalize(self, _stop_thread, thread, stopped)

  def close(self) -> None:
    """Ends the thread. The loader can only be restored after this."""
    if self._stop is not None:
      self._stop()

  def state(self) -> dict[str, Any]:
    """The position as plain JSON values, with the states of the shards that this host has opened."""
    return {"fingerprint": self._fingerprint, "batch_sequences": self._data.batch_sequences, "rows": self._position,
            "shards": self._shards.states_before(self._position)}

  def domain_tokens(self) -> dict[str, int]:
    """Tokens of the last batch, over all hosts, in rows of each domain; padding counts too."""
    last = range(self._position - self._data.batch_sequences, self._position)
    found = rows_lib.domains_of(last, self._order, self._data, self._seed)
    counts = self._data.sequence_tokens * np.bincount(found, minlength=len(self._data.domains))
    return {domain.name: int(count) for domain, count in zip(self._data.domains, counts)}

  def restore(self, state: dict[str, Any]) -> None:
    """Continues bit-exactly after `state`, which may come from other hosts (see `merge_states`) and another batch size.

    Raises:
      DataError: the data config, the files or the order of rows are not those of the state, or it is damaged.
    """
    kept = state.get("fingerprint")
    try:
      version = kept.get("order", 1)
      if version != rows_lib.VERSION:
        raise DataError(
            f"the position is of order {version} of the rows and this version of the code has order {rows_lib.VERSION}, in "
            "which rows are independent draws of the mixture; end the run with the version of the code that began it, or "
            "begin a new run with --init_from, which takes its parameters")
      # Where the config names no number of shards, it is that of the run's first batch, which may have been another.
      order = rows_lib.Order(self._data.virtual_shards or int(kept["virtual_shards"]), int(kept["window_rows"]))
      position = int(state["rows"])
      shards = {int(shard): {"window": int(of["window"]), "streams": dict(of["streams"])}
                for shard, of in state["shards"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise DataError(f"the saved position is damaged: {error!r}") from error
    self.close()
    self._prepare(order, shards)
    changed = config.differences(kept, self._fingerprint)
    if changed:
      raise DataError("the data changed since the checkpoint, so its position means nothing: " + "; ".join(changed)
                      + " (start afresh with --init_from to keep only the parameters)")
    self._position = position

  def _prepare(self, order: rows_lib.Order, states: dict[int, dict]) -> None:
    self._order = order
    streams = rows_lib.Streams(self._data, self._seed, self._tokenizer, order)
    self._shards = _Shards(self._data, self._seed, order, streams, states)
    self._fingerprint = _fingerprint(self._data, self._seed, self._tokenizer, order)
    self._stop: weakref.finalize | None = None  # ends the thread; None until it runs


class _Shards:
  """The virtual shards of a run, opened one by one when rows of them are needed."""

  def __init__(self, data: config.Data, seed: int, order: rows_lib.Order, streams: rows_lib.Streams, states: dict[int, dict]):
    """`states`: of shards, where the run is gone on with."""
    self._data, self._seed, self._order, self._streams = data, seed, order, streams
    self._states = states
    self._opened: dict[int, rows_lib.VirtualShard] = {}

  def row(self, number: int) -> np.ndarray:
    """Row `number` of the run, [4, S]."""
    index, shard = divmod(number, self._order.virtual_shards)
    if shard not in self._opened:
      self._opened[shard] = rows_lib.VirtualShard(shard, self._order, self._data, self._seed, self._streams.open,
                                                  self._states.get(shard))
    return self._opened[shard].row(index)

  def states_before(self, position: int) -> dict[str, Any]:
    """From where each shard's rows after the first `position` rows of the run can be made; called beside `row`."""
    states = dict(self._states)
    for shard, opened in list(self._opened.items()):
      states[shard] = opened.state_before(self._order.rows_before(shard, position))
    return {str(shard): state for shard, state in sorted(states.items())}

  def forget_before(self, position: int) -> None:
    for shard, opened in list(self._opened.items()):
      opened.forget_before(self._order.rows_before(shard, position))


def _make_batches(shards: _Shards, position: int, batch_rows: int, rows: list[int], columns: slice, ahead: queue.Queue,
                  stopped: threading.Event) -> None:
  """The thread: batches from `position` on, then what ended it."""
  while not stopped.is_set():
    try:
      batch_RFS = np.stack([shards.row(position + row)[:, columns] for row in rows])
      made = tuple(np.ascontiguousarray(field) for field in batch_RFS.swapaxes(0, 1))
      position += batch_rows
    except Exception as error:  # of grain, of a file: it belongs to the caller of `next`
      made = error
    while not stopped.is_set():
      try:
        ahead.put(made, timeout=0.2)
        break
      except queue.Full:
        continue
    if isinstance(made, Exception):
      return


def _stop_thread(thread: threading.Thread, stopped: threading.Event) -> None:
  stopped.set()
  if thread is not threading.current_thread():
    thread.join(timeout=5.0)  # of a batch; it may be inside ArrayRecord's C++, which must not outlive the interpreter


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
  """One state that any host can restore from, out of the hosts' own at the same step.

  Hosts that share rows opened the same shards; of a shard the latest state is kept, from which least is read again.
  """
  shards: dict[str, Any] = {}
  for state in states:
    for shard, found in state["shards"].items():
      if shard not in shards or found["window"] > shards[shard]["window"]:
        shards[shard] = found
  return {**states[0], "shards": shards}


def _fingerprint(data: config.Data, seed: int, tokenizer, order: rows_lib.Order) -> dict[str, Any]:
  """All that the meaning of a position depends on. grain itself accepts a wrong state without a word."""
  def digests(path):
    manifest = records.read_manifest(embedded.resolve(path))
    return [entry["sha256"] for entry in manifest["splits"]["train"]["files"]]

  return {
      "order": rows_lib.VERSION, **order._asdict(),
      "domains": [[d.name, d.weight, digests(d.path)] for d in data.domains], "seed": seed,
      "sequence_tokens": data.sequence_tokens, "packing": data.packing,
      # What the ids depend on, not the path: the same file elsewhere goes on, another one at the same path does not.
      "tokenizer": tokenizer.digest, "eos": tokenizer.eos, "bos": tokenizer.bos, "vocab_size": tokenizer.vocab_size,
      "grain": grain.__version__ if hasattr(grain, "__version__") else "",
  }
