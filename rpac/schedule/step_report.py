"""What a prediction says of a whole step, as data and as text for people to read."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rpac.contract.units import traffic
from rpac.devices.chip import chip
from rpac.schedule.call_report import micros
from rpac.schedule.compilers import is_verified
from rpac.schedule.interconnect import Interconnect
from rpac.schedule.model import Model
from rpac.schedule.report import Work
from rpac.schedule.step import CATEGORIES, Event, StepCall, Timed

STEP_DEFINITIONS: Final = {
    "seconds": "the whole step on one device, from its first operation to its last; without the launch by the host",
    "tokens_per_second": "the batch's new tokens over seconds, on all devices together",
    "tokens_per_second_per_chip": "that over the chips; a TPU7x chip has two devices",
    "mbu": "needed_bytes / (seconds x the chip's peak HBM bytes/s), on one device",
    "mfu": "needed_flops / (seconds x the chip's peak bf16 flop/s), on one device; a multiply-add is two flops",
    "needed_bytes": "of one device: each parameter once (of a table that is only looked up in, the rows), and what "
    "the attention of the batch needs",
    "needed_flops": "of one device: the matrix products of the compiled step, and what the attention of the batch needs",
    "parts": f"where the time goes: {'; '.join(f'{name}: {what}' for name, what in CATEGORIES.items())}",
    "by_bytes_seconds": "the part of seconds in operations that have no schedule that could be walked: their bytes at the HBM's "
    "rate, then their flops at the peak rate, which is an upper bound where both overlap; collectives are not in it",
    "collective_seconds": "what all collectives take on the interconnect, hidden behind other work or not; `parts` has what is "
    "not hidden",
    "copied_bytes": "what asynchronous copies move, which overlap with other work",
    "assumed_operations": "operations whose integer operands are data, such as token ids, and were taken to be 0",
    "loops_once": "loops that run as often as data says, such as copies of pages, and were followed once",
    "layer_seconds": "from the start of each attention kernel to the start of the next",
}

_TOP: Final = 12


@dataclass(frozen=True)
class Part:
    """One category of a step's time. Bytes are moved between HBM and the core."""

    category: str
    seconds: float
    share: float
    operations: int
    moved_bytes: int
    flops: int


@dataclass(frozen=True)
class OperationReport:
    """Equal operations of a step, together. timed_by: `schedule`, `bytes`, or `wait` for what is started elsewhere."""

    name: str
    category: str
    count: int
    seconds: float
    moved_bytes: int
    flops: int
    timed_by: str
    reason: str


