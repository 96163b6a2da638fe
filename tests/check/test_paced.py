"""Prefill and mixed kernels whose heads fill a wide MXU and whose softmax is paced by scores: over several blocks of tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mutation import SEED
from small import PACED

from rpac.check import batches_of, check_source
from rpac.kernels import render
from rpac.plan import KernelPlan, plan_spec
from rpac.spec import Spec

FEATURES: list[dict[str, Any]] = [
    {"sliding_window": 1500, "sinks": True, "soft_cap": 2.0},
    {"attention_chunk": 1664},
    {"causal": False, "sinks": True},
]


def plans(spec: Spec, target: str, kind: str) -> list[KernelPlan]:
    return [plan for plan in plan_spec(spec, target) if plan.kind == kind]


def is_paced(spec: Spec, target: str) -> bool:
    (plan,) = plans(spec, target, "prefill")
    assert plan.recipe.block is not None
    return plan.recipe.block.softmax == "paced"


def check(spec: Spec, kind: str, few: bool = False) -> None:
    """Holds a kernel against the oracle: in all batches and modes, or in two batches in one."""
    assert is_paced(spec, "tpu7x")
    for plan in plans(spec, "tpu7x", kind):
        batches = batches_of(spec, plan, np.random.default_rng(SEED), 1)
        modes = None
        if few:
            batches, modes = (max(batches, key=lambda batch: max(batch.kv_lens, default=0)), batches[-1]), ["on_wait"]
        results = list(check_source(spec, plan, render(spec, plan), batches=batches, modes=modes, seed=SEED))
        assert results
        assert not [result for result in results if not result.ok], f"seed {SEED}"


@pytest.mark.parametrize(
    ("target", "layout", "head_dim", "paced"),
    [
        ("tpu7x", "separate", 256, True),
        ("v6e", "separate", 256, True),
        ("v5p", "separate", 256, False),
        ("tpu7x", "interleaved", 256, False),
        ("tpu7x", "separate", 128, False),
    ],
)
def test_softmax_is_paced_where_a_head_fills_a_wide_mxu(target: str, layout: str, head_dim: int, paced: bool) -> None:
    model = replace(PACED.model, head_dim=head_dim)
    spec = replace(PACED, model=model, serving=replace(PACED.serving, kv_layout=layout))
    assert is_paced(spec, target) == paced


@pytest.mark.interpreter
def test_a_paced_kernel_with_lse_agrees_with_the_oracle() -> None:
    check(replace(PACED, serving=replace(PACED.serving, log_sum_exp=True)), "prefill", few=True)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefill", "mixed"])
def test_paced_kernels_agree_with_the_oracle(kind: str) -> None:
    check(PACED, kind)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_paced_kernels_of_other_features_agree_with_the_oracle(features: dict[str, Any]) -> None:
    check(replace(PACED, model=replace(PACED.model, **features)), "prefill")
