"""The tiny spec's programs, whose schedules are compiled once a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from command import TINY

from rpac.files.store import Store
from rpac.predict import Programs, programs_of


@pytest.fixture(scope="session")
def programs(dumps: Path) -> Callable[[str], Programs]:
    return cache(lambda target: programs_of(TINY, target, Store(dumps)))
