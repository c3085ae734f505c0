"""Domains of the rows of a batch, by the real loader on two domains of three to one: variance over that of independent draws.

PYTHONPATH=CHECKOUT python tests/symptoms/rows.py
"""

import pathlib
import tempfile

import numpy as np

from moe import config
from moe.data import pipeline
from moe.data import records
from moe.data import tokenizers


def share_ratio(counts: np.ndarray, rows: int, share: float = 0.25) -> float:
  return float(np.mean((counts - rows * share) ** 2) / (rows * share * (1 - share)))


with tempfile.TemporaryDirectory() as folder:
  rng, domains = np.random.default_rng(0), []
  for name, alphabet, weight in (("upper", "ABCDEF", 3.0), ("lower", "abcdef", 1.0)):
    documents = [records.Document("".join(rng.choice(list(alphabet), 200)), name, str(i)) for i in range(200)]
    records.write_domain(pathlib.Path(folder) / name, {"train": documents})
    domains.append(config.Domain(name=name, path=f"{folder}/{name}", weight=weight))
  for shards in (4, 16):
    data = config.Data(domains=tuple(domains), batch_sequences=16, sequence_tokens=64, virtual_shards=shards)
    loader, decode = pipeline.Loader(data, 0), tokenizers.ByteTokenizer().decode
    lower = np.array([[any(c.islower() for c in decode(row)) for row in next(loader)[0]] for _ in range(150)])
    micro = lower.reshape(150, 4, 4).swapaxes(1, 2).reshape(600, 4)
    print(
      f"16 rows, {shards} virtual shards: variance of the rarer domain's rows over independent draws: by batch "
      f"{share_ratio(lower.sum(1), 16):.2f}, by micro-batch {share_ratio(micro.sum(1), 4):.2f}"
    )
