"""The serving example on a cache so small that a load preempts, with programs lowered here."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

import rpac
from rpac.build import sources_of
from rpac.bundle import write_bundle
from rpac.lower import tasks_of
from rpac.spec import load_spec

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 pages a sequence, 24 in all."""
    from rpac.lower.worker import lower

    spec = load_spec(EXAMPLES / "serve" / "spec.yaml")
    spec = dataclasses.replace(spec, serving=dataclasses.replace(spec.serving, max_model_len=128, num_pages=24))
    tasks = tasks_of(spec, sources_of(spec, ["cpu"]))
    path = tmp_path_factory.mktemp("serve") / "small.rpac"
    write_bundle(path, spec, [lower(task, {"jax": "any", "libtpu_build": "none"}) for task in tasks])
    return path


@pytest.fixture(scope="session")
def engine(small_bundle: Path) -> rpac.Engine:
    return rpac.load(small_bundle, target="cpu")


@pytest.fixture(scope="session")
def llama() -> tuple[Any, Any]:
    """A configuration of two layers, and its weights."""
    from serve import toy as model

    config = model.Config(layers=2)
    return config, model.init(config, 0)


@pytest.fixture
def generator(engine: rpac.Engine, llama: tuple[Any, Any]) -> Any:
    """A new one, with empty caches, on the programs that are compiled already."""
    from serve.generate import Generator

    return Generator(engine, *llama)
