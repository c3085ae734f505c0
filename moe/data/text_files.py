"""Documents of the files that people have: text, jsonl, JSON and parquet, plain or compressed, in one pass.

    inputs -> find() -> Reader: tasks of blocks, in order -> texts(): a pure function of a block

A file is what its content says, by its first bytes, and only then what its name says. Blocks follow from where they begin, so
that a reader which begins at a task's end goes on with the same tasks. This module imports little: worker processes load it.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from moe.data.records import DataError

FORMATS = ("auto", "text", "jsonl", "json", "parquet")
PIPES = ("-", "/dev/stdin")
TASK_BYTES = 4 << 20  # of input in one task: small beside memory, large beside the cost of handing it to another process
_TASK_BLOCKS = 1024  # files of one task, at most
_PIECE_BYTES = 1 << 18  # decompressed at once: what stands before the place where a file is cut off is kept

_JSON_NAME = re.compile(r"\.(json|jsonl|jsonlines|ndjson)$", re.I)
_COMPRESSED_NAME = re.compile(r"\.(gz|gzip|zst|zstd|bz2|xz)$", re.I)
_UNREADABLE = {b"PK\x03\x04": "a zip archive; unpack it first", b"%PDF": "a PDF; extract its text first",
               b"ARROW1": "an Arrow file; write it as parquet first",
               b"version https://git-lfs.github.com/": "a pointer of Git LFS; fetch the file itself: git lfs pull"}
_WIDE = {"UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
_SURROGATES = re.compile("[\ud800-\udfff]")
_SHOWN_NAMES = 12  # fields, in messages


class Text(NamedTuple):
  """A document's text and where it came from. `replaced`: lone surrogates that became U+FFFD."""

  text: str
  source: str
  replaced: int = 0


class Fault(NamedTuple):
  """What cannot be read, in one line that begins with its file and line."""

  message: str


class Block(NamedTuple):
  """A part of a file: all of a text file, whole lines of jsonl, elements of JSON, rows of parquet; or what is wrong with it."""

  path: str
  kind: str  # text | jsonl | json | parquet | fault
  content: Any  # bytes | bytes | [(line, text of an element)] | pyarrow.RecordBatch | message
  first: int  # number of its first line, element or row


class Position(NamedTuple):
  """Where a task ends: a file, what was read of it (bytes, elements or rows), and the number of the next line."""

  file: int = 0
  offset: int = 0
  line: int = 1


class Task(NamedTuple):
  blocks: list[Block]
  after: Position
  read_bytes: int  # of all inputs up to here, as they lie on the disk


def shown(path: str) -> str:
  """A file name as valid text: bytes of it that are not UTF-8 as \\xe9."""
  return os.fsencode(path).decode("utf-8", "backslashreplace")


def find(inputs: Sequence[str]) -> list[str]:
  """The files that inputs name: files, folders (with all that is in them but hidden files), patterns, `-` for a pipe.

  What exists is no pattern, whatever brackets are in its name. Sorted, each file once.

  Raises:
    DataError: an input names no file.
  """
  found: dict[str, str] = {}
  for given in inputs:
    path = os.path.expanduser(given)
    if given in PIPES:
      files = ["-"]
    elif os.path.isdir(path):
      files = list(_files_below(path))
    elif os.path.exists(path):
      files = [path]
    else:
      files = [file for match in glob.glob(_literal_start(path), recursive=True)
               for file in (_files_below(match) if os.path.isdir(match) else [match])]
    if not files:
      what = f"the folder {shown(given)} holds no file" if os.path.isdir(path) else f"no file matches {shown(given)}"
      raise DataError(what + " (those that begin with a dot are left out)")
    found |= {os.path.normpath(file): file for file in files}
  return sorted(found.values(), key=os.fsencode)


def _files_below(folder: str) -> Iterator[str]:
  """Files in a folder and below, through links too; no pipes or devices, which would be waited for."""
  def refuse(error: OSError):
    raise DataError(f"the folder {shown(error.filename)} cannot be read: {error.strerror}") from error

  entered = set()
  for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
    if os.path.realpath(parent) in entered:  # a link to a folder above it
      folders.clear()
      continue
    entered.add(os.path.realpath(parent))
    folders[:] = [name for name in folders if not name.startswith(".")]
    for name in files:
      status = _status(os.path.join(parent, name))
      if not name.startswith(".") and (status is None or stat.S_ISREG(status.st_mode)):
        yield os.path.join(parent, name)


