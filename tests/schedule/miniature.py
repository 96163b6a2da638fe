"""Writes miniature schedules in the compiler's format, and a model in which a granule takes one cycle."""

from __future__ import annotations

from rpac.schedule.model import Model
from rpac.schedule.parse import Schedule, parse_schedule
from rpac.schedule.walk import Walk, walk

DELAY = {"tpu7x": 6, "v6e": 4, "v5p": 4, "v5e": 4}
LATENCY = 100
LOCAL_LATENCY = 50


def model(target: str, setup: int = 0) -> Model:
    """A clock of 1 Hz, so that seconds are cycles; one granule a cycle; a latency of 100 (50 where HBM is not touched)."""
    return Model(target, 1.0, 32.0, LATENCY, setup, LOCAL_LATENCY, ())


def text(*lines: str | int) -> str:
    """A schedule's text: a bundle from each string (`LB: ...` to label it), and n empty bundles from each int n."""
    bundles: list[str] = []
    for line in lines:
        bundles += [""] * line if isinstance(line, int) else [line]
    rows = ["= control target key start", "LB: loop body", "= control target key end", ""]
    for number, bundle in enumerate(bundles):
        label, _, body = bundle.partition("|") if "|" in bundle else ("", "", bundle)
        rows.append(f"{number:#x} {label}: > {{ {body} }}" if number else f"     0 {label}: > {{ {body} }}")
    return "\n".join(rows) + "\n"


def schedule(target: str, *lines: str | int) -> Schedule:
    return parse_schedule(text(*lines), target, "mini")


def run(target: str, *lines: str | int, operands: dict[int, list[int]] | None = None, trace: bool = False) -> Walk:
    """Parses and walks a miniature."""
    return walk(schedule(target, *lines), operands or {}, model(target), trace=trace, max_cycles=1e7)


def operand(index: int, shape: str = "s32[8]", register: str = "", space: str = "hbm") -> str:
    """The instruction that names an operand; its register is `%s90<index>_s<index>` unless given."""
    name = register or f"s90{index}_s{index}"
    return (
        f"%{name} = inlined_call_operand.{space} [shape: {shape}, index: {index}, kind: input, shape index: {{}}] "
        f"/* operand {index} */"
    )


def load_operand(target: str, index: int, words: int, allocation: str) -> list[str | int]:
    """Bundles that copy an operand of up to 8 words into SMEM and wait for it: 4 bundles and a stall."""
    shift = target == "v5e"
    pointer = f"%s91{index}_s1" if shift else f"%s90{index}_s{index}"
    first = f"{operand(index, f's32[{words}]')}  ;;  %s92{index}_s9 = smov [#{allocation}] /* materialized constant */"
    if shift:
        first += (
            f"  ;;  %s93{index}_s1 = sshll.u32 %s90{index}_s{index}, 4  ;;  "
            f"%s91{index}_s1 = int_to_ptr.hbm [resolvable:$true] %s93{index}_s1"
        )
    return [
        first,
        f"%18 = dma.hbm_to_smem /*hbm=*/{pointer}, /*size_in_granules=*/1, /*smem=*/%s92{index}_s9, "
        "/*dst_syncflagno=*/[#allocation9]",
        "%19 = dma.done.wait [#allocation9], 1",
        "%20 = vsyncadd [#allocation9], 4294967295",
    ]


def counted_loop(target: str, bound: str, *body: str) -> list[str | int]:
    """A loop of `body` and one more bundle, the branch, that runs `bound` times (at least once)."""
    return [
        "%s500_s3 = smov 0 /* copy for cssa */",
        "LB|%s501_s3 = sphi %s500_s3, %s502_s3 /* phi copy */  ;;  %s502_s3 = sadd.s32 1, %s501_s3",
        f"%p503_p0 = scmp.ge.s32.totalorder %s502_s3, {bound}",
        *body,
        "%504 = sbr.rel (!%p503_p0) target bundleno = LOOP (0x0), region = 3",
        DELAY[target],
    ]


FLAG = "/*dst_syncflagno=*/[#allocation5]"


def hbm_pointer(target: str, register: str = "%s900_s0") -> tuple[str, list[str | int]]:
    """The register to give to a DMA for a pointer, and the bundles that make it."""
    if target != "v5e":
        return register, []
    return "%s81_s7", [f"%s80_s7 = sshll.u32 {register}, 4  ;;  %s81_s7 = int_to_ptr.hbm [resolvable:$true] %s80_s7"]


def copy_in(target: str, granules: int, predicate: str = "", semaphore: int = 0) -> list[str | int]:
    """Bundles whose last starts a transfer of operand 0 into VMEM."""
    pointer, shift = hbm_pointer(target)
    flag = FLAG.replace("5]", f"5 + {semaphore:#x}]".replace("0x", "$0x")) if semaphore else FLAG
    return [
        *shift,
        f"%9 = dma.hbm_to_vmem [thread:$0]  {predicate}/*hbm=*/{pointer}, /*size_in_granules=*/{granules}, /*vmem=*/0, {flag}",
    ]


def wait(granules: int, semaphore: int = 0) -> str:
    place = f"#allocation5 + ${semaphore:#x}" if semaphore else "#allocation5"
    return f"%10 = dma.done.wait [{place}], {granules}"
