"""Builds a domain from files: each is read once, in order, by several processes, and a build that was killed goes on.

Worker processes turn the reader's tasks into records (`records_of`, a pure function), and this process writes them in the order
of the tasks. A *part* is done when its documents have `part_bytes` of text: its files are closed, and state.json in a scratch
folder beside the output says so. Parts end with tasks, and tasks follow from the files alone. So the domain has the same bytes
for any number of workers and interruptions, and what a kill or a full disk costs is the part under way.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moe.data import records
from moe.data import text_files
from moe.data.records import SPLITS, DataError

# Level 1 of Zstandard, where ArrayRecord's default is 3: documents are compressed one by one, which leaves the higher level
# 1% to gain for three times the work.
_ARRAY_RECORD = "group_size:1,zstd:1"
_STATE = "state.json"
_LOCK = "lock"
_SKIPPED = "skipped.txt"  # in the domain: what --on_bad=skip left out


@dataclasses.dataclass(frozen=True)
class Options:
  domain: str  # its name, kept with every document
  field: str = "text"  # that holds the text of a record
  held_out: float = 0.01  # share of the documents for validation, and for test
  shards: int = 1  # files of a split and part
  on_bad: str = "stop"  # stop | skip
  max_bad: int = 1000  # places left out, at most
  workers: int = 1  # processes
  part_bytes: int = 1 << 30  # of text


class Made(NamedTuple):
  """What a task gives: for each split its records and their bytes of text, and what was left out or changed."""

  records: list[list[bytes]]
  text_bytes: list[int]
  empty: int
  replaced: int  # documents with lone surrogates
  faults: list[str]


@dataclasses.dataclass
class State:
  """What is written so far. Saved at the end of a part, as JSON."""

  after: text_files.Position = text_files.Position()
  parts: int = 0
  splits: dict[str, dict] = dataclasses.field(
      default_factory=lambda: {split: {"documents": 0, "text_bytes": 0, "files": []} for split in SPLITS})
  empty: int = 0
  replaced: int = 0
  faults: list[str] = dataclasses.field(default_factory=list)
  resumed_documents: int = 0  # that an earlier try had written

  @property
  def documents(self) -> int:
    return sum(split["documents"] for split in self.splits.values())

  @property
  def text_bytes(self) -> int:
    return sum(split["text_bytes"] for split in self.splits.values())


class Progress(NamedTuple):
  documents: int
  text_bytes: int
  read_bytes: int  # of the inputs as they lie on the disk
  total_bytes: int | None  # None: a pipe


def split_of(text: bytes, held_out: float) -> str:
  """train, or for a share `held_out` each validation or test, by a hash of the text: equal texts never straddle."""
  place = int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64
  return "validation" if place < held_out else "test" if place < 2 * held_out else "train"


def records_of(blocks: list[text_files.Block], options: Options) -> Made:
  """The records of a task's blocks. A pure function, which worker processes run."""
  made = {split: [] for split in SPLITS}
  text_bytes = dict.fromkeys(SPLITS, 0)
  empty = replaced = 0
  faults: list[str] = []
  for block in blocks:
    for text in text_files.texts(block, options.field):
      if isinstance(text, text_files.Fault):
        faults.append(text.message)
        if options.on_bad == "stop" or len(faults) > options.max_bad:
          break
      elif not text.text:
        empty += 1
      else:
        content = text.text.encode()
        split = split_of(content, options.held_out)
        made[split].append(records.Document(text.text, options.domain, text.source).encode(len(content)))
        text_bytes[split] += len(content)
        replaced += bool(text.replaced)
  return Made(list(made.values()), list(text_bytes.values()), empty, replaced, faults)