def _literal_start(pattern: str) -> str:
  """The pattern with the folders that exist under its name taken literally."""
  start = pattern
  while start and not os.path.isdir(start):
    parent = os.path.dirname(start)
    if parent == start:
      break
    start = parent
  if not start or not os.path.isdir(start):
    return pattern
  return glob.escape(start) + pattern[len(start) :]


# ------------------------------------------------------------------------------------------------------------- tasks


class Reader:
  """The tasks of some files, in order, from a position on."""

  def __init__(self, paths: Sequence[str], form: str = "auto", field: str = "text", task_bytes: int = TASK_BYTES):
    """Opens nothing yet.

    Args:
      paths: from `find`.
      form: one of FORMATS.
      field: that holds the text; a dotted path leads into nested records.
      task_bytes: of input in a task, about.
    """
    self.paths, self.notes = list(paths), {}
    self._form, self._field, self._task_bytes = form, field, task_bytes
    found = [_status(path) for path in paths]
    self._sizes = [status.st_size if status else 0 for status in found]
    # Changes with what is read: of files, and of how.
    self.description = [form, field, task_bytes, [
        [shown(path), status.st_size, status.st_mtime_ns] if status else [shown(path)] for path, status in zip(paths, found)]]
    self.is_repeatable = all(status and stat.S_ISREG(status.st_mode) for status in found)  # no pipe among them
    self.total_bytes = sum(self._sizes) if self.is_repeatable else None  # as they lie on the disk

  def tasks(self, position: Position) -> Iterator[Task]:
    """What is left after `position`, which must be a task's end."""
    blocks, size = [], 0
    done = sum(self._sizes[: position.file])
    for number in range(position.file, len(self.paths)):
      start = position if number == position.file else Position(number)
      after = Position(number + 1)
      for block, after, read in self._blocks(number, start):
        blocks.append(block)
        size += len(block.content) if isinstance(block.content, bytes) else self._task_bytes
        if size >= self._task_bytes // 2 or len(blocks) >= _TASK_BLOCKS:
          yield Task(blocks, after, done + read)
          blocks, size = [], 0
      done += self._sizes[number]
    if blocks:
      yield Task(blocks, Position(len(self.paths)), done)

  def _blocks(self, number: int, start: Position) -> Iterator[tuple[Block, Position, int]]:
    """(block, where it ends, bytes read on the disk) of one file; faults of the file as a block at its end."""
    path, name, end = self.paths[number], shown(self.paths[number]), Position(number + 1)
    try:
      stream = _Stream(path)
    except OSError as error:
      yield Block(name, "fault", f"{name}: cannot be read: {_reason(error)}", 0), end, self._sizes[number]
      return
    with stream:
      head = stream.read(self._task_bytes)
      kind, fault = self._kind(number, head)
      if fault:
        yield Block(name, "fault", f"{name}: {fault}", 0), end, self._sizes[number]
        return
      if kind == "text":
        content = head + stream.read()
        if not stream.error:  # a part of a text is another text
          yield Block(name, kind, content, 1), end, self._sizes[number]
      elif kind == "jsonl":
        for content, after in _whole_lines(stream, head, start, self._task_bytes):
          yield Block(name, kind, content, after.line - content.count(b"\n")), after, stream.disk_bytes()
      elif kind == "json":
        for content, first in _elements(name, head + stream.read(), start.offset, self._task_bytes):
          if not isinstance(content, str):
            yield Block(name, kind, content, first), Position(number, first + len(content)), stream.disk_bytes()
          elif not stream.error:  # which says more
            yield Block(name, "fault", content, first), end, self._sizes[number]
      else:
        # parquet is read from its end, so what is compressed around it or comes through a pipe is read whole.
        whole = path if stream.plain_file else io.BytesIO(head + stream.read())
        yield from self._parquet(name, whole, number, start.offset)
      if stream.error:
        yield Block(name, "fault", f"{name}: {stream.error}", 0), end, self._sizes[number]

  def _kind(self, number: int, head: bytes) -> tuple[str, str]:
    """(kind, what is wrong) of a file by its first bytes, then by its name."""
    path = self.paths[number]
    for start, what in _UNREADABLE.items():
      if head.startswith(start):
        return "", f"is {what}"
    if not head and _COMPRESSED_NAME.search(path) and self._sizes[number] == 0:
      return "", "is empty, which no compressed file is: fetch it again"
    if head[257:262] == b"ustar":
      return "", "is a tar archive; unpack it first"
    for encoding, marks in _WIDE.items():
      if head.startswith(marks):
        return "", f"is {encoding} (by its byte order mark); write it as UTF-8 first: iconv -f {encoding} -t UTF-8"
    if self._form != "auto":
      return self._form, ""
    if head.startswith(b"PAR1"):
      return "parquet", ""
    name = _COMPRESSED_NAME.sub("", path)
    if name.lower().endswith((".parquet", ".pq")):
      return "", "has the name of a parquet file but does not begin as one"
    kind = self._kind_of_text(name, head)
    if kind != "text" and not _JSON_NAME.search(name):
      self.notes[shown(path)] = f"{shown(path)} is read as {kind}, by its content; --format=text takes it as one document"
    return kind, ""

  def _kind_of_text(self, name: str, head: bytes) -> str:
    body = head.removeprefix(codecs.BOM_UTF8).lstrip()
    lines = [line for line in body.split(b"\n", 64)[:64] if line.strip()]
    if len(head) == self._task_bytes and b"\n" not in body:
      lines = []  # the first one is longer than what was looked at
    rows = [_json_or_none(line) for line in lines[:2]]
    are_records = bool(rows) and all(isinstance(row, dict) and row for row in rows)
    named = _JSON_NAME.search(name)
    if not named:
      if not os.path.splitext(os.path.basename(name))[1]:  # a pipe, or a name that says nothing
        is_json = re.match(rb'\[\s*\{\s*"|\{\s*"[^"\n]*"\s*:', body)
        return "jsonl" if are_records else "json" if is_json else "text"
      # A text may begin with such lines by chance; records have the field.
      if are_records and all(isinstance(_field_of(row, self._field), str) for row in rows):
        return "jsonl"
      if are_records and len(rows) > 1:
        fields = f"without a field {self._field!r} (they have {_listed(_paths(rows[0]))})"
        self.notes[shown(name)] = (f"{shown(name)} is read as one document, though its lines are JSON objects, {fields}; "
                                   "--field or --format=jsonl reads them")
      return "text"
    if are_records:
      return "jsonl"
    if named[1].lower() == "json":
      is_object = body.startswith(b"{") and not any(isinstance(row, dict) for row in rows)
      return "json" if is_object or body.startswith(b"[") else "jsonl"
    # One array, or objects over several lines, under the name of jsonl.
    row = rows[0] if rows else None
    is_list_of_lists = isinstance(row, list) and not any(isinstance(item, dict) for item in row[:1])
    is_array = body.startswith(b"[") and not is_list_of_lists
    return "json" if is_array or (lines and lines[0].strip() == b"{") else "jsonl"

  def _parquet(self, name: str, whole, number: int, skip: int) -> Iterator[tuple[Block, Position, int]]:
    size, end = self._sizes[number], Position(number + 1)
    try:
      from pyarrow import parquet  # 175 MB: not among the requirements
    except ImportError as error:
      raise DataError(f"{name} is parquet, which needs pyarrow: pip install pyarrow") from error
    try:
      with parquet.ParquetFile(whole) as file:
        names = file.schema_arrow.names
        column = self._field if self._field in names else self._field.split(".")[0]
        if column not in names:
          columns = [file.schema.column(i).path for i in range(len(file.schema))]
          fault = f"{name}: has no column {column!r}; it has {_listed(columns)}; name one with --field"
          yield Block(name, "fault", fault, 0), end, size
          return
        row, rows = 0, max(file.metadata.num_rows, 1)
        for group in range(file.num_row_groups):
          about = file.metadata.row_group(group)
          if row + about.num_rows <= skip:
            row += about.num_rows
            continue
          # Batches of about a task; each row group by itself, so that a batch follows from where it begins.
          per_batch = max(int(about.num_rows * self._task_bytes / max(about.total_byte_size, 1)), 1)
          for batch in file.iter_batches(batch_size=min(per_batch, 1 << 16), row_groups=[group], columns=[column]):
            if row >= skip:
              yield Block(name, "parquet", batch, row), Position(number, row + batch.num_rows), size * row // rows
            row += batch.num_rows
    except (OSError, ValueError, KeyError, NotImplementedError, MemoryError) as error:  # ArrowInvalid is a ValueError
      yield Block(name, "fault", f"{name}: cannot be read as parquet: {_reason(error)}", 0), end, size


