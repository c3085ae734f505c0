"""Points of the expert layer where a caller may look at, or change, what passes: FSMoE's six (arXiv 2501.10714).

    with hooks.installed(before_dispatch=lambda rows: rows.astype(jnp.float8_e4m3fn).astype(rows.dtype)):
      step(...)                    # traced here: hooks are part of the program, and a program traced before has none

    before_layer -> (before_dispatch -> after_dispatch -> experts -> before_combine -> after_combine) x chunks -> after_layer

The ring dispatch has one before_dispatch and one after_combine around all chunks, as its transfers are between them.
SoftMoE, whose experts get mixtures and no tokens, has none of them. A function gets an array and returns one of the same shape
and dtype (tokens or rows x D), or None to leave it as it is.
"""

from __future__ import annotations

import contextlib

import jax

POINTS = ("before_layer", "before_dispatch", "after_dispatch", "before_combine", "after_combine", "after_layer")
_installed: list[dict] = []


@contextlib.contextmanager
def installed(**functions):
  """Calls these functions at the points of their names for what is traced inside.

  Raises:
    ValueError: a name that is no point.
  """
  unknown = set(functions) - set(POINTS)
  if unknown:
    raise ValueError(f"hook {sorted(unknown)[0]!r} is no point of the expert layer; the points are {', '.join(POINTS)}")
  _installed.append(functions)
  try:
    yield
  finally:
    _installed.remove(functions)


def at(point: str, x: jax.Array) -> jax.Array:
  """What the hooks of a point make of x, the first installed first."""
  for functions in _installed:
    if point in functions:
      changed = functions[point](x)
      if changed is not None:
        if changed.shape != x.shape or changed.dtype != x.dtype:
          raise ValueError(f"hook {point!r} turned {x.dtype}{list(x.shape)} into {changed.dtype}{list(changed.shape)}; return "
                           "the same shape and dtype, or None")
        x = changed
  return x
