"""The look the tools share: tables, --json, exit codes, and a user's mistake in one line. Without JAX."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moe.errors import UserError, storage_errors
from moe.terminal import prepare_streams, progress  # noqa: F401  (progress: for all tools)

FINE, DIFFERS, UNREADABLE = 0, 1, 2


def run(main: Callable[[], int]) -> None:
  """Ends the process with main's exit code; 2 and one line for what a user can mend."""
  prepare_streams()
  try:
    code = main()
    sys.stdout.flush()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    code = UNREADABLE
  except ImportError as error:  # gs:// without gcsfs
    print(f"error: {error}", file=sys.stderr)
    code = UNREADABLE
  except storage_errors() as error:
    if isinstance(error, BrokenPipeError):  # `| head`
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(FINE)
    print(f"error: {error}", file=sys.stderr)
    code = UNREADABLE
  except KeyboardInterrupt:
    code = 130
  sys.exit(code)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", left: Sequence[str] = ("name",)) -> None:
  """Numbers to the right. A frame in a terminal; elsewhere plain columns of full width, for grep and awk."""
  text = [[_cell(value) for value in row] for row in rows]
  if sys.stdout.isatty():
    from rich import box, console, table as rich_table

    framed = rich_table.Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
      framed.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in text:
      framed.add_row(*row)
    console.Console(highlight=False, markup=False).print(framed)
    return
  if title:
    print(title)
  widths = [max(map(len, cells)) for cells in zip(columns, *text)]
  for row in (columns, *text):
    cells = (cell.ljust(w) if column in left else cell.rjust(w) for cell, w, column in zip(row, widths, columns))
    print("  ".join(cells).rstrip())


def as_json(value: Any) -> None:
  """One document; what JSON has no number for is null."""
  print(json.dumps(_plain(value), indent=1))


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if hasattr(value, "tolist"):
    return _plain(value.tolist())
  return None if isinstance(value, float) and value - value != 0 else value


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.4g}"
  if isinstance(value, tuple):
    return "x".join(map(str, value)) or "scalar"
  return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def flat(values: Any, prefix: str = "") -> list[str]:
  """A line `path = value` for each leaf of a config."""
  if isinstance(values, dict) and values:
    return [line for key, value in values.items() for line in flat(value, f"{prefix}.{key}" if prefix else key)]
  return [f"{prefix} = {values!r}"]


def size(count: float) -> str:
  """1.5 GB, 20.0 MB, 3.2 kB."""
  for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if count >= factor:
      return f"{count / factor:,.1f} {unit}"
  return f"{count:.0f} B"


def count(number: float) -> str:
  """6.92 B, 20.0 M."""
  for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
    if number >= factor:
      return f"{number / factor:.3g} {unit}"
  return f"{number:.0f}"


_BARS = " ▁▂▃▄▅▆▇█"


def bars(values: Sequence[float], top: float) -> str:
  """One character a value, full at `top`; ! where it is no number."""
  return "".join("!" if v - v != 0 else _BARS[min(max(round(v / top * 8) if top else 0, 0), 8)] for v in map(float, values))