class _Stream:
  """The bytes of a file, decompressed by what its first bytes say. An error ends it, and is kept."""

  def __init__(self, path: str):
    if path == "-" and sys.stdin is None:
      raise DataError("- is given for a pipe, but there is no standard input")
    self._raw = sys.stdin.buffer if path == "-" else open(path, "rb")
    start = _read_fully(self._raw, 6)
    if self._raw.seekable():
      self._raw.seek(0)
      whole: BinaryIO = self._raw
    else:
      whole = io.BufferedReader(_Rejoined(start, self._raw), _PIECE_BYTES)
    self._bytes = _decompressed(whole, start, shown(path))
    self.plain_file = path != "-" and self._bytes is self._raw and self._raw.seekable()
    self.error = ""

  def read(self, size: int | None = None) -> bytes:
    """`size` bytes, or all; fewer only at the end, or where the file is damaged."""
    pieces, left = [], sys.maxsize if size is None else size
    while left > 0 and not self.error:
      try:
        piece = self._bytes.read1(min(left, _PIECE_BYTES))
      except EOFError:
        self.error = "is cut off: its compressed data ends too early"
      except Exception as error:  # each library has its own: BadGzipFile, zlib.error, LZMAError, ZstdError
        self.error = f"is damaged: {_reason(error)}"
      else:
        if not piece:
          break
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)

  def skip_to(self, offset: int, at: int) -> None:
    """Goes on at `offset`, after `at` bytes were read."""
    if self.plain_file:
      self._raw.seek(offset)
      return
    while at < offset and not self.error:
      piece = self.read(min(offset - at, _PIECE_BYTES))
      if not piece:
        return
      at += len(piece)

  def disk_bytes(self) -> int:
    return self._raw.tell() if self._raw.seekable() else 0

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._raw is not sys.stdin.buffer:
      self._raw.close()


