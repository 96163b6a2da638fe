"""Bundles for the engine: stand-ins of both tiers, and one of real programs for this machine's CPU."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from command import rpac

from rpac.engine import Engine, load

SMALL = Path(__file__).with_name("small.yaml")


@pytest.fixture(params=["portable", "executable"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Both tiers; this machine's CPU client stands in for a TPU's."""
    return load(request.getfixturevalue("bundle" if request.param == "portable" else "native_bundle"), target="cpu")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of small.yaml, built once a run through the command line, however many test processes ask."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "rpac-small"
    folder.mkdir(exist_ok=True)
    with (folder / "once").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "small.rpac").exists():
            done = rpac("build", SMALL, "-o", folder, cache=folder / "cache")
            assert done.returncode == 0, done.stderr
    return folder / "small.rpac"
