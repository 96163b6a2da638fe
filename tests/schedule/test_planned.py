"""A call whose first kernel tells its second what to do, in a loop inside of a conditional: the walk moves what it must."""

from __future__ import annotations

import functools
import gzip
import json
import random
from collections import Counter
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rpac.errors import ScheduleError
from rpac.schedule import Call, Dump, Walk
from rpac.schedule.hlo import Operation
from rpac.schedule.memory import Words
from rpac.schedule.sequence import run

from .gather import FIXTURES, PAGE_BYTES, PAGE_ROWS, PAGES, PAGES_PER_SEQ, SEQS, TARGETS
from .planned import PIECE, PLACES, PLAN, planned
from .recorder import Extent, recorded

each_target = pytest.mark.parametrize("target", TARGETS)
ENDS, TABLE, ITERATIONS = 0, 1, 2
PAGES_SHAPE = (PAGES, PAGE_ROWS, 128)  # of the cache, and of the output, which has as many
assert PLACES == PAGES
Batch = dict[int, list[int]]


@functools.cache
def call_of(target: str) -> Call:
    return Call(Dump(**json.loads(gzip.decompress((FIXTURES / f"planned-{target}.json.gz").read_bytes()))))


def batch(counts: list[int], iterations: int, seed: int = 0) -> Batch:
    table = random.Random(seed).choices(range(PAGES), k=PLACES)
    return {ENDS: [7 + sum(counts[:n]) for n in range(SEQS + 1)], TABLE: table, ITERATIONS: [iterations]}


def random_batch(seed: int) -> Batch:
    draw = random.Random(seed)
    return batch([draw.randint(0, PAGES_PER_SEQ) for _ in range(SEQS)], draw.randint(0, 3), seed)


def moves(given: Batch) -> list[tuple[int, int]]:
    """(page, place) in order, worked out here."""
    counts = np.diff(given[ENDS]).tolist()
    places = [seq * PAGES_PER_SEQ + page for seq, count in enumerate(counts) for page in range(count)]
    iterations = given[ITERATIONS][0] if places else 0
    return [((given[TABLE][place] + iteration) % PAGES, place) for iteration in range(iterations) for place in places]


def walks(call: Call, given: Batch) -> list[tuple[str, Walk]]:
    """Every kernel that runs, by its plain name, with its transfers."""
    found: list[tuple[str, Walk]] = []

    def kernel(operation: Operation, operands: dict[int, Words]) -> Mapping[int, Words]:
        done = call.walk_kernel(operation.name, operands, trace=True)
        found.append((operation.name.partition(".")[0], done))
        return done.written

    run(call.module, given, kernel, lambda operation, operands: None)
    return found


def extents(found: list[tuple[str, Walk]], shape: tuple[int, ...]) -> Counter[Extent]:
    moved: Counter[Extent] = Counter()
    for _, done in found:
        shape_of = {operand.index: operand.shape for operand in done.schedule.operands}
        for t in done.transfers:
            if t.operand is not None and shape_of[t.operand] == shape:
                moved[Extent(shape, t.to_hbm, t.offset, t.size)] += 1
    return moved


@each_target
@pytest.mark.parametrize("seed", range(6))
def test_the_second_kernel_moves_what_the_first_one_planned(target: str, seed: int) -> None:
    given = random_batch(seed)
    found = walks(call_of(target), given)
    expected = moves(given)
    assert [name for name, _ in found] == ["plan", "move"] * (
        given[ITERATIONS][0] if given[ENDS][-1] > given[ENDS][0] else 0
    )
    moved = [t for name, done in found if name == "move" for t in done.transfers if t.operand is not None]
    copied = [(t.to_hbm, t.offset // PAGE_BYTES) for t in moved if t.size == PAGE_BYTES]
    assert copied == [step for page, place in expected for step in ((False, page), (True, place))], f"{seed=}"


INTERPRETED = batch([3, 0, 1, 4, 0, 2, 1, 1], 2)


@functools.cache
def interpreted_extents() -> Counter[Extent]:
    arguments = [np.int32(INTERPRETED[i]) for i in (ENDS, TABLE, ITERATIONS)]
    call = jax.jit(functools.partial(planned, interpret=pltpu.InterpretParams()))
    with recorded() as found:
        jax.block_until_ready(call(*arguments, np.ones(PAGES_SHAPE, np.float32)))
    return found


@each_target
def test_it_moves_the_extents_that_the_interpreter_moves(target: str) -> None:
    given, interpreted = INTERPRETED, interpreted_extents()
    expected = Counter({e: n for e, n in interpreted.items() if e.shape == PAGES_SHAPE})
    found = walks(call_of(target), given)
    assert expected and extents(found, PAGES_SHAPE) == expected
    # The plan goes out in small pieces; coming in it may lie in VMEM, where XLA can have moved it.
    written = Counter({e: n for e, n in interpreted.items() if e.shape == (PLAN,) and e.written})
    assert extents([one for one in found if one[0] == "plan"], (PLAN,)) == written
    assert set(written.values()) == {given[ITERATIONS][0]} and {e.size for e in written} == {4 * PIECE}


@each_target
def test_nothing_runs_where_the_condition_does_not_hold(target: str) -> None:
    assert walks(call_of(target), batch([0] * SEQS, 3)) == []
    report = call_of(target).predict(batch([0] * SEQS, 3))
    assert report.kernels == () and report.kernel_seconds == 0 and report.seconds > 0


@each_target
def test_each_iteration_of_the_loop_is_timed(target: str) -> None:
    reports = [call_of(target).predict(batch([2] * SEQS, iterations)) for iterations in (0, 1, 2, 5)]
    assert [len(report.kernels) for report in reports] == [0, 2, 4, 10]
    seconds = [report.seconds for report in reports]
    assert seconds[3] - seconds[2] == pytest.approx(3 * (seconds[2] - seconds[1]), rel=0.02)
    assert {kernel.name.partition(".")[0] for kernel in reports[3].kernels} == {"plan", "move"}


@each_target
def test_the_operands_of_the_second_kernel_are_those_of_the_first_iteration(target: str) -> None:
    given = batch([1] * SEQS, 2)
    operands = {name.partition(".")[0]: of for name, of in call_of(target).operands(given).items()}
    plan = operands["move"][0]
    assert (plan[0], list(plan[PIECE : PIECE + SEQS])) == (SEQS, [page for page, _ in moves(given)[:SEQS]])
    assert set(plan[1:PIECE]) == {None}  # scratch that nothing ever wrote


@each_target
def test_a_loop_or_branch_on_what_was_not_given_is_refused_and_named(target: str) -> None:
    given = batch([1] * SEQS, 2)
    with pytest.raises(ScheduleError, match="which of its kernels run depends on %"):
        call_of(target).predict({TABLE: given[TABLE], ITERATIONS: [1]})
    with pytest.raises(ScheduleError, match="how often this loop runs its kernels"):
        call_of(target).predict({ENDS: given[ENDS], TABLE: given[TABLE]})
    with pytest.raises(ScheduleError, match=r"operand 1 \(s32\[32\]\), which is missing"):
        call_of(target).predict({ENDS: given[ENDS], ITERATIONS: [1]})
