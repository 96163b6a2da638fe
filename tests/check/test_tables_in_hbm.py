"""Kernels that have page tables in HBM agree with the oracle, in the interpreter with its race detector and NaN memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mutation import Bug, retiled
from small import (
    ALL_FEATURES,
    INTERLEAVED,
    SEPARATE,
    blocks_plan,
    drafting,
    featured,
    latent,
    pairing,
    pairs_plan,
    small_plan,
    transposed_plan,
)
from small import TRANSPOSED as LONG_CHUNKS
from test_features import SEED, SLOW, failures

from rpac.check import CheckBatch, check_source
from rpac.kernels import render
from rpac.plan import KernelPlan
from rpac.plan.families import Override
from rpac.spec import Spec

IN_HBM = Override(program={"page_table": "hbm"})
CHUNKS = {"attention_chunk": 192}
READ = {"update_cache": False}


def in_hbm(spec: Spec, plan: KernelPlan) -> KernelPlan:
    """The plan with page tables in HBM, which the rule has in SMEM."""
    found = retiled(spec, plan, override=IN_HBM)
    assert (plan.recipe.page_table, found.recipe.page_table) == ("smem", "hbm")
    return found


def small(kind: str) -> Callable[[Spec], KernelPlan]:
    return lambda spec: small_plan(spec, kind)


CASES: dict[str, tuple[Spec, Callable[[Spec], KernelPlan]]] = {
    "waves": (SEPARATE, small("decode")),
    "prefill": (SEPARATE, small("prefill")),
}
MORE: dict[str, tuple[Spec, Callable[[Spec], KernelPlan]]] = {
    "decode, blocks": (INTERLEAVED, blocks_plan),
    "waves, all heads": (INTERLEAVED, small("decode")),
    "waves, window": (featured(SEPARATE, ALL_FEATURES), small("decode")),
    "waves, chunks": (featured(SEPARATE, CHUNKS), small("decode")),
    "waves, a tree of drafts": (drafting("separate", 4, tree=True), small("decode")),
    "waves, all heads, drafts in a window": (drafting("interleaved", 4, sliding_window=150), small("decode")),
    "waves, token pairs": (pairing(), pairs_plan),
    "waves, latent": (latent(), small("decode")),
    "decode, blocks, drafts in a window": (drafting("interleaved", 4, sliding_window=150), blocks_plan),
    "prefill, interleaved": (INTERLEAVED, small("prefill")),
    "prefill, window": (featured(SEPARATE, ALL_FEATURES), small("prefill")),
    "prefill, transposed scores": (LONG_CHUNKS["separate"], lambda spec: transposed_plan(spec, "prefill")),
    "prefill, read-only cache": (featured(SEPARATE, READ), small("prefill")),
    "prefill, latent": (latent(), small("prefill")),
    "mixed": (SEPARATE, small("mixed")),
    "mixed, chunks": (featured(INTERLEAVED, CHUNKS), small("mixed")),
    "mixed, latent": (latent(), small("mixed")),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=SLOW) for name in MORE)])
def test_a_kernel_with_page_tables_in_hbm_agrees_with_the_oracle(case: str) -> None:
    spec, plan_of = {**CASES, **MORE}[case]
    assert failures(spec, in_hbm(spec, plan_of(spec)), few=True) == []


def with_bug(bug: Bug, spec: Spec, plan: KernelPlan, batch: CheckBatch) -> Any:
    source = bug.apply(render(spec, in_hbm(spec, plan)))
    (result,) = check_source(spec, in_hbm(spec, plan), source, batches=[batch], modes=["on_wait"], seed=SEED)
    return result


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "bug",
    [
        Bug("the pages of the window before", "DecodeKernel.find_tile_pages", "window + 1", "window"),
        pytest.param(
            Bug(
                "no wait for windows",
                "DecodeKernel.iterate",
                "self.wait_for_windows(wave + LOOKAHEAD)",
            ),
            marks=SLOW,
        ),
    ],
    ids=str,
)
def test_a_bug_in_the_fetch_of_page_tables_is_caught(bug: Bug) -> None:
    batch = CheckBatch("rows", (1,) * 6, (500, 3, 512, 200, 70, 130), 6)
    assert not with_bug(bug, SEPARATE, small_plan(SEPARATE, "decode"), batch).ok
