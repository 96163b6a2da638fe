"""Calls that take a stated time on a clock that only they move."""

from __future__ import annotations

import itertools
from collections.abc import Iterable


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Calls:
    """Runs asynchronously, as a device does: starting a call takes no time, and `wait` takes that of all that were started."""

    def __init__(self, clock: Clock, seconds: Iterable[float]) -> None:
        self.clock = clock
        self.started = 0
        self._seconds = itertools.cycle(seconds)
        self._pending = 0.0

    def __call__(self) -> None:
        self.started += 1
        self._pending += next(self._seconds)

    def wait(self) -> None:
        self.clock.now += self._pending
        self._pending = 0.0
