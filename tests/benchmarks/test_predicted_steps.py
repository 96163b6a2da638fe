"""The page of predicted steps has the tables of the kept results, and the steps that they are of exist."""

from __future__ import annotations

import importlib
import json
import sys

import pytest


@pytest.fixture(scope="module")
def page():
    return importlib.import_module("predicted_steps")


def test_the_page_has_the_tables_of_the_results(page) -> None:
    text = page.PAGE.read_text()
    for name, table in page.tables(json.loads(page.RESULTS.read_text())).items():
        assert table in text, f"run benchmarks/predicted_steps.py --page: table {name} is an earlier one"


def test_every_model_has_a_spec_and_a_step_for_each_of_its_targets(page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(page.HERE), *sys.path])
    for model in page.MODELS.values():
        assert all((page.HERE / f"{model.spec.format(target=target)}.yaml").exists() for target in model.targets)
        name, _, function = model.function.partition(":")
        module = importlib.import_module(name)
        for wanted in (function, f"{function}_arrays", f"{function}_l{page.FIRST}"):
            assert callable(getattr(module, wanted))
        described = getattr(module, f"{function}_arrays")("decode", 64, None)
        assert len(described["params"]["layers"]) == model.layers == len(described["caches"])


def test_measured_rows_are_beside_what_was_predicted_for_them(page) -> None:
    results = {
        "qwen3-8b v6e decode 64x1536": {"seconds": 10e-3},
        "qwen3-8b v6e prefill 1x2048/2048": {"seconds": 20e-3},
        "qwen3-8b v6e prefill 1x2048/4096": {"seconds": 22e-3},
    }
    found = page.tables(results)
    assert "| qwen3-8b | 1,024 | 64 | 11.11 | 10.00 | -10% |" in found["decode"]
    assert "| qwen3-8b | 1,024 | 64 | 29.4 | 20.0 | -32% |" in found["prefill"]
    assert "| qwen3-8b | 4,096 | 8 | 32.7 | 21.0 | -36% |" in found["prefill"]
