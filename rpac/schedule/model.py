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
"""Fitted for tpu7x (nominally 2.2 GHz). For the others, peak flop/s over multiply-adds a cycle."""

_LATENCY_S: Final = 1.45e-6
_LOCAL_LATENCY_S: Final = 0.5e-6
_FITTED: Final = "tpu7x"


def model_of(target: str) -> Model:
    """The model of a target; imports JAX for the HBM bandwidth. Raises ScheduleError where there is none."""
    if target not in GENERATIONS:
        raise ScheduleError(f"no timing model for target {target!r}; allowed: {', '.join(GENERATIONS)}")
    fitted = target == _FITTED
    return Model(
        target=target,
        clock_hz=_CLOCK_HZ[target],
        hbm_bytes_per_s=float(chip(target).hbm_bandwidth),
        latency_s=_LATENCY_S,
        setup_s=0.0,
        local_latency_s=_LOCAL_LATENCY_S,
        sources=(
            ("clock_hz", "fitted" if fitted else "nominal"),
            ("hbm_bytes_per_s", "nominal"),
            ("latency_s", "fitted" if fitted else "assumed"),
            ("setup_s", "assumed"),
            ("local_latency_s", "assumed"),
        ),
    )
