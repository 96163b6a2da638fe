"""Reports of the tiny spec, from predictions that need no compile."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import TINY
from predicted import stub

from rpac.files.store import Store
from rpac.predict import Programs, programs_of
from rpac.report import Report, Request, gather

pytest.importorskip("matplotlib")
Gathered = Callable[..., Report]


@pytest.fixture(scope="session", autouse=True)
def planned_once() -> Iterator[None]:
    """Each spec is planned once a run: plans take most of the time of a report that compiles nothing."""
    kept: dict[tuple[Any, ...], Programs] = {}

    def programs(path: Path, target: str, *_: object, layer: str = "", **options: Any) -> Programs:
        key = (path, path.stat().st_mtime_ns, target, layer)
        if key not in kept:
            kept[key] = programs_of(path, target, Store(None), layer=layer, **options)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("rpac.report.predictions"), "programs_of", programs)
        yield


@pytest.fixture(scope="session")
def gathered() -> Gathered:
    """`gathered(*paths, targets=..., ...)`: the report of specs and bundles, by default of tiny on two chips."""

    def make(*paths: Path, targets: tuple[str, ...] = ("tpu7x", "v6e"), **asked: Any) -> Report:
        return gather(paths or [TINY], Request(targets=targets, **asked), Store(None), predict_one=stub)

    return make


@pytest.fixture(scope="session")
def usual(gathered: Gathered) -> Report:
    """Of tiny with 10 layers, with a price for one of its two chips."""
    return gathered(layers={"": 10}, prices={"tpu7x": 9.0})
