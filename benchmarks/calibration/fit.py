"""Finds a target's constants: least squares on a grid, over the points that are marked for it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from published import Point

from calibration.walks import Predictor
from rpac.schedule import Model


@dataclass(frozen=True)
class Grid:
    """What a fit tries: clocks in GHz (of v6e the nominal one), latencies in microseconds, and costs of a DMA in nanoseconds."""

    clocks: tuple[float, ...]
    latencies: tuple[float, ...]
    setups: tuple[float, ...]


GRIDS = {
    "tpu7x": Grid(
        (1.70, 1.73, 1.75, 1.76, 1.77, 1.78, 1.79, 1.82, 2.2), (1.0, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45, 1.5, 1.75), (0.0,)
    ),
    "v6e": Grid(
        (1.75,), (0.7, 0.75, 0.8, 0.85, 0.9, 1.0, 1.1, 1.2, 1.3, 1.35, 1.4, 1.45), (0.0, 30.0, 40.0, 45.0, 50.0, 55.0)
    ),
}


@dataclass(frozen=True)
class Fit:
    """The best constants of a grid; `error` is the root mean squared log error over the points in the fit, and `held_out` the
    mean absolute error of the other decode points of the same kernel.
    """

    clock_hz: float
    latency_s: float
    setup_s: float
    error: float
    held_out: float


def fit(predictor: Predictor, points: Sequence[Point], base: Model, setups: Sequence[float]) -> Fit:
    """The clock, latency and cost of a DMA with the least mean squared log error."""
    fitted = [point for point in points if point.fit]
    sources = {point.source for point in fitted}
    others = [p for p in points if not p.fit and p.case == "decode" and p.source in sources]

    def loss(model: Model) -> float:
        return sum(math.log1p(predictor.row(p, model).error) ** 2 for p in fitted) / len(fitted)

    grid = GRIDS[base.target]
    models = [
        dataclasses.replace(base, clock_hz=clock * 1e9, latency_s=latency * 1e-6, setup_s=setup * 1e-9)
        for clock, latency, setup in itertools.product(grid.clocks, grid.latencies, setups)
    ]
    best = min(models, key=loss)
    held_out = sum(abs(predictor.row(p, best).error) for p in others) / len(others)
    return Fit(best.clock_hz, best.latency_s, best.setup_s, math.sqrt(loss(best)), held_out)
