"""Holds the timing model against published measurements and writes docs/calibration.md.

    python benchmarks/calibrate.py [--cache build/schedules] [--check-fit]

Compiles RPA v3 in the peers' own environment the first time (about half an hour on two cores), and keeps the schedules.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import calibrate_tokamax
from peers import environment
from published import POINTS, Point
from rpa_v3 import Config, dump, parameters
from witnesses import WITNESSES

from rpac.errors import ScheduleError
from rpac.schedule import Call, Model, model_of

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """A point beside its prediction; `config` is the best of those tried."""

    point: Point
    seconds: float
    config: Config

    @property
    def error(self) -> float:
        return self.seconds / self.point.seconds - 1


class Predictor:
    """Reads each dump once and walks it for any model."""

    def __init__(self, cache: Path, python: str | None) -> None:
        self._cache, self._python = cache, python
        self._calls: dict[Config, Call] = {}

    def kernel_seconds(
        self, config: Config, kv_lens: Sequence[int], q_lens: Sequence[int], case: str, model: Model
    ) -> float:
        """Seconds of the one kernel of the call that has the work; the other, empty, runs beside no measurement."""
        if config not in self._calls:
            if self._python is None:
                self._python = environment.ensure(ROOT / "build" / "peers")
            self._calls[config] = Call(dump(config, self._python, self._cache), model)
        call = self._calls[config]
        call.model = model
        name = next(k.name for k in call.kernels if k.name.startswith(f"RPA{case[0]}"))
        operands = call.operands(parameters(config, kv_lens, q_lens, case))[name]
        return call.walk_kernel(name, operands).cycles / model.clock_hz

    def row(self, point: Point, model: Model) -> Row:
        """The best of a point's configs. One that the compiler refuses is left out; all of them is an error."""
        found, refused = [], None
        for config in point.configs:
            try:
                seconds = self.kernel_seconds(config, point.kv_lens, point.q_lens, point.case, model)
            except ScheduleError as error:
                refused = error
                continue
            found.append(Row(point, seconds, config))
        if not found:
            raise ScheduleError(f"{point.source}, {point.label}: no tiles compile: {refused}")
        return min(found, key=lambda row: row.seconds)


def fit(predictor: Predictor, base: Model) -> tuple[Model, float]:
    """The clock and latency with the least mean squared log error over the points marked for it, and that error."""
    points = [point for point in POINTS if point.fit]

    def loss(model: Model) -> float:
        return sum(math.log1p(predictor.row(p, model).error) ** 2 for p in points) / len(points)

    clocks = [ghz * 1e9 for ghz in (1.70, 1.73, 1.75, 1.76, 1.77, 1.78, 1.79, 1.82, 2.2)]
    latencies = [us * 1e-6 for us in (1.0, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45, 1.5, 1.75)]
    models = [dataclasses.replace(base, clock_hz=c, latency_s=s) for c, s in itertools.product(clocks, latencies)]
    best = min(models, key=loss)
    return best, math.sqrt(loss(best))


def tiles_of(row: Row) -> str:
    config = row.config
    tiles = config.decode_tiles if row.point.case == "decode" else config.mixed_tiles
    return "default" if tiles is None else ", ".join(map(str, tiles))


