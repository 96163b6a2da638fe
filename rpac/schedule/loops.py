"""Where a walk's cycles went: the loops of a schedule, found from its backward branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rpac.schedule.isa import SLOTS
from rpac.schedule.parse import Schedule
from rpac.schedule.walk import Walk


@dataclass(frozen=True)
class Loop:
    """Instructions [first, last], without those of loops inside it, over a whole walk. Cycles of the walk's clock.

    depth counts from 1; iterations: how often its first instruction was issued. utilization: slot -> share of its capacity used
    while the loop issued instructions, as the compiler counts occupancy; None where the dump does not say.
    """

    first: int
    last: int
    depth: int
    iterations: int
    issued: int
    stalled: float
    utilization: tuple[tuple[str, float], ...] | None


def loops_of(walk: Walk) -> tuple[Loop, ...]:
    """The loops of a walk, the one that took longest first. Code outside of any loop is left out."""
    ranges = _ranges(walk.schedule)
    owner = _owners(ranges, len(walk.schedule.bundles))
    stalled = [0.0] * len(ranges)
    for wait in walk.waits:
        if owner[wait.bundle] is not None:
            stalled[owner[wait.bundle] or 0] += wait.stalled
    found = []
    for index, (first, last) in enumerate(ranges):
        own = [bundle for bundle in range(first, last + 1) if owner[bundle] == index]
        issued = sum(walk.executed[bundle] for bundle in own)
        depth = sum(1 for a, b in ranges if a <= first and last <= b)
        found.append(
            Loop(first, last, depth, walk.executed[first], issued, stalled[index], _utilization(walk, own, issued))
        )
    return tuple(sorted(found, key=lambda loop: -(loop.issued + loop.stalled)))


def loop_around(loops: Sequence[Loop], bundle: int) -> int | None:
    """The first instruction of the innermost loop that holds an instruction; None outside of all."""
    around = [loop for loop in loops if loop.first <= bundle <= loop.last]
    return max(around, key=lambda loop: loop.depth).first if around else None


def _ranges(schedule: Schedule) -> list[tuple[int, int]]:
    delay = schedule.generation.delay_slots
    last_of: dict[int, int] = {}
    for index, bundle in enumerate(schedule.bundles):
        for instruction in bundle.instructions:
            if instruction.target is not None and instruction.target <= index:
                last_of[instruction.target] = max(last_of.get(instruction.target, 0), index + delay)
    return sorted(last_of.items())


def _owners(ranges: Sequence[tuple[int, int]], bundles: int) -> list[int | None]:
    """The innermost loop of each instruction. Ranges are sorted by start, so an inner loop overwrites its outer one."""
    owner: list[int | None] = [None] * bundles
    for index in sorted(range(len(ranges)), key=lambda i: ranges[i][0] - ranges[i][1]):
        first, last = ranges[index]
        owner[first : last + 1] = [index] * (last + 1 - first)
    return owner


def _utilization(walk: Walk, bundles: Sequence[int], issued: int) -> tuple[tuple[str, float], ...] | None:
    slots, capacity = walk.schedule.slots, walk.schedule.slot_capacity
    if slots is None or capacity is None or not issued:
        return None
    used = [sum(walk.executed[b] * slots[b][column] for b in bundles) for column in range(len(SLOTS))]
    return tuple((name, n / (issued * most)) for name, n, most in zip(SLOTS, used, capacity, strict=True))
