"""The reader of compiled programs: shapes, groups, trips, and the schedule of what overlaps, on texts written by hand."""

import types

import numpy as np
import pytest

from moe import hardware
from moe.hardware import Chip
from tools import hlo

CHIP = Chip(clock=1e9, flops=1e12, hbm=1e12, links=1e9, hbm_bytes=1 << 30, network=1e8, host=1e8)
SIZES = {"slice": 2, "fsdp": 2, "tensor": 2}

PROGRAM = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %p = (s32[], f32[1000]{0}) parameter(0)
  %x = f32[1000]{0} get-tuple-element(%p), index=1
  %start = (f32[1000]{0}, f32[2000]{0}) all-gather-start(%x), replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
  %work = f32[1000]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"3000"}
  %done = f32[2000]{0} all-gather-done(%start), metadata={op_name="jit(step)/gather"}
  ROOT %out = (s32[], f32[1000]{0}) tuple(%i, %work)
}

%condition (p: (s32[], f32[1000])) -> pred[] {
  %p.1 = (s32[], f32[1000]{0}) parameter(0)
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%cheap (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  ROOT %c = f32[1000]{0} fusion(%a), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100"}
}

%dear (a: f32[1000]) -> f32[1000] {
  %a.1 = f32[1000]{0} parameter(0)
  ROOT %d = f32[1000]{0} fusion(%a.1), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100000"}
}

ENTRY %main (a: f32[1000]) -> f32[1000] {
  %a.2 = f32[1000]{0} parameter(0), metadata={op_name="state.params"}
  %loop = (s32[], f32[1000]{0}) while(%t), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  %choice = f32[1000]{0} conditional(%which, %a.2, %a.2), branch_computations={%cheap, %dear}
  %kernel = f32[1000]{0} custom-call(%a.2), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
 "flops":"1" }}, backend_config={"cost_estimate":{"flops":"8500000"}}
  ROOT %sum = f32[1000]{0} all-reduce(%choice), replica_groups=[2,4]<=[2,4]T(1,0), to_apply=%add
}
"""


def test_walk():
  program = hlo.parse(PROGRAM)
  assert program.entry == "main"
  walk = hlo.walk(program, CHIP, SIZES)
  gather, reduce = walk.collectives
  assert (gather.kind, gather.axes, gather.count, gather.asynchronous) == ("all-gather", ("fsdp",), 5, True)
  assert gather.bytes == 5 * 4000 and gather.seconds == pytest.approx(5 * 4e-6)
  assert gather.exposed == pytest.approx(5 * 1e-6)  # 3 of 4 us are hidden behind the fusion
  assert reduce.kind == "all-reduce" and reduce.bytes == 2 * 4000 * 3 / 4 and reduce.exposed == reduce.seconds
  kernel = 8.5e6 / (CHIP.flops * hlo.KERNEL_EFFICIENCY)
  assert walk.compute == pytest.approx(5 * 3e-6 + 1e-7 + kernel)
  assert walk.seconds == pytest.approx(walk.compute + gather.exposed + reduce.seconds)
  assert walk.unknown_trips == 0


CHAIN = """HloModule m, is_scheduled=true

%begin (q: f32[1000]) -> (f32[1000], f32[2000]) {
  %q = f32[1000]{0} parameter(0)
  %g.1 = f32[2000]{0} all-gather(%q), replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
}

%async_collective_fusion.7 (r: f32[1000]) -> (f32[1000], f32[2000]) {
  %r = f32[1000]{0} parameter(0)
  %g.2 = f32[2000]{0} all-gather(%r), replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
}

%finish (s: f32[1000]) -> f32[2000] {
  %s = f32[1000]{0} parameter(0)
  %g.3 = f32[2000]{0} all-gather(%s), replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
}

