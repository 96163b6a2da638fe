"""Miniature schedules whose cycle counts are worked out by hand, for every generation."""

from __future__ import annotations

import pytest

from rpac.errors import ScheduleError
from rpac.schedule.isa import GENERATIONS
from rpac.schedule.walk import walk

from .miniature import (
    DELAY,
    FLAG,
    LATENCY,
    LOCAL_LATENCY,
    copy_in,
    counted_loop,
    hbm_pointer,
    load_operand,
    model,
    operand,
    run,
    schedule,
    wait,
)

TARGETS = tuple(GENERATIONS)
each_target = pytest.mark.parametrize("target", TARGETS)


def branch_to(lines: list[str | int], label: int = 1) -> list[str | int]:
    """Replaces the placeholder target by the bundle of the label-th `LB`."""
    at, seen = 0, 0
    for line in lines:
        if isinstance(line, str) and line.startswith("LB|"):
            seen += 1
            if seen == label:
                break
        at += line if isinstance(line, int) else 1
    return [line.replace("LOOP", str(at)) if isinstance(line, str) else line for line in lines]


@each_target
def test_a_phi_of_vectors_is_a_vector_instruction(target: str) -> None:
    """MLA v2 of tpu-inference has one in each loop that carries a vector: its own cycle, and no effect on scalars."""
    assert run(target, "%v2_v1 = vphi %v1_v0, %v3_v1", "%v3_v1 = vadd.f32 %v2_v1, %v2_v1").cycles == 2


@each_target
def test_a_bundle_takes_a_cycle_empty_or_full(target: str) -> None:
    done = run(
        target, "%1 = vst [vmem:[#allocation2] sm:$0xff] /*vst_source=*/%v1_v0", 7, "%v2_v1 = vadd.f32 %v1_v0, %v1_v0"
    )
    assert (done.cycles, done.issued, done.stalled) == (9, 9, 0)


@each_target
def test_a_branch_takes_effect_after_the_delay_slots_of_its_generation(target: str) -> None:
    done = run(target, "%1 = sbr.rel target bundleno = 20 (0x14), region = 1", 20)
    assert done.cycles == 1 + DELAY[target] + 1
    assert [i for i, n in enumerate(done.executed) if n] == [*range(1 + DELAY[target]), 20]


@each_target
def test_a_branch_whose_predicate_fails_costs_its_bundle_alone(target: str) -> None:
    done = run(
        target,
        "%p1_p0 = scmp.eq.s32.totalorder 1, 2",
        "%2 = sbr.rel (%p1_p0) target bundleno = 15 (0xf), region = 1",
        14,
    )
    assert done.cycles == 16


@each_target
def test_a_loop_turns_as_often_as_its_operand_says(target: str) -> None:
    load = load_operand(target, 0, 8, "allocation7")
    lines = branch_to([*load, "%s510_s5 = sld [smem:[#allocation7 + $0x2]]", *counted_loop(target, "%s510_s5"), 3])
    turn = 3 + DELAY[target]
    for turns in (1, 2, 50):
        done = walk(schedule(target, *lines), {0: [0, 0, turns, 0, 0, 0, 0, 0]}, model(target))
        assert done.issued == 4 + 1 + 1 + turns * turn + 3
        assert done.cycles == done.issued + LATENCY


@each_target
def test_work_in_the_delay_slots_counts_on_both_ways(target: str) -> None:
    """A counter that the shadow of the branch raises must be raised on the last turn too."""
    lines = branch_to(
        [
            "%s1_s1 = smov 0  ;;  %s2_s2 = smov 0",
            "LB|%s3_s1 = sphi %s1_s1, %s5_s1  ;;  %s4_s2 = sphi %s2_s2, %s6_s2  ;;  %s5_s1 = sadd.s32 1, %s3_s1",
            "%p1_p0 = scmp.lt.s32.totalorder %s5_s1, 5",
            "%7 = sbr.rel (%p1_p0) target bundleno = LOOP (0x0), region = 3",
            "%s6_s2 = sadd.s32 10, %s4_s2",
            DELAY[target] - 1,
            "%8 = sst [smem:[#allocation3]] %s6_s2",
            "%s9_s4 = sld [smem:[#allocation3]]",
            "%p2_p1 = scmp.ne.s32.totalorder %s9_s4, 50",
            "%10 = shalt.err (%p2_p1)",
        ]
    )
    assert run(target, *lines).issued == 1 + 5 * (3 + DELAY[target]) + 4


