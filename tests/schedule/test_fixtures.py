"""Real schedules of a small ragged kernel, one for each generation, against what the kernel must do."""

from __future__ import annotations

import gzip
import json
import random
import re

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rpac.errors import ScheduleError
from rpac.schedule import Call, Dump, parse_schedule
from rpac.schedule.isa import GENERATIONS

from .gather import FIXTURES, PAGE_BYTES, PAGES, PAGES_PER_SEQ, SEQS, TARGETS, gather

each_target = pytest.mark.parametrize("target", TARGETS)
LENS, TABLE, CACHE, OUT = 0, 1, 2, 3


def load(target: str) -> Dump:
    return Dump(**json.loads(gzip.decompress((FIXTURES / f"gather-{target}.json.gz").read_bytes())))


def kernel_text(target: str) -> str:
    dump = load(target)
    return dump.schedules[Call(dump).kernels[0].name]


def random_batch(seed: int) -> tuple[list[int], list[int]]:
    draw = random.Random(seed)
    return [draw.randint(0, PAGES_PER_SEQ) for _ in range(SEQS)], draw.choices(range(PAGES), k=SEQS * PAGES_PER_SEQ)


def pages_of(lens: list[int], table: list[int]) -> list[tuple[int, int]]:
    """(page read, page of the output written) in the order of the kernel's loops."""
    return [
        (table[seq * PAGES_PER_SEQ + i], seq * PAGES_PER_SEQ + i)
        for seq, count in enumerate(lens)
        for i in range(count)
    ]


@each_target
@pytest.mark.parametrize("seed", range(10))
def test_the_walk_moves_exactly_the_pages_that_the_batch_names(target: str, seed: int) -> None:
    lens, table = random_batch(seed)
    call = Call(load(target))
    name = call.kernels[0].name
    operands = call.operands({LENS: lens, TABLE: table})[name]
    done = call.walk_kernel(name, operands, trace=True)
    reads = [(t.operand, t.offset, t.size) for t in done.transfers if not t.to_hbm and t.opcode.endswith("vmem")]
    writes = [(t.operand, t.offset, t.size) for t in done.transfers if t.to_hbm]
    pages = pages_of(lens, table)
    assert sorted(reads) == sorted((CACHE, page * PAGE_BYTES, PAGE_BYTES) for page, _ in pages), f"{seed=}"
    assert writes == [(OUT, place * PAGE_BYTES, PAGE_BYTES) for _, place in pages], f"{seed=}"
    scalars = done.read_bytes - len(pages) * PAGE_BYTES
    assert done.written_bytes == len(pages) * PAGE_BYTES
    assert 0 <= scalars <= 2048  # the lengths and the table, padded; none where XLA moved them to VMEM first


@each_target
def test_a_longer_batch_takes_longer_and_an_empty_one_still_takes_time(target: str) -> None:
    call = Call(load(target))
    table = list(range(PAGES))
    seconds = [call.predict({LENS: [n] * SEQS, TABLE: table}).seconds for n in range(PAGES_PER_SEQ + 1)]
    assert seconds[0] > 0
    assert sorted(seconds) == seconds
    # Every page is waited for twice: once read, once written.
    assert seconds[1] - seconds[0] > SEQS * 2 * call.model.latency_s


@each_target
def test_the_loops_of_the_kernel_are_found_with_their_iterations(target: str) -> None:
    call = Call(load(target))
    report = call.predict({LENS: [3] * SEQS, TABLE: list(range(PAGES))})
    iterations = {loop.depth: loop.iterations for loop in report.kernels[0].loops}
    assert iterations == {1: SEQS, 2: 3 * SEQS}
    kernel = report.kernels[0]
    assert kernel.seconds == pytest.approx(kernel.compute_seconds + kernel.stall_seconds)
    assert sum(w.stall_seconds for w in kernel.waits) == pytest.approx(kernel.stall_seconds)
    hottest = kernel.loops[0]
    assert hottest.utilization is not None
    assert all(0 <= share <= 1 for share in hottest.utilization.values())
    assert hottest.utilization["SALU"] > 0


@each_target
def test_a_schedule_is_refused_under_every_other_generation_that_its_text_tells_apart(target: str) -> None:
    text = kernel_text(target)
    for other in GENERATIONS:
        if (other == "v5e") != (target == "v5e"):
            with pytest.raises(ScheduleError, match="the dump is of another generation"):
                parse_schedule(text, other)


@each_target
def test_a_missing_operand_is_named_with_its_shape(target: str) -> None:
    call = Call(load(target))
    with pytest.raises(ScheduleError, match=rf"operand 1 \(s32\[{SEQS * PAGES_PER_SEQ}\]\).*missing; given: \[0\]"):
        call.walk_kernel(call.kernels[0].name, {0: [1] * SEQS})


def test_an_operand_of_another_length_is_refused() -> None:
    call = Call(load("tpu7x"))
    with pytest.raises(ScheduleError, match=r"operand 0 has 3 values; the kernel takes .8., so 8"):
        call.walk_kernel(call.kernels[0].name, {0: [1, 2, 3]})
    with pytest.raises(ScheduleError, match=r"operand 9 was given; the kernel has .0, 1, 2, 3."):
        call.walk_kernel(call.kernels[0].name, {9: []})


@each_target
def test_a_file_cut_anywhere_is_refused(target: str) -> None:
    """Up to the last closing brace: what follows it is a remark."""
    text = kernel_text(target)
    draw = random.Random(7)
    for cut in draw.sample(range(text.rindex("}")), 60):
        with pytest.raises(ScheduleError):
            parse_schedule(text[:cut], target)


@each_target
def test_a_file_that_lost_a_line_is_refused(target: str) -> None:
    lines = kernel_text(target).split("\n")
    bundles = [i for i, line in enumerate(lines) if re.match(r" *0x[0-9a-f]+ ", line)]
    for lost in bundles[:-1:7]:
        with pytest.raises(ScheduleError):
            parse_schedule("\n".join(lines[:lost] + lines[lost + 1 :]), target)


@each_target
def test_the_walk_moves_the_pages_that_an_interpreted_run_copies(target: str) -> None:
    """The interpreter executes the kernel's own DMAs on real data: each page that it copied is a transfer of the walk."""
    lens, table = random_batch(3)
    cache = np.arange(PAGES, dtype=np.float32)[:, None, None] * np.ones((1, PAGE_BYTES // 512, 128), np.float32) + 1
    out = np.asarray(
        gather(np.int32(lens), np.int32(table), cache, interpret=pltpu.InterpretParams(uninitialized_memory="nan"))
    )
    copied = {(int(out[s, p, 0, 0]) - 1, s * PAGES_PER_SEQ + p) for s in range(SEQS) for p in range(lens[s])}
    call = Call(load(target))
    name = call.kernels[0].name
    done = call.walk_kernel(name, call.operands({LENS: lens, TABLE: table})[name], trace=True)
    moved = [t for t in done.transfers if t.operand in (CACHE, OUT)]
    reads = sorted(t.offset // PAGE_BYTES for t in moved if t.operand == CACHE)
    writes = sorted(t.offset // PAGE_BYTES for t in moved if t.operand == OUT)
    assert reads == sorted(page for page, _ in copied)
    assert writes == sorted(place for _, place in copied)
    assert np.isnan(out).sum() == (SEQS * PAGES_PER_SEQ - len(writes)) * PAGE_BYTES // 4
