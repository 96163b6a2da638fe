"""What a calibration keeps between runs, so that one target is walked again without the others: `results.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from published import Point
from rpa_v3 import Config

from calibration.fit import Fit
from calibration.walks import Row
from rpac.schedule import Model

FILE = Path(__file__).with_name("results.json")
_CONSTANTS = ("clock_hz", "hbm_bytes_per_s", "latency_s", "setup_s")


class StaleError(Exception):
    """Results are missing, or were made with other constants or for other points: walk the target again."""


@dataclass
class TargetResults:
    """All that was found for one target. Seconds.

    points: by `key`, the best time and the tiles that it is of. witnesses: by title, for each choice the time at each context.
    fits: the best constants, then those without a cost of a DMA where the grid has one. calls: the whole calls of
    `calibration.tokamax`, by label: the times of the call, of its kernels, and of XLA's copy of the cache.
    """

    model: dict[str, float]
    points: dict[str, tuple[float, list[int] | None]] = field(default_factory=dict)
    witnesses: dict[str, list[list[float]]] = field(default_factory=dict)
    fits: list[Fit] = field(default_factory=list)
    calls: dict[str, list[float]] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        tiles = tiles_of(row.point, row.config)
        self.points[key(row.point)] = (row.seconds, list(tiles) if tiles else None)

    def row(self, point: Point) -> Row:
        """Raises StaleError where the point was not walked, or not with today's tiles."""
        found = self.points.get(key(point))
        for config in point.configs if found else ():
            tiles = tiles_of(point, config)
            if (list(tiles) if tiles else None) == found[1]:
                return Row(point, found[0], config)
        raise StaleError(f"{key(point)}: no result of these tiles; run calibrate.py --target {point.target}")


def constants(model: Model) -> dict[str, float]:
    """The constants that results depend on."""
    return {name: getattr(model, name) for name in _CONSTANTS}


def key(point: Point) -> str:
    return f"{point.source}, {point.label}"


def tiles_of(point: Point, config: Config) -> tuple[int, ...] | None:
    """The tiles of the kernel that has the work."""
    return config.decode_tiles if point.case == "decode" else config.mixed_tiles


def read(models: Sequence[Model], file: Path = FILE) -> dict[str, TargetResults]:
    """What was found for each target. Raises StaleError where a target's constants are not those of its model."""
    data: dict[str, Any] = json.loads(file.read_text())
    found = {}
    for model in models:
        kept = data.get(model.target)
        if kept is None or kept["model"] != constants(model):
            raise StaleError(
                f"no results with the constants of {model.target}; run calibrate.py --target {model.target}"
            )
        fits = [Fit(**fields) for fields in kept["fits"]]
        points = {name: (seconds, tiles) for name, (seconds, tiles) in kept["points"].items()}
        found[model.target] = TargetResults(kept["model"], points, kept["witnesses"], fits, kept["calls"])
    return found


def write(results: dict[str, TargetResults], file: Path = FILE) -> None:
    file.write_text(json.dumps({name: asdict(one) for name, one in results.items()}, indent=1, sort_keys=True) + "\n")