class _Rejoined(io.RawIOBase):
  """A pipe whose first bytes were looked at."""

  def __init__(self, start: bytes, rest: BinaryIO):
    self._start, self._rest = start, rest

  def readable(self):
    return True

  def readinto(self, buffer):
    if not self._start:
      return self._rest.readinto(buffer)
    count = min(len(buffer), len(self._start))
    buffer[:count], self._start = self._start[:count], self._start[count:]
    return count


def _read_fully(file: BinaryIO, size: int) -> bytes:
  content = b""
  while len(content) < size:
    piece = file.read(size - len(content))
    if not piece:
      break
    content += piece
  return content


def _decompressed(file: BinaryIO, start: bytes, name: str) -> BinaryIO:
  if start.startswith(b"\x1f\x8b"):
    return gzip.GzipFile(fileobj=file)
  if start.startswith(b"BZh"):
    return bz2.BZ2File(file)
  if start.startswith(b"\xfd7zXZ\0"):
    return lzma.LZMAFile(file)
  # Of Zstandard, a frame of data, or one to be skipped, as parallel compressors (pzstd) write them first.
  if start.startswith(b"\x28\xb5\x2f\xfd") or re.match(rb"[\x50-\x5f]\x2a\x4d\x18", start):
    zstd = _zstd(name)
    # Public dumps are made with --long=31, beyond the library's default of 2^27 bytes.
    return zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})
  return file


def _zstd(name: str):
  try:
    from compression import zstd  # Python >= 3.14
  except ImportError:
    try:
      from backports import zstd  # the same module for older ones
    except ImportError as error:
      raise DataError(f"{name} is compressed by Zstandard, which needs backports.zstd: pip install backports.zstd") from error
  return zstd


