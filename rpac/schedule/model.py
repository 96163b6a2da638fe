"""The constants of the timing model for each target, and where each comes from.

The clock is an effective one: schedules are cycle-accurate, but compute-bound kernels take longer on hardware than their
instructions at the nominal clock. docs/calibration.md states the error at every published point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from rpac.devices.chip import chip
from rpac.errors import ScheduleError
from rpac.schedule.isa import GENERATIONS

Source = Literal["fitted", "nominal", "assumed"]


@dataclass(frozen=True)
class Model:
    """How fast one core of a target runs a schedule.

    clock_hz: VLIW instructions a second. hbm_bytes_per_s: of the FIFO channel between HBM and the core. latency_s: from a DMA's
    last byte to its semaphore showing it. setup_s: what each DMA holds the channel beside its
    bytes. local_latency_s: a DMA that does not touch HBM. sources: for each constant, `fitted` to published
    measurements, `nominal` (the vendor's figure) or `assumed` (taken over from the fitted target).
    """

    target: str
    clock_hz: float
    hbm_bytes_per_s: float
    latency_s: float
    setup_s: float
    local_latency_s: float
    sources: tuple[tuple[str, Source], ...]

    @property
    def bytes_per_cycle(self) -> float:
        return self.hbm_bytes_per_s / self.clock_hz

    def cycles(self, seconds: float) -> float:
        return seconds * self.clock_hz


_CLOCK_HZ: Final = {"tpu7x": 1.77e9, "v6e": 1.75e9, "v5p": 1.75e9, "v5e": 1.5e9}
"""Fitted for tpu7x (nominally 2.2 GHz). For the others, peak flop/s over multiply-adds a cycle; on v6e measurements agree."""

_LATENCY_S: Final = {"tpu7x": 1.45e-6, "v6e": 0.8e-6, "v5p": 1.45e-6, "v5e": 1.45e-6}
_SETUP_S: Final = {"tpu7x": 0.0, "v6e": 50e-9, "v5p": 0.0, "v5e": 0.0}
"""A DMA's own cost. On v6e pages of 128 tokens take longer than pages of 256; on tpu7x no measurement asks for a cost."""

_LOCAL_LATENCY_S: Final = 0.5e-6
_FITTED: Final = {"tpu7x": ("clock_hz", "latency_s"), "v6e": ("latency_s", "setup_s")}
"""What benchmarks/calibrate.py fits. The other targets have the latency of tpu7x."""


def model_of(target: str) -> Model:
    """The model of a target; imports JAX for the HBM bandwidth. Raises ScheduleError where there is none."""
    if target not in GENERATIONS:
        raise ScheduleError(f"no timing model for target {target!r}; allowed: {', '.join(GENERATIONS)}")
    sources: dict[str, Source] = {
        "clock_hz": "nominal",
        "hbm_bytes_per_s": "nominal",
        "latency_s": "assumed",
        "setup_s": "assumed",
        "local_latency_s": "assumed",
    }
    for name in _FITTED.get(target, ()):
        sources[name] = "fitted"
    return Model(
        target=target,
        clock_hz=_CLOCK_HZ[target],
        hbm_bytes_per_s=float(chip(target).hbm_bandwidth),
        latency_s=_LATENCY_S[target],
        setup_s=_SETUP_S[target],
        local_latency_s=_LOCAL_LATENCY_S,
        sources=tuple(sources.items()),
    )
