"""Predicts every shipped spec on every TPU target beside the bound of its batches; writes docs/models.md and its picture.

    python benchmarks/models.py [--spec NAME]... [--target T]... [--kind decode]...

Results are kept in `benchmarks/models/results.json`, and schedules in rpac's cache. A restricted run fills the rest of the
page from there; figures of an earlier kernel, compiler or walker are marked. A run that starts with nothing compiles for
hours on two cores.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

from kept import Results, digest, walker_digest
from models.bound import floor_of
from models.cases import Case, Place, cases, places
from models.document import COLORS, NOT_RUN, Result, Row, document, draw

from rpac.batch.select import select
from rpac.devices.chip import TPU_TARGETS
from rpac.devices.toolchain import toolchain
from rpac.errors import PlanError, RpacError, ScheduleError
from rpac.files.store import Store, default_cache_dir
from rpac.plan.tuned import TunedTiles
from rpac.predict import Programs, predict_on, programs_of
from rpac.report.bound import bound_of

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "models" / "results.json"
TEMPLATE = Path(__file__).with_name("models.md.in")


class Bench:
    def __init__(self) -> None:
        self.results = Results(RESULTS, Result)
        self._walker = walker_digest()
        self._programs = cache(self._make_programs)

    def result(self, place: Place, case: Case, may_run: bool) -> Result:
        """What is kept for a batch, or a new prediction where it may run and the kernel, compiler or walker is another."""
        name = " | ".join([place.title, place.layout, place.target, case.workload.label])
        try:
            programs = self._programs(place)
            batch = case.workload.batch(programs.limits)
            variant = select(programs.tasks, programs.limits, batch.tokens, batch.distribution)
        except PlanError as error:
            return Result(error=str(error).split("\n")[0])
        key = digest(programs.tasks[variant].key(toolchain(), "dump"), case.workload.kv_lens, self._walker)
        kept = self.results.get(name, key)
        if not may_run or (kept is not None and not kept.earlier):
            return kept or Result(error=NOT_RUN)
        print(name, file=sys.stderr, flush=True)
        try:
            report = predict_on(programs, variant, batch, case.workload).report
        except ScheduleError as error:
            found = Result(str(variant), error=str(error).split("\n")[0])
        else:
            floor = floor_of(report, programs.model)
            found = Result(str(variant), report.seconds, floor.name, floor.seconds, bound_of(report).words)
        self.results.keep(name, key, found)
        return found

    def _make_programs(self, place: Place) -> Programs:
        store = Store(default_cache_dir())
        return programs_of(place.path, place.target, store, layer=place.spec.layer, tuned=TunedTiles.of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", action="append", default=[], help="run only this spec, in both layouts")
    parser.add_argument("--target", action="append", default=[], choices=TPU_TARGETS, help="run only this target")
    parser.add_argument("--kind", action="append", default=[], choices=COLORS, help="run only batches of this kind")
    options = parser.parse_args()
    bench, folder = Bench(), ROOT / "build" / "bench-models"
    asked = {(place.path, place.spec.layer, place.target) for place in places(folder, options.spec, options.target)}
    found: dict[Row, Result] = {}
    for place in places(folder, [], list(TPU_TARGETS)):
        for case in cases(place.spec):
            wanted = (place.path, place.spec.layer, place.target) in asked and case.kind in (options.kind or COLORS)
            found[place, case] = bench.result(place, case, wanted)
    bench.results.drop_unasked()
    in_order = dict(sorted(found.items(), key=lambda item: TPU_TARGETS.index(item[0][0].target)))
    (ROOT / "docs" / "models.md").write_text(document(TEMPLATE.read_text(), in_order))
    draw(in_order, ROOT / "docs" / "img" / "models.png")
    print("docs/models.md and docs/img/models.png written", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except RpacError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