def build(reader: text_files.Reader, folder: pathlib.Path, options: Options,
          report: Callable[[Progress], None] = lambda progress: None) -> State:
  """Makes a domain of the reader's files; it appears complete or not at all.

  A build that ended early leaves its parts beside the folder, and goes on after them when it is called again for the same files
  and options. What comes through a pipe begins again.

  Args:
    reader: of the files.
    folder: must not exist yet.
    options: what becomes of them.
    report: called after each task.

  Returns:
    What was written.

  Raises:
    DataError: the folder exists or cannot be written, a file cannot be read, or there is no document.
  """
  folder = folder.absolute()
  if folder.exists():
    raise DataError(f"{folder} exists already; remove it or choose another --output")
  if text_files.shown(str(folder)) != str(folder):
    raise DataError(f"the name of --output={text_files.shown(str(folder))} is not UTF-8; ArrayRecord needs that")
  scratch = folder.with_name(f".{folder.name}.build")
  try:
    scratch.mkdir(parents=True, exist_ok=True)
    with open(scratch / _LOCK, "w") as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        raise DataError(f"another process builds {folder}; wait for it, or choose another --output") from error
      key = _key(reader, options)
      state = _restored(scratch, key)
      try:
        _write_parts(reader, scratch, options, key, state, report)
        if not state.documents:
          raise DataError(f"there is no document in {len(reader.paths)} file(s)" + (
              f": all {state.empty} are empty" if state.empty else "") + "; nothing is built")
        _complete(scratch, folder, state)
      finally:
        if (not state.parts or not reader.is_repeatable) and scratch.exists():  # nothing to go on with
          shutil.rmtree(scratch, ignore_errors=True)
  except (OSError, RuntimeError) as error:
    reason = getattr(error, "strerror", None) or error
    again = "it goes on after what is done" if reader.is_repeatable else "what comes through a pipe begins again"
    raise DataError(f"cannot write {folder}: {reason}; make room or mend it and give the command again: {again}") from error
  return state


def _key(reader: text_files.Reader, options: Options) -> str:
  """Names what the bytes of a domain depend on; not what a user may change to go on (workers, --on_bad)."""
  parts = [reader.description, options.domain, options.field, options.held_out, options.shards, options.part_bytes]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _restored(scratch: pathlib.Path, key: str) -> State:
  """The state of the build that is under way in a folder; removes what does not belong to it."""
  state = State()
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    saved = json.loads((scratch / _STATE).read_text())
    if saved.pop("key") == key:
      state = State(**{**saved, "after": text_files.Position(*saved["after"])})
      state.resumed_documents = state.documents
  kept = {entry["name"] for split in state.splits.values() for entry in split["files"]} | {_LOCK, _STATE}
  if state.parts and not all((scratch / name).exists() for name in kept):
    # It was about to be completed: files have their last names already.
    kept |= {path.name for path in scratch.iterdir()}
  for path in scratch.iterdir():
    if path.name not in kept:
      path.unlink()
  return state


def _write_parts(reader: text_files.Reader, scratch: pathlib.Path, options: Options, key: str, state: State,
                 report: Callable[[Progress], None]) -> None:
  part = _Part(scratch, state, options)
  try:
    with contextlib.closing(_in_order(reader.tasks(state.after), options)) as made_of_tasks:
      for task, made in made_of_tasks:
        part.write(made)
        state.after = task.after
        state.faults += made.faults
        _check_faults(state.faults, options)
        report(Progress(state.documents, state.text_bytes, task.read_bytes, reader.total_bytes))
        if part.text_bytes >= options.part_bytes:
          part.close()
          if reader.is_repeatable:
            _save(scratch, key, state)
          part = _Part(scratch, state, options)
    part.close()
    state.after = text_files.Position(len(reader.paths))
    if state.documents and reader.is_repeatable:
      _save(scratch, key, state)
  finally:
    part.abandon()


def _check_faults(faults: list[str], options: Options) -> None:
  if faults and options.on_bad == "stop":
    raise DataError(f"{faults[0]} (--on_bad=skip leaves such places out)")
  if len(faults) > options.max_bad:
    raise DataError(f"more than --max_bad={options.max_bad} places cannot be read: {faults[0]}; ...; {faults[options.max_bad]}")


