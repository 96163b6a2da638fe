"""Measures how readable the generated programs are: `python benchmarks/readability.py [FILE or FOLDER ...]`.

For each program, of generated/ unless others are named:

    longest    lines of the longest function
    closures   functions and lambdas defined inside functions or methods, of the kernel that has the most: its own and
               those of all functions that it calls. A program without a Pallas kernel counts as one kernel.
    integers   integers above 2 in functions and classes, which should be named constants; numbers of axes, the order of
               axes in a transposition, and masks of bits, in hexadecimal, do not count
    twice      functions with the body of another one, or with a name that is already defined in the same place
    residue    what nobody would write by hand: `* 1`, `+ 0`, `lax.div(x, 1)`, "1 steps"
    refs       refs of kernels without their shape in a comment beside them

Exits with 1 where a number is over its limit. With --verbose it says where each of them is.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from tabulate import tabulate

from rpac.kernels.prune import ENTRY, pruned

ROOT: Final = Path(__file__).resolve().parent.parent
AXES: Final = ("axis", "axes", "dimension", "dimensions", "permutation")  # keywords whose integers number axes
SHORT: Final = 2  # statements; shorter bodies may be alike by chance
PLURAL: Final = re.compile(r"\b1 (blocks|buffers|chunks|groups|heads|iterations|pages|rows|steps|tiles|tokens|waves)\b")
KERNEL_PREFIX: Final = re.compile(r"\b(DECODE|BLOCK)_(?=[A-Z])")


@dataclass(frozen=True)
class Measures:
    """What is measured of one program: one string for each finding, which says where it is."""

    longest: int
    closures: tuple[str, ...]
    integers: tuple[str, ...]
    twice: tuple[str, ...]
    residue: tuple[str, ...]
    refs: tuple[str, ...]

    def count(self, column: str) -> int:
        value = getattr(self, column)
        return value if isinstance(value, int) else len(value)


COLUMNS: Final = tuple(field.name for field in fields(Measures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "paths", type=Path, nargs="*", default=[ROOT / "generated"], help="programs, or folders of them"
    )
    for column in COLUMNS:
        parser.add_argument(f"--{column}", type=int, metavar="LIMIT", help=f"fail where {column} is over this")
    parser.add_argument("--verbose", action="store_true", help="say where each finding is")
    options = parser.parse_args()
    files = sorted(file for path in options.paths for file in (path.rglob("*.py") if path.is_dir() else [path]))
    # Not by fork, which Python warns of where threads run, as they do beside JAX.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        every = pool.map(measures, [file.read_text() for file in files], chunksize=8)
        found = dict(zip(map(_shown, files), every, strict=True))
    rows = [(name, *map(one.count, COLUMNS)) for name, one in found.items()]
    most = [max(values, default=0) for values in zip(*(row[1:] for row in rows), strict=True)]
    print(tabulate([*rows, ("most", *most)], headers=("program", *COLUMNS)))
    if options.verbose:
        for name, one in found.items():
            for column in COLUMNS[1:]:
                print("".join(f"{name}: {column}: {where}\n" for where in getattr(one, column)), end="")
    over = list(_over(found, {column: getattr(options, column) for column in COLUMNS}))
    print("".join(f"{line}\n" for line in over), end="")
    sys.exit(bool(over))


def _shown(file: Path) -> str:
    return str(file.relative_to(ROOT) if file.is_absolute() and file.is_relative_to(ROOT) else file)


def _over(found: dict[str, Measures], limits: dict[str, int | None]) -> Iterator[str]:
    for name, one in found.items():
        for column, limit in limits.items():
            if limit is not None and one.count(column) > limit:
                yield f"{name}: {column} {one.count(column)}, the limit is {limit}"


def measures(text: str) -> Measures:
    """The measures of one program."""
    tree = ast.parse(text)
    functions = [node for node in _walk(tree) if isinstance(node, ast.FunctionDef)]
    kernels = sorted(_kernels(tree))
    return Measures(
        longest=max((_lines(node) for node in functions), default=0),
        closures=max((tuple(_closures(pruned(text, name))) for name in kernels or [ENTRY]), key=len),
        integers=tuple(_integers(tree, text.splitlines())),
        twice=(*_same_bodies(functions), *_same_names(tree)),
        residue=tuple(_residue(tree, text)),
        refs=tuple(_refs_without_shape(tree, kernels, text.splitlines())),
    )


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all inside it, in the order of the source."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _walk(child)


def _lines(node: ast.FunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - min([node.lineno, *(one.lineno for one in node.decorator_list)]) + 1


def _kernels(tree: ast.Module) -> set[str]:
    """The names of the functions that `pallas_call` is given, through `functools.partial` too."""
    found = set()
    for node in _walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("pallas_call"):
            kernel = node.args[0]
            while isinstance(kernel, ast.Call):
                kernel = kernel.args[0]
            found.add(ast.unparse(kernel))
    return found


def _closures(text: str) -> Iterator[str]:
    """The functions and lambdas inside functions of a source."""

    def inside(node: ast.AST, within: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            name = within
            if isinstance(child, ast.FunctionDef | ast.Lambda):
                own = child.name if isinstance(child, ast.FunctionDef) else "lambda"
                if within:
                    yield f"{own} in {within}"
                name = own
            yield from inside(child, name)

    return inside(ast.parse(text), "")


def _integers(tree: ast.Module, lines: list[str]) -> Iterator[str]:
    """Integers above 2 in functions and classes that are neither numbers of axes nor masks of bits."""

    def inside(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value > 2:
            written = lines[node.lineno - 1][node.col_offset : node.end_col_offset]
            if not written.startswith("0x"):
                yield f"line {node.lineno}: {written}"
        if isinstance(node, ast.keyword) and node.arg in AXES:
            return
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".transpose"):
            node = node.func
        for child in ast.iter_child_nodes(node):
            yield from inside(child)

    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from inside(node)


def _same_bodies(functions: list[ast.FunctionDef]) -> Iterator[str]:
    """Functions that are alike but for their name, docstring and the prefix of a kernel's constants."""
    first: dict[str, ast.FunctionDef] = {}
    for node in functions:
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if sum(isinstance(child, ast.stmt) for part in body for child in _walk(part)) <= SHORT:
            continue
        text = KERNEL_PREFIX.sub("", "\n".join(map(ast.unparse, (node.args, *body))))
        other = first.setdefault(text, node)
        if other is not node:
            yield f"line {node.lineno}: {node.name} is {other.name} of line {other.lineno} again"


