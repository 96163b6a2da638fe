"""What cannot be read or walked says so: where, what was found, and what is missing."""

from __future__ import annotations

import pytest

from rpac.errors import ScheduleError
from rpac.schedule.parse import parse_schedule
from rpac.schedule.walk import walk

from .miniature import load_operand, model, operand, run, schedule, text
from .test_walk import copy_in, wait


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        ("%1 = sfrobnicate.u32 %s1_s1, 4", r"mini:5: unknown instruction 'sfrobnicate\.u32'"),
        ("%v1_v1 = vfrobnicate.f32 %v2_v2", r"mini:5: unknown instruction 'vfrobnicate\.f32'"),
        ("%1 = dma.hbm_to_moon %s1_s1, 4", r"mini:5: unknown instruction 'dma\.hbm_to_moon'"),
        ("%s1_s1 = sadd.s32 ?, 4", r"mini:5: cannot read argument '\?'"),
        ("%s1_s1 = sld [smem:[#allocation4 * 3]]", "mini:5: cannot read address"),
        ("%1 = sbr.rel somewhere", "has no target;"),
        ("%1 = sbr.rel target bundleno = 99 (0x63), region = 1", "a branch to instruction 0x63 of 0x1"),
        ("%s1_s1 = inlined_call_operand.hbm of some kind", "has no shape and index"),
        (
            "%1 = vmatmul.mubr.bf16.gmra.mxu0 %v1_v1",
            r"tpu7x does not have \(v6e does\): the dump is of another generation",
        ),
        ("%1 = vmatmul.bf16.gmra.mxu0 %v1_v1", r"tpu7x does not have \(v5p or v5e does\)"),
        ("%1 = sfence } /* Start region 7 */ /*", "regions 7 never end"),
    ],
)
def test_a_text_that_is_no_schedule_of_this_target_is_refused(bundle: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(text(bundle).replace("/* }", ""), "tpu7x", "mini")


def test_an_unknown_target_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ScheduleError, match="'v9z'; allowed: tpu7x, v6e, v5p, v5e"):
        parse_schedule(text("%1 = sfence"), "v9z")


@pytest.mark.parametrize("content", ["", "hello\n", "= control target key end\n"])
def test_a_file_without_bundles_is_refused(content: str) -> None:
    with pytest.raises(ScheduleError, match="no instruction; the file is truncated or no schedule"):
        parse_schedule(content, "tpu7x")


@pytest.mark.parametrize(
    ("utilization", "message"),
    [
        ("nonsense", "the columns must be MXU, XLU"),
        (
            f"==\n{'MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU'}\n1 2\n==\n0 0\n",
            "has not 10",
        ),
        (
            "==\nMXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU\nx\n==\n",
            "holds something that is no",
        ),
        (
            "==\nMXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU\n"
            + "2 " * 10
            + "\n==\n"
            + "0 " * 10,
            "1 utilization rows for 2 instructions; the files are not a pair",
        ),
    ],
)
def test_utilization_that_does_not_fit_is_refused(utilization: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(text("%1 = sfence", 1), "tpu7x", "mini", utilization)


def test_a_wait_that_nothing_satisfies_is_named() -> None:
    lines = [operand(0, "f32[4096]"), *copy_in("tpu7x", 64), wait(65)]
    with pytest.raises(
        ScheduleError, match=r"mini:7: 10 = dma.done.wait in instruction 0x2: waits for 65 .* has 64 and nothing"
    ):
        run("tpu7x", *lines)


BRANCH = ["%p1_p0 = scmp.lt.s32.totalorder %s1_s1, 4", "%2 = sbr.rel (%p1_p0) target bundleno = 0 (0x0), region = 1", 7]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (
            "%s1_s1 = sld [smem:[#allocation4 + $0x7]]",
            r"mini:5 reads smem\[#allocation4 \+ 0x7\], which was never written",
        ),
        ("%s1_s1 = spop %2", r"mini:5: s1_s1 = spop in instruction 0x0 comes out of a vector"),
        ("%s1_s1 = scvt.f32.s32 %s2_s2", "comes out of float arithmetic"),
        ("%1 = sfence", "register %s1_s1 was never set"),
        (
            "%s1_s1 = inlined_call_operand.<no memory space> [shape: s32[1], index: 3, kind: input]",
            "operand 3, a scalar s32",
        ),
        ("%4 = sdivrem.u32 4, 0 /* kRem */  ;;  %s1_s1 = spop.drf %4", "a division by zero"),
    ],
)
def test_control_flow_on_a_value_that_is_not_known_names_it(first: str, reason: str) -> None:
    with pytest.raises(ScheduleError, match=f"depends on a value that the walk cannot know: .*{reason}"):
        run("tpu7x", first, *BRANCH)


