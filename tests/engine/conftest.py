"""Bundles for the engine: stand-ins of both tiers, and one of real programs for this machine's CPU."""

from __future__ import annotations

import pytest

from rpac.engine import Engine, load


@pytest.fixture(params=["portable", "executable"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Both tiers; this machine's CPU client stands in for a TPU's."""
    return load(request.getfixturevalue("bundle" if request.param == "portable" else "native_bundle"), target="cpu")
