"""Kernels whose recipe is not the rule's: each option that tiles leave open agrees with the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from mutation import retiled
from small import PACED, TRANSPOSED, featured, pairing, pairs_plan, plan_of, transposed_plan
from test_features import SLOW, failures

from rpac.kernels import render
from rpac.plan import KernelPlan
from rpac.plan.families import Override, options_of, override_of
from rpac.spec import Spec

LSE: dict[str, Any] = {"sinks": True, "log_sum_exp": True}
BLOCKS = [
    # Of scores that the rule transposes, and masks in the matmul.
    {"scores": "rows", "mask": "compare", "pipelined": False},
    *(
        pytest.param(wanted, marks=SLOW)
        for wanted in (
            {"scores": "rows"},
            {"mask": "compare"},
            {"pipelined": False},
            {"scores": "rows", "mask": "compare"},
        )
    ),
]


def with_override(spec: Spec, plan: KernelPlan, override: Override) -> KernelPlan:
    """The plan with that recipe; it is another one than the rule's."""
    found = retiled(spec, plan, override=override)
    assert override_of(spec, found) == override
    assert found.recipe != plan.recipe
    assert render(spec, found).body != render(spec, plan).body
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize("features", [{}, pytest.param(LSE, marks=SLOW)], ids=str)
@pytest.mark.parametrize("wanted", BLOCKS, ids=str)
def test_other_recipes_of_a_prefill_kernel_agree_with_the_oracle(
    wanted: Mapping[str, str | bool], features: dict[str, Any]
) -> None:
    spec = featured(TRANSPOSED["separate"], features)
    plan = with_override(spec, transposed_plan(spec, "prefill"), Override(block=wanted))
    assert failures(spec, plan, few=True) == []


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "wanted", [{"paced": False, "pipelined": False}, pytest.param({"paced": False}, marks=SLOW)], ids=str
)
def test_a_kernel_with_long_steps_agrees_with_the_oracle_without_pacing(wanted: Mapping[str, str | bool]) -> None:
    plan = with_override(PACED, plan_of(PACED, "prefill"), Override(block=wanted))
    assert failures(PACED, plan, few=True) == []


@pytest.mark.interpreter
def test_a_decode_kernel_need_not_read_token_pairs() -> None:
    spec = pairing()
    plan = with_override(spec, pairs_plan(spec), Override(decode={"read": "separate"}))
    assert failures(spec, plan, few=True) == []


@pytest.mark.parametrize("wanted", [{"mask": "lengths"}, {"paced": False}, {"scores": "columns"}], ids=str)
def test_what_tiles_do_not_allow_is_refused_with_what_they_do(wanted: Mapping[str, str | bool]) -> None:
    plan = transposed_plan(TRANSPOSED["separate"], "prefill")
    assert plan.block is not None
    (name,) = wanted
    options = options_of(TRANSPOSED["separate"], plan.target, plan.block, {})[name]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"recipe: {name}: found .*must be {' or '.join(map(repr, options))}"):
        retiled(TRANSPOSED["separate"], plan, override=Override(block=wanted))
