"""compile_check --search without a compiler: what is legal, what the closed form says, and the two ranks."""

import dataclasses
import math

import pytest
from tests import small

from moe import config
from moe import hardware
from tools import layout_search

CHIP = hardware.CHIPS["v5e"]


def run(**changes):
  return small.run(batch=16, length=64, **changes)


def test_every_legal_layout_and_no_other():
  found = layout_search.layouts(run(), 8)
  assert len(set(found)) == len(found)
  for layout in found:
    assert math.prod(layout.mesh) == 8
    layout_search.applied(run(), layout)
  meshes = {layout.mesh for layout in found}
  assert (1, 8, 1, 1, 1) in meshes and (1, 1, 8, 1, 1) in meshes and (1, 2, 2, 1, 2) in meshes
  assert not [m for m in meshes if m[-1] > 2]  # two heads of keys and values
  assert {layout.overlap_degree for layout in found if layout.mesh[2] == 1} == {1}
  with pytest.raises(config.ConfigError, match="num_kv_heads = 2 is not divisible"):
    layout_search.applied(run(), layout_search.Layout((1, 2, 1, 1, 4), "full", 1, 1))


def of(mesh, remat="full", micro=1, degree=1, **changes):
  base = run(model={"d_model": 512, "num_layers": 8, "experts": {"d_expert": 1024}}, **changes)
  return layout_search.estimate(layout_search.applied(base, layout_search.Layout(mesh, remat, micro, degree)), CHIP)


def test_the_closed_form_moves_the_right_way():
  fsdp = (1, 8, 1, 1, 1)
  memory = [of(fsdp, remat).hbm for remat in ("offload", "full", "attention", "none")]
  assert memory == sorted(memory) and len(set(memory)) == 4
  assert of(fsdp, "none").compute < of(fsdp, "attention").compute < of(fsdp, "full").compute
  assert of((8, 1, 1, 1, 1)).hbm > of(fsdp).hbm  # copies of the parameters
  assert of((8, 1, 1, 1, 1), optimizer={"zero1": True}).hbm < of((8, 1, 1, 1, 1)).hbm
  assert of(fsdp, optimizer={"offload": 1.0}).hbm < of(fsdp).hbm
  long = {"data": {"sequence_tokens": 1 << 16}}
  assert of((1, 1, 8, 1, 1), degree=4, **long).network < of((1, 1, 8, 1, 1), **long).network  # chunks hide the exchange
  fits = dataclasses.replace(CHIP, hbm_bytes=int(of(fsdp).hbm))
  ranked = layout_search.ranked(run(model={"d_model": 512, "num_layers": 8, "experts": {"d_expert": 1024}}), 8, 1, fits)
  room = [value.hbm <= fits.hbm_bytes for _, value in ranked]
  assert room == sorted(room, reverse=True) and any(room) and not all(room)
  times = [value.seconds for _, value in ranked if value.hbm <= fits.hbm_bytes]
  assert times == sorted(times)


def test_search_prints_both_ranks():
  """A compiler that finds the closed form's last to be the best, and no room for its first."""
  asked = []

  def check(run, topology, slices):
    asked.append(run.mesh)
    at = len(asked)
    return {"fits": at > 1, "hbm": {"peak_bytes": 1e9 * at}, "step_seconds": {"predicted": 10.0 - at}, "compile_seconds": 1.0}

  rows = layout_search.search(run(), "v5e:2x4", 1, 8, check, seconds=100, count=4)
  assert [row["place"] for row in rows] == [1, 2, 3, 4, 5] and [row["compiled_place"] for row in rows] == [5, 4, 3, 2, 1]
  assert layout_search.rank_correlation(rows) == -1
  text = layout_search.text(rows)
  assert "no room" in text and "rank correlation of the two: -1.00" in text and f"{rows[0]['of']} legal layouts" in text
  assert text.index("       1            5") < text.index("       5            1")
  assert layout_search.search(run(), "v5e:2x4", 1, 8, check, seconds=-1) == []
  assert layout_search.text([]) == "  no legal layout"


def test_search_passes_over_what_cannot_fit():
  """Where a layout without remat needs far more than the closed form says, no other without remat is compiled."""

  def check(run, topology, slices):
    fits = run.model.remat != "none"
    peak = {"peak_bytes": 1e9 if fits else 1e18}
    return {"fits": fits, "hbm": peak, "step_seconds": {"predicted": 1.0}, "compile_seconds": 1.0}

  rows = layout_search.search(run(), "v5e:2x4", 1, 8, check, seconds=100, count=3)
  assert [row["fits"] for row in rows].count(True) == 3 and [row["remat"] for row in rows].count("none") == 1
  assert max([row["mesh"] for row in rows if row["fits"]].count(row["mesh"]) for row in rows) <= 2