class _Part:
  """The files of one part, and what of the state is of it."""

  def __init__(self, scratch: pathlib.Path, state: State, options: Options):
    self._scratch, self._state, self._shards = scratch, state, options.shards
    self._writers: dict[str, records.SplitWriter] = {}
    self._paths: list[pathlib.Path] = []
    self.text_bytes = 0

  def write(self, made: Made) -> None:
    state = self._state
    for split, contents, text_bytes in zip(SPLITS, made.records, made.text_bytes, strict=True):
      if contents and split not in self._writers:
        paths = [self._scratch / f"{split}-{state.parts:05}.{i:05}" for i in range(self._shards)]
        self._paths += paths
        self._writers[split] = records.SplitWriter(paths, _ARRAY_RECORD)
      for content in contents:
        self._writers[split].write(content)
      state.splits[split]["documents"] += len(contents)
      state.splits[split]["text_bytes"] += text_bytes
      self.text_bytes += text_bytes
    state.empty += made.empty
    state.replaced += made.replaced

  def close(self) -> None:
    """Puts the files on the disk, and their entries into the state."""
    for split, writer in self._writers.items():
      self._state.splits[split]["files"] += writer.close()
    for path in self._paths:
      with open(path, "rb") as file:
        os.fsync(file.fileno())
    if self._writers:
      self._state.parts += 1
    self._writers, self._paths = {}, []

  def abandon(self) -> None:
    """Gives the room of a part that is not done back."""
    for writer in self._writers.values():
      with contextlib.suppress(Exception):  # what ended the part is raised already
        writer.abandon()
    for path in self._paths:
      path.unlink(missing_ok=True)


def _save(scratch: pathlib.Path, key: str, state: State) -> None:
  path = scratch / _STATE
  part = path.with_suffix(".part")
  part.write_text(json.dumps({"key": key, **dataclasses.asdict(state)}))
  os.replace(part, path)


def _complete(scratch: pathlib.Path, folder: pathlib.Path, state: State) -> None:
  for split, about in state.splits.items():
    files = []
    for entry, path in zip(about["files"], records.shard_paths(scratch, split, len(about["files"]))):
      if (scratch / entry["name"]).exists():  # else an earlier try did so
        os.replace(scratch / entry["name"], path)
      if path.stat().st_size != entry["file_bytes"]:
        (scratch / _STATE).unlink()
        raise DataError(f"{path} was changed while the domain was built; give the same command again: it begins anew")
      files.append({**entry, "name": path.name})
    about["files"] = files
  records.write_manifest(scratch, state.splits)
  if state.faults:
    (scratch / _SKIPPED).write_text("".join(f"{fault}\n" for fault in state.faults))
  os.replace(scratch, folder)
  for name in (_STATE, _LOCK):
    (folder / name).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- workers


def _in_order(tasks: Iterator[text_files.Task], options: Options) -> Iterator[tuple[text_files.Task, Made]]:
  """Each task with what it gives, in order; made by worker processes where there is more than one task."""
  first, second = next(tasks, None), next(tasks, None)
  if first is None:
    return
  if second is None or options.workers < 2:
    yield first, records_of(first.blocks, options)
    if second is not None:
      yield second, records_of(second.blocks, options)
    for task in tasks:
      yield task, records_of(task.blocks, options)
    return
  # Not forked from this process: it may have threads, of JAX or ArrayRecord.
  context = multiprocessing.get_context("forkserver")
  pool = concurrent.futures.ProcessPoolExecutor(options.workers, context, initializer=_begin_worker)
  waiting: collections.deque = collections.deque()
  try:
    ahead = [first, second]
    while True:
      # So many tasks are under way that no worker waits for the writing, and memory stays bounded.
      while len(waiting) < 2 * options.workers:
        task = ahead.pop(0) if ahead else next(tasks, None)
        if task is None:
          break
        waiting.append((task, pool.submit(records_of, task.blocks, options)))
      if not waiting:
        return
      task, future = waiting.popleft()
      yield task, future.result()
  except concurrent.futures.process.BrokenProcessPool as error:
    raise DataError("a worker process was killed, perhaps for want of memory; give the same command again with fewer "
                    "--workers") from error
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is the parent's
  parent = multiprocessing.parent_process()

  def end_with_parent():
    parent.join()  # a parent that is killed cannot end its workers
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()
