"""Collectives are recognized whatever runs them, and timed by their bytes."""

from __future__ import annotations

import pytest

from rpac.errors import ScheduleError
from rpac.schedule.hlo import parse_module
from rpac.schedule.interconnect import Collective, Interconnect, collective_of, interconnect_of, seconds_of

ARRAY = "bf16[64,1024]{1,0}"
WIRES = Interconnect("tpu7x", links=6, link_bytes_per_s=1e11, devices_per_chip=2, hop_s=1e-6)


def module(line: str) -> str:
    return (
        f"%inner (p: bf16[64,1024]) -> bf16[64,1024] {{\n  %p = {ARRAY} parameter(0)\n"
        f"  ROOT %ar = {ARRAY} all-reduce(%p), replica_groups=mesh['x'=8,'y'=2] {{'x'}}, to_apply=%add\n}}\n\n"
        f"ENTRY %main (x: bf16[64,1024]) -> bf16[64,1024] {{\n  %x = {ARRAY} parameter(0)\n  ROOT %r = {line}\n}}\n"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"{ARRAY} all-reduce(%x), replica_groups={{{{0,1,2,3}}}}", Collective("all-reduce", 131072, 4)),
        (f"{ARRAY} all-reduce-start(%x), replica_groups=[2,4]<=[8]", Collective("all-reduce", 131072, 4)),
        ("bf16[256,1024]{1,0} all-gather(%x), replica_groups=[1,4]<=[4]", Collective("all-gather", 524288, 4)),
        ("bf16[16,1024]{1,0} reduce-scatter(%x), replica_groups=[1,4]<=[4]", Collective("reduce-scatter", 131072, 4)),
        (f"{ARRAY} call-start(%x), to_apply=%inner", Collective("all-reduce", 131072, 8)),
        (f"{ARRAY} copy(%x)", None),
    ],
)
def test_a_collective_is_what_hlo_says(line: str, expected: Collective | None) -> None:
    found = parse_module(module(line))
    assert collective_of(found, found["r"]) == expected


def test_an_all_reduce_passes_the_ring_twice() -> None:
    # Four chips: three quarters of the bytes twice over two links of 100 GB/s, and two hops each way.
    assert seconds_of(Collective("all-reduce", 2**20, 8), WIRES) == pytest.approx(2 * (0.75 * 2**20 / 2e11 + 2e-6))
    once = seconds_of(Collective("all-gather", 2**20, 8), WIRES)
    assert seconds_of(Collective("all-reduce", 2**20, 8), WIRES) == pytest.approx(2 * once)


def test_devices_of_one_chip_need_one_hop_and_one_device_nothing() -> None:
    assert seconds_of(Collective("all-reduce", 2**20, 2), WIRES) == 1e-6
    assert seconds_of(Collective("all-reduce", 2**20, 1), WIRES) == 0


def test_every_target_has_a_table_entry() -> None:
    assert interconnect_of("v6e").link_bytes_per_s == 100e9
    with pytest.raises(ScheduleError, match="no interconnect is known for target 'v4'; allowed: tpu7x, v6e"):
        interconnect_of("v4")