@each_target
def test_nested_loops_start_their_inner_phi_anew(target: str) -> None:
    inner = counted_loop(target, "3")
    inner_turn = 3 + DELAY[target]
    outer = [
        "%s1_s1 = smov 0",
        "LB|%s2_s1 = sphi %s1_s1, %s3_s1  ;;  %s3_s1 = sadd.s32 1, %s2_s1",
        *inner,
        "%p1_p2 = scmp.lt.s32.totalorder %s3_s1, 4",
        "%7 = sbr.rel (%p1_p2) target bundleno = 1 (0x1), region = 9",
        DELAY[target],
    ]
    lines = branch_to(outer, label=2)
    assert run(target, *lines).issued == 1 + 4 * (1 + 1 + 3 * inner_turn + 2 + DELAY[target])


@each_target
def test_a_wait_stalls_for_what_its_transfer_still_needs(target: str) -> None:
    done = run(target, operand(0, "f32[4096]"), *copy_in(target, 64), 9, wait(64))
    # Started at cycle 1 (after two bundles on v5e): 64 cycles of channel, then the latency; the wait is issued 10 later.
    assert done.stalled == 64 + LATENCY - 10
    assert (done.read_bytes, done.written_bytes, done.dmas) == (64 * 32, 0, 1)
    assert [(w.count, w.stalled) for w in done.waits] == [(1, 64 + LATENCY - 10)]


@each_target
def test_a_wait_for_what_has_arrived_costs_its_bundle_alone(target: str) -> None:
    assert run(target, operand(0, "f32[4096]"), *copy_in(target, 64), 64 + LATENCY, wait(64)).stalled == 0


@each_target
def test_overlapping_transfers_share_the_channel_in_order(target: str) -> None:
    """Two of 64 granules started a cycle apart end 64 cycles apart, and their latencies overlap."""
    done = run(
        target,
        operand(0, "f32[4096]"),
        *copy_in(target, 64),
        *copy_in(target, 64, semaphore=1)[-1:],
        wait(64),
        wait(64, 1),
    )
    assert [w.stalled for w in done.waits] == [64 + LATENCY - 2, 64 - 1]
    assert done.dma_busy == 128


@each_target
def test_one_wait_can_cover_several_transfers(target: str) -> None:
    done = run(target, operand(0, "f32[4096]"), *copy_in(target, 64), *copy_in(target, 32)[-1:], wait(96))
    assert done.stalled == 96 + LATENCY - 2


@each_target
def test_a_transfer_of_nothing_takes_nothing(target: str) -> None:
    done = run(target, operand(0, "f32[4096]"), *copy_in(target, 0), wait(0))
    assert (done.stalled, done.read_bytes, done.dmas) == (0, 0, 1)


@each_target
def test_a_predicated_transfer_and_its_wait_happen_only_where_the_predicate_holds(target: str) -> None:
    for value, moved in ((1, 64 * 32), (2, 0)):
        lines = [
            operand(0, "f32[4096]"),
            f"%p1_p0 = scmp.eq.s32.totalorder {value}, 1",
            *copy_in(target, 64, "(%p1_p0), "),
        ]
        lines += ["%5 = dma.done.wait (%p1_p0), [#allocation5], 64"]
        assert run(target, *lines).read_bytes == moved


@each_target
def test_bytes_to_hbm_are_told_from_bytes_from_it(target: str) -> None:
    pointer, shift = hbm_pointer(target)
    store = f"%9 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s70_s8, /*size_in_granules=*/16, /*hbm=*/{pointer}, {FLAG}"
    done = run(target, operand(0, "f32[4096]"), *shift, "%s70_s8 = smov [#allocation2]", store, wait(16), trace=True)
    assert (done.read_bytes, done.written_bytes) == (0, 512)
    assert [(t.operand, t.offset, t.size, t.to_hbm) for t in done.transfers] == [(0, 0, 512, True)]


