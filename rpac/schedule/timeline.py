"""The clock of a whole module: what runs on the core one after another, and what the compiler starts beside it and awaits later.

The HBM channel is shared: an asynchronous copy and the DMAs of the operations after it queue up in the order they start.
Collectives go over the interconnect, one after another, and meet no traffic but their own.
"""

from __future__ import annotations

from collections.abc import Callable

from rpac.schedule.hbm import Channel
from rpac.schedule.model import Model
from rpac.schedule.walk import Walk


class Timeline:
    """Times in seconds from the start of the step."""

    def __init__(self, model: Model) -> None:
        self.now = 0.0
        self.copied = 0.0
        self._second = 1 / model.clock_hz
        self._cycles = model.cycles
        self._channel = Channel(model.hbm_bytes_per_s, model.latency_s, model.setup_s)
        self._wires_free_at = 0.0
        self._pending: dict[str, float] = {}

    @property
    def backlog(self) -> int:
        """For how many cycles the HBM channel is still busy; whole ones, so that equal layers are walked once."""
        return max(0, round(self._cycles(self._channel.free_at - self.now)))

    def walk(self, done: Callable[[int], Walk]) -> Walk:
        """Runs an operation by its schedule, from the backlog that the channel has."""
        walked = done(self.backlog)
        if walked.dmas:
            self._channel.free_at = self.now + walked.channel_free_at * self._second
        self.now += walked.cycles * self._second
        return walked

    def pass_by(self, seconds: float) -> None:
        """Runs something that takes so long."""
        self.now += seconds

    def stream(self, seconds: float, size: int) -> float:
        """Runs something that has no schedule: it has the channel, then the core. Returns how long it took."""
        began = self.now
        if size:
            self.now = self._channel.start(self.now, size)
        self.now += seconds
        return self.now - began

    def start_copy(self, name: str, size: int) -> None:
        self.copied += size
        self._pending[name] = self._channel.start(self.now, size) if size else self.now

    def start_collective(self, name: str, seconds: float) -> None:
        self._wires_free_at = max(self._wires_free_at, self.now) + seconds
        self._pending[name] = self._wires_free_at

    def wait(self, name: str) -> float:
        """Waits for what was started under a name; where it was started in another iteration of a loop, for the oldest.

        Returns for how long the core had nothing to do.
        """
        if name not in self._pending:
            name = next(iter(self._pending), name)
        done = self._pending.pop(name, self.now)
        waited = max(0.0, done - self.now)
        self.now += waited
        return waited
