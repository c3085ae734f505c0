"""Logits of one set of tokens, ours and transformers', in float32 on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import numpy as np

from moe import config
from moe import stored
from tools import terminal

# Of the largest logit: float32 sums in another order; a wrong rotary sign or norm flag moves logits by as much as they are.
TOLERANCE = 1e-4


def ours(source: stored.Source, m: config.Model, tokens: np.ndarray) -> np.ndarray:
  """[B, S, V] float32 from parameters named as ours."""
  import jax
  import jax.numpy as jnp

  params: dict = {}
  for name in source.leaves:
    if name.startswith("params."):
      *parents, last = name.split(".")[1:]
      place = params
      for key in parents:
        place = place.setdefault(key, {})
      place[last] = jnp.asarray(stored.whole(source, name), jnp.float32)
  with jax.default_matmul_precision("highest"):
    return np.asarray(_program(dataclasses.replace(m, compute_dtype="float32"))(params, jnp.asarray(tokens, jnp.int32)))


@functools.cache
def _program(m: config.Model):
  import jax
  import jax.numpy as jnp

  from moe import model as model_lib

  transformer = model_lib.build(m)

  @jax.jit
  def run(params, ids):
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    out = transformer.apply({"params": params}, ids, jnp.ones_like(ids), places)
    return transformer.apply({"params": params}, out.hidden, method="logits")

  return run


def theirs(hf_dir, tokens: np.ndarray) -> np.ndarray:
  """[B, S, V] float32 from transformers."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  loaded = transformers.AutoModelForCausalLM.from_pretrained(str(hf_dir), dtype=torch.float32, attn_implementation="eager")
  with torch.no_grad():
    return loaded.eval()(torch.from_numpy(tokens).long()).logits.numpy()


def compare(hf_dir, source: stored.Source, m: config.Model) -> bool:
  """Whether both give the same logits for 2 x 24 random tokens; prints the difference. True where it cannot be seen."""
  if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    print("check: logits not compared, transformers and torch are not installed (pip install torch transformers)")
    return True
  tokens = np.random.default_rng(0).integers(0, m.vocab_size, (2, 24)).astype(np.int32)
  a, b = ours(source, m, tokens), theirs(hf_dir, tokens)
  gap, size = float(np.abs(a - b).max()), float(np.abs(b).max())
  good = gap <= TOLERANCE * size
  print(f"check: logits differ from transformers' by at most {gap:.2g}, they are up to {size:.3g}"
        + ("" if good else f": more than {TOLERANCE} of it, so these are not the same model"))
  return good


def check(meant: stored.Source, written: stored.Source, hf_dir, ours_source: stored.Source, m: config.Model) -> int:
  """What was written, read back, against what was meant; then the logits, where transformers is there. An exit code."""
  wrong = [name for name in meant.leaves if not _equal(meant, written, name)]
  print(f"check: {len(meant.leaves) - len(wrong)} of {len(meant.leaves)} arrays are equal to the bit" + (
      f"; not {', '.join(wrong[:3])}" if wrong else ""))
  return terminal.DIFFERS if wrong or not compare(hf_dir, ours_source, m) else terminal.FINE


def _equal(a: stored.Source, b: stored.Source, name: str) -> bool:
  return name in b.leaves and all(
      block.tobytes() == np.ascontiguousarray(b.read(name, begin, tuple(s + n for s, n in zip(begin, block.shape)))).tobytes()
      for begin, block in stored.blocks(a, name))
