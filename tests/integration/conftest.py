"""Bundles of the tiny spec, each built once a run through the command line, however many test processes ask."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command import TINY, rpac


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this run see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def cache(shared: Path) -> Path:
    """The cache that `built` fills."""
    return shared / "rpac-cache"


@pytest.fixture(scope="session")
def built(shared: Path, cache: Path) -> Callable[[str], Path]:
    """`built(target)` is the bundle of tiny for one target."""

    def build(target: str) -> Path:
        out = shared / "rpac-built" / target
        out.mkdir(parents=True, exist_ok=True)
        with (out / "once").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / "tiny.rpac").exists():
                done = rpac("build", TINY, "--target", target, "-o", out, cache=cache)
                assert done.returncode == 0, done.stderr
        return out / "tiny.rpac"

    return build
