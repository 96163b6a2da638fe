"""Imports go downward: each stage knows those before it, and none that come after."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rpac

PACKAGE = Path(rpac.__file__).parent

# From the lowest to the highest; a module, or a package as a whole, imports only from above its own line.
ORDER = [
    "errors", "_version",
    "contract", "spec", "batch", "files", "devices", "serving",
    "plan", "init", "traffic", "kernels", "oracle",
    "lower", "bundle", "trust", "schedule", "engine", "adapters", "step",
    "check", "build", "rebuild", "diff", "predict", "report", "tune", "bench", "cli",
]  # fmt: skip

# May be imported where it is needed, because it imports nothing but `errors`: `rpac.__version__` is there.
ROOT = "rpac"


def parts() -> list[str]:
    return sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})


def imports(node: ast.AST) -> Iterator[str]:
    """The parts of rpac that some code imports, at any depth, those for a type checker alone included."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=module, names=names, level=0) if module is not None:
                yield from (f"{module}.{name.name}" for name in names)
            case ast.ImportFrom():
                raise AssertionError(f"line {child.lineno}: a relative import")
        yield from imports(child)


def edges(part: str) -> set[str]:
    files = (PACKAGE / part).rglob("*.py") if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]
    found = [name.split(".") for file in files for name in imports(ast.parse(file.read_text(), str(file)))]
    return {name[1] for name in found if name[0] == "rpac"}


def edges_of_module(path: str) -> set[str]:
    """The modules of rpac that one module imports, with dots."""
    found = set()
    for name in imports(ast.parse((PACKAGE / path).read_text(), path)):
        whole = PACKAGE.parent.joinpath(*name.split("."))
        found.add(name if whole.is_dir() or whole.with_suffix(".py").is_file() else name.rpartition(".")[0])
    return {name for name in found if name.startswith("rpac")}


def test_no_module_is_part_of_a_circle() -> None:
    paths = {path.relative_to(PACKAGE.parent): path for path in PACKAGE.rglob("*.py")}
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    graph = {name: edges_of_module(str(path.relative_to("rpac"))) - {name} for name, path in names.items()}
    while leaves := {name for name, below in graph.items() if not below}:
        graph = {name: below - leaves for name, below in graph.items() if name not in leaves}
    assert graph == {}


def test_every_part_has_its_place() -> None:
    assert set(parts()) - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("part", [part for part in parts() if part in ORDER])
def test_a_part_imports_only_downward(part: str) -> None:
    below = ORDER[: ORDER.index(part) + 1]
    upward = {other for other in edges(part) if other != ROOT and other not in below}
    assert upward == set()


def test_errors_imports_nothing_of_rpac() -> None:
    assert edges("errors") == set()


def test_importing_the_package_imports_no_stage() -> None:
    code = "import sys, rpac; print(*(name for name in sys.modules if name.startswith('rpac.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"rpac.errors", "rpac._version"}


def test_the_oracle_shares_nothing_with_what_it_judges() -> None:
    assert edges_of_module("oracle/attention.py") == set()


def test_nobody_knows_the_command_line() -> None:
    assert [part for part in parts() if part != "cli" and "cli" in edges(part)] == []


@pytest.mark.parametrize("part", ["contract", "spec", "batch", "serving", "init", "traffic", "kernels"])
def test_the_first_stages_need_no_jax(part: str) -> None:
    code = f"import sys, rpac.{part}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "jaxlib", "libtpu"} & set(done.stdout.split())


def test_no_part_does_work_when_imported() -> None:
    """Importing all of the command line loads neither JAX nor a compiler. A build's workers import it too, before
    the settings of JAX are what a build needs."""
    code = "import sys, rpac.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "jaxlib", "libtpu"} & set(done.stdout.split())
