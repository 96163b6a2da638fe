"""A whole step from the schedules of its operations: three equal layers on two TPU7x devices, as the compiler left them."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from typing import Any

import pytest

from rpac.schedule import Dump
from rpac.schedule.dump import TOP
from rpac.schedule.hlo import parse_module
from rpac.schedule.step import CATEGORIES, StepCall, Timed
from rpac.schedule.traffic import looked_up_bytes, moved_bytes

from .sharded_step import FIXTURE, HIDDEN, LAYERS, VOCABULARY, WIDTH

ROWS, CONTEXT, PAGE = 8, 48, 16


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(FIXTURE.read_bytes()))
    return found


@pytest.fixture(scope="module")
def call(kept: dict[str, Any]) -> StepCall:
    return StepCall(Dump(**kept["dump"]))


@pytest.fixture(scope="module")
def timed(call: StepCall, kept: dict[str, Any]) -> Timed:
    return call.time(parameters(kept))


def parameters(kept: dict[str, Any], context: int = CONTEXT) -> dict[int, list[int]]:
    """Decode of ROWS rows, by the number of each argument."""
    sizes = {name: (number, shape) for number, (name, shape, _) in enumerate(kept["arguments"])}
    pages = [page % 32 for page in range(sizes["page_indices"][1][0])]
    given = {
        "token_ids": [0] * 16,
        "positions": [context - 1] * ROWS + [0] * (16 - ROWS),
        "kv_lens": [context] * ROWS,
        "page_indices": pages,
        "cu_q_lens": list(range(ROWS + 1)),
        "distribution": [ROWS, ROWS, ROWS],
    }
    return {sizes[name][0]: values for name, values in given.items()}


def test_the_compiler_calls_the_operations_in_the_order_of_the_module(call: StepCall) -> None:
    called = re.findall(r"inlined_call [^\n]*?/\* %(\S+) = ", call.dump.schedules[TOP])
    entry = call.module.computations[call.module.entry].operations
    followed = [o.name for o in entry if o.name in call.schedules]
    assert len(called) > 20
    assert [name for name in called if name in call.schedules] == followed


def test_equal_layers_share_schedules(call: StepCall, timed: Timed) -> None:
    ran = [event for event in timed.events if event.category == "attention"]
    assert len(ran) == LAYERS
    assert {event.schedule for event in ran} == {ran[0].schedule}
    assert len(call.schedules) > len(call.dump.schedules) - 1


def test_times_add_up_and_nothing_large_is_timed_by_bytes(timed: Timed) -> None:
    assert sum(event.seconds for event in timed.events) == pytest.approx(timed.seconds)
    assert {event.category for event in timed.events} <= CATEGORIES.keys()
    by_bytes = sum(event.seconds for event in timed.events if event.reason and event.category != "collectives")
    assert by_bytes < 0.1 * timed.seconds


def test_the_matrix_products_are_those_of_the_model(timed: Timed) -> None:
    tokens, device = 16, 2
    layer = 2 * tokens * WIDTH * (512 + 256 + 256 + 512 + 2 * HIDDEN) // device
    head = 2 * 8 * WIDTH * VOCABULARY // device
    assert sum(event.flops for event in timed.events) == LAYERS * layer + head


def test_each_layer_reduces_twice_over_both_devices(timed: Timed) -> None:
    reduced = Counter((one.bytes, one.devices) for one in timed.collectives if one.kind == "all-reduce")
    assert reduced == {(16 * WIDTH * 2, 2): 2 * LAYERS}
    assert timed.wires_seconds == pytest.approx(len(timed.collectives) * 1e-6)  # both are on one chip: a hop each


def test_a_longer_context_moves_more_in_attention_alone(call: StepCall, kept: dict[str, Any], timed: Timed) -> None:
    shorter = call.time(parameters(kept, PAGE))
    for category, more in (("attention", True), ("matrix products", False)):
        moved = [
            sum(event.read_bytes for event in one.events if event.category == category) for one in (shorter, timed)
        ]
        assert (moved[0] < moved[1]) == more, category


LOOKUP = """%look (p: f32[1000,128], i: s32[16]) -> f32[16,128] {
  %p = f32[1000,128]{1,0:T(8,128)} parameter(0)
  %i = s32[16]{0:T(128)} parameter(1)
  ROOT %g = f32[16,128]{1,0:T(8,128)} gather(%p, %i), offset_dims={1}, slice_sizes={1,128}
}

ENTRY %main (t: f32[1000,128], u: f32[1000,128], i: s32[16]) -> f32[16,128] {
  %t = f32[1000,128]{1,0:T(8,128)} parameter(0)
  %u = f32[1000,128]{1,0:T(8,128)} parameter(1)
  %i.1 = s32[16]{0:T(128)} parameter(2)
  %a = f32[16,128]{1,0:T(8,128)} fusion(%t, %i.1), kind=kCustom, calls=%look
  %b = f32[16,128]{1,0:T(8,128)} fusion(%u, %i.1), kind=kCustom, calls=%look
  %all = f32[1000,128]{1,0:T(8,128)} negate(%u)
  ROOT %r = f32[16,128]{1,0:T(8,128)} add(%a, %b)
}
"""


def test_of_a_table_that_is_only_looked_up_in_the_rows_count() -> None:
    module = parse_module(LOOKUP)
    assert looked_up_bytes(module, [0, 1]) == {0: 16 * 512, 1: 1000 * 512}
    assert moved_bytes(module, module["a"]) == (16 * 512 + 512, 16 * 512)
