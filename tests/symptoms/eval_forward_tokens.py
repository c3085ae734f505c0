"""Tokens of the forward pass per scored token in evaluation, beside the floor that half-overlapping windows allow.

PYTHONPATH=CHECKOUT python tests/symptoms/eval_forward_tokens.py
"""

import pathlib
import tempfile

import numpy as np

from moe.data import embedded, evaluation, records, tokenizers

FOLDER = pathlib.Path(tempfile.mkdtemp())
BYTE = tokenizers.load("byte")


def measure(name: str, path: str, tokenizer, length: int, rows: int) -> None:
  forward = inside = scored = 0
  for windows, _ in evaluation.batches(path, "validation", tokenizer, length, rows):
    forward += windows.inputs.size
    inside += int((windows.segment_ids > 0).sum())
    scored += int(windows.scored.sum())
  print(f"{name}, {rows} rows of {length}: forward/scored {forward / scored:.3f}, floor {inside / scored:.3f}, "
        f"ratio {forward / inside:.3f}; {scored} tokens scored")


def domain_of(lengths: np.ndarray) -> str:
  """A domain whose validation documents have these numbers of bytes."""
  folder = pathlib.Path(tempfile.mkdtemp(dir=FOLDER)) / "domain"
  documents = [records.Document("x" * int(length), "made", str(i)) for i, length in enumerate(lengths)]
  records.write_domain(folder, {"train": [], "test": [], "validation": documents})
  return str(folder)


for length, rows in ((512, 16), (1024, 8), (4096, 4)):
  measure("kjv", "embedded:kjv", BYTE, length, rows)
  measure("python", "embedded:python", BYTE, length, rows)

texts = [document.text for document in records.read_documents(embedded.resolve("embedded:kjv"), "train")][:300]
tokenizers.train_bpe(texts, 4000, FOLDER / "bpe.json")
measure("kjv, BPE", "embedded:kjv", tokenizers.load(str(FOLDER / "bpe.json")), 4096, 4)

rng = np.random.default_rng(0)
for name, lengths in {
  "log-normal about 300": np.exp(rng.normal(np.log(300), 1.0, 4000)) + 1,
  "log-normal about 1500": np.exp(rng.normal(np.log(1500), 1.2, 2000)) + 1,
  "2300 each": np.full(500, 2300),
  "uniform to 4000": rng.integers(1, 4000, 2000),
}.items():
  measure(name, domain_of(lengths), BYTE, 4096, 16)
