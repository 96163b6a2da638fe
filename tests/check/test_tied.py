"""Prefill and mixed kernels whose heads fill a wide MXU, with weights that wait for scores: over several blocks of tiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutation import SEED, Mutation, check_bug, dropped

from rpac.check import batches_of, check_source
from rpac.contract.attention import Attention
from rpac.kernels import render
from rpac.plan import KernelPlan, plan_spec
from rpac.spec import Spec, load_spec

TINY = load_spec(Path(__file__).parents[2] / "specs" / "tiny.yaml")
WIDE = replace(
    TINY,
    name="wide",
    model=Attention(8, 1, 256, "bfloat16", "bfloat16", 256**-0.5),
    serving=replace(
        TINY.serving,
        kv_layout="separate",
        page_size=128,
        max_model_len=3328,  # the last queries see whole tiles in two blocks
        max_num_tokens=256,
        token_buckets=(256,),
        max_num_seqs=2,
        prefill_chunk=128,
        context_lens=(2000,),
    ),
)
FEATURES: list[dict[str, Any]] = [
    {"sliding_window": 1500, "sinks": True, "soft_cap": 2.0},
    {"attention_chunk": 1664},
    {"causal": False, "sinks": True},
]
MUTATIONS = [
    Mutation("scores of another step weighed", r"next_scores\[i % 4,", "next_scores[(i + 1) % 4,"),
    dropped("maximum not kept", r"row_max\[head, rows\] = new_max"),
    Mutation("next scores of this turn", r"turn if later > i else jnp\.minimum\(turn \+ 1, last_turn\)", "turn"),
    Mutation("parts of the first tokens", r"first \+ part\.start", "first"),
    Mutation("values of the first tokens", r"\), head_values\(slot, first,", "), head_values(slot, 0,"),
    Mutation("limit one too far", r"\(scores\.shape, 1\) <= query", "(scores.shape, 1) <= query + 1"),
    Mutation("a piece too few on the diagonal", r"pl\.cdiv\(valid, 512\) - first_piece", "1"),
    Mutation("the sum before left out", r"rescale \* old_sum \+ ", ""),
    Mutation("scores of this block for the next", r"jnp\.where\(goes_on, turns, turns - 1\)", "turns - 1"),
    Mutation("next block not waited for", r"(^ *)pl\.when\(goes_on & \(turn.*$", r"\1pass"),
    dropped("clear_tail removed", r"clear_tail\(slot, valid\)"),
]


def plans(spec: Spec, target: str, kind: str) -> list[KernelPlan]:
    return [plan for plan in plan_spec(spec, target) if plan.kind == kind]


def is_tied(spec: Spec, target: str) -> bool:
    (plan,) = plans(spec, target, "prefill")
    assert plan.recipe.block is not None
    return plan.recipe.block.softmax == "paced"


def check(spec: Spec, kind: str, few: bool = False) -> None:
    """Holds a kernel against the oracle: in all batches and modes, or in two batches in one."""
    assert is_tied(spec, "tpu7x")
    for plan in plans(spec, "tpu7x", kind):
        batches = batches_of(spec, plan, np.random.default_rng(SEED), 1)
        modes = None
        if few:
            batches, modes = (max(batches, key=lambda batch: max(batch.kv_lens, default=0)), batches[-1]), ["on_wait"]
        results = list(check_source(spec, plan, render(spec, plan), batches=batches, modes=modes, seed=SEED))
        assert results
        assert not [result for result in results if not result.ok], f"seed {SEED}"


@pytest.mark.parametrize(
    ("target", "layout", "head_dim", "tied"),
    [
        ("tpu7x", "separate", 256, True),
        ("v6e", "separate", 256, True),
        ("v5p", "separate", 256, False),
        ("tpu7x", "interleaved", 256, False),
        ("tpu7x", "separate", 128, False),
    ],
)
def test_weights_are_tied_where_a_head_fills_a_wide_mxu(target: str, layout: str, head_dim: int, tied: bool) -> None:
    model = replace(WIDE.model, head_dim=head_dim)
    spec = replace(WIDE, model=model, serving=replace(WIDE.serving, kv_layout=layout))
    assert is_tied(spec, target) == tied


def test_a_tied_kernel_with_lse_agrees_with_the_oracle() -> None:
    check(replace(WIDE, serving=replace(WIDE.serving, log_sum_exp=True)), "prefill", few=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefill", "mixed"])
def test_tied_kernels_agree_with_the_oracle(kind: str) -> None:
    check(WIDE, kind)


@pytest.mark.slow
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_tied_kernels_of_other_features_agree_with_the_oracle(features: dict[str, Any]) -> None:
    check(replace(WIDE, model=replace(WIDE.model, **features)), "prefill")


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.bug)
def test_a_bug_of_tied_turns_is_caught(mutation: Mutation) -> None:
    (plan,) = plans(WIDE, "tpu7x", "prefill")
    check_bug(WIDE, plan, mutation)
