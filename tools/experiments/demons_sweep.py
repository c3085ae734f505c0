"""Balance scopes on eight synthetic domains: Demons in the Detail (arXiv 2501.11873) in minutes on two cores.

    python -m tools.experiments.demons_sweep --seeds=3

Each domain has its own rotation R of a shared token space: after token v comes w with probability softmax(8 U R u_v). A
model of one mixture-of-experts layer (8 experts, top 1, too narrow for all rotations at once) sees the token and its
domain. A batch is 64 sequences of 32 tokens, each of one domain; f of the balance loss is taken over 1, 2, 4, 16 or all 64
sequences ("balance batch size"), or over as many random tokens as one sequence has ("shuffle"). Same coefficient for all.

Prints, for every scope: the gap of the cross-entropy to that of the true distribution, the share of a domain's tokens that
its favourite expert takes, the top-1 probability, and the largest load over the mean load of a whole batch, with the paper's
perplexities beside them, and whether the order is the paper's. Draws <out>/demons_sweep.png.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from moe.config import Router  # noqa: E402
from moe.routing import balance  # noqa: E402
from moe.routing import gates  # noqa: E402

DOMAINS, EXPERTS, VOCAB, WIDTH, HIDDEN, ROWS, TOKENS = 8, 8, 256, 24, 24, 64, 32
SCOPES = {"1": ("microbatch", 64), "2": ("microbatch", 32), "4": ("microbatch", 16), "16": ("microbatch", 4),
          "64 (global)": ("global", 1), "1, shuffled": ("shuffle", 64)}
# Table 1 and 2, 3.4 B / 0.6 B model, 120 B tokens: perplexity by balance batch size (4, 32, 512) and shuffled.
PAPER = "the paper, 120 B tokens: perplexity 8.167 at balance batch size 4, 8.062 at 32, 8.038 at 512, 8.041 shuffled"


def world(seed):
  """[domains, V, V] log-probabilities of what follows a token in a domain."""
  keys = jax.random.split(jax.random.fold_in(jax.random.key(4), seed), 2)
  tokens = jax.random.normal(keys[0], (VOCAB, WIDTH))
  tokens = tokens / jnp.linalg.norm(tokens, axis=-1, keepdims=True)
  rotations = jnp.linalg.qr(jax.random.normal(keys[1], (DOMAINS, WIDTH, WIDTH)))[0]
  return jax.nn.log_softmax(8 * jnp.einsum("vd,ide,we->ivw", tokens, rotations, tokens))


def batch(truth, key):
  """(domains [B], inputs [B, S], targets [B, S], the targets' true log-probabilities [B, S])."""
  cumulative = jnp.cumsum(jnp.exp(truth), -1)
  pick, begin, walk = jax.random.split(key, 3)
  domains = jax.random.randint(pick, (ROWS,), 0, DOMAINS)

  def step(current, draw):
    following = jnp.sum(cumulative[domains, current] < draw[:, None], -1)
    return jnp.minimum(following, VOCAB - 1), current

  first = jax.random.randint(begin, (ROWS,), 0, VOCAB)
  last, inputs = jax.lax.scan(step, first, jax.random.uniform(walk, (TOKENS, ROWS)))
  inputs = inputs.T
  targets = jnp.concatenate([inputs[:, 1:], last[:, None]], 1)
  return domains, inputs, targets, truth[domains[:, None], inputs, targets]


def init(key):
  def normal(key, *shape):
    return jax.random.normal(key, shape) * shape[-2] ** -0.5

  keys = jax.random.split(key, 6)
  return {"token": jax.random.normal(keys[0], (VOCAB, WIDTH)), "domain": jax.random.normal(keys[1], (DOMAINS, WIDTH)),
          "router": 0.1 * normal(keys[2], WIDTH, EXPERTS), "up": normal(keys[3], EXPERTS, WIDTH, HIDDEN),
          "down": normal(keys[4], EXPERTS, HIDDEN, WIDTH), "head": normal(keys[5], WIDTH, VOCAB)}


def forward(params, data, router: Router, groups: int, key):
  """(mean loss, gap to the truth, balance loss, Stats, experts [B, S])."""
  domains, inputs, targets, true_log_p = data
  x = params["token"][inputs] + params["domain"][domains][:, None]
  logits = x @ params["router"]
  choice, mask = gates.token_choice(logits, router), jnp.ones(inputs.shape, bool)
  stats = balance.collect(logits, choice, mask[..., None], mask, mask.astype(jnp.int32), router, groups,
                          jax.random.uniform(key, mask.shape))
  hidden = jax.nn.gelu(jnp.einsum("bsd,edf->bsef", x, params["up"]))
  every = jnp.einsum("bsef,efd->bsed", hidden, params["down"])
  weight = jnp.sum(jax.nn.one_hot(choice.experts, EXPERTS) * choice.weights[..., None], -2)
  out = jnp.einsum("bse,bsed->bsd", weight, every) @ params["head"]
  loss = -jnp.take_along_axis(jax.nn.log_softmax(out), targets[..., None], -1).mean()
  if router.balance_scope == "global":
    lbl = balance.balance_sum(balance.fractions(stats.counts, stats.tokens, 1), stats.probability_sums) / stats.tokens
  else:
    lbl = stats.local_balance_sum / stats.tokens
  return loss, loss + true_log_p.mean(), lbl, stats, choice.experts[..., 0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train(scope: str, groups: int, steps: int, coefficient: float, seed):
  """Metrics of one run, measured on 16 batches that it has not seen."""
  router = Router(top_k=1, renormalize=False, balance_scope=scope)
  truth = world(seed)
  optimizer = optax.adam(5e-3)
  params = init(jax.random.fold_in(jax.random.key(1), seed))

  def step(carry, i):
    params, state = carry
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), seed), i)
    data = batch(truth, key)

    def objective(params):
      loss, _, lbl, _, _ = forward(params, data, router, groups, jax.random.fold_in(key, 1))
      return loss + coefficient * lbl

    updates, state = optimizer.update(jax.grad(objective)(params), state)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))

  def measure(total, i):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), seed), i)
    data = batch(truth, key)
    _, gap, _, stats, experts = forward(params, data, router, groups, key)
    shares = jnp.zeros((DOMAINS, EXPERTS)).at[data[0]].add(jax.nn.one_hot(experts, EXPERTS).sum(1))
    load = stats.counts.max() / stats.counts.mean()
    return (total[0] + gap / 16, total[1] + shares, total[2] + stats.weight_sum / stats.tokens / 16, total[3] + load / 16), None

  (gap, shares, top, load), _ = jax.lax.scan(measure, (0.0, jnp.zeros((DOMAINS, EXPERTS)), 0.0, 0.0), jnp.arange(16))
  favourite = jnp.mean(shares.max(-1) / jnp.maximum(shares.sum(-1), 1))
  return {"gap": gap, "favourite": favourite, "top": top, "load": load}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=800)
  parser.add_argument("--coefficient", type=float, default=0.1)
  parser.add_argument("--out", default="runs/experiments")
  arguments = parser.parse_args()
  results = {name: [] for name in SCOPES}
  for seed in range(arguments.seeds):
    for name, (scope, groups) in SCOPES.items():
      values = jax.device_get(train(scope, groups, arguments.steps, arguments.coefficient, seed))
      results[name].append({key: float(value) for key, value in values.items()})
    print(f"seed {seed}: gap " + ", ".join(f"{name}: {results[name][-1]['gap']:.3f}" for name in SCOPES), flush=True)
  print(f"\nmeans of {arguments.seeds} seeds, {arguments.steps} steps, coefficient {arguments.coefficient}")
  print(f"{'balance batch size':20s}{'gap to truth':>14s}{'favourite':>12s}{'top-1 sum':>12s}{'max/mean load':>15s}")
  for name, runs in results.items():
    gap, favourite, top, load = (np.mean([run[key] for run in runs]) for key in ("gap", "favourite", "top", "load"))
    print(f"{name:20s}{gap:14.3f}{favourite:12.2f}{top:12.2f}{load:15.2f}")
  print(PAPER)
  gaps = {name: np.array([run["gap"] for run in runs]) for name, runs in results.items()}
  margin = gaps["1"] - gaps["64 (global)"]
  print(f"global below 1 sequence in {np.sum(margin > 0)} of {arguments.seeds} seeds, by {margin.min():.3f} to "
        f"{margin.max():.3f}; shuffled less global: {np.abs(gaps['1, shuffled'] - gaps['64 (global)']).max():.3f} at most")
  sizes = list(gaps)[:5]
  ordered = [all(gaps[a][s] > gaps[b][s] for a, b in zip(sizes, sizes[1:])) for s in range(arguments.seeds)]
  print(f"gap falls with every step of the balance batch size in {sum(ordered)} of {arguments.seeds} seeds, on average: "
        f"{all(gaps[a].mean() > gaps[b].mean() for a, b in zip(sizes, sizes[1:]))}")
  folder = pathlib.Path(arguments.out)
  folder.mkdir(parents=True, exist_ok=True)
  figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
  titles = {"gap": "gap to the true distribution, nats", "favourite": "share of a domain's favourite expert"}
  for axis, (key, title) in zip(axes, titles.items()):
    for seed in range(arguments.seeds):
      axis.plot([1, 2, 4, 16, 64], [results[name][seed][key] for name in sizes], marker="o", color="tab:blue", alpha=0.5)
      axis.plot([1], [results["1, shuffled"][seed][key]], marker="*", markersize=11, color="tab:orange", linestyle="",
                label="1, shuffled" if seed == 0 else None)
    axis.set(title=title, xlabel="balance batch size, sequences", xscale="log")
    axis.legend()
  figure.savefig(folder / "demons_sweep.png", dpi=110)
  (folder / "demons_sweep.json").write_text(json.dumps(results, indent=1) + "\n")
  print(f"wrote {folder}/demons_sweep.png and .json")


if __name__ == "__main__":
  main()
