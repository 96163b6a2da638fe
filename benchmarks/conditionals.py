"""Counts the conditionals of the templates, and checks that features stay in their own files.

    python benchmarks/conditionals.py [--limit N]

A conditional is an `{% if %}`, an `{% elif %}` or an inline `if` of Jinja. A template asks for a feature where it reads a
name that is a feature's key in `rpac.contract.features`, reads `features`, or calls `uses`. Only the files of
`features/` may: each for its own feature, and for another that it meets, which `MEETINGS` lists.

Exits with 1 where a template asks for a feature that it must not, where a meeting is listed that no file asks for, or
where there are more conditionals than the limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import jinja2
from jinja2 import nodes
from tabulate import tabulate

from rpac.contract.features import BY_KEY
from rpac.kernels.slots import environment, templates_dir

FAMILIES: Final = ("pallas_tpu", "xla")

MEETINGS: Final[Mapping[tuple[str, str], str]] = {}
"""Why the file of the first feature asks for the second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="fail where there are more conditionals than this")
    parser.add_argument("--templates", type=Path, default=templates_dir(), help="the folder of the templates")
    options = parser.parse_args()
    counts = {name: conditionals(tree) for name, tree in parsed(options.templates)}
    total = sum(counts.values())
    rows = sorted(((count, name) for name, count in counts.items() if count), key=lambda row: (-row[0], row[1]))
    print(tabulate([*rows, (total, f"all {len(counts)} templates")], headers=("conditionals", "template")))
    problems = list(misplaced(options.templates, MEETINGS))
    if options.limit is not None and total > options.limit:
        problems.append(f"{total} conditionals; the limit is {options.limit}")
    print(*problems, sep="\n")
    sys.exit(bool(problems))


def parsed(folder: Path) -> Iterator[tuple[str, nodes.Template]]:
    """Every template under a folder, by its path there."""
    syntax = jinja2.Environment(extensions=list(environment(FAMILIES[0]).extensions))
    for path in sorted(folder.rglob("*.jinja")):
        yield path.relative_to(folder).as_posix(), syntax.parse(path.read_text())


def conditionals(tree: nodes.Template) -> int:
    """How many conditionals a template has."""
    return sum(1 for _ in tree.find_all((nodes.If, nodes.CondExpr)))


def asked(tree: nodes.Template) -> Iterator[tuple[int, str]]:
    """The features that a template asks for, each with its line; `features` where it reads the whole list."""
    for node in tree.find_all((nodes.Name, nodes.Getattr, nodes.Call)):
        match node:
            case nodes.Call(node=nodes.Name(name="uses"), args=[nodes.Const(value=key)]):
                yield node.lineno, key
            case nodes.Call(node=nodes.Name(name="uses")):
                yield node.lineno, "features"
            case nodes.Name(name=name, ctx="load") | nodes.Getattr(attr=name) if name in BY_KEY or name == "features":
                yield node.lineno, name


def misplaced(folder: Path, meetings: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """What is asked where it must not be, and meetings that are listed in vain."""
    met = set()
    for name, tree in parsed(folder):
        path = Path(name)
        own = path.name.partition(".")[0] if path.parent.name == "features" else None
        for line, feature in asked(tree):
            pair = (own, feature)
            met.add(pair)
            if own is None:
                yield f"{name}:{line}: asks for {feature}: only a template in features/ may"
            elif feature != own and pair not in meetings:
                yield f"{name}:{line}: asks for {feature}, which {own} does not meet; MEETINGS lists what does"
    for pair in meetings:
        if pair not in met:
            yield f"MEETINGS: {pair[0]} never asks for {pair[1]}"


if __name__ == "__main__":
    main()
