"""Makes a domain's ArrayRecord files from text, jsonl, JSON or parquet; or trains a tokenizer on domains.

  python -m tools.build_data --domain=books --output=data/books texts 'more/*.txt.gz'
  python -m tools.build_data --domain=web --output=data/web --field=content 'crawl-*.jsonl'
  zstdcat dump.zst | python -m tools.build_data --domain=dump --output=data/dump --field=meta.text -
  python -m tools.build_data --verify data/books
  python -m tools.build_data --train_tokenizer=bpe.json --vocab_size=4096 data/books data/web

Files are what their content says (plain or compressed by gzip, Zstandard, bzip2 or xz), folders are read with all below them. A
build that was killed, or whose disk was full, goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import time

from moe.config import ConfigError
from moe.data import building
from moe.data import embedded
from moe.data import records
from moe.data import text_files
from moe.data import tokenizers
from tools import terminal

def _workers() -> int:
  """One a CPU, but no more than keep the process that writes busy: it takes about 90 MB/s."""
  cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(cpus, 8)


def _show(work, now: building.Progress) -> None:
  """Documents, text a second, and how much of the inputs is read; of a pipe, whose end is not known, how much text it gave."""
  done = now.text_bytes if now.total_bytes is None else now.read_bytes
  if not work.done:  # a build that goes on did not read what is before
    work.first_done, work.first_text = done, now.text_bytes
  work.done = done
  rate = (now.text_bytes - work.first_text) / max(time.monotonic() - work.start, 1e-9)
  work.what = f"{now.documents:,} documents, {terminal.size(rate)}/s of text"


def build(arguments: argparse.Namespace) -> None:
  if "://" in arguments.output:
    raise ConfigError(f"--output={arguments.output} must be a local folder; copy it by `gcloud storage cp -r` once it is built")
  reader = text_files.Reader(text_files.find(arguments.inputs), arguments.format, arguments.field)
  options = building.Options(
      domain=arguments.domain, field=arguments.field, held_out=arguments.held_out, shards=arguments.shards,
      on_bad=arguments.on_bad, max_bad=arguments.max_bad, workers=arguments.workers or _workers(),
      part_bytes=int(arguments.part_mb * 1e6))
  with terminal.progress("documents", reader.total_bytes, "B") as work:
    state = building.build(reader, pathlib.Path(arguments.output).expanduser(), options, functools.partial(_show, work))
  if state.resumed_documents:
    print(f"note: went on after {state.resumed_documents:,} documents of an earlier try")
  for note in list(reader.notes.values())[:5]:
    print(f"note: {note}")
  for split, about in state.splits.items():
    print(f"{split:10s} {about['documents']:,} documents, {about['text_bytes']:,} bytes of text")
  for split, about in state.splits.items():
    if not about["documents"]:
      print(f"note: {split} is empty: " + _way_to_fill(split, state.documents, arguments.held_out))
  if state.empty:
    print(f"note: {state.empty:,} documents without text are left out")
  if state.replaced:
    print(f"note: lone surrogates became U+FFFD in {state.replaced:,} documents")
  if state.faults:
    print(f"note: {len(state.faults):,} places could not be read and are left out, the first is {state.faults[0]}; all are in "
          f"{arguments.output}/skipped.txt")


def _way_to_fill(split: str, documents: int, held_out: float) -> str:
  if split == "train":
    return f"all {documents} documents are held out by --held_out={held_out}; lower it"
  if held_out == 0:
    return "--held_out=0; a run evaluates on it unless Train.eval_every_steps is 0"
  share = min(max(10 / documents, 2 * held_out), 0.4)
  return f"--held_out={held_out} of {documents} documents; give more, or remove the folder and try --held_out={share:.2g}"


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


def train_tokenizer(arguments: argparse.Namespace) -> None:
  folders = [embedded.resolve(path) for path in arguments.inputs]
  texts = (document.text for folder in folders for document in records.read_documents(folder, "train"))
  tokenizers.train_bpe(texts, arguments.vocab_size, pathlib.Path(arguments.train_tokenizer))
  print(tokenizers.described(tokenizers.load(arguments.train_tokenizer)))


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.build_data", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("inputs", nargs="+", metavar="INPUT",
                      help="files, folders, patterns, or - for a pipe; with --verify or --train_tokenizer domains")
  parser.add_argument("--domain", help="name of the domain, kept with every document")
  parser.add_argument("--output", help="folder to make")
  parser.add_argument("--format", choices=text_files.FORMATS, default="auto",
                      help="text: a file is a document; jsonl: a line; json: an element of an array, or objects one after "
                      "another; parquet: a row; auto: by content, then by name (default)")
  parser.add_argument("--field", default="text", help="field or column that holds the text, or a path to it: meta.text "
                      "(default: text)")
  parser.add_argument("--held_out", type=float, default=0.01, help="share of the documents for validation, and for test "
                      "(default: 0.01)")
  parser.add_argument("--on_bad", choices=("stop", "skip"), default="stop", help="what to do where something cannot be read, "
                      "or has no text (default: stop)")
  parser.add_argument("--max_bad", type=int, default=1000, help="stop when more places than that were skipped (default: 1000)")
  parser.add_argument("--workers", type=int, default=0, help="processes; the domain does not depend on it (default: one a CPU, "
                      "8 at most)")
  parser.add_argument("--part_mb", type=float, default=1000.0, help="MB of text after which files are closed and others begun; "
                      "an interrupted build goes on after them (default: 1000)")
  parser.add_argument("--shards", type=int, default=1, help="files a split and part (default: 1)")
  parser.add_argument("--verify", action="store_true", help="check built domains against their manifests")
  parser.add_argument("--train_tokenizer", metavar="JSON", help="learn a byte-level BPE on the training splits of domains")
  parser.add_argument("--vocab_size", type=int, default=4096, help="ids of the tokenizer to learn (default: 4096)")
  arguments = parser.parse_args(argv)
  if arguments.verify:
    return max(verify(embedded.resolve(path)) for path in arguments.inputs)
  if arguments.train_tokenizer:
    train_tokenizer(arguments)
    return 0
  if not arguments.domain or not arguments.output:
    raise ConfigError("--domain and --output are needed to build; see --help")
  if not 0 <= arguments.held_out < 0.5 or arguments.shards < 1:
    raise ConfigError(f"--held_out={arguments.held_out} must be in [0, 0.5) and --shards={arguments.shards} at least 1")
  if arguments.workers < 0 or arguments.max_bad < 0 or not arguments.part_mb > 0:
    raise ConfigError(f"--workers={arguments.workers} and --max_bad={arguments.max_bad} must be at least 0, and "
                      f"--part_mb={arguments.part_mb} above 0")
  build(arguments)
  return 0


if __name__ == "__main__":
  terminal.run(main)