@dataclass(frozen=True)
class StepReport:
    """The prediction for one step and batch; see STEP_DEFINITIONS. Times in seconds, sizes in bytes, of one device."""

    target: str
    devices: int
    compiler: str
    compiler_verified: bool
    seconds: float
    tokens: int
    tokens_per_second: float
    tokens_per_second_per_chip: float
    mbu: float
    mfu: float
    needed_bytes: int
    needed_flops: int
    moved_bytes: int
    copied_bytes: int
    collective_seconds: float
    collective_bytes: int
    by_bytes_seconds: float
    assumed_operations: int
    loops_once: int
    layer_seconds: tuple[float, ...]
    parts: tuple[Part, ...]
    operations: tuple[OperationReport, ...]
    interconnect: Interconnect | None
    model: Model

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the definitions of its fields under `definitions`."""
        return {**asdict(self), "definitions": STEP_DEFINITIONS}

    def detail(self) -> Iterator[str]:
        """Lines about the parts and about the operations that take longest."""
        for part in self.parts:
            yield (
                f"  {part.category}: {micros(part.seconds)} us, {part.share:.1%}; {part.operations} operations, moves "
                f"{traffic(part.moved_bytes)}" + (f", {part.flops / 1e9:.1f} GFLOP" if part.flops else "")
            )
        yield (
            f"  timed by bytes: {micros(self.by_bytes_seconds)} us, {self.by_bytes_seconds / self.seconds:.1%}; asynchronous "
            f"copies: {traffic(self.copied_bytes)}" + self._collectives()
        )
        for one in self.operations[:_TOP]:
            how = f"by its {one.timed_by}" if one.timed_by != "wait" else "waits"
            yield f"    {one.name}: {one.count} x {micros(one.seconds / one.count)} us, {how}, moves {traffic(one.moved_bytes)}"

    def _collectives(self) -> str:
        if self.interconnect is None:
            return ""
        rate = self.interconnect.ring_bytes_per_s / 1e9
        return (
            f"; collectives: {traffic(self.collective_bytes)} in {micros(self.collective_seconds)} us at {rate:.0f} GB/s a chip "
            f"and {self.interconnect.hop_s * 1e6:g} us a hop (assumed)"
        )


def step_report(call: StepCall, timed: Timed, work: Work, tokens: int, devices: int, replicas: int) -> StepReport:
    """`work`: what the step needs on one device. `tokens`: new ones of one replica; `devices`: of all replicas together."""
    facts = chip(call.dump.target)
    together = tokens * replicas / timed.seconds
    moved = sum(event.read_bytes + event.written_bytes for event in timed.events)
    return StepReport(
        target=call.dump.target,
        devices=devices,
        compiler=call.dump.compiler,
        compiler_verified=is_verified(call.dump.compiler),
        seconds=timed.seconds,
        tokens=tokens,
        tokens_per_second=together,
        tokens_per_second_per_chip=together / (devices / facts.devices_per_chip),
        mbu=work.bytes / facts.hbm_bandwidth / timed.seconds,
        mfu=work.flops / facts.peak_bf16_flops / timed.seconds,
        needed_bytes=work.bytes,
        needed_flops=work.flops,
        moved_bytes=moved + timed.copied_bytes,
        copied_bytes=timed.copied_bytes,
        collective_seconds=timed.wires_seconds,
        collective_bytes=sum(one.bytes for one in timed.collectives),
        by_bytes_seconds=sum(e.seconds for e in timed.events if e.reason and e.category != "collectives"),
        assumed_operations=sum(event.assumed for event in timed.events),
        loops_once=len(timed.loops_once),
        layer_seconds=_layers(timed.events),
        parts=_parts(timed),
        operations=_operations(timed.events),
        interconnect=call.wires if timed.collectives else None,
        model=call.model,
    )


def _layers(events: Sequence[Event]) -> tuple[float, ...]:
    now, starts = 0.0, []
    for event in events:
        if event.category == "attention":
            starts.append(now)
        now += event.seconds
    return tuple(after - before for before, after in itertools.pairwise(starts))


def _parts(timed: Timed) -> tuple[Part, ...]:
    found = []
    for category in CATEGORIES:
        events = [event for event in timed.events if event.category == category]
        if events:
            seconds = sum(event.seconds for event in events)
            moved = sum(event.read_bytes + event.written_bytes for event in events)
            flops = sum(event.flops for event in events)
            found.append(Part(category, seconds, seconds / timed.seconds, len(events), moved, flops))
    return tuple(sorted(found, key=lambda part: -part.seconds))


def _operations(events: Sequence[Event]) -> tuple[OperationReport, ...]:
    """What has one schedule is one; of the others, those with one opcode and one reason."""
    groups: dict[tuple[str, str, str], list[Event]] = defaultdict(list)
    for event in events:
        if event.category != "calls":
            name = event.schedule or (
                "DMAs behind copies"
                if not event.opcode.endswith("-done") and event.category == "copies"
                else event.opcode
            )
            groups[name, event.category, event.reason].append(event)
    found = []
    for (name, category, reason), of in groups.items():
        timed_by = "schedule" if of[0].schedule else "bytes" if reason else "wait"
        moved, flops = sum(e.read_bytes + e.written_bytes for e in of), sum(e.flops for e in of)
        found.append(
            OperationReport(name, category, len(of), sum(e.seconds for e in of), moved, flops, timed_by, reason)
        )
    return tuple(sorted(found, key=lambda one: -one.seconds))
