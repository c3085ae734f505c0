"""What a server could gain from knowing the routing: an expert cache and an expert-aware batch former, on recorded traces.

    python -m tools.expert_cache                        # the sanity table: independent choices of 7 experts
    python -m tools.expert_cache RUN_DIR --layer 0      # hit rates and experts a batch of a trained model

A trace is the sequence of experts that one stream of tokens asks for. The cache holds a few experts of a layer; a miss
evicts one of them: at random, the least recently used (LRU), or the one needed farthest in the future (Belady, which is
optimal and needs the future: a pre-gate knows some of it). The batch former takes waiting requests by expert
(Read-ME, arXiv 2410.19123, Algorithm 1), so that a batch touches few experts; requests that waited too long go first.
Counts only: no time is measured or claimed.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from moe import model as model_lib
from moe.config import ConfigError, Model
from moe.data import evaluation
from moe.terminal import progress
from tools import restore
from tools import terminal

_NEVER = np.iinfo(np.int64).max


def next_uses(trace: Sequence[int]) -> np.ndarray:
  """[n] int64: position of the next request of the same expert, or a very large number."""
  result, seen = np.full(len(trace), _NEVER), {}
  for i in range(len(trace) - 1, -1, -1):
    result[i] = seen.get(trace[i], _NEVER)
    seen[trace[i]] = i
  return result


def hits(trace: Sequence[int], capacity: int, policy: str, seed: int = 0) -> int:
  """Requests that find their expert in a cache that starts empty.

  Args:
    trace: experts in order of request.
    capacity: experts that the cache holds.
    policy: random | lru | belady.
    seed: of the random evictions.

  Raises:
    ValueError: unknown policy, or a capacity below 1.
  """
  if policy not in ("random", "lru", "belady") or capacity < 1:
    raise ValueError(f"policy {policy!r} must be random, lru or belady, and capacity {capacity} at least 1")
  rng, cache, found = np.random.default_rng(seed), {}, 0  # expert -> last use, or next use for belady
  future = next_uses(trace) if policy == "belady" else None
  for i, expert in enumerate(trace):
    if expert in cache:
      found += 1
    elif len(cache) == capacity:
      if policy == "random":
        victim = list(cache)[rng.integers(capacity)]
      else:
        victim = min(cache, key=cache.get) if policy == "lru" else max(cache, key=cache.get)
      del cache[victim]
    cache[expert] = future[i] if policy == "belady" else i
  return found


def form_batches(requests: Iterable[tuple[int, int]], budget: int, window: int, patience: int | None = None,
                 expert_aware: bool = True) -> list[list[tuple[int, int]]]:
  """Groups requests into batches of at most `budget`.

  Args:
    requests: (identity, expert) in order of arrival.
    budget: requests of one batch.
    window: requests that wait at most; arrivals beyond it come in as batches leave.
    patience: batches a request may be passed over before it goes first; None: for ever, as in the paper.
    expert_aware: False takes requests in order of arrival.

  Raises:
    ValueError: a budget below 1, or a window below the budget.
  """
  if budget < 1 or window < budget:
    raise ValueError(f"budget {budget} must be at least 1 and window {window} at least the budget")
  arrivals, batches = iter(requests), []
  waiting: list[tuple[int, int, int]] = []  # identity, expert, batches passed over
  exhausted = False
  while True:
    while not exhausted and len(waiting) < window:
      request = next(arrivals, None)
      exhausted = request is None
      if request is not None:
        waiting.append((*request, 0))
    if not waiting:
      return batches
    if expert_aware:
      old = [r for r in waiting if patience is not None and r[2] >= patience]
      chosen = old[:budget]
      taken = {r[1] for r in chosen}
      rest = [r for r in waiting if r not in chosen]
      queues = collections.defaultdict(list)
      for request in rest:
        queues[request[1]].append(request)
      # experts that the batch touches already cost nothing more; then the longest queues
      for expert in sorted(queues, key=lambda e: (e not in taken, -len(queues[e]), e)):
        chosen = chosen + queues[expert][: budget - len(chosen)]
    else:
      chosen = waiting[:budget]
    batches.append([(identity, expert) for identity, expert, _ in chosen])
    gone = {identity for identity, _, _ in chosen}
    waiting = [(identity, expert, age + 1) for identity, expert, age in waiting if identity not in gone]


def unique_experts(batches: list[list[tuple[int, int]]]) -> float:
  """Mean number of different experts a batch."""
  return float(np.mean([len({expert for _, expert in batch}) for batch in batches]))


def record(path: str, layer: int, tokens: int) -> tuple[np.ndarray, Model]:
  """First choices of a trained model on its validation text: ([streams, tokens], the model's config).

  `layer` counts the layers with experts.

  Each full window of the evaluation is one stream.

  Raises:
    ConfigError: the model has no such layer, or its tokens do not choose.
  """
  trained = restore.load(path)
  model = trained.run.model
  if not 0 <= layer < model.num_routers:
    raise ConfigError(f"--layer={layer}: {path} has {model.num_routers} layer(s) with experts, numbered from 0")
  if model.lookahead:
    raise ConfigError(f"{model.lookahead}: a served token has no routing of its own to record")
  transformer = model_lib.build(model)
  run = jax.jit(lambda p, *batch: transformer.apply({"params": p}, *batch).experts[layer, ..., 0])
  streams = []
  for domain in trained.run.data.domains:
    for window, _ in evaluation.batches(domain.path, "validation", trained.tokenizer, trained.run.data.sequence_tokens,
                                        trained.run.data.batch_sequences, 1 + tokens // trained.run.tokens_per_step,
                                        packed=False):  # a stream is one document
      first = np.asarray(run(trained.params, window.inputs, window.segment_ids, window.positions))
      streams += list(first[(window.segment_ids > 0).all(1)])
  if not streams:
    raise ConfigError(f"no validation document of {path} fills a window of {trained.run.data.sequence_tokens} tokens")
  return np.stack(streams), model


def cache_table(streams: np.ndarray, num_experts: int) -> list[str]:
  """Hit rates by capacity and policy; each stream has a cache of its own."""
  lines = ["cache hits, % of requests", "  capacity    random       LRU    Belady"]
  for capacity in range(2, max(num_experts - 1, 3)):
    rates = [100 * sum(hits(s.tolist(), capacity, policy, seed=i) for i, s in enumerate(streams)) / streams.size
             for policy in ("random", "lru", "belady")]
    lines.append(f"  {capacity:8d}" + "".join(f"{rate:10.2f}" for rate in rates))
  return lines


def batch_table(streams: np.ndarray, budget: int, window: int, patience: int) -> list[str]:
  """Experts a batch, with requests arriving from all streams in turn."""
  requests = list(enumerate(streams.T.reshape(-1).tolist()))
  rows = {"in order of arrival": form_batches(requests, budget, window, expert_aware=False),
          "by expert": form_batches(requests, budget, window),
          f"by expert, patience {patience}": form_batches(requests, budget, window, patience)}
  lines = [f"different experts a batch of {budget}, {window} requests waiting"]
  return lines + [f"  {name:24s} {unique_experts(batches):6.2f}" for name, batches in rows.items()]


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.expert_cache", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("path", nargs="?", help="run directory, or checkpoints/<step> of one; without it, independent choices")
  parser.add_argument("--layer", type=int, default=0, help="which of the layers with experts, from 0 (0 with a pre-gate)")
  parser.add_argument("--tokens", type=int, default=20_000, help="tokens of each domain, at least")
  parser.add_argument("--budget", type=int, default=16, help="requests a batch")
  parser.add_argument("--window", type=int, default=64, help="requests waiting")
  parser.add_argument("--patience", type=int, default=8, help="batches a request may be passed over")
  arguments = parser.parse_args(argv)
  if arguments.budget < 1 or arguments.window < arguments.budget or arguments.patience < 0 or arguments.tokens < 1:
    parser.error("--budget and --tokens must be at least 1, --window at least the budget, --patience at least 0")
  if arguments.path:
    with progress("routes the validation text"):
      streams, model = record(arguments.path, arguments.layer, arguments.tokens)
    num_experts = model.experts.num_experts
    layer = "pre-gate" if model.router.pre_gate.d_model else model.moe_layer_name(arguments.layer)
    title = f"{arguments.path}, {layer}: {streams.shape[0]} streams of {streams.shape[1]} tokens"
  else:
    num_experts = 7
    streams = np.random.default_rng(0).integers(0, num_experts, (8, 4096))
    title = ("8 streams of 4096 independent, even choices of 7 experts; the paper's trace gives Belady 44.16, 61.82, 77.21, "
             "88.03 and LRU 33.90, 52.42, 66.95, 83.48 at 2 to 5")
  repeats = (streams[:, 1:] == streams[:, :-1]).mean()
  print(title, f"next token stays with its expert: {repeats:.1%}", "", *cache_table(streams, num_experts), "",
        *batch_table(streams, arguments.budget, arguments.window, arguments.patience), sep="\n")
  return 0


if __name__ == "__main__":
  terminal.run(main)
