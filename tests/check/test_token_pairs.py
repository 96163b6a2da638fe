"""Decode kernels that put two tokens into each row of a matmul: head_dim 64, separate K and V, tiles of two registers or more."""

from __future__ import annotations

from typing import Any

import pytest
from mutation import retiled
from small import ALL_FEATURES as ALL
from small import pairing, pairs_plan
from test_features import CHUNKS_ALL, READ, SLOW, failures

from rpac.devices.chip import TPU_TARGETS
from rpac.kernels import render
from rpac.lower import Cache, lower_all, tasks_of
from rpac.plan import DecodeWaves, KernelPlan
from rpac.spec import Spec

SHAPES: dict[str, dict[str, Any]] = {
    "two heads a set, and half a set": {"q_heads": 12, "kv_heads": 3},
    "eight heads a set": {"q_heads": 8, "kv_heads": 8},
    "a set of no other head": {"q_heads": 8, "kv_heads": 1},
    "rows of two registers": {"q_heads": 32, "kv_heads": 2},
    "rows that are no query's": {"q_heads": 10, "kv_heads": 2},
    "float32": {"q_dtype": "float32", "kv_dtype": "float32"},
    "8 bits": {"kv_dtype": "float8_e4m3fn", "kv_scale": "head"},
    "8 bits, made in the program": {"kv_dtype": "int8", "kv_scale": "tensor", "quantize": "kernel"},
}
FEATURES: dict[str, dict[str, Any]] = {
    "all": {**ALL, "sliding_window": 300},
    "chunks and all": CHUNKS_ALL,
    "read alone": READ,
    "drafts": {"decode_len": 4, "sliding_window": 300},
    "a tree of drafts": {"decode_len": 4, "tree_mask": True, "log_sum_exp": True},
    "drafts of 8 bits": {"decode_len": 2, "kv_dtype": "float8_e5m2", "kv_scale": "tensor"},
}
QUICK = ("two heads a set, and half a set", "all")
SLOW_TARGETS = [pytest.param(target, marks=[] if target == "tpu7x" else SLOW) for target in TPU_TARGETS]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "features",
    [
        pytest.param(features, id=name, marks=[] if name in QUICK else SLOW)
        for name, features in {**SHAPES, **FEATURES}.items()
    ],
)
def test_kernels_agree_with_the_oracle_in_the_interpreter(features: dict[str, Any]) -> None:
    spec = pairing(**features)
    assert failures(spec, pairs_plan(spec)) == []


@pytest.mark.interpreter
@SLOW
def test_mixed_kernels_agree_with_the_oracle_in_the_interpreter() -> None:
    spec = pairing(**FEATURES["all"])
    assert failures(spec, pairs_plan(spec, kind="mixed")) == []


def test_tiles_of_one_register_are_taken_as_they_lie() -> None:
    spec = pairing()
    plan = pairs_plan(spec)
    assert isinstance(plan.decode, DecodeWaves)
    plan = retiled(spec, plan, decode={"tile": 128})
    text = render(spec, plan).text
    assert "kv_swapped" not in text
    assert "of each half of a tile share a row" not in text


@pytest.mark.compile
@pytest.mark.once
@pytest.mark.parametrize("target", SLOW_TARGETS)
def test_kernels_compile(target: str) -> None:
    specs = [pairing(**features) for features in (SHAPES["8 bits"], FEATURES["all"])]
    compiled([(spec, pairs_plan(spec, target)) for spec in specs])


@SLOW
@pytest.mark.compile
@pytest.mark.parametrize("target", TPU_TARGETS)
def test_kernels_of_every_shape_and_feature_compile(target: str) -> None:
    specs = [pairing(**features) for features in (*SHAPES.values(), *FEATURES.values())]
    compiled([(spec, pairs_plan(spec, target, kind)) for spec in specs for kind in ("decode", "mixed")])


def compiled(cases: list[tuple[Spec, KernelPlan]]) -> None:
    for spec, plan in cases:
        tasks = [task for task in tasks_of(spec, [(plan, render(spec, plan))]) if task.tokens == plan.tokens[-1]]
        for result in lower_all(tasks, Cache(None), 1):
            assert result.executable
