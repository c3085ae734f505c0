"""Plain words for the names of a checkpoint's leaves, and how what a user guesses finds them.

`opt_state.1.mu.layers.experts.attention.k` is `first moment of attention key, layers with experts`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

from moe.errors import UserError

_STATE = {  # the beginning of a name
    r"params\.": "", r"opt_state\.\d+\.mu\.": "first moment of ", r"opt_state\.\d+\.nu\.": "second moment of "}
_STACKS = {  # the layers that a leaf stacks
    r"dense_layers\.": "leading dense layers", r"layers\.experts\.": "layers with experts",
    r"layers\.dense_(\d+)\.": r"dense layers between (\1)", r"pre_gate\.": "pre-gate"}
_PARTS = {
    "attention.q": "attention query", "attention.k": "attention key", "attention.v": "attention value",
    "attention.out": "attention output", "attention_norm_scale": "norm before attention",
    "block_norm_scale": "norm before feed-forward", "final_norm_scale": "last norm", "embedding": "token embedding",
    "head": "output head", "moe.gate": "expert gate", "moe.up": "expert up", "moe.down": "expert down",
    "moe.router.weight": "router", "router.weight": "router", "moe.router.selection_bias": "selection bias of the router",
    "dense.gate": "feed-forward gate", "dense.up": "feed-forward up", "dense.down": "feed-forward down"}
_WHOLE = {
    r"step": "optimizer steps done", r"opt_state\.\d+\.count": "updates that Adam counts",
    r"guard\.losses": "recent losses, of the guard", r"guard\.norms": "recent gradient norms, of the guard",
    r"guard\.seen": "steps that the guard saw", r"guard\.skipped": "steps that the guard skipped"}
# What other codebases call it; found, not shown.
_OTHERS = {
    "first moment": "adam mu exp_avg momentum", "second moment": "adam nu exp_avg_sq variance", "query": "q_proj wq",
    "key": "k_proj wk", "value": "v_proj wv", "attention output": "o_proj wo", "attention": "self_attn attn",
    "output head": "lm_head unembedding", "token embedding": "embed_tokens wte", "expert": "experts mlp ffn",
    "feed-forward": "mlp ffn", "router": "gating", "norm": "layernorm rmsnorm ln"}


def plain(name: str) -> str:
  """What a leaf of ours is, in words; the name itself where it is none of ours."""
  for pattern, words in _WHOLE.items():
    if re.fullmatch(pattern, name):
      return words
  state, rest = _prefix(name, _STATE)
  stack, rest = _prefix(rest, _STACKS)
  part = _PARTS.get(rest)
  if part is None:
    if rest == name:
      return name
    part = rest.replace(".", " ").replace("_", " ")
  return state + part + (f", {stack}" if stack else "")


def _prefix(name: str, table: dict[str, str]) -> tuple[str, str]:
  """(the words of the entry that the name begins with, the rest of the name)."""
  for pattern, words in table.items():
    if match := re.match(pattern, name):
      return match.expand(words), name[match.end() :]
  return "", name


def select(names: Iterable[str], text: str, place: str = "the checkpoint") -> list[str]:
  """The names that a filter means, in their order.

  Args:
    names: of all leaves.
    text: one or several, with commas between: a whole name, a pattern with * ? [ ], whole parts of the name (`moe.gate`), some
      of its letters, or words of `plain` and of other codebases (`first moment router`, `exp_avg_sq`). The first of these
      readings that finds anything counts.
    place: for the message.

  Raises:
    UserError: one of them means no leaf.
  """
  names = list(names)
  chosen: set[str] = set()
  for pattern in filter(None, (part.strip() for part in text.split(","))):
    found = next(filter(None, _readings(names, pattern)), None)
    if not found:
      raise UserError(f"{place} has no leaf {pattern!r}; `ls` shows the names and what they are" + _nearest(names, pattern))
    chosen.update(found)
  if not chosen:
    raise UserError(f"no leaf of {place} is named by {text!r}; `ls` shows the names and what they are")
  return [name for name in names if name in chosen]


def _readings(names: list[str], pattern: str):
  yield [name for name in names if name == pattern]
  if re.search(r"[*?\[]", pattern):
    yield [name for name in names if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")]
    yield [name for name in names if fnmatch.fnmatchcase(plain(name), pattern)]
    return
  yield [name for name in names if f".{pattern}." in f".{name}."]
  yield [name for name in names if pattern in name]
  words = _words(pattern)
  yield [name for name in names if words and words <= _all_words(name)]
  yield [name for name in names if words and all(any(word in known for known in _all_words(name)) for word in words)]


def _words(text: str) -> set[str]:
  return set(re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)*", text.lower()))


def _all_words(name: str) -> set[str]:
  said = plain(name)
  others = [words for part, words in _OTHERS.items() if part in said]
  return _words(" ".join([name.replace("_", " "), name, said, *others]))


def _nearest(names: list[str], pattern: str) -> str:
  near = difflib.get_close_matches(pattern, names, 1, 0.5)
  return f"; did you mean {near[0]!r}?" if near else ""
