"""The example server on a small checkpoint that is written here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from served import SMALL, spec_of, write_small_bundle

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from serve.tiny import write_checkpoint

    folder = tmp_path_factory.mktemp("models") / "small"
    write_checkpoint(folder, SMALL)
    return folder


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "small.rpac"
    write_small_bundle(path, spec_of(checkpoint))
    return path


@pytest.fixture(scope="session")
def steps(checkpoint: Path, bundle: Path) -> Any:
    from serve.bundle import open_bundle

    return open_bundle(str(bundle), checkpoint, "cpu")


@pytest.fixture(scope="session")
def llama(checkpoint: Path) -> tuple[Any, Any]:
    """The model and its weights."""
    from serve.checkpoint import load_params
    from serve.config import read_config

    config = read_config(checkpoint)
    return config, load_params(checkpoint, config)


@pytest.fixture(scope="session")
def text(checkpoint: Path) -> Any:
    from serve.text import Text

    return Text(checkpoint)


@pytest.fixture
def generator(steps: Any) -> Any:
    """A new one, with empty caches, on steps that are compiled already."""
    from serve.generate import Generator

    return Generator(steps)