@each_target
def test_a_transfer_is_traced_to_its_operand_and_offset(target: str) -> None:
    """HBM addresses count granules, but on v5e 16 of them until they are shifted."""
    unit = GENERATIONS[target].hbm_pointer_granules
    offset = f"%s60_s6 = scalar_lea.hbm %s901_s1, {5 * 16 // unit}"
    pointer, shift = hbm_pointer(target, "%s60_s6")
    load = f"%9 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/{pointer}, /*size_in_granules=*/16, /*vmem=*/%s70_s8, {FLAG}"
    lines = [operand(0), operand(1, "f32[4096]"), offset, *shift, "%s70_s8 = smov [#allocation2]", load, wait(16)]
    done = run(target, *lines, trace=True)
    assert [(t.operand, t.offset, t.size) for t in done.transfers] == [(1, 5 * 512, 512)]


@each_target
def test_transfers_inside_the_core_leave_hbm_alone(target: str) -> None:
    lines = [
        operand(0, "s32[8]", space="vmem") + "  ;;  %s1_s1 = smov [#allocation4]",
        "%s2_s2 = sshll.u32 %s900_s0, 4  ;;  %s3_s2 = int_to_ptr.vmem [resolvable:$true] %s2_s2",
        "%4 = dma.vmem_to_smem /*vmem=*/%s3_s2, /*size_in_granules=*/1, /*smem=*/%s1_s1, /*dst_syncflagno=*/[#allocation5]",
        wait(1),
        "%s5_s5 = sld [smem:[#allocation4 + $0x3]]",
        "%p1_p0 = scmp.ne.s32.totalorder %s5_s5, 4294967295",
        "%6 = shalt.err (%p1_p0)",
    ]
    done = run(target, *lines, operands={0: [5, 6, 7, -1, 0, 0, 0, 0]})
    assert (done.read_bytes, done.written_bytes, done.dma_busy) == (0, 0, 0)
    assert done.stalled == LOCAL_LATENCY - 1


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("%s9_s9 = sadd.s32 2147483647, 1", -(2**31)),
        ("%s9_s9 = sadd.s32 4294967168, 200", 72),
        ("%s9_s9 = ssub.s32 0, 5", -5),
        ("%s9_s9 = smul.u32 65536, 65537", 65536),
        ("%s9_s9 = smulhi.u32 3435973837, 10240", 8192),
        ("%s9_s9 = smulhi.u32 4294967295, 4294967295", -2),
        ("%s9_s9 = sshll.u32 3, 31", -(2**31)),
        ("%s9_s9 = sshll.u32 3, 32", 0),
        ("%s9_s9 = sshrl.u32 4294967295, 28", 15),
        ("%s9_s9 = sshra.s32 4294967280, 2", -4),
        ("%s9_s9 = smin.u32 4294967295, 7", 7),
        ("%s9_s9 = sand.u32 4294967295, 12", 12),
        ("%s9_s9 = sor.u32 8, 3", 11),
        ("%s9_s9 = sxor.u32 6, 3", 5),
        ("%p1_p1 = scmp.lt.u32.totalorder 4294967295, 7  ;;  %s9_s9 = smov 3", 3),
        ("%p2_p2 = scmp.lt.s32.totalorder 4294967295, 7 @ %s9_s9 = scalar_select %p2_p2, 4, 5", 4),
        ("%p2_p2 = scmp.lt.u32.totalorder 4294967295, 7 @ %s9_s9 = scalar_select %p2_p2, 4, 5", 5),
        ("%p2_p2 = scmp.lt.s32.totalorder 8, 7 @ %s9_s9 = smov (!%p2_p2, 11), 12", 12),
        ("%p2_p2 = scmp.lt.s32.totalorder 6, 7 @ %s9_s9 = smov (!%p2_p2, 11), 12", 11),
        ("%4 = sdivrem.u32 17, 5 /* kDivAndRem */ @ %s9_s9 = spop.drf %4", 3),
        ("%4 = sdivrem.u32 17, 5 /* kDivAndRem */ @ %s8_s8 = spop.drf %4 @ %s9_s9 = spop.drf %4", 2),
        ("%4 = sdivrem.u32 17, 5 /* kRem */ @ %s9_s9 = spop.drf %4", 2),
        ("%s9_s9 = sld [smem:[#allocation4]] /* core id */", 0),
        (
            "%1 = sst [smem:[#allocation4 + $0x3]] 21 @ %s2_s2 = smov 1 @ %s9_s9 = sld [smem:[#allocation4 + %s2_s2 + $0x2]]",
            21,
        ),
    ],
)
def test_scalar_work_is_exact(code: str, expected: int) -> None:
    check = [f"%p9_p9 = scmp.ne.s32.totalorder %s9_s9, {expected % 2**32}", "%9 = shalt.err (%p9_p9)"]
    run("tpu7x", *code.split(" @ "), *check)
    wrong = [f"%p9_p9 = scmp.ne.s32.totalorder %s9_s9, {(expected + 1) % 2**32}", "%9 = shalt.err (%p9_p9)"]
    with pytest.raises(ScheduleError, match="a check that the compiler put into the kernel fails"):
        run("tpu7x", *code.split(" @ "), *wrong)


