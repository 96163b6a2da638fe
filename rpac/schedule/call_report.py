"""What a prediction says of a call, as data and as text for people to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rpac.contract.units import traffic
from rpac.schedule.model import Model
from rpac.schedule.parse import Spills

DEFINITIONS = {
    "seconds": "the whole call, XLA's operations included, one after another",
    "kernel_seconds": "the Pallas kernels of the call",
    "mbu": "needed_bytes / (seconds x the chip's peak HBM bytes/s)",
    "mfu": "needed_flops / (seconds x the chip's peak bf16 flop/s); a multiply-add is two flops",
    "needed_bytes": "cached K and V read once, new K and V read and written once, queries read, output written",
    "needed_flops": "4 x head_dim x q_heads for each pair of a query and a token that it may attend to; of latent attention "
    "2 x (2 x kv_lora_rank + rope_dim) x q_heads",
    "moved_bytes": "what DMAs between HBM and the core move, with what XLA's operations read and write",
    "compute_seconds": "instructions issued, empty ones included, over the clock",
    "stall_seconds": "what waits add to them; the two make up a kernel's seconds",
    "dma_seconds": "how long the HBM channel was busy; overlaps both",
    "utilization": "share of a slot's capacity that the instructions issued in a loop used, as the compiler counts it",
}


_TOP: Final = 6
"""How many waits and loops of a kernel are shown, those that take longest first."""

_TOP_SLOTS: Final = 4
_TOP_XLA: Final = 8


@dataclass(frozen=True)
class WaitReport:
    """One wait of a kernel: where, on what, how often, and how long it stalled in all.

    line: of the schedule's text. loop: first instruction of the innermost loop around it, None outside of all. semaphore: the
    first that it waited on; a wait in a loop goes through those of several buffers.
    """

    instruction: int
    line: int
    loop: int | None
    semaphore: str
    count: int
    stall_seconds: float


@dataclass(frozen=True)
class LoopReport:
    """One loop of a kernel, without the loops inside it. Utilization by slot, None where the dump does not say."""

    first_instruction: int
    last_instruction: int
    depth: int
    iterations: int
    compute_seconds: float
    stall_seconds: float
    utilization: dict[str, float] | None


@dataclass(frozen=True)
class KernelReport:
    """One kernel. seconds = compute_seconds (instructions issued) + stall_seconds; the channel's dma_seconds overlap both."""

    name: str
    seconds: float
    compute_seconds: float
    stall_seconds: float
    dma_seconds: float
    dmas: int
    read_bytes: int
    written_bytes: int
    instructions: int
    spills: Spills
    waits: tuple[WaitReport, ...]
    loops: tuple[LoopReport, ...]


@dataclass(frozen=True)
class XlaReport:
    """One operation of XLA around the kernels.

    timed_by: `schedule` (walked) or `bytes` (over the HBM bandwidth). reason: why it was not walked, or empty.
    """

    name: str
    opcode: str
    seconds: float
    read_bytes: int
    written_bytes: int
    timed_by: str
    reason: str


@dataclass(frozen=True)
class CallReport:
    """The prediction for one call and batch. Times in seconds, sizes in bytes; see DEFINITIONS.

    compiler: libtpu's version; compiler_verified: whether the reading of its schedules is.
    """

    target: str
    compiler: str
    compiler_verified: bool
    seconds: float
    kernel_seconds: float
    mbu: float | None
    mfu: float | None
    kernel_mbu: float | None
    kernel_mfu: float | None
    needed_bytes: int | None
    needed_flops: int | None
    moved_bytes: int
    kernels: tuple[KernelReport, ...]
    xla: tuple[XlaReport, ...]
    model: Model

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the definitions of its fields under `definitions`."""
        return {**asdict(self), "definitions": DEFINITIONS}

    def __str__(self) -> str:
        """What `rpac predict --detail` prints, under two lines with the time, the clock and the shares of the peaks."""
        cycles = self.kernel_seconds * self.model.clock_hz
        unverified = "" if self.compiler_verified else ", which nobody has verified"
        lines = [
            f"{micros(self.seconds)} us on {self.target}, predicted from the schedule of libtpu {self.compiler}{unverified}",
            f"{self.shares()}kernels: {micros(self.kernel_seconds)} us, {cycles:,.0f} cycles at "
            f"{self.model.clock_hz / 1e9:.2f} GHz; moves {traffic(self.moved_bytes)}",
        ]
        return "\n".join([*lines, *self.detail()])

    def shares(self) -> str:
        if self.needed_bytes is None or self.needed_flops is None:
            return ""
        return (
            f"MBU {share(self.mbu)}, MFU {share(self.mfu)}; needs {traffic(self.needed_bytes)} and "
            f"{self.needed_flops / 1e9:.3f} GFLOP; "
        )

    def detail(self) -> Iterator[str]:
        """Lines about each kernel, with its longest waits and loops, and about XLA's operations."""
        for kernel in self.kernels:
            yield from _kernel_lines(kernel)
        yield from _xla_lines(self.xla)


