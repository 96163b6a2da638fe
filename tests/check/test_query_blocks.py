"""Prefill and mixed kernels whose tiles take several iterations: recipes, and scores that no batch of the check has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from bugs.query_rows import STALE_MAXIMUM
from mutation import SEED, Bug
from small import ITERATED, TRANSPOSED, iterated_plan, transposed_plan

from rpac.check import CheckBatch
from rpac.check.arrays import make_arguments
from rpac.check.compare import compare
from rpac.check.execute import prepare_run
from rpac.contract.program import Source
from rpac.kernels import render
from rpac.oracle.expected import oracle
from rpac.plan import KernelPlan
from rpac.spec import Spec


@pytest.mark.parametrize("kind", ["prefill", "mixed"])
@pytest.mark.parametrize("layout", ITERATED)
def test_the_matmul_masks_where_lanes_are_spare(layout: str, kind: str) -> None:
    plan = iterated_plan(ITERATED[layout], kind)
    assert plan.recipe.block is not None
    assert plan.recipe.block.mask == "matmul"


def holds_far_above(spec: Spec, plan: KernelPlan, source: Source) -> bool:
    """Whether it holds against the oracle where the first block's scores are far above all others: a maximum that stays is
    seen only where all probabilities of the block after it vanish.
    """
    chunk = spec.serving.prefill_chunk
    batch = CheckBatch("far above", (chunk, chunk), (chunk, chunk), 0, 2)
    args = make_arguments(spec, batch, plan.tokens[-1], batch.pages(128) + 1, np.random.default_rng(SEED))
    args.queries[:chunk] *= 1000
    wanted, cache, _ = oracle(spec.model, "separate", args.of_batch, args.extra)
    found = prepare_run(plan, source)(args, "on_wait")
    assert found.out is not None
    assert found.kv_cache is not None
    return compare(args, found.out, found.kv_cache, wanted, cache, kv_layout="separate").ok


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("spec", "make_plan"),
    [(ITERATED["separate"], iterated_plan), (TRANSPOSED["separate"], transposed_plan)],
    ids=["iterated", "transposed"],
)
@pytest.mark.parametrize("bug", [None, STALE_MAXIMUM], ids=["as it is", STALE_MAXIMUM.name])
def test_scores_far_above_those_of_the_next_block_do_not_reach_it(
    spec: Spec, make_plan: Callable[[Spec, str], KernelPlan], bug: Bug | None
) -> None:
    plan = make_plan(spec, "prefill")
    source = render(spec, plan)
    assert holds_far_above(spec, plan, bug.apply(source) if bug else source) == (bug is None)
