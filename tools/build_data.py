"""Makes a domain's ArrayRecord files from text, jsonl or parquet; or trains a tokenizer on one.

  python -m tools.build_data --domain=books --output=data/books --format=text 'corpus/*.txt'
  python -m tools.build_data --domain=web --output=data/web --format=jsonl --field=content 'crawl-*.jsonl'
  python -m tools.build_data --verify data/books
  python -m tools.build_data --train_tokenizer=bpe.json --vocab_size=4096 data/books
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import pathlib
from collections.abc import Iterator

from moe.config import ConfigError
from moe.data import embedded
from moe.data import records
from moe.data import tokenizers
from moe.data.records import DataError, Document
from tools import terminal


def read_documents(path: str, kind: str, field: str, domain: str) -> Iterator[Document]:
  """The documents of one input file: all of a text file, a line of jsonl, a row of parquet.

  Raises:
    DataError: with the file, and the line or row.
  """
  try:
    if kind == "text":
      yield Document(pathlib.Path(path).read_text(encoding="utf-8"), domain, path)
    elif kind == "jsonl":
      with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
          if line.strip():
            yield Document(_text(json.loads(line), field, f"{path}:{number}"), domain, f"{path}:{number}")
    else:
      for number, row in enumerate(_parquet_rows(path, field)):
        yield Document(_text(row, field, f"{path} row {number}"), domain, f"{path}#{number}")
  except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
    raise DataError(f"{path} cannot be read as {kind}: {error}") from error


def _text(row, field: str, place: str) -> str:
  if not isinstance(row, dict) or not isinstance(row.get(field), str):
    names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise DataError(f"{place} has no text field {field!r} (it has {names}); name it with --field")
  return row[field]


def _parquet_rows(path: str, field: str):
  try:
    from pyarrow import parquet  # an extra: 175 MB
  except ImportError as error:
    raise DataError("parquet needs pyarrow; pip install 'moe-pretrain[parquet]'") from error
  file = parquet.ParquetFile(path)
  if field not in file.schema_arrow.names:
    raise DataError(f"{path} has no column {field!r}; it has {', '.join(file.schema_arrow.names)}; name one with --field")
  for batch in file.iter_batches(columns=[field]):
    yield from batch.to_pylist()


def split_of(document: Document, held_out: float) -> str:
  """train, or for a share `held_out` each validation or test, by a hash of the text: equal texts never straddle."""
  place = int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8]) / 2**64
  return "validation" if place < held_out else "test" if place < 2 * held_out else "train"


def build(arguments: argparse.Namespace) -> None:
  files = sorted({path for pattern in arguments.inputs for path in glob.glob(pattern, recursive=True)})
  if not files:
    raise DataError(f"no file matches {' '.join(arguments.inputs)}")

  def documents(split):
    for path in files:
      for document in read_documents(path, arguments.format, arguments.field, arguments.domain):
        if document.text and split_of(document, arguments.held_out) == split:
          yield document

  manifest = records.write_domain(pathlib.Path(arguments.output), {s: documents(s) for s in records.SPLITS},
                                  arguments.shards)
  for split, entry in manifest["splits"].items():
    print(f"{split:10s} {entry['documents']:,} documents, {entry['text_bytes']:,} bytes of text")


def verify(folder: pathlib.Path) -> int:
  """0 where every file has the manifest's digest, 1 with a line for each that has not."""
  wrong = 0
  for split in records.read_manifest(folder)["splits"].values():
    for entry in split["files"]:
      path = folder / entry["name"]
      found = records.sha256(path) if path.exists() else "missing"
      if found != entry["sha256"]:
        print(f"{path}: {found}, the manifest says {entry['sha256']}")
        wrong += 1
  print("damaged" if wrong else "every file is as it was built")
  return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.build_data", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("inputs", nargs="+", metavar="GLOB", help="input files; with --verify or --train_tokenizer a domain")
  parser.add_argument("--domain", help="name of the domain, kept with every document")
  parser.add_argument("--output", help="directory to make")
  parser.add_argument("--format", choices=("text", "jsonl", "parquet"), default="text")
  parser.add_argument("--field", default="text", help="field or column that holds the text (jsonl, parquet)")
  parser.add_argument("--held_out", type=float, default=0.01, help="share of the documents for validation, and for test")
  parser.add_argument("--shards", type=int, default=1, help="files a split")
  parser.add_argument("--verify", action="store_true", help="check a built domain against its manifest")
  parser.add_argument("--train_tokenizer", metavar="JSON", help="learn a byte-level BPE on the training split of a domain")
  parser.add_argument("--vocab_size", type=int, default=4096)
  arguments = parser.parse_args(argv)
  if arguments.verify or arguments.train_tokenizer:
    if len(arguments.inputs) != 1:
      raise ConfigError(f"one domain directory is wanted, got {len(arguments.inputs)}")
    folder = embedded.resolve(arguments.inputs[0])
    if arguments.verify:
      return verify(folder)
    texts = (document.text for document in records.read_documents(folder, "train"))
    tokenizers.train_bpe(texts, arguments.vocab_size, pathlib.Path(arguments.train_tokenizer))
    print(f"{arguments.train_tokenizer}: {tokenizers.load(arguments.train_tokenizer).vocab_size} ids")
    return 0
  if not arguments.domain or not arguments.output:
    raise ConfigError("--domain and --output are needed to build; see --help")
  if not 0 <= arguments.held_out < 0.5 or arguments.shards < 1:
    raise ConfigError(f"--held_out={arguments.held_out} must be in [0, 0.5) and --shards={arguments.shards} at least 1")
  build(arguments)
  return 0


if __name__ == "__main__":
  terminal.run(main)