def _whole_lines(stream: _Stream, head: bytes, start: Position, size: int) -> Iterator[tuple[bytes, Position]]:
  """(whole lines, of about `size` bytes; where they end) from a position on. `head`: what was read of the file so far."""
  offset, line = start.offset, start.line
  rest = bytearray(head[offset:])
  if offset > len(head):
    stream.skip_to(offset, len(head))
  ended = False
  while not ended:
    if len(rest) < size:
      rest += stream.read(size - len(rest))
    ended = len(rest) < size
    cut = rest.rfind(b"\n") + 1
    while not cut and not ended:  # a line longer than that
      more = stream.read(size)
      ended = len(more) < size
      cut = more.rfind(b"\n") + 1 and len(rest) + more.rfind(b"\n") + 1
      rest += more
    if ended and not stream.error:  # else the last line is cut off, too
      cut = len(rest)
    if cut:
      content = bytes(rest[:cut])
      del rest[:cut]
      offset += cut
      line += content.count(b"\n")
      yield content, Position(start.file, offset, line)


def _elements(name: str, content: bytes, skip: int, size: int) -> Iterator[tuple[list[tuple[int, str]] | str, int]]:
  """(elements as (line, JSON text), number of the first) of arrays, or of values one after another; last a message, where the
  file is damaged. The text of the elements is passed on, not their values: it is the smaller of the two."""
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    yield _not_utf8(name, content, error), 0
    return
  place, line, counted, number = _after_blanks(text, 0), 1, 0, 0
  in_array, fault = False, ""
  found: list[tuple[int, str]] = []
  length = 0
  while place < len(text) and not fault:
    if text[place] == ("]" if in_array else "["):
      in_array = not in_array
      place = _after_blanks(text, place + 1)
      continue
    line += text.count("\n", counted, place)
    counted = place
    try:
      _, end = _JSON.raw_decode(text, place)
    except json.JSONDecodeError as error:
      fault = f"{name}:{error.lineno}: {_json_fault(error)}"
      break
    except (ValueError, RecursionError) as error:
      fault = f"{name}:{line}: {_json_fault(error)}"
      break
    if number >= skip:
      found.append((line, text[place:end]))
      length += end - place
    number += 1
    if length >= size:
      yield found, number - len(found)
      found, length = [], 0
    place = _after_blanks(text, end)
    if in_array and text.startswith(",", place):
      place = _after_blanks(text, place + 1)
    elif in_array and place < len(text) and text[place] != "]":
      fault = f"{name}:{line}: is not JSON: there is no comma after the element that begins here"
  if in_array and not fault:
    fault = f"{name}:{1 + text.count(chr(10))}: is not JSON: the array ends without ]"
  if found:
    yield found, number - len(found)
  if fault:
    yield fault, number


# ------------------------------------------------------------------------------------------------------------- texts


def texts(block: Block, field: str = "text") -> Iterator[Text | Fault]:
  """The documents of a block in order, and what cannot be one. A pure function: it can run anywhere."""
  if block.kind == "fault":
    yield Fault(block.content)
  elif block.kind == "text":
    try:
      yield Text(block.content.removeprefix(codecs.BOM_UTF8).decode("utf-8"), block.path)
    except UnicodeDecodeError as error:
      yield Fault(_not_utf8(block.path, block.content.removeprefix(codecs.BOM_UTF8), error))
  elif block.kind == "jsonl":
    for number, line in enumerate(block.content.split(b"\n"), block.first):
      line = line.removeprefix(codecs.BOM_UTF8).strip(b" \t\r")
      if line:
        yield _of_line(line, field, f"{block.path}:{number}")
  elif block.kind == "json":
    for number, (line, text) in enumerate(block.content, block.first):
      yield _of_row(_JSON.decode(text), field, f"{block.path}:{line}", f"{block.path}#{number}")
  else:
    for number, row in enumerate(_rows(block.content), block.first):
      place = f"{block.path} row {number}"
      if isinstance(row, UnicodeDecodeError):
        yield Fault(f"{place}: field {field!r} is no text: {_byte_fault(row)}")
      else:
        yield _of_row(row, field, place, f"{block.path}#{number}")