def table(rows: Iterable[Row]) -> list[str]:
    lines = ["| point | measured, us | predicted, us | error | tiles | in the fit |", "|---|--:|--:|--:|---|---|"]
    for row in rows:
        tiles = tiles_of(row) + ("" if row.point.tiles_known else f" (best of {len(row.point.configs)})")
        cells = [
            row.point.label,
            f"{row.point.seconds * 1e6:,.0f}",
            f"{row.seconds * 1e6:,.0f}",
            f"{row.error:+.1%}",
            tiles,
            "yes" if row.point.fit else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def witnesses(predictor: Predictor) -> list[str]:
    lines = []
    for witness in WITNESSES:
        lines += ["", f"### {witness.title}", "", witness.text, ""]
        lines += ["| tiles | measured, served | " + " | ".join(f"predicted, {n}" for n in witness.contexts) + " |"]
        lines += ["|---|--:|" + "--:|" * len(witness.contexts)]
        model = model_of(witness.target)
        base: list[float] = []
        for config, measured in witness.choices:
            times = []
            for context in witness.contexts:
                lens, ones = (context,) * witness.seqs, (1,) * witness.seqs
                times.append(predictor.kernel_seconds(config, lens, ones, "decode", model))
            base = base or times
            shown = [f"{time * 1e6:,.0f} us ({first / time - 1:+.0%})" for time, first in zip(times, base, strict=True)]
            tiles = config.decode_tiles
            name = "default" if tiles is None else f"fetch {tiles[1]}, compute {tiles[3]}"
            lines.append(f"| {name} | {measured} | {' | '.join(shown)} |")
    return lines


def document(
    rows: Sequence[Row],
    model: Model,
    fitted: tuple[Model, float] | None,
    witness_lines: Sequence[str],
    tokamax_lines: Sequence[str],
) -> str:
    """docs/calibration.md."""

    def group(source: str, case: str) -> list[str]:
        chosen = [row for row in rows if row.point.source == source and row.point.case == case]
        return table(chosen)

    def worst(chosen: Iterable[Row]) -> str:
        return f"{max((abs(row.error) for row in chosen), default=0):.1%}"

    template = (Path(__file__).parent / "calibration.md.in").read_text()
    fields = {
        "clock": f"{model.clock_hz / 1e9:.3g}",
        "latency": f"{model.latency_s * 1e6:.3g}",
        "bandwidth": f"{model.hbm_bytes_per_s / 1e12:.3g}",
        "compiler": " ".join(environment.COMPILER),
        "package": environment.PEERS[0],
        "fit": "not repeated in this run"
        if fitted is None
        else f"{fitted[0].clock_hz / 1e9:.4g} GHz and {fitted[0].latency_s * 1e6:.3g} us, root mean squared error "
        f"{fitted[1]:.1%}",
        "worst_known": worst(row for row in rows if row.point.tiles_known),
        "worst_held_known": worst(row for row in rows if row.point.tiles_known and not row.point.fit),
        "worst_decode_unknown": worst(row for row in rows if not row.point.tiles_known and row.point.case == "decode"),
        "worst_prefill_unknown": worst(
            row for row in rows if row.point.source == "paper" and row.point.case == "mixed"
        ),
        "worst_held_decode": worst(
            row for row in rows if row.point.source == "flywheel" and row.point.case == "decode"
        ),
        "flywheel_prefill": "\n".join(group("flywheel", "mixed")),
        "flywheel_decode": "\n".join(group("flywheel", "decode")),
        "paper_decode": "\n".join(group("paper", "decode")),
        "paper_prefill": "\n".join(group("paper", "mixed")),
        "witnesses": "\n".join(witness_lines),
        "tokamax": "\n".join(tokamax_lines),
    }
    return template.format(**fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "schedules", help="where schedules are kept")
    parser.add_argument("--python", help="the peers' interpreter; by default an environment of its own is made")
    parser.add_argument(
        "--skip-fit", action="store_true", help="state errors only; do not search for the constants again"
    )
    options = parser.parse_args()
    predictor = Predictor(options.cache, options.python)
    model = model_of("tpu7x")
    rows = []
    for point in POINTS:
        row = predictor.row(point, model)
        print(
            f"{point.source:9} {point.label:36} {row.point.seconds * 1e6:10,.0f} {row.seconds * 1e6:10,.0f} {row.error:+7.1%}"
        )
        rows.append(row)
    fitted = None if options.skip_fit else fit(predictor, model)
    tokamax = calibrate_tokamax.table(calibrate_tokamax.rows(model, options.cache))
    text = document(rows, model, fitted, witnesses(predictor), tokamax)
    (ROOT / "docs" / "calibration.md").write_text(text)


if __name__ == "__main__":
    main()
