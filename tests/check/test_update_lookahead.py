"""An update of the cache is the same however far ahead it fetches the new tokens of pages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mutation import Bug, retiled

from rpac.check import check_source
from rpac.contract.attention import Attention
from rpac.kernels import render
from rpac.plan import KernelPlan, plan_spec
from rpac.plan.buffers import UPDATE_LOOKAHEAD
from rpac.spec import Spec, load_spec

SPECS = Path(__file__).parents[2] / "specs"
TINY = load_spec(SPECS / "tiny.yaml")
SEPARATE = replace(TINY, name="tiny-separate", serving=replace(TINY.serving, kv_layout="separate"))
LATENT = replace(
    TINY,
    name="tiny-latent",
    model=Attention(16, 1, 128, "bfloat16", "bfloat16", 0.1, rope_dim=64),
    serving=replace(TINY.serving, kv_layout="latent"),
)
SLOW = pytest.mark.slow


def looking_ahead(spec: Spec, kind: str, lookahead: int) -> KernelPlan:
    plan = next(one for one in plan_spec(spec, "tpu7x") if one.kind == kind)
    return retiled(spec, plan, block={"update_lookahead": lookahead})


@pytest.mark.parametrize("lookahead", range(1, UPDATE_LOOKAHEAD + 1))
@pytest.mark.parametrize("kind", ["prefill", pytest.param("mixed", marks=SLOW)])
@pytest.mark.parametrize(
    "spec", [TINY, pytest.param(SEPARATE, marks=SLOW), pytest.param(LATENT, marks=SLOW)], ids=lambda spec: spec.name
)
def test_an_update_that_looks_less_far_ahead_agrees_with_the_oracle(spec: Spec, kind: str, lookahead: int) -> None:
    plan = looking_ahead(spec, kind, lookahead)
    results = list(check_source(spec, plan, render(spec, plan), seed=0, random_batches=1))
    assert results
    assert not [result for result in results if not result.ok]


def test_a_ring_that_is_one_page_too_short_is_caught() -> None:
    """The batches update more pages than the shortest ring holds, or the test above would show nothing."""
    fewer = Bug("one buffer of new tokens too few", "", "NEW_BUFFERS = 2", "NEW_BUFFERS = 1")
    plan = looking_ahead(TINY, "prefill", 1)
    source = fewer.apply(render(TINY, plan))
    results = check_source(TINY, plan, source, seed=0, random_batches=1)
    assert any(not result.ok for result in results)
