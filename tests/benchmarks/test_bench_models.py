"""The page of all shipped specs: its batches, the bound of each, and what it says, without a compile."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rpac.batch import Limits
from rpac.contract.attention import Attention
from rpac.devices.chip import TPU_TARGETS
from rpac.schedule.model import model_of

MODEL = Attention(32, 8, 128, "bfloat16", "bfloat16", 0.1)


def module(name: str):
    return importlib.import_module(f"models.{name}")


@pytest.fixture
def places(tmp_path: Path):
    return list(module("cases").places(tmp_path, [], list(TPU_TARGETS)))


def test_every_shipped_spec_is_there_on_every_target_in_each_layout_that_it_can_have(places):
    layouts = {}
    for place in places:
        layouts.setdefault(place.title.removesuffix("-separate"), set()).add(place.layout)
    assert layouts.pop("deepseek-v3") == {"latent"}
    assert set(map(frozenset, layouts.values())) == {frozenset({"interleaved", "separate"})}
    assert {place.target for place in places} == set(TPU_TARGETS)


def test_every_batch_is_one_that_the_spec_takes(places):
    for place in places:
        found = module("cases").cases(place.spec)
        assert {case.kind for case in found} == {"decode", "prefill", "mixed"}
        for case in found:
            case.workload.batch(Limits.of(place.spec))  # raises BatchError where it does not


def test_names_restrict_what_runs_and_take_both_layouts_with_them(tmp_path: Path):
    found = list(module("cases").places(tmp_path, ["llama3-8b"], ["v6e"]))
    assert [(place.title, place.target, place.layout) for place in found] == [
        ("llama3-8b-separate", "v6e", "separate"),
        ("llama3-8b", "v6e", "interleaved"),
    ]


def report(needed_bytes: int, needed_flops: int, target: str = "tpu7x"):
    return SimpleNamespace(target=target, needed_bytes=needed_bytes, needed_flops=needed_flops, model=model_of(target))


def test_a_bound_is_the_longest_of_bytes_flops_and_latency():
    floor_of = module("bound").floor_of
    hbm = floor_of(report(3_690_000_000, 1), MODEL)
    assert (hbm.name, hbm.seconds) == ("HBM", pytest.approx(1e-3, rel=0.01))
    assert floor_of(report(1, 1), MODEL).name == "fixed cost"
    narrow, wide = (floor_of(report(1, 10**12), replace(MODEL, head_dim=head_dim)) for head_dim in (128, 256))
    assert narrow.name == wide.name == "MXU"
    assert narrow.seconds == pytest.approx(1.5 * wide.seconds)  # half of one of two matmuls is empty
    assert floor_of(report(1, 10**12, "v5e"), MODEL) == floor_of(report(1, 10**12, "v5e"), replace(MODEL, head_dim=256))


def test_the_page_has_a_sentence_for_a_row_far_from_its_bound_and_marks_earlier_figures(places):
    result = module("document").Result
    place = places[0]
    cases = module("cases").cases(place.spec)
    found = {
        (place, cases[0]): result("decode/64", 10e-6, "HBM", 9e-6, "all of it is a loop"),
        (place, cases[1]): result("decode/64", 10e-6, "HBM", 5e-6, "half of it is waits", earlier=True),
        (place, cases[2]): result(error=module("document").NOT_RUN),
        (place, cases[3]): result(error="the compiler refused it"),
    }
    page = module("document").document("{summary}\n\n{tables}\n", found)
    assert "all of it is a loop" not in page
    assert f"{cases[1].workload.label} (0.50): half of it is waits." in page
    assert "| 10.0\\* | HBM | 5.0 | 0.50 |" in page
    assert "not run yet" not in page  # a dash in the table says it
    assert f"{cases[3].workload.label}: the compiler refused it" in page
    assert "| tpu7x | 4 | 1 |" in page
