"""Forward tokens (B x S of all batches) per scored token, beside the floor of half-overlapping windows."""
# ruff: noqa: E501, UP031


import tempfile
import time
import numpy as np
from moe.data import evaluation, records, embedded, tokenizers
import pathlib


FOLDER = pathlib.Path(tempfile.mkdtemp())

def measure(name, path, tok, S, B, split="validation"):
  t = time.perf_counter()
  forward = inside = scored = 0
  size = 0.0
  for w, n in evaluation.batches(path, split, tok, S, B):
    forward += w.inputs.size
    inside += int((w.segment_ids > 0).sum())
    scored += int(w.scored.sum())
    size += n
  print(
    f"{name}: S {S}, B {B}: forward/scored {forward / scored:.3f}, floor {inside / scored:.3f}, ratio {forward / inside:.3f}; {scored} tokens scored, {size:.1f} bytes, {time.perf_counter() - t:.1f} s"
  )


byte = tokenizers.load("byte")
for S, B in ((512, 16), (1024, 8), (4096, 4)):
  measure("kjv", "embedded:kjv", byte, S, B)
  measure("python", "embedded:python", byte, S, B)
bpe = FOLDER / "bpe.json"
if not bpe.exists():
  texts = [d.text for d in records.read_documents(embedded.resolve("embedded:kjv"), "train")][:300]
  tokenizers.train_bpe(texts, 4000, bpe)
tok = tokenizers.load(str(bpe))
measure("kjv bpe", "embedded:kjv", tok, 4096, 4)
# synthetic: lengths by log-normal
rng = np.random.default_rng(0)
for name, median, sigma, count in (
  ("lognormal 300", 300, 1.0, 4000),
  ("lognormal 1500", 1500, 1.2, 2000),
  ("2300 each", 2300, 0.0, 500),
  ("uniform to 4000", None, None, 2000),
):
  folder = FOLDER / name.replace(" ", "_")
  if not folder.exists():
    lengths = (
      rng.integers(1, 4000, count) if median is None else np.exp(rng.normal(np.log(median), sigma, count)).astype(int) + 1
    )
    records.write_domain(
      folder,
      {"train": [], "test": [], "validation": [records.Document("x" * int(n), "d", str(i)) for i, n in enumerate(lengths)]},
    )
  measure(name, str(folder), byte, 4096, 16)
