"""Leaves out of a source what nothing in it uses: parts of templates may define all that goes with what they do."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

ENTRY = "ragged_paged_attention"


@functools.lru_cache(maxsize=64)  # plans that differ in numbers alone have the same text: constants have names
def pruned(text: str, entry: str = ENTRY) -> str:
    """The source without the functions, classes and methods that `entry` does not reach by name.

    A comment that stands directly above a definition belongs to it and goes with it.
    """
    tree = ast.parse(text)
    definitions = dict(_definitions(tree))
    reached: set[Definition] = set()
    names = {entry}
    rest = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    called = {entry, *_names(rest, definitions)}
    waiting = [node for node in definitions if node.name in called]
    while waiting:
        node = waiting.pop()
        if node in reached:
            continue
        reached.add(node)
        new = set(_names([node], definitions)) - names
        names |= new
        waiting += [one for one in definitions if one.name in new]
        waiting += [one for one in definitions if one.name in names and definitions[one] in reached]
    # A method is reached where its name is and its class is.
    kept = {node for node in reached if (owner := definitions[node]) is None or owner in reached}
    lines = text.splitlines(keepends=True)
    for node in sorted(definitions, key=lambda one: -one.lineno):
        if node not in kept and (definitions[node] is None or definitions[node] in kept):
            first, last = _span(node, lines)
            del lines[first:last]
    return _with_blank_lines("".join(lines))


Definition = ast.FunctionDef | ast.ClassDef


def _definitions(tree: ast.Module) -> Iterator[tuple[Definition, Definition | None]]:
    """Functions and classes of the module, and methods with their class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node, None
        if isinstance(node, ast.ClassDef):
            yield from ((method, node) for method in node.body if isinstance(method, ast.FunctionDef))


def _names(roots: list[ast.stmt] | list[Definition], definitions: dict[Definition, Definition | None]) -> Iterator[str]:
    """Names and attributes in some code; of a class not those in its methods, which are reached one by one."""
    for root in roots:
        waiting: list[ast.AST] = [root]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.Name):
                yield node.id
            elif isinstance(node, ast.Attribute):
                yield node.attr
            for child in ast.iter_child_nodes(node):
                if not (child in definitions and child is not root and not _is_special(child)):
                    waiting.append(child)


def _is_special(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("__")


def _span(node: Definition, lines: list[str]) -> tuple[int, int]:
    """The lines of a definition, with its decorators and the comment directly above it."""
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    assert node.end_lineno is not None
    return first, node.end_lineno


def _with_blank_lines(text: str) -> str:
    """Two blank lines around what stands at the top level, at most one elsewhere; none at the start of a block."""
    kept: list[str] = []
    blank = 0
    for line in text.splitlines():
        if not line.strip():
            blank += 1
            continue
        if kept and blank:
            top = not line.startswith((" ", ")", "]", "}"))
            opens = (
                kept[-1].rstrip().endswith(":") and line.startswith(" ") and not line.lstrip().startswith(("def", "@"))
            )
            kept += [""] * (min(blank, 2) if top else 0 if opens else 1)
        kept.append(line)
        blank = 0
    return "\n".join(kept) + "\n"
