"""Scalars that a kernel stores in HBM or VMEM and reads back, or leaves in its results; by schedules written by hand."""

from __future__ import annotations

import pytest

from rpac.errors import ScheduleError
from rpac.schedule.isa import GENERATIONS

from .miniature import LATENCY, LOCAL_LATENCY, operand, run
from .test_walk import FLAG, copy_in, hbm_pointer, wait

each_target = pytest.mark.parametrize("target", tuple(GENERATIONS))
STORES = [f"%{60 + i} = sst [smem:[#allocation4 + ${i:#x}]] {word}" for i, word in enumerate((5, 6, 7, 8))]
STAGED = "%s70_s8 = smov [#allocation4]  ;;  %s71_s9 = smov [#allocation6]"
BACK = "%s5_s5 = sld [smem:[#allocation6 + $0x3]]"


def output(index: int, shape: str = "s32[16]", space: str = "hbm", result: int = 0, aliases: str = "") -> str:
    text = operand(index, shape, space=space).replace("kind: input", "kind: output")
    shared = f", may-alias: {{{aliases}}}" if aliases else ""
    return text.replace("shape index: {}", f"shape index: {{{result}}}{shared}")


def send(pointer: str, space: str = "hbm", granules: int = 1) -> list[str]:
    return [
        f"%9 = dma.smem_to_{space} /*smem=*/%s70_s8, /*size_in_granules=*/{granules}, /*{space}=*/{pointer}, {FLAG}",
        wait(granules),
        f"%8 = vsyncadd [#allocation5], {2**32 - granules}",
    ]


def fetch(pointer: str, space: str = "hbm", granules: int = 1) -> list[str]:
    return [
        f"%9 = dma.{space}_to_smem /*{space}=*/{pointer}, /*size_in_granules=*/{granules}, /*smem=*/%s71_s9, {FLAG}",
        wait(granules),
        f"%8 = vsyncadd [#allocation5], {2**32 - granules}",
    ]


def check(register: str, expected: int) -> list[str]:
    return [f"%p9_p9 = scmp.ne.s32.totalorder %{register}, {expected}", "%9 = shalt.err (%p9_p9)"]


@each_target
def test_what_scalars_write_to_a_result_is_read_back_and_left_there(target: str) -> None:
    pointer, shift = hbm_pointer(target)
    lines = [output(0), *shift, STAGED, *STORES, *send(pointer), *fetch(pointer), BACK, *check("s5_s5", 8)]
    done = run(target, *lines, trace=True)
    assert done.written == {0: [5, 6, 7, 8] + [None] * 12}
    assert [(t.operand, t.offset, t.size, t.to_hbm) for t in done.transfers] == [(0, 0, 32, True), (0, 0, 32, False)]
    assert (done.read_bytes, done.written_bytes) == (32, 32)
    # The least that a DMA moves still takes a latency, both ways.
    assert [w.stalled for w in done.waits] == [LATENCY, LATENCY]


@each_target
def test_a_result_that_the_compiler_keeps_in_vmem_is_written_too(target: str) -> None:
    shift = "%s2_s2 = sshll.u32 %s900_s0, 4  ;;  %s3_s2 = int_to_ptr.vmem [resolvable:$true] %s2_s2"
    lines = [output(0, space="vmem", result=2), shift, STAGED, *STORES, *send("%s3_s2", "vmem")]
    done = run(target, *lines)
    assert done.written == {2: [5, 6, 7, 8] + [None] * 12}
    assert (done.written_bytes, done.stalled) == (0, LOCAL_LATENCY - 1)


@each_target
def test_scalars_spilled_to_hbm_come_back(target: str) -> None:
    """An allocation of no operand: its address is taken as it is."""
    spill = "%s72_s7 = smov [#allocation60_spill]"
    if target == "v5e":
        spill += "  ;;  %s73_s7 = sshll.u32 %s72_s7, 4  ;;  %s72_s7 = int_to_ptr.hbm [resolvable:$true] %s73_s7"
        spill = spill.replace("%s72_s7 = smov", "%s74_s7 = smov").replace("sshll.u32 %s72_s7", "sshll.u32 %s74_s7")
    lines = [STAGED, spill, *STORES, *send("%s72_s7"), *fetch("%s72_s7"), BACK, *check("s5_s5", 8)]
    done = run(target, *lines)
    assert (done.written, done.read_bytes, done.written_bytes) == ({}, 32, 32)


def test_an_output_that_is_an_input_starts_with_its_words() -> None:
    lines = [operand(0, "s32[16]").replace("shape index: {}", "shape index: {}, may-alias: {0,1}")]
    lines += [output(1, aliases="0,1"), STAGED, *STORES, *send("%s901_s1"), *fetch("%s900_s0", granules=2)]
    lines += ["%s6_s6 = sld [smem:[#allocation6 + $0xb]]", *check("s6_s6", 11), BACK, *check("s5_s5", 8)]
    done = run("tpu7x", *lines, operands={0: list(range(16))})
    assert done.written == {0: [5, 6, 7, 8, None, None, None, None, *range(8, 16)]}


def test_words_overwritten_by_vectors_are_not_known_any_more() -> None:
    overwrite = f"%9 = dma.vmem_to_hbm /*vmem=*/0, /*size_in_granules=*/1, /*hbm=*/%s900_s0, {FLAG}"
    taken = f"%8 = vsyncadd [#allocation5], {2**32 - 1}"
    lines = [output(0), STAGED, *STORES, *send("%s900_s0"), overwrite, wait(1), taken]
    assert run("tpu7x", *lines).written == {0: [None] * 16}
    with pytest.raises(ScheduleError, match=r"reads smem\[#allocation6 \+ 0x3\], which was never written"):
        run("tpu7x", *lines, *fetch("%s900_s0"), BACK, *check("s5_s5", 8))


def test_results_that_only_vectors_write_are_left_out() -> None:
    store = f"%9 = dma.vmem_to_hbm /*vmem=*/0, /*size_in_granules=*/1, /*hbm=*/%s900_s0, {FLAG}"
    assert run("tpu7x", output(0), store, wait(1)).written == {}


def test_a_stale_word_does_not_outlive_a_transfer_of_nothing_known() -> None:
    """Scratch that was never written comes in over a word that was."""
    old = "%7 = sst [smem:[#allocation6 + $0x3]] 9"
    with pytest.raises(ScheduleError, match="never written"):
        run("tpu7x", output(0), STAGED, old, *fetch("%s900_s0"), BACK, *check("s5_s5", 9))


def test_a_word_that_is_not_known_in_an_operand_is_an_error_only_where_it_decides() -> None:
    lines = [operand(0, "s32[8]"), STAGED, *fetch("%s900_s0"), BACK]
    known = [0, 1, 2, None, 4, 5, 6, 7]
    run("tpu7x", *lines, operands={0: known})  # type: ignore[dict-item]
    with pytest.raises(ScheduleError, match="never written"):
        run("tpu7x", *lines, *check("s5_s5", 3), operands={0: known})  # type: ignore[dict-item]


def test_small_transfers_queue_behind_each_other_and_share_their_latency() -> None:
    """Four of one granule, started in four cycles: the channel is never behind, so the waits end a cycle apart."""
    starts = [copy_in("tpu7x", 1, semaphore=i)[-1] for i in range(4)]
    waits = [wait(1, i) for i in range(4)]
    done = run("tpu7x", operand(0, "f32[4096]"), *starts, *waits)
    assert (done.dma_busy, done.dmas, done.read_bytes) == (4, 4, 128)
    assert [w.stalled for w in done.waits] == [LATENCY + 1 - 4, 0, 0, 0]
