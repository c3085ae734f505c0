"""Evaluation by domain: bits per byte with each byte scored once, and where the experts' load goes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe import config
from moe import sharding
from moe import step as step_lib
from moe.data import embedded
from moe.data import evaluation
from moe.data import records
from moe.data.tokenizers import Tokenizer
from moe.model import Batch
from moe.routing import analysis

_LARGEST_TEXT_BYTES = 8 << 20  # xz -9e takes a second a megabyte


def evaluate_domain(run: config.Run, mesh, eval_step, params, domain: config.Domain, tokenizer: Tokenizer,
                    split: str = "validation", limit_batches: int | None = None,
                    stop: Callable[[], bool] = lambda: False) -> tuple[dict[str, Any], list] | None:
  """Scores a domain's split. Collective: every host calls it, and reads the same batches.

  Args:
    run: gives the window and the batch.
    mesh: the mesh that is set.
    eval_step: from `step.jit_eval_step`.
    params: the model's parameters on the mesh.
    domain: what to read.
    tokenizer: of the run.
    split: which split.
    limit_batches: stop after the rows of this many micro-batches of training; None: every byte.
    stop: asked after each batch, on all hosts with the same answer: whether to leave off.

  Returns:
    None where it was left off; else
    (bits_per_byte (nll of all tokens and document ends, over the bytes of the text), loss (nats a token), accuracy,
    tokens (scored), bytes, forward_tokens (that the model was run on, padding too), window_tokens (of the documents'
    windows: the fewest that forward_tokens could be), expert_counts [L, E], router_entropy (nats), top_k_weight and router_z
    [L], and the information in nats between the layers' choices and between their probabilities [L, L], see
    routing/analysis.py;
    for each layer and expert what it reads in the first rows, see `analysis.examples`, on the first host: [] on the others).
    The routing is that of scored tokens: each token of the text counts once.

  Raises:
    records.DataError
  """
  rows = step_lib.eval_rows(run, mesh)
  limit = limit_batches and -(-limit_batches * run.data.batch_sequences // (run.train.micro_batches * rows))
  batches = evaluation.batches(domain.path, split, tokenizer, run.data.sequence_tokens, rows, limit,
                               step_lib.packs_evaluation(run.model))
  sums = step_lib.zero_eval_sums(run, mesh)
  text_bytes, forward_tokens, window_tokens, first = 0.0, 0, 0, None
  for window, size in batches:
    batch, scored = _on_mesh(mesh, window)
    sums, chosen = eval_step(params, sums, batch, scored)
    if mesh.devices.flat[0].platform == "cpu":
      # Forwards do not wait for each other's sums, and on CPU several programs in flight take the few threads from the
      # devices that their collectives wait for: for ever. Elsewhere programs run one after the other.
      jax.block_until_ready(sums)
    if first is None:
      first = window, chosen
    text_bytes += size
    forward_tokens += window.inputs.size
    window_tokens += int(np.count_nonzero(window.segment_ids))
    if stop():
      return None
  if first is None:
    raise records.DataError(f"domain {domain.name!r} has no {split} documents")
  # The device still works on the batches above, meanwhile.
  shown = _examples(*first, run.model.experts.num_experts, tokenizer) if jax.process_index() == 0 else []
  total = step_lib.eval_totals(sums)
  tokens = total["scored"]
  score = {"bits_per_byte": float(total["nll"] / math.log(2) / text_bytes), "loss": float(total["nll"] / tokens),
           "accuracy": float(total["hits"] / tokens), "tokens": int(tokens), "bytes": round(text_bytes),
           "forward_tokens": forward_tokens, "window_tokens": window_tokens,
           "expert_counts": total["expert_counts"], "router_entropy": total["entropy"] / tokens,
           "top_k_weight": total["weight"] / tokens, "router_z": total["z"] / tokens,
           "information_choices": total["information_choices"],
           "information_probabilities": total["information"] / np.maximum(total["sampled"], 1)}
  return score, shown


def _on_mesh(mesh, window: evaluation.Window) -> tuple[Batch, jax.Array]:
  """(batch, scored) as arrays of the mesh, of which every host has all rows."""
  shards = sharding.batch_sharding(mesh)
  *fields, scored = (jax.make_array_from_callback(a.shape, shards, lambda index, a=a: a[index]) for a in window)
  return Batch(*fields), scored


def _examples(window: evaluation.Window, chosen: jax.Array, num_experts: int, tokenizer: Tokenizer) -> list[list[dict]]:
  """`analysis.examples` of the rows of a batch of which there are choices [L, R, S]."""
  first = np.asarray(chosen)
  inputs, segment_ids, scored = (field[: first.shape[1]] for field in (window.inputs, window.segment_ids, window.scored))
  return analysis.examples(first[..., None], inputs, scored, num_experts, tokenizer.decode, segment_ids=segment_ids)


def routing_table(results: dict[str, dict[str, Any]], model: config.Model, most_layers: int = 8) -> list[str]:
  """A few lines for the terminal: the routing of each layer, by its number in the model, over all domains; where there are
  many the worst loaded."""
  counts = np.stack([r["expert_counts"] for r in results.values()])  # [domains, L, E]
  total = counts.sum(0)
  columns = {
      "max/mean load": total.max(-1) / np.maximum(total.mean(-1), 1e-9), "experts in use": analysis.effective_experts(total),
      "entropy": np.mean([r["router_entropy"] for r in results.values()], 0),
      "top-k sum": np.mean([r["top_k_weight"] for r in results.values()], 0),
      "specialised": analysis.specialisation(counts)}
  lines = ["  layer" + "".join(f"{name:>16s}" for name in columns)]
  worst = np.argsort(-columns["max/mean load"], kind="stable")[:most_layers]
  lines += [f"  {model.moe_layer_number(layer):5d}" + "".join(f"{values[layer]:16.2f}" for values in columns.values())
            for layer in sorted(worst)]
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
