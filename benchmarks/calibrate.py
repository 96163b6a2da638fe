"""Holds the timing model against published measurements and writes docs/calibration.md.

    python benchmarks/calibrate.py [--target T]... [--skip-fit]     # walks the points of a target; of all by default
    python benchmarks/calibrate.py --page                           # walks nothing: the page from what is kept
    python benchmarks/calibrate.py --bench bench.json...            # prints what `rpac bench` measured beside the points

Compiles RPA v3 in the peers' own environments the first time (TPU7x half an hour on two cores, v6e some minutes), and keeps
the schedules. What was found is kept in benchmarks/calibration/results.json, so that one target runs without the other.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it draws the lengths of batches; no device is asked for

import published_sglang
from calibration import bench, page, results, tokamax
from calibration.fit import GRIDS, Fit, fit
from calibration.results import TargetResults
from calibration.walks import BUILD, Predictor, Row
from published import POINTS, Point
from witnesses import WITNESSES

from rpac.schedule import model_of

PAGE = Path(__file__).parents[1] / "docs" / "calibration.md"
TARGETS = tuple(GRIDS)


def walk_target(
    target: str, points: Sequence[Point], predictor: Predictor, fits: Sequence[Fit] | None
) -> TargetResults:
    """Walks all points and witnesses of a target. `fits`: those of an earlier run; None: they are made."""
    model = model_of(target)
    found = TargetResults(results.constants(model))
    for point in points:
        row = predictor.row(point, model)
        show(row)
        found.add(row)
    for witness in WITNESSES:
        if witness.target == target:
            found.witnesses[witness.title] = [
                [
                    predictor.kernel_seconds(config, (n,) * witness.seqs, (1,) * witness.seqs, "decode", model)
                    for n in witness.contexts
                ]
                for config, _ in witness.choices
            ]
    if target == tokamax.TARGET:
        found.calls = {row.point.label: list(row.times) for row in tokamax.rows(model, predictor.cache)}
    grid = GRIDS[target].setups
    tried = (grid, (0.0,)) if len(grid) > 1 else (grid,)
    found.fits = list(fits) if fits is not None else [fit(predictor, points, model, setups) for setups in tried]
    return found


def show(row: Row) -> None:
    point = row.point
    print(
        f"{point.target:6} {point.source:12} {point.label:52} {point.seconds * 1e6:10,.0f} {row.seconds * 1e6:10,.0f} "
        f"{row.error:+7.1%} {'in the fit' if point.fit else 'held out'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="walk the points of this target only")
    parser.add_argument("--page", action="store_true", help="walk nothing; write the page from what is kept")
    parser.add_argument("--bench", nargs="+", type=Path, metavar="FILE", help="print these files of `rpac bench` too")
    parser.add_argument("--skip-fit", action="store_true", help="do not search for the constants again")
    parser.add_argument("--cache", type=Path, default=BUILD / "schedules", help="where schedules are kept")
    parser.add_argument("--python", help="an interpreter with RPA v3; by default an environment of its own is made")
    options = parser.parse_args()
    points = (*POINTS, *published_sglang.points())
    walked = () if options.page or options.bench else options.target or TARGETS
    predictor = Predictor(options.cache, options.python)
    kept = results.read([model_of(target) for target in TARGETS if target not in walked])
    for target in walked:
        old = results.read([model_of(target)])[target].fits if options.skip_fit else None
        kept[target] = walk_target(target, [p for p in points if p.target == target], predictor, old)
        results.write(kept)
    if options.bench:
        measured = [one for file in options.bench for one in bench.read(file)]
        for point in points:
            show(kept[point.target].row(point))
        print("\n".join(page.bench_table(measured)))
    else:
        PAGE.write_text(page.document(points, kept))


if __name__ == "__main__":
    main()