def _same_names(tree: ast.Module) -> Iterator[str]:
    """Functions and classes whose name is defined twice in one body."""
    for scope in _walk(tree):
        if isinstance(scope, ast.Module | ast.ClassDef | ast.FunctionDef):
            names = Counter(one.name for one in scope.body if isinstance(one, ast.FunctionDef | ast.ClassDef))
            where = getattr(scope, "name", "the module")
            yield from (f"{name} is defined {count} times in {where}" for name, count in names.items() if count > 1)


def _residue(tree: ast.Module, text: str) -> Iterator[str]:
    """Arithmetic that does nothing, and words of one thing as if it were several."""
    for node in _walk(tree):
        match node:
            case (
                ast.BinOp(op=ast.Mult() | ast.FloorDiv() | ast.Div(), right=ast.Constant(value=1))
                | ast.BinOp(op=ast.Mult(), left=ast.Constant(value=1))
                | ast.BinOp(op=ast.Add() | ast.Sub(), right=ast.Constant(value=0))
                | ast.BinOp(op=ast.Add(), left=ast.Constant(value=0))
                | ast.Call(func=ast.Attribute(attr="div" | "rem"), args=[_, ast.Constant(value=1)])
            ):
                yield f"line {node.lineno}: {ast.unparse(node)}"
    for number, line in enumerate(text.splitlines(), 1):
        yield from (f"line {number}: {match[0]}" for match in PLURAL.finditer(line))


def _refs_without_shape(tree: ast.Module, kernels: list[str], lines: list[str]) -> Iterator[str]:
    """Fields of type Ref, and parameters of kernels, with no `dtype[shape]` in a comment on their line."""
    for node in _walk(tree):
        refs: list[tuple[str, int]] = []
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation) if "Ref" in ast.unparse(annotation):
                refs = [(name, node.lineno)]
            case ast.FunctionDef(name=name) if name in kernels:
                refs = [(one.arg, one.lineno) for one in node.args.args]
        for name, line in refs:
            if not re.search(r"#.*\w\[.*\]", lines[line - 1]):
                yield f"line {line}: {name}"


if __name__ == "__main__":
    main()