def _kernel_lines(kernel: KernelReport) -> Iterator[str]:
    spills = kernel.spills
    yield (
        f"  {kernel.name}: {micros(kernel.seconds)} us = {micros(kernel.compute_seconds)} compute + "
        f"{micros(kernel.stall_seconds)} stalls; HBM channel busy {micros(kernel.dma_seconds)} us"
    )
    yield (
        f"    {kernel.instructions} instructions, {kernel.dmas} DMAs, reads {traffic(kernel.read_bytes)}, writes "
        f"{traffic(kernel.written_bytes)}; spills: {spills.vector_stores} vector stores, {spills.vector_fills} fills, "
        f"{spills.scalar_stores} scalar stores, {spills.scalar_fills} fills"
    )
    for wait in sorted(kernel.waits, key=lambda wait: -wait.stall_seconds)[:_TOP]:
        if wait.stall_seconds > 0:
            around = "outside of all loops" if wait.loop is None else f"in the loop at {wait.loop}"
            yield (
                f"    wait at instruction {wait.instruction}, {around}, on {wait.semaphore}: {wait.count} times, "
                f"{micros(wait.stall_seconds)} us stalled"
            )
    iterated = [loop for loop in kernel.loops if loop.iterations]
    for loop in sorted(iterated, key=lambda loop: -(loop.compute_seconds + loop.stall_seconds))[:_TOP]:
        yield (
            f"    loop at instructions {loop.first_instruction}-{loop.last_instruction}, depth {loop.depth}: "
            f"{loop.iterations} iterations, {micros(loop.compute_seconds)} us, {micros(loop.stall_seconds)} us stalled; "
            f"{_slots(loop.utilization)}"
        )


def _xla_lines(operations: Sequence[XlaReport]) -> Iterator[str]:
    # What has nothing is the end of an operation that is counted at its start.
    counted = [one for one in operations if one.seconds or one.read_bytes or one.written_bytes]
    longest = sorted(counted, key=lambda one: -one.seconds)[:_TOP_XLA]
    for one in counted:
        if one in longest:
            yield (
                f"  XLA {one.name} ({one.opcode}): {micros(one.seconds)} us by its {one.timed_by}, reads "
                f"{traffic(one.read_bytes)}, writes {traffic(one.written_bytes)}"
            )
    rest = [one for one in counted if one not in longest]
    if rest:
        yield (
            f"  XLA, {len(rest)} more: {micros(sum(one.seconds for one in rest))} us, reads "
            f"{traffic(sum(one.read_bytes for one in rest))}, writes {traffic(sum(one.written_bytes for one in rest))}"
        )


def _slots(utilization: dict[str, float] | None) -> str:
    if utilization is None:
        return "slots unknown"
    busiest = sorted(utilization.items(), key=lambda item: -item[1])[:_TOP_SLOTS]
    return ", ".join(f"{name} {used:.2f}" for name, used in busiest if used > 0) or "no slot used"


def micros(seconds: float) -> str:
    """Seconds as microseconds, to one decimal."""
    return f"{1e6 * seconds:.1f}"


def share(value: float | None) -> str:
    """MBU or MFU, or a dash where the needed work is not known."""
    return "-" if value is None else f"{value:.3f}"
