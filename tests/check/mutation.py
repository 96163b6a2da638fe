"""Bugs to put into a generated kernel by hand, and whether the check catches them.

A bug edits the syntax tree of a source: in one function it replaces one expression or one statement, written as the kernel
has it. Numbers, spaces and comments play no part, because tile numbers have names.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rpac.check import check_source
from rpac.contract.program import Source
from rpac.kernels import render
from rpac.plan import KernelPlan
from rpac.plan.families import RULES, Override
from rpac.plan.planner import with_tiles
from rpac.spec import Spec

SEED = 0
SECONDS = 120.0  # a run takes less than one, on a machine with nothing else to do
HANG = 10.0  # of a run that will not end


@dataclass(frozen=True)
class Bug:
    """`where` is a function, with dots: `DecodeKernel.fetch_block` or `DecodeKernel.run.next_step`; empty for all.

    In it `found`, an expression or a statement, becomes `instead`, or is left out where `instead` is empty. It must be
    found once.

    A kernel with a bug that `hangs` may wait forever. `says` is in the notes of the check that catches the bug.
    """

    name: str
    where: str
    found: str
    instead: str = ""
    hangs: bool = False
    says: str = ""

    def __str__(self) -> str:
        return self.name

    def apply(self, source: Source) -> Source:
        """The source with the bug. Fails where the kernel no longer has what it edits."""
        tree = ast.parse(source.text)
        function = self._function(tree)
        edit = _Edit(ast.unparse(ast.parse(self.found)), self.instead)
        edit.visit(function)
        assert edit.count == 1, f"{self.name}: found {edit.count} of {self.found!r} in {self.where} of {source.path}"
        return Source(source.path, ast.unparse(tree))

    def _function(self, tree: ast.Module) -> ast.AST:
        node: ast.AST = tree
        for name in filter(None, self.where.split(".")):
            found = [one for one in _definitions(node) if one.name == name]
            assert len(found) == 1, f"{self.name}: found {len(found)} of {name!r} of {self.where}"
            node = found[0]
        return node


@dataclass(frozen=True)
class BugSuite:
    """Bugs of one kernel: that of a spec, by the plan that `make_plan` returns for it."""

    name: str
    spec: Spec
    make_plan: Callable[[Spec], KernelPlan]
    bugs: tuple[Bug, ...]
    ordinary: tuple[str, ...] = ()  # names of the bugs that are not marked slow

    def __post_init__(self) -> None:
        names = Counter(bug.name for bug in self.bugs)
        assert not [name for name, count in names.items() if count > 1], f"{self.name}: two bugs of one name"
        assert set(self.ordinary) <= set(names), f"{self.name}: {set(self.ordinary) - set(names)}"

    def __str__(self) -> str:
        return self.name

    def apply_all(self) -> None:
        """Applies every bug. Fails where the kernel no longer has what one of them edits."""
        source = render(self.spec, self.make_plan(self.spec))
        for bug in self.bugs:
            bug.apply(source)


class _Edit(ast.NodeTransformer):
    def __init__(self, found: str, instead: str) -> None:
        self._found = found
        self._instead = ast.parse(instead or "pass").body[0]
        self.count = 0

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.stmt | ast.expr) and ast.unparse(node) == self._found:
            self.count += 1
            if isinstance(node, ast.expr):
                assert isinstance(self._instead, ast.Expr), "an expression can only become another one"
                return self._instead.value
            return self._instead
        return super().generic_visit(node)


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes inside a node, but not those inside another of them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child
        else:
            yield from _definitions(child)


# Numbers of tiles that a program's decode kernel has as well: in a mixed program, those of its mixed kernel have a prefix.
_IN_BOTH_KERNELS = ("KV_BLOCK", "KV_BUFFERS", "PAGE_BUFFERS", "Q_BLOCK", "TILE", "WINDOW_OFFSET")


class _MixedNames(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(f"MIXED_{node.id}", node.ctx) if node.id in _IN_BOTH_KERNELS else node


def in_mixed(bug: Bug) -> Bug:
    """A bug of a prefill kernel, in a mixed kernel."""
    found, instead = (ast.unparse(_MixedNames().visit(ast.parse(code))) for code in (bug.found, bug.instead))
    return replace(bug, where=bug.where.replace("PrefillKernel", "MixedKernel"), found=found, instead=instead)


def retiled(
    spec: Spec,
    plan: KernelPlan,
    decode: dict[str, Any] | None = None,
    block: dict[str, Any] | None = None,
    override: Override = RULES,
) -> KernelPlan:
    """A plan with some fields of its tiles changed, and the recipe that follows from them but for an override."""
    tiles = [
        replace(tiles, **changes) if changes else tiles  # type: ignore[type-var]
        for tiles, changes in ((plan.decode, decode), (plan.block, block))
    ]
    found = with_tiles(spec, plan, *tiles, override)  # type: ignore[arg-type]
    assert found is not None
    return found


def check_bug(spec: Spec, plan: KernelPlan, bug: Bug) -> None:
    """Fails where no batch shows the bug."""
    time_limit = HANG if bug.hangs else SECONDS
    results = check_source(spec, plan, bug.apply(render(spec, plan)), seed=SEED, time_limit=time_limit)
    caught = next((result for result in results if not result.ok), None)
    assert caught is not None, "the bug goes unseen"
    print(caught)
    assert bug.hangs or not any("did not end" in note for note in caught.notes)
    assert bug.says in "\n".join(caught.notes)