@pytest.mark.parametrize("place", ["size_in_granules", "hbm", "dst_syncflagno"])
def test_a_transfer_whose_size_or_place_is_not_known_names_it(place: str) -> None:
    start = "".join(copy_in("tpu7x", 64))  # type: ignore[arg-type]
    known = {"size_in_granules": "64", "hbm": "%s900_s0", "dst_syncflagno": "[#allocation5]"}[place]
    lines = [operand(0, "f32[4096]"), "%s1_s1 = spop %2", start.replace(f"/*{place}=*/{known}", f"/*{place}=*/%s1_s1")]
    with pytest.raises(ScheduleError, match=r"is not known: .*comes out of a vector"):
        run("tpu7x", *lines)


def test_a_value_that_is_not_known_does_no_harm_where_nothing_turns_on_it() -> None:
    run("tpu7x", "%s1_s1 = spop %2", "%s2_s2 = sadd.s32 %s1_s1, 4", "%1 = sst [smem:[#allocation4]] %s2_s2")
    ahead = ["%p3_p3 = scmp.lt.s32.totalorder 5, 4", "%p4_p4 = scmp.lt.s32.totalorder %s1_s1, 4"]
    both = "%p5_p5 = pnand %p3_p3, %p4_p4  ;;  %p6_p6 = pneg %p5_p5"
    run("tpu7x", "%s1_s1 = spop %2", *ahead, both, "%2 = shalt.err (%p6_p6)")


def test_a_store_to_an_unknown_address_is_refused() -> None:
    with pytest.raises(ScheduleError, match="the address is not known"):
        run("tpu7x", "%s1_s1 = spop %2", "%1 = sst [smem:[#allocation4 + %s1_s1]] 4")


def test_a_read_past_an_operand_is_a_read_of_what_was_never_written() -> None:
    lines = [*load_operand("tpu7x", 0, 2, "allocation7"), "%s1_s1 = sld [smem:[#allocation7 + $0x2]]", *BRANCH]
    with pytest.raises(ScheduleError, match=r"reads smem\[#allocation7 \+ 0x2\], which was never written"):
        run("tpu7x", *lines, operands={0: [1, 2]})


def test_a_branch_in_the_shadow_of_another_means_another_generation() -> None:
    branch = "%1 = sbr.rel target bundleno = 12 (0xc), region = 1"
    with pytest.raises(ScheduleError, match="a branch in the 6 delay slots of the branch at instruction 0x0"):
        run("tpu7x", branch, 4, branch, 8)
    run("v6e", "%p1_p1 = scmp.lt.s32.totalorder 5, 4", branch.replace("rel", "rel (%p1_p1)"), 4, branch, 8)


def test_a_branch_without_room_for_its_delay_slots_is_refused() -> None:
    with pytest.raises(ScheduleError, match="has fewer than 6 instructions after it"):
        run("tpu7x", "%1 = sbr.rel target bundleno = 0 (0x0), region = 1", 5)


def test_a_loop_that_never_ends_is_stopped() -> None:
    with pytest.raises(ScheduleError, match="still running after 1e\\+03 cycles"):
        walk(
            schedule("tpu7x", "%1 = sbr.rel target bundleno = 0 (0x0), region = 1", 6),
            {},
            model("tpu7x"),
            max_cycles=1000,
        )


def test_a_negative_transfer_is_refused() -> None:
    with pytest.raises(ScheduleError, match="the size is -1 granules"):
        run("tpu7x", operand(0, "f32[4096]"), *copy_in("tpu7x", 2**32 - 1))
