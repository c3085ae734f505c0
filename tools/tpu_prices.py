"""What a slice costs by the list, said before anything is bought. No price is made up: what the list lacks has none.

`tpu_prices.json` has list prices with the day and the place they were copied from; your contract, a discount and a change
of price are not in it.
"""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

PATH = pathlib.Path(__file__).with_name("tpu_prices.json")
# What each way to pay is called in the list; the others have no list price.
_LISTED = {"on demand": "on_demand", "spot": "spot"}


class Price(NamedTuple):
  """USD an hour: of one chip, and of all of them."""

  chip: float
  total: float


def region(zone: str) -> str:
  """`us-west4` of `us-west4-a`."""
  return zone.rpartition("-")[0]


def hourly(chip: str, chips: int, zone: str, how: str) -> Price | None:
  """The list price, or None where the list has none.

  Args:
    chip: a key of hardware.CHIPS.
    chips: of all slices.
    how: on demand | spot | flex-start | reserved.
  """
  table = json.loads(PATH.read_text()).get(_LISTED.get(how, ""), {})
  each = table.get(chip, {}).get(region(zone))
  return None if each is None else Price(each, each * chips)


def describe(chip: str, chips: int, zone: str, how: str) -> list[str]:
  """Lines for the terminal: chips x price."""
  price, listed = hourly(chip, chips, zone, how), json.loads(PATH.read_text())
  what = f"{chips:,} chip(s) of {chip} in {region(zone)}, {how}"
  if price is None:
    lines = [f"price: {what}: no price known; see {listed['page']}"]
  else:
    lines = [f"price: {what}: {price.chip:.2f} USD an hour and chip, {price.total:,.2f} USD an hour in all "
             f"(list price copied {listed['copied']}; yours may differ)"]
  if how == "spot" and price is not None:
    lines.append("  spot prices change, up to once a day")
  return lines


def bound(price: Price | None, max_hours: float | None, autodelete: bool) -> str:
  """A line for the terminal: what bounds the hours of TPU VMs, and so the price."""
  if max_hours is not None:
    return f"  at most {max_hours:g} h of running VMs" + (f": {max_hours * price.total:,.2f} USD" if price else "")
  day = f" (a day is {24 * price.total:,.0f} USD)" if price else ""
  until = "the job ends, however long it takes" if autodelete else "somebody deletes them"
  return f"  NO UPPER BOUND: the VMs are billed until {until}{day}; --max_hours=H bounds it"
