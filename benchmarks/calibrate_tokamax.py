"""Holds the walk of whole calls against the measured times of tokamax's batched RPA; prints the table of docs/calibration.md.

    python benchmarks/calibrate_tokamax.py [--cache build/schedules] [--python PATH]

Compiles each shape in an environment of its own the first time (a minute or two each on two cores), and keeps the schedules.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from peers import environment
from published_tokamax import POINTS, Point

from rpac.schedule import Call, Dump, Model, dump_command, model_of

ROOT = Path(__file__).parents[1]
_SCRIPT = Path(__file__).parent / "peers" / "compile_experimental.py"


@dataclass(frozen=True)
class Row:
    """A point beside its prediction. Seconds of the whole call, of its kernels, and of XLA's copy of the cache."""

    point: Point
    seconds: float
    kernel_seconds: float
    copy_seconds: float

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
    heads = ("point", "measured, us", "predicted, us", "error", "of it kernels, us", "copy of the cache, us", "blocks")
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
    path = cache / f"tokamax-{hashlib.sha256(request.encode()).hexdigest()[:16]}.json.gz"
    if not path.exists():
        found = dump_command([python, str(_SCRIPT), request], "tpu7x", timeout=3600)
        cache.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(asdict(found)).encode(), 5))
    return Dump(**json.loads(gzip.decompress(path.read_bytes())))


def rows(model: Model, cache: Path, python: str | None = None) -> list[Row]:
    """All points, in order."""
    interpreter = python or environment.ensure(ROOT / "build" / "peers-tokamax", *environment.ENVIRONMENTS["tokamax"])
    return [row(point, model, cache, interpreter) for point in POINTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "schedules", help="where schedules are kept")
    parser.add_argument("--python", help="tokamax's interpreter; by default an environment of its own is made")
    options = parser.parse_args()
    print("\n".join(table(rows(model_of("tpu7x"), options.cache, options.python))))


if __name__ == "__main__":
    main()