def _rows(batch) -> list[dict | UnicodeDecodeError]:
  """The rows of a batch of parquet; the error for one whose strings are not UTF-8, which its writer did not check."""
  try:
    return batch.to_pylist()
  except UnicodeDecodeError:
    rows: list[dict | UnicodeDecodeError] = []
    for i in range(batch.num_rows):
      try:
        rows += batch.slice(i, 1).to_pylist()
      except UnicodeDecodeError as error:
        rows.append(error)
    return rows


def _of_line(line: bytes, field: str, place: str) -> Text | Fault:
  try:
    row = _JSON.decode(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    return Fault(f"{place}: {_byte_fault(error)}")
  except (ValueError, RecursionError) as error:
    return Fault(f"{place}: {_json_fault(error)}")
  return _of_row(row, field, place, place)


def _of_row(row: Any, field: str, place: str, source: str) -> Text | Fault:
  if not isinstance(row, dict):
    return Fault(f"{place}: holds {_kind_name(row)}, not an object with a field {field!r}")
  text = _field_of(row, field)
  if isinstance(text, bytes):
    try:
      text = text.decode("utf-8")
    except UnicodeDecodeError as error:
      return Fault(f"{place}: field {field!r} is no text: {_byte_fault(error)}")
  if text is _MISSING:
    return Fault(f"{place}: has no text field {field!r} (it has {_listed(_paths(row))}); name it with --field")
  if not isinstance(text, str):
    return Fault(f"{place}: field {field!r} is {_kind_name(text)}, not text")
  replaced = 0
  if not text.isascii():
    text, replaced = _SURROGATES.subn("\ufffd", text)
  return Text(text, source, replaced)


_MISSING = object()
# Numbers are not looked at: as floats they may have any number of digits.
_JSON = json.JSONDecoder(parse_int=float)


def _field_of(row: dict, field: str) -> Any:
  """The value at a field, which is a name, or a path with dots where there is no such name; _MISSING."""
  if field in row:
    return row[field]
  value: Any = row
  for name in field.split("."):
    if not isinstance(value, dict) or name not in value:
      return _MISSING
    value = value[name]
  return value


def _paths(row: dict) -> list[str]:
  """Names of a row's fields, and of those one level below."""
  return [path for name, value in row.items()
          for path in ([f"{name}.{inner}" for inner in value] if isinstance(value, dict) and value else [str(name)])]


def _json_or_none(line: bytes) -> Any:
  try:
    return _JSON.decode(line.strip().decode("utf-8"))
  except (ValueError, RecursionError):
    return None


_BLANKS = re.compile(r"[ \t\r\n]*")


def _after_blanks(text: str, place: int) -> int:
  return _BLANKS.match(text, place).end()


def _json_fault(error: Exception) -> str:
  if isinstance(error, RecursionError):
    return "is nested too deeply to be read"
  if isinstance(error, json.JSONDecodeError):
    return f"is not JSON: {error.msg} (column {error.colno})"
  return f"is not JSON: {error}"


def _byte_fault(error: UnicodeDecodeError) -> str:
  return (f"byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8; if it is Latin-1, write it as UTF-8 first: "
          "iconv -f LATIN1 -t UTF-8")


def _not_utf8(name: str, content: bytes, error: UnicodeDecodeError) -> str:
  line = content.count(b"\n", 0, error.start) + 1
  return f"{name}:{line}: {_byte_fault(error)}"


def _kind_name(value: Any) -> str:
  names = {type(None): "null", dict: "an object", list: "a list", bool: "a truth value", float: "a number", int: "a number",
           str: "a string"}
  return names.get(type(value), f"a {type(value).__name__}")


def _listed(names: Sequence[str]) -> str:
  more = len(names) - _SHOWN_NAMES
  listed = ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
  return _SURROGATES.sub("\ufffd", listed) or "none"


def _status(path: str) -> os.stat_result | None:
  try:
    return os.stat(path) if path != "-" else None
  except OSError:
    return None  # opening it tells what is wrong


def _reason(error: Exception) -> str:
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return str(error).split("\n")[0] or type(error).__name__