ENTRY %main (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %async-collective-start.3 = (f32[1000]{0}, f32[2000]{0}) fusion(%a), kind=kCustom, calls=%begin
  %x.1 = f32[1000]{0} get-tuple-element(%async-collective-start.3), index=0
  %s.1 = (f32[1000], f32[2000]) fusion(%a, %x.1), calls=%async_collective_fusion.7, backend_config={"estimated_cycles":"1000"}
  %x.2 = f32[1000]{0} get-tuple-element(%s.1), index=0
  %s.2 = (f32[1000], f32[2000]) fusion(%a, %x.2), calls=%async_collective_fusion.7, backend_config={"estimated_cycles":"1000"}
  %x.3 = f32[1000]{0} get-tuple-element(%s.2), index=0
  %async-collective-done.3 = f32[2000]{0} fusion(%x.3), kind=kCustom, calls=%finish
  %rows = f32[3000]{0} fusion(%a), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"0"}
  %exchange = f32[1000]{0} ragged-all-to-all(%rows, %a, %o), replica_groups={{0,2},{1,3},{4,6},{5,7}}
  %down-start = ((f32[8,1000]{1,0:S(5)}, s32[]), f32[1,1000]{1,0}, u32[]) dynamic-slice-start(%h), calls=%f
  %down-done = f32[1,1000]{1,0} dynamic-slice-done(%down-start)
}
"""


def test_a_transfer_that_goes_on_beside_several_matmuls_counts_once():
  """v5e writes the collective into each link of the chain; two of its four microseconds are hidden. A ragged exchange moves no
  more than its smaller side holds; what comes from the host's memory goes over another link."""
  walk = hlo.walk(hlo.parse(CHAIN), CHIP, SIZES)
  gather, exchange = walk.collectives
  assert (gather.kind, gather.bytes, gather.asynchronous) == ("all-gather", 4000, True)
  assert gather.exposed == pytest.approx(2e-6) and walk.compute == pytest.approx(2e-6)
  assert (exchange.kind, exchange.bytes) == ("ragged-all-to-all", 4000 / 2)
  assert walk.host == pytest.approx(4000 / CHIP.host) and walk.network == pytest.approx(6e-6)
  assert walk.host_exposed == pytest.approx(walk.host)
  assert walk.seconds == pytest.approx(2e-6 + 2e-6 + 2e-6 + walk.host)


SPARSE_CORE = """HloModule m, is_scheduled=true

%gather (q: f32[1000]) -> f32[2000] {
  %q = f32[1000]{0} parameter(0)
  ROOT %g = f32[2000]{0} all-gather(%q), replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
}

ENTRY %main (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %one.start = (f32[2000], s32[]) call-start(), to_apply=%gather
  %work.1 = f32[1000]{0} fusion(%a), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"3000"}
  %one.update = (f32[2000], s32[]) call-update(%one.start, %work.1)
  %two.start = (f32[2000], s32[]) call-start(), to_apply=%gather
  %work.2 = f32[1000]{0} fusion(%a), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"1000"}
  %two.update = (f32[2000], s32[]) call-update(%two.start, %work.2)
  %work.3 = f32[1000]{0} fusion(%a), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"2000"}
  %two = f32[2000]{0} call-done(%two.update)
  %one = f32[2000]{0} call-done(%one.update)
}
"""


def test_a_transfer_by_the_sparse_core_begins_with_its_update():
  """Two of 4 us each, from 3 us on one after the other: done at 11 us, when 6 us of work are over. The first one's last
  microsecond is exposed, too, and counts as its own though the program waits for the second."""
  walk = hlo.walk(hlo.parse(SPARSE_CORE), CHIP, SIZES)
  one, two = walk.collectives
  assert one.asynchronous and two.asynchronous and one.seconds == two.seconds == pytest.approx(4e-6)
  assert walk.seconds == pytest.approx(11e-6) and walk.exposed == pytest.approx(5e-6)
  assert (one.exposed, two.exposed) == (pytest.approx(1e-6), pytest.approx(4e-6))


def test_unknown_trips_are_counted():
  text = PROGRAM.replace("%limit = s32[] constant(5)", "%limit = s32[] get-tuple-element(%p.1), index=0")
  walk = hlo.walk(hlo.parse(text), CHIP, SIZES)
  assert walk.unknown_trips == 1 and walk.collectives[0].count == 1


@pytest.mark.parametrize("attribute, axes, members", [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("slice",), 2),
    ("replica_groups=[1,8]<=[8]", ("slice", "fsdp", "tensor"), 8),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", ("slice", "fsdp"), 4),
    ("replica_groups=mesh['slice'=2,'fsdp'=2,'tensor'=2] {'fsdp','tensor'}", ("fsdp", "tensor"), 4),
    ("replica_groups=mesh['slice'=2,'fsdp'=2,'tensor'=2] {'tensor','fsdp'}", ("fsdp", "tensor"), 4),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_2'}", ("tensor",), 2),
    ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ("slice", "fsdp", "tensor"), 8),
    ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", ("fsdp",), 2),
    ("replica_groups={{0,3},{1,2}}", (), 2)])
