"""Every gate against a dense float64 reference, on one device and with expert parallelism.

    python -m tools.experiments.gate_errors

Prints the largest error of the MoE block's output and of its gradients (tokens and all parameters), each relative to the
largest entry. The reference shares no code with the library: choice and drops are NumPy loops, experts run on all tokens.
Needs eight devices; on a CPU they are made.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# ruff: noqa: E402
import dataclasses
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from moe import config
from moe import model as model_lib
from moe import sharding
from moe.routing import gates

ROWS, TOKENS, WIDTH, EXPERTS, HIDDEN = 8, 16, 16, 8, 24
GATES = {
    "softmax": {}, "softmax, not renormalised": {"renormalize": False}, "softmax, groups": {"num_groups": 4, "top_groups": 1},
    "noisy": {"gate": "noisy"}, "sigmoid": {"gate": "sigmoid", "renormalize": False},
    "sigmoid, DeepSeek-V3": {"gate": "sigmoid", "num_groups": 2, "top_groups": 1, "bias_update_rate": 0.1,
                             "weight_scale": 2.5},
    "cosine": {"gate": "cosine", "cosine_width": 12},
    "expert_choice": {"gate": "expert_choice", "allow_lookahead": True, "balance_coef": 0.0},
    "soft": {"gate": "soft", "soft_slots": 3, "allow_lookahead": True, "balance_coef": 0.0},
}
DISPATCHES = {"dropless": {}, "capacity": {"capacity_factor": 0.5},
              "capacity, microbatch": {"capacity_factor": 0.5, "capacity_group": "microbatch"},
              "capacity, probability": {"capacity_factor": 0.5, "drop_policy": "probability"},
              "capacity, random": {"capacity_factor": 0.5, "drop_policy": "random"}}
MESHES = {"1 device": config.Mesh(), "8 devices, expert 4": config.Mesh(data=2, expert=4)}


def make_model(gate: str, dispatch: str) -> config.Model:
  router = config.Router(top_k=2, **GATES[gate])
  return config.Model(
      vocab_size=8, num_layers=1, d_model=WIDTH, compute_dtype="float32", router=router,
      attention=config.Attention(num_heads=2, head_dim=8),
      experts=config.Experts(num_experts=EXPERTS, d_expert=HIDDEN, **DISPATCHES[dispatch]))


def cases() -> list[tuple[str, str]]:
  """(gate, dispatch) that go together."""
  plain = [(gate, dispatch) for gate in GATES for dispatch in ("dropless", "capacity")]
  plain.remove(("soft", "capacity"))
  return plain + [("softmax", "capacity, probability"), ("softmax", "capacity, random"), ("softmax", "capacity, microbatch"),
                  ("expert_choice", "capacity, microbatch")]


# ----------------------------------------------------------------------------------------------- reference, in float64


def _selection(scores, probabilities, priority, model: config.Model, mask) -> np.ndarray:
  """[B, S, E] bool, which expert each token reaches: loops over tokens, groups and experts."""
  r, e = model.router, model.experts
  rows, tokens, count = scores.shape
  chosen = np.zeros(scores.shape, bool)
  groups = [[(b, s) for s in range(tokens) if mask[b, s]] for b in range(rows)]
  factor, size = e.capacity_factor or (1.0 if r.gate == "expert_choice" else 0.0), tokens
  if e.capacity_group == "microbatch":
    groups, size = [sum(groups, [])], rows * tokens
  slots = math.ceil(factor * r.top_k * size / count)
  if r.gate == "expert_choice":
    for group in groups:
      for expert in range(count):
        for place in sorted(group, key=lambda p: -probabilities[(*p, expert)])[:slots]:
          chosen[(*place, expert)] = True
    return chosen
  for b, s in [place for group in groups for place in group]:
    allowed, width = range(count), count // r.num_groups
    if r.num_groups > 1:
      members = [sorted(scores[b, s, g * width : (g + 1) * width])[::-1] for g in range(r.num_groups)]
      rank = [m[0] + m[1] if r.gate == "sigmoid" else m[0] for m in members]
      best = sorted(range(r.num_groups), key=lambda g: -rank[g])[: r.top_groups]
      allowed = [i for g in best for i in range(g * width, (g + 1) * width)]
    chosen[b, s, sorted(allowed, key=lambda i: -scores[b, s, i])[: r.top_k]] = True
  if factor:
    for group in groups:
      for expert in range(count):
        takers = [place for place in group if chosen[(*place, expert)]]
        if e.drop_policy == "probability":
          takers.sort(key=lambda p: -probabilities[(*p, expert)])
        elif e.drop_policy == "random":
          takers.sort(key=lambda p: -priority[p])
        for place in takers[slots:]:
          chosen[(*place, expert)] = False
  return chosen


def _logits(x, p, model: config.Model, noise):
  r = model.router
  if r.gate == "cosine":
    a, b = x @ p["projection"], p["weight"]
    cosine = (a @ b) / jnp.linalg.norm(a, axis=-1, keepdims=True) / jnp.linalg.norm(b, axis=0)
    return cosine * jnp.exp(p["log_scale"][0])
  clean = x @ p["weight"]
  return clean + jnp.log1p(jnp.exp(x @ p["noise"])) * noise if r.gate == "noisy" else clean


def reference(x, params, model: config.Model, mask, noise, priority):
  """The MoE block, every expert on every token; float64 in, float64 out, differentiable in x and params."""
  r, p = model.router, params["router"]

  def expert(i):
    gate, up = x @ params["gate"][i], x @ params["up"][i]
    return (gate / (1 + jnp.exp(-gate)) * up) @ params["down"][i]

  if r.gate == "soft":
    scores = jnp.where(mask[..., None], x @ p["weight"], -jnp.inf)
    into = jnp.exp(scores - scores.max(1, keepdims=True))
    into = into / into.sum(1, keepdims=True)
    out_of = jnp.exp(x @ p["weight"])
    out_of = jnp.where(mask[..., None], out_of / out_of.sum(-1, keepdims=True), 0)
    slots = jnp.einsum("bsn,bsd->bnd", into, x)
    total = jnp.zeros_like(x)
    for n in range(EXPERTS * r.soft_slots):
      i = n // r.soft_slots
      gate, up = slots[:, n] @ params["gate"][i], slots[:, n] @ params["up"][i]
      out = (gate / (1 + jnp.exp(-gate)) * up) @ params["down"][i]
      total = total + out_of[:, :, n, None] * out[:, None]
    return total

  logits = _logits(x, p, model, noise)
  scores = 1 / (1 + jnp.exp(-logits)) if r.gate == "sigmoid" else jax.nn.softmax(logits)
  fixed = np.asarray(jax.lax.stop_gradient(scores))
  biased = fixed + np.asarray(jax.lax.stop_gradient(p["selection_bias"])) if r.bias_update_rate else fixed
  everything = dataclasses.replace(model, experts=dataclasses.replace(model.experts, capacity_factor=0.0))
  kept = _selection(biased, fixed, priority, model, mask)
  chosen = kept if r.gate == "expert_choice" else _selection(biased, fixed, priority, everything, mask)
  weights = jnp.where(chosen, scores, 0)
  if r.renormalize and r.gate != "expert_choice":
    weights = weights / jnp.where(mask[..., None], weights.sum(-1, keepdims=True), 1)
  weights = jnp.where(kept, weights, 0) * r.weight_scale
  return sum(weights[..., i, None] * expert(i) for i in range(EXPERTS))


# ----------------------------------------------------------------------------------------------------------- comparison


def _inputs(model: config.Model, seed: int):
  """(x, segment ids, parameters, noise, priority, cotangent) in float64 and NumPy; the parameters fit the model's tree."""
  rng = np.random.default_rng(seed)
  segments = np.ones((ROWS, TOKENS), np.int32)
  segments[1, 9:], segments[5, 13:] = 0, 0
  context = model_lib.block_context(jnp.asarray(segments))
  block = model_lib.MoEBlock(model)
  x = jnp.zeros((ROWS, TOKENS, WIDTH))
  shapes = model_lib.unbox(jax.eval_shape(lambda: block.init(jax.random.key(0), x, context)))[0]["params"]
  params = jax.tree.map(lambda a: rng.normal(size=a.shape) * 0.4, shapes)
  noise = rng.normal(size=(ROWS, TOKENS, EXPERTS))
  return (rng.normal(size=x.shape), segments, params, noise, rng.random((ROWS, TOKENS)), rng.normal(size=x.shape))


