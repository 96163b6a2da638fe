"""Whole calls of tokamax's batched RPA beside their measured times, walked kernel by kernel."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dumps
from peers import environment
from published_tokamax import POINTS, Point

from calibration.results import StaleError
from rpac.schedule import Call, Dump, Model, dump_command

TARGET = "tpu7x"
BENCHMARKS = Path(__file__).parents[1]
_SCRIPT = BENCHMARKS / "peers" / "compile_experimental.py"


@dataclass(frozen=True)
class Row:
    """A point beside its prediction. Seconds of the whole call, of its kernels, and of XLA's copy of the cache."""

    point: Point
    seconds: float
    kernel_seconds: float
    copy_seconds: float

    @property
    def times(self) -> tuple[float, float, float]:
        """What is kept of it."""
        return self.seconds, self.kernel_seconds, self.copy_seconds

    @property
    def error(self) -> float:
        return self.seconds / self.point.seconds - 1


def row(point: Point, model: Model, cache: Path, python: str) -> Row:
    """Predicts one point."""
    report = Call(_dump(point, cache, python), model).predict(point.shape.parameters)
    copies = sum(operation.seconds for operation in report.xla if "kv_cache" in operation.name)
    return Row(point, report.seconds, report.kernel_seconds, copies)


def table(rows: Iterable[Row]) -> list[str]:
    """The rows of docs/calibration.md."""
    heads = ("point", "measured, us", "predicted, us", "error", "kernels, us", "copy of the cache, us", "blocks")
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|--:|--:|--:|---|"]
    for one in rows:
        shape = one.point.shape
        times = (one.point.seconds, one.seconds)
        blocks = shape.decode if shape.new == 1 else shape.prefill
        cells = [
            one.point.label,
            *(f"{seconds * 1e6:,.0f}" for seconds in times),
            f"{one.error:+.1%}",
            *(f"{seconds * 1e6:,.0f}" for seconds in (one.kernel_seconds, one.copy_seconds)),
            ", ".join(map(str, blocks)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _dump(point: Point, cache: Path, python: str) -> Dump:
    request = json.dumps(point.shape.request, sort_keys=True)
    return dumps.kept(
        cache, "tokamax", request, lambda: dump_command([python, str(_SCRIPT), request], TARGET, timeout=3600)
    )


def rows(model: Model, cache: Path) -> Iterator[Row]:
    """All points, in order; each is compiled the first time, which takes a minute or two on two cores."""
    folder = BENCHMARKS.parent / "build" / "peers-tokamax"
    python = environment.ensure(folder, *environment.ENVIRONMENTS["tokamax"])
    return (row(point, model, cache, python) for point in POINTS)


def kept(calls: Mapping[str, Sequence[float]]) -> list[Row]:
    """The rows of an earlier run, from their seconds by label. Raises StaleError where a point was not walked."""
    missing = [point.label for point in POINTS if point.label not in calls]
    if missing:
        raise StaleError(f"tokamax, {missing[0]}: no result; run calibrate.py --target tpu7x")
    return [Row(point, *calls[point.label]) for point in POINTS]
