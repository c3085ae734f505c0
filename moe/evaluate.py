"""Evaluation by domain: bits per byte with each byte scored once, and where the experts' load goes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
from typing import Any

import jax
import numpy as np

from moe import config
from moe import sharding
from moe.data import embedded
from moe.data import evaluation
from moe.data import records
from moe.data.tokenizers import Tokenizer
from moe.model import Batch
from moe.routing import analysis

_LARGEST_TEXT_BYTES = 8 << 20  # xz -9e takes a second a megabyte


def evaluate_domain(run: config.Run, mesh, eval_step, params, domain: config.Domain, tokenizer: Tokenizer,
                    split: str = "validation", limit_batches: int | None = None) -> tuple[dict[str, Any], list]:
  """Scores a domain's split.

  Args:
    run: gives the window and the batch.
    mesh: the mesh that is set.
    eval_step: from `step.jit_eval_step`.
    params: the model's parameters on the mesh.
    domain: what to read.
    tokenizer: of the run.
    split: which split.
    limit_batches: stop after this many batches; None: every byte.

  Returns:
    (bits_per_byte (nll of all tokens and document ends, over the bytes of the text), loss (nats a token), accuracy,
    tokens, bytes, expert_counts [L, E], router_entropy (nats), top_k_weight and router_z [L], and the information in nats
    between the layers' choices and between their probabilities [L, L], see routing/analysis.py;
    for each layer and expert what it reads in the first batch, see `analysis.examples`).

  Raises:
    records.DataError
  """
  rows, shards = run.data.batch_sequences // run.train.micro_batches, sharding.batch_sharding(mesh)
  sums, shown, text_bytes = None, None, 0.0
  for window, size in evaluation.batches(domain.path, split, tokenizer, run.data.sequence_tokens, rows, limit_batches):
    arrays = [jax.make_array_from_callback(a.shape, shards, lambda index, a=a: a[index]) for a in window]
    out, chosen = eval_step(params, Batch(*arrays[:4]), arrays[4])
    out = jax.tree.map(lambda x: np.asarray(x, np.float64), out)
    if shown is None:
      shown = analysis.examples(np.asarray(chosen), window[0], window[2] > 0, run.model.experts.num_experts, tokenizer.decode)
    sums = out if sums is None else jax.tree.map(np.add, sums, out)
    text_bytes += size
  if sums is None:
    raise records.DataError(f"domain {domain.name!r} has no {split} documents")
  stats = sums["stats"]
  score = {"bits_per_byte": float(sums["nll"] / math.log(2) / text_bytes), "loss": float(sums["nll"] / sums["scored"]),
           "accuracy": float(sums["hits"] / sums["scored"]), "tokens": int(sums["scored"]), "bytes": round(text_bytes),
           "expert_counts": stats.counts.astype(np.int64), "router_entropy": stats.entropy_sum / stats.tokens,
           "top_k_weight": stats.weight_sum / stats.tokens, "router_z": stats.z_sum / stats.tokens,
           "information_choices": analysis.mutual_information(sums["joint"]),
           "information_probabilities": sums["information"] / sums["sampled"]}
  return score, shown


def routing_table(results: dict[str, dict[str, Any]], most_layers: int = 8) -> list[str]:
  """A few lines for the terminal: the routing of each layer, over all domains, where there are many the worst loaded."""
  counts = np.stack([r["expert_counts"] for r in results.values()])  # [domains, L, E]
  total = counts.sum(0)
  columns = {
      "max/mean load": total.max(-1) / np.maximum(total.mean(-1), 1e-9), "experts in use": analysis.effective_experts(total),
      "entropy": np.mean([r["router_entropy"] for r in results.values()], 0),
      "top-k sum": np.mean([r["top_k_weight"] for r in results.values()], 0),
      "specialised": analysis.specialisation(counts)}
  lines = ["  layer" + "".join(f"{name:>16s}" for name in columns)]
  worst = np.argsort(-columns["max/mean load"], kind="stable")[:most_layers]
  lines += [f"  {layer:5d}" + "".join(f"{values[layer]:16.2f}" for values in columns.values()) for layer in sorted(worst)]
  if len(total) > most_layers:
    lines.append(f"  (the {most_layers} most uneven of {len(total)} layers)")
  return lines


def compressors(domain: config.Domain, split: str = "validation") -> dict[str, tuple[float, float, float]] | None:
  """Bits per byte of gzip -9, bzip2 -9 and xz -9e on a domain's text, None where it is too large to bother.

  Three columns: the split alone; the split after the training text (compressed sizes subtracted), the fair comparison
  for xz, whose window holds all of it; and the whole text.
  """
  folder = embedded.resolve(domain.path)
  splits = records.read_manifest(folder)["splits"]
  if sum(s["text_bytes"] for s in splits.values()) > _LARGEST_TEXT_BYTES:
    return None
  texts = {name: "".join(d.text for d in records.read_documents(folder, name)).encode()
           for name in splits if splits[name]["documents"]}
  scored, train, whole = texts[split], texts["train"], b"".join(texts.values())
  sizes = {"gzip": lambda b: len(gzip.compress(b, 9)), "bzip2": lambda b: len(bz2.compress(b, 9)),
           "xz": lambda b: len(lzma.compress(b, preset=9 | lzma.PRESET_EXTREME))}
  return {name: (8 * size(scored) / len(scored), 8 * (size(train + scored) - size(train)) / len(scored),
                 8 * size(whole) / len(whole)) for name, size in sizes.items()}
