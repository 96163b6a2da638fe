"""Times calls by the clock of the host, and says how times are spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

WARM_CALLS = 3
FENCED_S = 0.01
"""Seconds between two fences at least: a fence takes tens of microseconds, which are then below 1% of a time."""
LEAST_TIMES = 5
MOST_TIMES = 1000


class Timed(Protocol):
    """Calls of a program, which run one after the other on the device."""

    def __call__(self) -> object: ...

    def wait(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How many times are taken, and of how many calls in a row each is the mean."""

    times: int
    calls_each: int


@dataclass(frozen=True)
class Spread:
    """Times in seconds. `p10` and `p90` are the 10th and the 90th percentile, interpolated between neighbors."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        p10, median, p90 = np.percentile(np.asarray(times, np.float64), (10, 50, 90)).tolist()
        return cls(median, p10, p90, len(times))


def estimate(calls: Timed, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a call takes, roughly: the least of a few that are waited for one by one, after the first."""
    calls()
    calls.wait()
    return min(_between_fences(calls, 1, clock) for _ in range(WARM_CALLS))


def plan(estimated: float, seconds: float, calls: int | None) -> Plan:
    """As many times as `seconds` have room for, or of `calls` calls together; each of enough calls to last FENCED_S."""
    each = max(math.ceil(FENCED_S / max(estimated, 1e-9)), 1)
    if calls is not None:
        each = min(each, max(calls // LEAST_TIMES, 1))
        return Plan(calls // each, each)
    return Plan(min(max(int(seconds / (each * max(estimated, 1e-9))), LEAST_TIMES), MOST_TIMES), each)


def between_fences(calls: Timed, plan: Plan, clock: Callable[[], float] = time.perf_counter) -> tuple[float, ...]:
    """Seconds of a call: for each time, the calls between two fences over their number."""
    calls.wait()
    return tuple(_between_fences(calls, plan.calls_each, clock) for _ in range(plan.times))


def _between_fences(calls: Timed, count: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(count):
        calls()
    calls.wait()
    return (clock() - start) / count
