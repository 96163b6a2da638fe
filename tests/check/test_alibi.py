"""Position biases: portable programs and TPU kernels against the oracle, alone and beside what they go with; compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mutation import retiled
from small import SPECS, featured, small_plan
from test_features import KINDS, SLOW, compiled, failures

import rpac
from rpac.devices.chip import TPU_TARGETS
from rpac.plan import BlockTiles, KernelPlan, plan_spec
from rpac.spec import Spec

FEATURES: dict[str, dict[str, Any]] = {
    "alone": {},
    "lse": {"log_sum_exp": True},
    "window, soft cap, sinks and lse": {"sliding_window": 150, "soft_cap": 2.0, "sinks": True, "log_sum_exp": True},
    "chunks": {"attention_chunk": 192},
    "read-only cache": {"update_cache": False},
    "a head for each query": {"q_heads": 4, "kv_heads": 4},
    "8 bits": {"kv_dtype": "float8_e4m3fn", "kv_scale": "head", "quantize": "kernel"},
}
QUICK = ("window, soft cap, sinks and lse",)
CASES = [pytest.param(value, id=name, marks=[] if name in QUICK else SLOW) for name, value in FEATURES.items()]


def biased(layout: str, features: dict[str, Any]) -> Spec:
    return featured(SPECS[layout], {"alibi": True, **features}, "biased")


def plan_of(spec: Spec, target: str, kind: str) -> KernelPlan:
    return next(plan for plan in plan_spec(spec, target) if plan.kind == kind)


@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize("features", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_portable_programs_agree_with_the_oracle(kind: str, features: dict[str, Any], layout: str) -> None:
    spec = biased(layout, features)
    assert failures(spec, plan_of(spec, "cpu", kind)) == []


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["interleaved", pytest.param("separate", marks=pytest.mark.slow)])
@pytest.mark.parametrize("features", CASES)
def test_mixed_kernels_agree_with_the_oracle(features: dict[str, Any], layout: str) -> None:
    spec = biased(layout, features)
    assert failures(spec, small_plan(spec, "mixed"), few=True) == []


@pytest.mark.interpreter
@pytest.mark.parametrize("masked", ["matmul", pytest.param("compare", marks=SLOW)])
def test_kernels_with_transposed_scores_agree_with_the_oracle(masked: str) -> None:
    """Query rows along lanes, and blocks that go on in the next one."""
    spec = biased("separate", {"q_heads": 16, "soft_cap": 30.0 if masked == "compare" else None})
    spec = replace(spec, serving=replace(spec.serving, prefill_chunk=64, max_num_tokens=128, token_buckets=(128,)))
    plan = plan_of(spec, "tpu7x", "prefill")
    assert isinstance(plan.block, BlockTiles)
    plan = retiled(spec, plan, block={"q_block": 32, "step_rows": 128, "block": 256, "tile": 128})
    assert plan.recipe.block is not None
    assert (plan.recipe.block.query_order, plan.recipe.block.pipelined) == ("transpose", True)
    assert failures(spec, plan, few=True) == []


@pytest.mark.compile
@pytest.mark.once
def test_a_mixed_program_compiles() -> None:
    """It has both kernels."""
    compiled(biased("interleaved", {"sinks": True, "log_sum_exp": True}), TPU_TARGETS[0], ("mixed",))


@pytest.mark.slow
@pytest.mark.parametrize("target", TPU_TARGETS)
@pytest.mark.parametrize("layout", SPECS)
def test_every_kernel_compiles(layout: str, target: str) -> None:
    compiled(biased(layout, {"sinks": True, "log_sum_exp": True}), target, tuple(KINDS))


def test_the_slopes_are_those_of_the_models() -> None:
    """BLOOM 176B has 112 heads; 8 heads are the paper's own example."""
    assert rpac.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    found = rpac.alibi_slopes(112)
    whole = [2.0 ** (-8 * (i + 1) / 64) for i in range(64)]
    between = [2.0 ** (-8 * (2 * i + 1) / 128) for i in range(48)]
    assert np.allclose(found, [*whole, *between], rtol=1e-6)
    with pytest.raises(ValueError, match="found 0 query heads; must be 1 or more"):
        rpac.alibi_slopes(0)
