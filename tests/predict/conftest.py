"""The tiny spec's programs, whose schedules are compiled once a run, and a bundle of them without its executables."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from command import TINY

from rpac.build import sources_of
from rpac.bundle import write_bundle
from rpac.contract.program import Lowered
from rpac.devices.chip import chip
from rpac.devices.toolchain import toolchain
from rpac.files.store import Store
from rpac.lower import tasks_of
from rpac.predict import Programs, programs_of
from rpac.spec import Spec, load_spec


@pytest.fixture(scope="session")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where schedules are kept, for all test processes of this run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "rpac-dumps"


@pytest.fixture(scope="session")
def programs(dumps: Path) -> Callable[[str], Programs]:
    return cache(lambda target: programs_of(TINY, target, Store(dumps)))


Bundled = Callable[..., Path]


@pytest.fixture
def bundled(tmp_path: Path) -> Bundled:
    """`bundled()` writes a bundle of tiny for tpu7x; a prediction compiles its sources, so its blobs are stand-ins."""

    def write(name: str = "a", spec: Spec | None = None, **made_by: str) -> Path:
        spec = spec or load_spec(TINY)
        device = chip("tpu7x")
        lowered = [
            Lowered(
                task.target, task.kind, task.tokens, task.source, task.plan, exported=b"stand-in", executable=None,
                device_kind=device.device_kind, topology=device.topology, toolchain={**toolchain(), **made_by},
                flags={}, aliases={"kv_cache": 1}, memory={},
            )
            for task in tasks_of(spec, sources_of(spec, ["tpu7x"]))
        ]  # fmt: skip
        path = tmp_path / name / "tiny.rpac"
        write_bundle(path, replace(spec, targets=("tpu7x",)), lowered)
        return path

    return write