def test_a_predicated_move_into_a_phi_keeps_the_old_value_where_it_does_not_happen() -> None:
    """The phi sees what its register holds, not what the skipped move would have put there."""
    lines = branch_to(
        [
            "%s1_s1 = smov 4  ;;  %s4_s4 = smov 0",
            "LB|%s2_s1 = sphi %s1_s1, %s3_s1  ;;  %s5_s4 = sphi %s4_s4, %s6_s4  ;;  %s6_s4 = sadd.s32 1, %s5_s4",
            "%p1_p1 = scmp.lt.s32.totalorder %s6_s4, 2",
            "%p2_p2 = scmp.lt.s32.totalorder %s6_s4, 5",
            "%s3_s1 = smov (%p1_p1), 9",
            "%7 = sbr.rel (%p2_p2) target bundleno = LOOP (0x0), region = 3",
            DELAY["tpu7x"],
            "%p3_p3 = scmp.ne.s32.totalorder %s2_s1, 9",
            "%8 = shalt.err (%p3_p3)",
        ]
    )
    run("tpu7x", *lines)


def test_a_semaphore_counts_what_is_added_and_taken() -> None:
    lines = [operand(0, "f32[4096]"), *copy_in("tpu7x", 64), wait(64), "%7 = vsyncadd [#allocation5], 4294967232"]
    done = run("tpu7x", *lines, "%8 = vsyncadd [#allocation5], 3", wait(3), "%9 = vsyncpa [#allocation5], 7", wait(7))
    assert done.stalled == 64 + LATENCY - 1
    with pytest.raises(ScheduleError, match="waits for 1 granules on #allocation5"):
        run("tpu7x", *lines, wait(1))


def test_a_setup_cost_holds_the_channel_for_every_transfer() -> None:
    lines = [operand(0, "f32[4096]"), *copy_in("tpu7x", 64), *copy_in("tpu7x", 64)[-1:], wait(128)]
    done = walk(schedule("tpu7x", *lines), {}, model("tpu7x", setup=10))
    assert done.stalled == 2 * (64 + 10) + LATENCY - 2


def megacore(cookie: int, popped: str = "%v8_v1 = vpop.ccrf") -> list[str | int]:
    """How a kernel whose grid is split over both cores of v5p begins: each checks what the other one pushed."""
    return [
        f"%v1_v0 = vmov {cookie} /* materialized constant */",
        "%7 = vpush.ccrf %v1_v0",
        popped,
        "%22 = vpush %v8_v1",
        "%s9_s1 = spop %22",
        f"%p1_p0 = scmp.ne.s32.totalorder %s9_s1, {cookie}",
        "%18 = shalt.err (%p1_p0) /* scheckeq: BarrierMegacore */",
    ]


@pytest.mark.parametrize("cookie", [7, 199067321, 4294967290])
def test_both_cores_of_v5p_pass_the_barrier_that_they_begin_with(cookie: int) -> None:
    done = run("v5p", *megacore(cookie))
    assert done.schedule.cores == 2
    assert done.cycles == 7


def test_a_core_has_half_of_the_channel_where_the_other_one_works_too() -> None:
    transfer = [operand(0), *copy_in("v5p", 64), wait(64)]
    alone = run("v5p", *transfer)
    both = run("v5p", *megacore(7), *transfer)
    assert both.dma_busy == 2 * alone.dma_busy
    assert both.read_bytes == alone.read_bytes  # of this core


def test_what_comes_from_another_vector_is_no_barrier() -> None:
    with pytest.raises(ScheduleError, match="s9_s1 = spop in instruction 0x4 comes out of a vector"):
        run("v5p", *megacore(7, "%v8_v1 = vadd.s32 %v1_v0, %v1_v0"))
