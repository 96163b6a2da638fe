"""HBM and DMA timing: one channel that serves transfers in the order they were started.

A transfer of n bytes started at cycle t occupies the channel for n / bandwidth and a cost of its own, which may be 0, from
max(t, the channel is free), and its semaphore sees it one latency later. That is all: no banks, no row conflicts, no direction
changes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


@dataclass
class Channel:
    """A FIFO of transfers. Times in cycles of the walk's clock, sizes in bytes."""

    bytes_per_cycle: float
    latency: float
    setup: float = 0.0
    free_at: float = 0.0
    busy: float = 0.0

    def start(self, cycle: float, size: int) -> float:
        """Queues a transfer at `cycle`; returns the cycle at which its semaphore is signalled."""
        length = size / self.bytes_per_cycle + self.setup
        self.free_at = max(self.free_at, cycle) + length
        self.busy += length
        return self.free_at + self.latency


@dataclass
class Semaphore:
    """A sync flag: what has been added to it so far, and a heap of (cycle, granules) that transfers under way will add."""

    value: int = 0
    arriving: list[tuple[float, int]] = field(default_factory=list)

    def expect(self, cycle: float, amount: int) -> None:
        """A transfer will add `amount` at `cycle`."""
        heapq.heappush(self.arriving, (cycle, amount))

    def settle(self, cycle: float) -> int:
        """The value at `cycle`."""
        while self.arriving and self.arriving[0][0] <= cycle:
            self.value += heapq.heappop(self.arriving)[1]
        return self.value

    def wait(self, cycle: float, amount: int) -> float | None:
        """The first cycle, from `cycle` on, at which the value is at least `amount`; None where it never is."""
        while self.settle(cycle) < amount:
            if not self.arriving:
                return None
            cycle = self.arriving[0][0]
        return cycle
