"""The HLO around kernels, the work that a batch needs, and the report of a call."""

from __future__ import annotations

import json

import pytest

from rpac.errors import ScheduleError
from rpac.schedule import Call, attention_work
from rpac.schedule.hlo import parse_module

from .gather import PAGE_BYTES, SEQS
from .test_fixtures import LENS, TABLE, load

HEAD = "HloModule m\n\nENTRY %main (a: s32[4]) -> s32[4] {\n"


def module(*lines: str) -> str:
    return HEAD + "".join(f"  {line}\n" for line in lines) + "}\n"


def test_bytes_count_padding_by_tiles_and_leave_vmem_out() -> None:
    found = parse_module(
        module(
            "%a = bf16[3,100]{1,0:T(8,128)(2,1)} parameter(0)",
            "%b = f32[10]{0:T(128)} parameter(1)",
            "%c = bf16[3,100]{0,1:T(8,128)(2,1)} copy(%a)",
            "%d = f32[10]{0:T(128)S(1)} copy(%b)",
            "%e = (f32[10]{0:T(128)}, u32[]{:S(2)}) fusion(%d, %b), kind=kLoop",
        )
    )
    assert found.traffic(found["c"]) == (8 * 128 * 2, 104 * 128 * 2)
    assert found.traffic(found["d"]) == (512, 0)
    assert found.traffic(found["e"]) == (512, 512)


def test_an_asynchronous_operation_is_counted_once() -> None:
    found = parse_module(
        module(
            "%a = f32[128]{0:T(128)} parameter(0)",
            "%s = ((f32[128]{0:T(128)}, token[]), f32[128]{0:T(128)}, u32[]{:S(2)}) call-start(%a, %a)",
            "%d = f32[128]{0:T(128)} call-done(%s)",
        )
    )
    assert found.traffic(found["d"]) == (0, 0)
    assert sum(found.traffic(found["s"])) == 1024


def test_an_asynchronous_operation_that_gets_its_inputs_late_is_counted_where_it_does() -> None:
    found = parse_module(
        module(
            "%a = f32[128]{0:T(128)} parameter(0)",
            "%s = ((), (), s32[]{:S(2)}) call-start()",
            "%u = ((f32[128]{0:T(128)}), f32[128]{0:T(128)}) call-update(%s, %a)",
            "%d = f32[128]{0:T(128)} call-done(%u)",
        )
    )
    assert [found.traffic(found[name]) for name in "sud"] == [(0, 0), (512, 512), (0, 0)]


@pytest.mark.parametrize("text", ["", "HloModule m\n", HEAD, HEAD + "  %a = nonsense\n}\n"])
def test_a_broken_module_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        parse_module(text)


def test_needed_work_counts_each_pair_that_may_attend() -> None:
    kv_lens, q_lens, q_heads, kv_heads, head_dim = [9, 1, 30], [3, 1, 30], 4, 2, 128
    pairs = sum(
        1 for kv, q in zip(kv_lens, q_lens, strict=True) for i in range(q) for j in range(kv) if j <= kv - q + i
    )
    work = attention_work(kv_lens, q_lens, q_heads, kv_heads, head_dim, 2, 2)
    assert work.flops == 4 * head_dim * q_heads * pairs
    rows = (40 - 34) + 2 * 34  # cached rows read, new rows read and written
    assert work.bytes == rows * 2 * kv_heads * head_dim * 2 + 2 * 34 * q_heads * head_dim * 2


@pytest.mark.parametrize("chunk", [1, 4, 9, 29])
def test_needed_work_of_chunks_is_what_they_hold(chunk: int) -> None:
    kv_lens, q_lens = (5, 12, 30), (5, 3, 11)
    pairs = cached = 0
    for kv, q in zip(kv_lens, q_lens, strict=True):
        seen = {(i, j) for i in range(kv - q, kv) for j in range(kv) if j <= i and i // chunk == j // chunk}
        pairs += len(seen)
        cached += len({j for i, j in seen if i == kv - q and j < kv - q})
    work = attention_work(kv_lens, q_lens, 4, 2, 128, 2, 2, attention_chunk=chunk)
    assert work.flops == 4 * 128 * 4 * pairs
    assert work.bytes == (cached + 2 * sum(q_lens)) * 2 * 2 * 128 * 2 + 2 * sum(q_lens) * 4 * 128 * 2


@pytest.mark.parametrize("window", [1, 4, 9, 29])
def test_needed_work_of_a_window_is_what_it_reaches(window: int) -> None:
    kv_lens, q_lens = [9, 1, 30], [3, 1, 10]
    pairs, rows = 0, 0
    for kv, q in zip(kv_lens, q_lens, strict=True):
        seen = {(i, j) for i in range(kv - q, kv) for j in range(kv) if i - window < j <= i}
        pairs += len(seen)
        rows += len({j for _, j in seen if j < kv - q}) + 2 * q
    work = attention_work(kv_lens, q_lens, 4, 2, 128, 2, 2, window)
    assert work.flops == 4 * 128 * 4 * pairs
    assert work.bytes == rows * 2 * 2 * 128 * 2 + 2 * sum(q_lens) * 4 * 128 * 2


def test_needed_work_that_writes_nothing_reads_each_row_once() -> None:
    written, read = (attention_work([9, 30], [3, 10], 4, 2, 128, 2, 2, update_cache=update) for update in (True, False))
    assert written.bytes - read.bytes == 13 * 2 * 2 * 128 * 2
    assert written.flops == read.flops


def test_needed_work_that_is_not_causal_counts_every_pair() -> None:
    assert attention_work([9, 30], [3, 10], 4, 2, 128, 2, 2, causal=False).flops == 4 * 128 * 4 * (9 * 3 + 30 * 10)


def test_the_report_is_plain_json_with_its_definitions() -> None:
    call = Call(load("v6e"))
    parameters = {LENS: [2] * SEQS, TABLE: list(range(32))}
    work = attention_work([64] * 4, [1] * 4, 8, 1, 128, 2, 2)
    report = call.predict(parameters, work)
    data = json.loads(json.dumps(report.to_json()))
    assert {"seconds", "kernel_seconds", "mbu", "mfu", "kernels", "xla", "definitions", "compiler"} <= data.keys()
    assert data["seconds"] == pytest.approx(data["kernel_seconds"] + sum(x["seconds"] for x in data["xla"]))
    assert data["mbu"] == pytest.approx(work.bytes / data["seconds"] / 1.64e12)
    assert data["moved_bytes"] >= 2 * 2 * SEQS * PAGE_BYTES
    assert call.predict(parameters).mbu is None


def test_a_computation_ends_where_its_brace_does_whatever_follows_and_metadata_of_several_lines_does_not_end_it() -> (
    None
):
    found = parse_module(
        "HloModule m\n\n"
        '%called (p: s32[4]) -> s32[4] {\n  ROOT %p = s32[4]{0:T(128)} parameter(0)\n}, execution_thread="sparsecore"\n\n'
        "ENTRY %main (a: s32[4]) -> s32[4] {\n"
        "  %a = s32[4]{0:T(128)} parameter(0)\n"
        '  %k = s32[4]{0:T(128)} custom-call(%a), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{}"\n}}, metadata={op_name="k"}\n'
        "  ROOT %copy = s32[4]{0:T(128)} copy(%k)\n}\n"
    )
    assert [operation.name for operation in found.computations["main"].operations] == ["a", "k", "copy"]
    assert [operation.name for operation in found.computations["called"].operations] == ["p"]
