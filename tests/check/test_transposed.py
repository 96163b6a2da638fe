"""Prefill and mixed kernels whose scores lie with query rows along lanes: weights are the matrix that the MXU keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small import LONG_WINDOW, TRANSPOSED, featured, transposed_plan
from test_features import CHUNKS_ALL, READ, SLOW, compiled, failures

from rpac.contract.attention import Attention
from rpac.devices.chip import TPU_TARGETS
from rpac.plan import plan_spec

UNCAPPED = {**LONG_WINDOW, "soft_cap": None}  # masked by the MXU
FEATURES: list[dict[str, Any]] = [
    LONG_WINDOW,
    UNCAPPED,
    {**CHUNKS_ALL, "attention_chunk": 640},
    {**CHUNKS_ALL, "attention_chunk": 640, "soft_cap": None},
    {"causal": False, "sinks": True, "log_sum_exp": True},
    {"soft_cap": 2.0},
    READ,
]
SHAPES: list[dict[str, Any]] = [
    {"head_dim": 64},
    {"head_dim": 80},
    {"head_dim": 72},
]  # the last: not whole registers of rows
QUANTIZED = {"kv_dtype": "float8_e4m3fn", "kv_scale": "head", "quantize": "kernel"}


@pytest.mark.parametrize(
    ("target", "model", "transposed"),
    [
        ("tpu7x", TRANSPOSED["separate"].model, True),
        ("v6e", TRANSPOSED["separate"].model, True),
        ("v5p", TRANSPOSED["separate"].model, False),  # the MXU is as wide as a head
        ("tpu7x", replace(TRANSPOSED["separate"].model, head_dim=256), False),
        (
            "tpu7x",
            replace(TRANSPOSED["separate"].model, q_heads=12),
            False,
        ),  # rows of three heads are no whole registers
        ("tpu7x", Attention(16, 4, 128, "float32", "float32", 128**-0.5), False),
    ],
)
def test_scores_are_transposed_where_a_wide_mxu_would_be_half_empty(
    target: str, model: Attention, transposed: bool
) -> None:
    spec = replace(TRANSPOSED["separate"], model=model)
    for plan in plan_spec(spec, target):
        if plan.kind == "prefill":
            assert plan.recipe.block is not None
            assert (plan.recipe.block.scores == "transposed") == transposed


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("layout", "features"),
    [
        ("separate", {}),
        ("separate", LONG_WINDOW),
        ("separate", UNCAPPED),
        ("interleaved", {}),
        ("separate", QUANTIZED),
        ("separate", SHAPES[0]),
    ],
    ids=str,
)
def test_transposed_kernels_agree_with_the_oracle_in_a_few_batches(layout: str, features: dict[str, Any]) -> None:
    spec = featured(TRANSPOSED[layout], features)
    assert failures(spec, transposed_plan(spec, "prefill"), few=True) == []


@SLOW
@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["prefill", "mixed"])
@pytest.mark.parametrize("layout", TRANSPOSED)
@pytest.mark.parametrize("features", [{}, *FEATURES, *SHAPES, QUANTIZED], ids=str)
def test_transposed_kernels_agree_with_the_oracle(features: dict[str, Any], layout: str, kind: str) -> None:
    spec = featured(TRANSPOSED[layout], features)
    assert failures(spec, transposed_plan(spec, kind)) == []


@pytest.mark.compile
@pytest.mark.once
@pytest.mark.parametrize(
    ("target", "features"),
    [pytest.param("tpu7x", UNCAPPED, marks=SLOW), ("v6e", {**UNCAPPED, "head_dim": 64})],
    ids=str,
)
def test_a_transposed_kernel_with_all_compiles(target: str, features: dict[str, Any]) -> None:
    compiled(featured(TRANSPOSED["separate"], features), target, ("prefill",))


@SLOW
@pytest.mark.compile
@pytest.mark.parametrize("target", TPU_TARGETS)
@pytest.mark.parametrize("layout", TRANSPOSED)
@pytest.mark.parametrize("features", [{}, *FEATURES, *SHAPES, QUANTIZED], ids=str)
def test_every_transposed_kernel_compiles(features: dict[str, Any], layout: str, target: str) -> None:
    compiled(featured(TRANSPOSED[layout], features), target, ("prefill", "mixed"))
