"""Compares rpac with its peers on the same batches, predicted from the compiler's schedules; writes docs/benchmarks.md.

    python benchmarks/peers.py [--quick] [--only NAME]... [--target T]... [--page N]...

What has run is kept by content: schedules under `build/bench-peers`, and results in `benchmarks/peers/results.json`. A second
run takes what it can from there, and a restricted run fills the rest of the document from it. A run that starts with nothing
compiles for hours on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from peers import environment
from peers.cases import CASES, PLACES
from peers.contenders import CONTENDERS, OURS
from peers.document import OURS_NAMES, Section, bullet, choices, refusals, summary, table
from peers.picture import draw
from peers.run import Bench, progress
from peers.store import Result

from rpac.devices.toolchain import toolchain

ROOT = Path(__file__).parents[1]
TEMPLATE = Path(__file__).with_name("benchmarks.md.in")
RESULTS = Path(__file__).parent / "peers" / "results.json"
QUICK = "RPA v3, best"
NAMES = (*OURS_NAMES, *(one.name for one in CONTENDERS))


def sections(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[Section, ...]]:
    """All sections after each contender of each of them, so that the document grows while the run goes on."""
    found: dict[tuple[str, int], dict[tuple[str, str], Result]] = {place: {} for place in PLACES}

    def fill(target: str, page: int, name: str, may_run: bool) -> None:
        for case in CASES:
            if name in OURS_NAMES:
                result = bench.ours(OURS[OURS_NAMES.index(name)], target, page, case, may_run)
            else:
                peer = next(one for one in CONTENDERS if one.name == name)
                result = bench.peer(peer, target, page, case, may_run)
            found[target, page][name, case.label] = result

    def snapshot() -> tuple[Section, ...]:
        return tuple(Section(*place, CASES, names_at(place), results) for place, results in found.items())

    for place in found:
        for name in names_at(place):
            fill(*place, name, may_run=False)
    for name in NAMES:
        for place in found:
            if name in names_at(place) and wanted(options, name, *place):
                fill(*place, name, may_run=True)
                yield snapshot()
    yield snapshot()


def names_at(place: tuple[str, int]) -> tuple[str, ...]:
    """Who is compared there."""
    return (*OURS_NAMES, *PLACES[place]) if PLACES[place] else NAMES


def wanted(options: argparse.Namespace, name: str, target: str, page: int) -> bool:
    """Whether the command line asks for a contender on a target and page size; without restrictions, for all."""
    named = not options.only or any(part.lower() in name.lower() for part in options.only)
    if options.quick:
        named = named and (name in OURS_NAMES or name == QUICK)
        return named and (target, page) == next(iter(PLACES))
    return named and target in (options.target or [target]) and page in (options.page or [page])


def document(found: Sequence[Section]) -> str:
    """docs/benchmarks.md."""
    parts = []
    for section in found:
        parts += [f"## {section.title}", "", *table(section), "", "What ran:", "", *choices(section), ""]
    fields = {
        "about": "\n".join(bullet(f"**{one.name}**: {one.about}") for one in (*OURS, *CONTENDERS)),
        "summary": "\n".join(summary(found)),
        "tables": "\n".join(parts).rstrip(),
        "refusals": "\n".join(refusals(found)),
        "compiler": " ".join(environment.COMPILER),
        "pinned": " ".join(environment.PINNED),
        "packages": ", ".join((*environment.PEERS, *environment.TOKAMAX)),
        "ours": ", ".join(f"{name} {version}" for name, version in toolchain().items() if name in ("jax", "libtpu")),
    }
    return TEMPLATE.read_text().format(**fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="run only contenders with this in their name")
    targets, page_sizes = (sorted({place[part] for place in PLACES}) for part in range(2))
    parser.add_argument("--target", action="append", choices=targets, help="run only this target")
    parser.add_argument("--page", action="append", type=int, choices=page_sizes, help="run only this page size")
    parser.add_argument("--quick", action="store_true", help=f"run rpac and {QUICK} on one target and page size")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    pythons = dict(pair.split("=", 1) for pair in options.python)
    bench = Bench(RESULTS, ROOT / "build" / "bench-peers", pythons)
    for found in sections(bench, options):
        (ROOT / "docs" / "benchmarks.md").write_text(document(found))
        draw(found, ROOT / "docs" / "img" / "benchmarks.png")
    bench.store.drop_unasked()
    progress("docs/benchmarks.md and docs/img/benchmarks.png written")


if __name__ == "__main__":
    main()
