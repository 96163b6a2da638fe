"""What tests of damaged bundles share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpac.bundle import verify_bundle
from rpac.bundle.manifest import _seal
from rpac.engine import load
from rpac.errors import BundleError

SEED = random.SystemRandom().randrange(2**32)
Edit = Callable[[dict[str, Any]], Any]


def refused(path: Path) -> str:
    """What `load` and `verify_bundle` both say of a bundle."""
    with pytest.raises(BundleError) as loaded:
        load(path, target="cpu")
    with pytest.raises(BundleError) as verified:
        verify_bundle(path)
    assert loaded.value.exit_code == 4
    assert str(loaded.value) == str(verified.value)
    return str(loaded.value)


def a_blob(bundle: Path) -> Path:
    return sorted((bundle / "blobs").iterdir())[0]


def reseal(bundle: Path, edit: Edit) -> None:
    """Edits the manifest and gives it a digest that matches, as a wrong writer would."""
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    del data["digest"]
    edit(data)
    path.write_bytes(_seal(data))
