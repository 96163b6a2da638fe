"""Programs that see all of a cache and write nothing are tried on rows with fewer tokens than queries; others never are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rpac.check import batches_of, check_source
from rpac.check.arrays import make_arguments
from rpac.kernels import render
from rpac.plan import plan_spec
from rpac.spec import Spec, load_spec

TINY = load_spec(Path(__file__).parents[2] / "specs" / "tiny.yaml")
CROSS = replace(TINY, model=replace(TINY.model, causal=False, update_cache=False))
KINDS = ["prefill", "mixed"]


def few(spec: Spec, target: str, kind: str) -> list[tuple[int, int]]:
    """New tokens and length of the rows, at the edges of a plan, that have fewer tokens than queries."""
    plans = [plan for plan in plan_spec(spec, target) if plan.kind == kind]
    return [
        row
        for plan in plans
        for batch in batches_of(spec, plan, np.random.default_rng(0), 2)
        for row in zip(batch.q_lens, batch.kv_lens, strict=True)
        if row[1] < row[0]
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["tpu7x", "cpu"])
def test_rows_of_fewer_keys_than_queries_are_tried_where_they_are_allowed(target: str, kind: str) -> None:
    rows = few(CROSS, target, kind)
    assert {1} < {length for _, length in rows}
    for spec in (TINY, replace(TINY, model=replace(TINY.model, causal=False))):
        assert few(spec, target, kind) == []


@pytest.mark.parametrize("kind", KINDS)
def test_such_rows_attend_as_the_oracle_says(kind: str) -> None:
    plan = next(plan for plan in plan_spec(CROSS, "cpu") if plan.kind == kind)
    batches = [
        batch
        for batch in batches_of(CROSS, plan, np.random.default_rng(0), 0)
        if any(length < new for new, length in zip(batch.q_lens, batch.kv_lens, strict=True))
    ]
    assert batches
    results = list(check_source(CROSS, plan, render(CROSS, plan), batches=batches))
    assert [result.notes for result in results if not result.ok] == []
    make_arguments(CROSS, batches[0], plan.tokens[-1], 64, np.random.default_rng(0))  # whose metadata it validates
