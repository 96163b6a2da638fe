"""Compares rpac with its peers, predicted from the compiler's schedules; writes docs/benchmarks.md and the README's table.

    python benchmarks/peers.py [--quick] [--heads LABEL]... [--only NAME]... [--case TEXT]... [--target T]... [--page N]...

What has run is kept by content: schedules under `build/bench-peers`, and results in `benchmarks/peers/results.json`. A second
run takes what it can from there, and a restricted run fills the rest of the document from it; figures of an earlier kernel,
compiler or walker are marked. A run that starts with nothing compiles for hours on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from peers import environment
from peers.cases import HEADS, LLAMA_8B, MEASURED, SHARDS, Case, Heads, Place
from peers.contenders import CONTENDERS, OURS
from peers.document import OURS_NAMES, Section, bullet, choices, not_run, refusals, shards, summary, table
from peers.headline import PAGE, README, rewritten
from peers.picture import draw
from peers.run import NOT_RUN, Bench, progress
from peers.store import Result

from rpac.devices.toolchain import toolchain

ROOT = Path(__file__).parents[1]
TEMPLATE = Path(__file__).with_name("benchmarks.md.in")
RESULTS = Path(__file__).parent / "peers" / "results.json"
QUICK = "RPA v3, best"
NAMES = (*OURS_NAMES, *(one.name for one in CONTENDERS))


def sections(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[Section, ...]]:
    """All sections after each contender of each of them, so that the document grows while the run goes on."""
    found: dict[tuple[str, Place], dict[tuple[str, str], Result]] = {}
    places = [(heads, place) for heads in HEADS for place in heads.places]

    def fill(heads: Heads, place: Place, name: str, may_run: bool) -> None:
        for case in heads.cases:
            runs = may_run and wanted_case(options, case)
            if name in OURS_NAMES:
                result = bench.ours(OURS[OURS_NAMES.index(name)], heads, place, case, runs)
            else:
                peer = next(one for one in CONTENDERS if one.name == name)
                result = bench.peer(peer, heads, place, case, runs)
            found.setdefault((heads.label, place), {})[name, case.label] = result

    def snapshot() -> tuple[Section, ...]:
        return tuple(
            Section(heads, *place, heads.cases, names_at(heads, place), found[heads.label, place])
            for heads, place in places
        )

    for heads, place in places:
        for name in names_at(heads, place):
            fill(heads, place, name, may_run=False)
    for name in NAMES:
        for heads, place in places:
            if name in names_at(heads, place) and wanted(options, name, heads, place):
                fill(heads, place, name, may_run=True)
                yield snapshot()
    yield snapshot()


def names_at(heads: Heads, place: Place) -> tuple[str, ...]:
    """Who is compared there."""
    return (*heads.ours, *heads.places[place])


def wanted(options: argparse.Namespace, name: str, heads: Heads, place: Place) -> bool:
    """Whether the command line asks for a contender on a target and page size; without restrictions, for all."""
    named = not options.only or any(part.lower() in name.lower() for part in options.only)
    if options.quick:
        named = named and (name in OURS_NAMES or name == QUICK)
        return named and (heads, place) == (LLAMA_8B, next(iter(LLAMA_8B.places)))
    target, page = place
    there = target in (options.target or [target]) and page in (options.page or [page])
    return named and there and heads.label in (options.heads or [heads.label])


def wanted_case(options: argparse.Namespace, case: Case) -> bool:
    return not options.case or any(part in case.label for part in options.case)


def document(found: Sequence[Section]) -> str:
    """docs/benchmarks.md."""
    llama = [section for section in found if section.heads == LLAMA_8B]
    others = [section for section in found if section.heads in SHARDS]
    parts = []
    for section in llama:
        parts += [f"## {section.title}", "", *table(section), "", "What ran:", "", *choices(section), ""]
    fields = {
        "about": "\n".join(bullet(f"**{one.name}**: {one.about}") for one in (*OURS, *CONTENDERS)),
        "summary": "\n".join(summary(llama)),
        "shards": "\n".join(shards(others, MEASURED)).rstrip(),
        "not_run": "\n".join(not_run(found, NOT_RUN)),
        "tables": "\n".join(parts).rstrip(),
        "refusals": "\n".join(refusals(found, NOT_RUN)),
        "compiler": " ".join(environment.COMPILER),
        "pinned": " ".join(environment.PINNED),
        "packages": ", ".join((*environment.PEERS, *environment.TOKAMAX)),
        "ours": ", ".join(f"{name} {version}" for name, version in toolchain().items() if name in ("jax", "libtpu")),
    }
    return TEMPLATE.read_text().format(**fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="run only contenders with this in their name")
    parser.add_argument("--heads", action="append", choices=[one.label for one in HEADS], help="run only these heads")
    parser.add_argument("--case", action="append", help="run only batches with this in their label")
    everywhere = {place for heads in HEADS for place in heads.places}
    targets, page_sizes = (sorted({place[part] for place in everywhere}) for part in range(2))
    parser.add_argument("--target", action="append", choices=targets, help="run only this target")
    parser.add_argument("--page", action="append", type=int, choices=page_sizes, help="run only this page size")
    parser.add_argument("--quick", action="store_true", help=f"run rpac and {QUICK} on one target and page size")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    pythons = dict(pair.split("=", 1) for pair in options.python)
    bench = Bench(RESULTS, ROOT / "build" / "bench-peers", pythons)
    for found in sections(bench, options):
        page = document(found)
        PAGE.write_text(page)
        README.write_text(rewritten(README.read_text(), page))
        draw([section for section in found if section.heads == LLAMA_8B], ROOT / "docs" / "img" / "benchmarks.png")
    bench.store.results.drop_unasked()
    progress("docs/benchmarks.md, the README's table and docs/img/benchmarks.png written")


if __name__ == "__main__":
    main()