def errors(gate: str, dispatch: str, mesh: config.Mesh, seed: int = 0) -> tuple[float, float, int]:
  """(largest error of the output, of all gradients, selections dropped)."""
  model = make_model(gate, dispatch)
  x, segments, params, noise, priority, cotangent = _inputs(model, seed)

  def fixed_noise(draw, key, rows, shape):
    drawn = noise if len(shape) == 2 else priority
    return jnp.asarray(drawn, jnp.float32)[rows]

  def ours(x, params):
    context = model_lib.block_context(jnp.asarray(segments))
    out, decision, _ = model_lib.MoEBlock(model).apply(
        {"params": params}, sharding.constrain(x, "batch", None, None), context, rngs={"routing": jax.random.key(0)})
    return jnp.vdot(out, jnp.asarray(cotangent, jnp.float32)), (out, decision.stats.dropped)

  devices = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
  with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:devices])), mock.patch.object(gates, "row_noise", fixed_noise):
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, params))
    grads, (out, dropped) = jax.device_get(jax.jit(jax.grad(ours, (0, 1), has_aux=True))(*single))

  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32).astype(jnp.float64), (x, params))

    def value(x, params):
      result = reference(x, params, model, segments > 0, np.asarray(noise, np.float32), priority)
      return jnp.vdot(result, jnp.asarray(cotangent, jnp.float32).astype(jnp.float64)), result

    want_grads, want = jax.device_get(jax.grad(value, (0, 1), has_aux=True)(*wide))
  if model.router.bias_update_rate:  # the reference differentiates nothing through it either
    assert not np.any(grads[1]["router"]["selection_bias"])

  def worst(a, b):
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) if np.any(b) else float(np.abs(a).max())

  return worst(out, want), max(jax.tree.leaves(jax.tree.map(worst, grads, want_grads))), int(dropped)


def main() -> None:
  print("largest relative error against the float64 reference\n" + " " * 58 + "".join(f"{name:>24s}" for name in MESHES))
  print(f"{'gate':26s} {'dispatch':22s} dropped  " + f"{'forward':>12s}{'gradient':>12s}" * len(MESHES))
  for gate, dispatch in cases():
    results = [errors(gate, dispatch, mesh) for mesh in MESHES.values()]
    numbers = "".join(f"{value:12.1e}" for result in results for value in result[:2])
    print(f"{gate:26s} {dispatch:22s} {results[0][2]:7d}  {numbers}")


if __name__ == "__main__":
  main()