def test_groups(attribute, axes, members):
  assert hlo.group_of(attribute, SIZES) == (axes, members)


def test_sizes_and_largest():
  assert hlo.size_of("(bf16[2,3]{1,0:T(8,128)S(1)}, f8e4m3fn[4], pred[])") == 12 + 4 + 1
  assert hlo.largest(hlo.parse(PROGRAM), 2)[0] == (8000, "f32[2000]", "jit(step)/gather")
  rows = hlo.summary(hlo.walk(hlo.parse(PROGRAM), CHIP, SIZES).collectives)
  assert [r["kind"] for r in rows] == ["all-gather", "all-reduce"] and rows[0]["asynchronous_share"] == 1


def test_links_that_a_group_of_devices_has():
  v5p, v6e = hardware.CHIPS["v5p"], hardware.CHIPS["v6e"]
  assert hardware.link_rate(v5p, (4, 4, 8)) == v5p.links  # whole cubes close in rings
  assert hardware.link_rate(v5p, (2, 2, 1)) == v5p.links * 2 / 6  # a host alone: two neighbours
  assert hardware.link_rate(v5p, (2, 2, 4)) == v5p.links * 3 / 6  # less than a cube: lines
  assert hardware.link_rate(v5p, (4, 4, 8), (1, 1, 8)) == v5p.links * 2 / 6
  assert hardware.link_rate(v5p, (4, 4, 8), (1, 1, 2)) == v5p.links / 6  # neighbours on a ring
  assert hardware.link_rate(v6e, (16, 16)) == v6e.links and hardware.link_rate(v6e, (8, 8)) == v6e.links / 2
  assert hardware.link_rate(v6e, (8, 16)) == v6e.links * 3 / 4
  assert hardware.link_rate(hardware.CHIPS["tpu7x"], (2, 2, 2), (1, 1, 1)) == hardware.CHIPS["tpu7x"].links  # within a chip


def test_a_transfer_takes_the_links_of_its_axes():
  devices = np.empty((1, 2, 4), object)
  for at in np.ndindex(devices.shape):
    devices[at] = types.SimpleNamespace(coords=(at[1], at[2], 0))
  mesh = types.SimpleNamespace(shape={"slice": 1, "fsdp": 2, "tensor": 4}, devices=devices)
  rate = lambda *axes: hlo.rate(CHIP, mesh, axes)
  assert rate("fsdp") == rate("tensor") == CHIP.links / 6 and rate("fsdp", "tensor") == rate() == CHIP.links / 3
  assert rate("slice", "fsdp") == CHIP.network
  assert hlo.rate(CHIP, SIZES, ("fsdp",)) == CHIP.links  # lengths alone


def custom(name, shape, *operands):
  rest = f"operand_layout_constraints={{{', '.join(operands)}}}, backend_config={{}}"
  return hlo.Instruction(name, shape, "custom-call", [], rest)


def test_kernels_that_declare_nothing():
  """A grouped matmul of 24 tiles and 64 groups visits up to 87; a backward pass of attention in one kernel has five products,
  the one without the queries' gradient four."""
  table, heads = "s32[87]{0}", "bf16[2,4,64,8]{3,2,1,0}"
  operands = ("s32[65]{0}", table, table, "bf16[12288,2048]{1,0}", "bf16[64,2048,1408]{2,1,0}")
  grouped = custom("gmm.1", "bf16[12288,1408]{1,0}", *operands)
  keys = custom("splash_mha_dkv.1", f"({heads}, {heads})", heads, heads, heads)
  fused = custom("splash_mha_dkv.2", f"(bf16[2,2,4,64,8]{{4,3,2,1,0}}, {heads}, {heads})", heads, heads, heads)
  assert hlo.kernel_flops(grouped) == 2 * 12288 * 2048 * 1408
  assert hlo.visited(grouped) == pytest.approx(87 / 24) and hlo.visited(grouped, 0.5) == pytest.approx(75 / 24)
  assert hlo.visited(keys) == 1
  assert hlo.kernel_flops(keys) == 4 * 2 * 4 * 64 * 64 * 8 and hlo.kernel_flops(fused) == 5 * 2 * 4 * 64 * 64 * 8
