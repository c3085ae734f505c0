"""What a host pays for its share of the batches: memory, seconds to the first batch, milliseconds a batch, the longest wait.

    python -m tools.bench.loader --batch=2048 --length=2048 --rows=4           # a host of PaLM's pod: 4 of 2048 rows
    python -m tools.bench.loader --batch=16 --length=4096 --rows=4             # a host of OLMoE's
    python -m tools.bench.loader --batch=16 --length=4096 --packing=best_fit --vocab_size=4096

Batches are taken as fast as they come, or one every `--step_seconds`; each measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np

from moe import config
from moe.data import embedded
from moe.data import pipeline
from moe.data import records
from moe.data import tokenizers


def resident_bytes() -> int:
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--length", type=int, default=4096)
  parser.add_argument("--rows", type=int, help="of the batch, for this host; default: all")
  parser.add_argument("--virtual_shards", type=int, default=0)
  parser.add_argument("--packing", default="concat")
  parser.add_argument("--vocab_size", type=int, default=0, help="of a BPE learnt on the text; 0: bytes")
  parser.add_argument("--batches", type=int, default=200)
  parser.add_argument("--step_seconds", type=float, default=0.0)
  arguments = parser.parse_args()
  domains = (config.Domain(name="kjv", path="embedded:kjv", weight=3.0), config.Domain(name="python", path="embedded:python"))
  with tempfile.TemporaryDirectory() as folder:
    tokenizer = "byte"
    if arguments.vocab_size:
      tokenizer = f"{folder}/bpe.json"
      texts = [d.text for d in records.read_documents(embedded.resolve("embedded:kjv"), "validation")]
      tokenizers.train_bpe(texts, arguments.vocab_size, pathlib.Path(tokenizer))
    data = config.Data(domains=domains, batch_sequences=arguments.batch, sequence_tokens=arguments.length, tokenizer=tokenizer,
                       packing=arguments.packing, virtual_shards=arguments.virtual_shards)
    before, begin = resident_bytes(), time.monotonic()
    loader = pipeline.Loader(data, 0, range(arguments.rows or arguments.batch))
    waits = []
    for _ in range(arguments.batches):
      asked = time.monotonic()
      next(loader)
      waits.append(time.monotonic() - asked)
      time.sleep(arguments.step_seconds)
    seconds = time.monotonic() - begin
    state = loader.state()
    later = np.sort(waits[1:])
    rows = arguments.rows or arguments.batch
    shards = state["fingerprint"]["virtual_shards"]
    print(f"batch {arguments.batch} x {arguments.length}, {rows} rows here, {len(state['shards'])} of {shards} virtual shards "
          f"open, {arguments.packing}, {'BPE' if arguments.vocab_size else 'bytes'}")
    print(f"  first batch {waits[0]:.2f} s; then waited for {1e3 * np.median(later):.1f} ms (median), "
          f"{1e3 * later[-1]:.0f} ms (longest), {later.sum():.2f} s in all of {seconds:.1f} s")
    print(f"  memory {(resident_bytes() - before) / 1e6:.0f} MB; state {len(json.dumps(state)) / 1e3:.1f} kB")
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
