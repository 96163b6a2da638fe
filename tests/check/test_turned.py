"""Prefill and mixed kernels whose scores lie with query rows along lanes: weights are the matrix that the MXU keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_block_mutations as turns
from mutation import Mutation, check_bug, dropped, retiled
from test_features import ALL, CHUNKS_ALL, READ, SLOW, compiled, failures, featured

from rpac.contract.attention import Attention
from rpac.devices.chip import TPU_TARGETS
from rpac.kernels import render
from rpac.plan import KernelPlan, plan_spec
from rpac.spec import Spec

SPECS = {
    layout: replace(spec, serving=replace(spec.serving, prefill_chunk=128)) for layout, spec in turns.SPECS.items()
}
APART = SPECS["separate"]
LONG_WINDOW = {**ALL, "sliding_window": 300}
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

STEPS = [
    Mutation(
        "scores of another step weighed", r"weights_of\(next_scores\[i % 4,", "weights_of(next_scores[(i + 1) % 4,"
    ),
    Mutation("largest of another step", r"old_max, step_max\[i % 4\]", "old_max, step_max[(i + 1) % 4]"),
    Mutation(
        "largest of each sublane alone",
        r"in_all_rows\(jnp\.max\(jnp\.stack\(made\), axis=0\)\)",
        "jnp.max(jnp.stack(made), axis=0)",
    ),
    Mutation("largest of the last part", r"jnp\.max\(jnp\.stack\(made\), axis=0\)", "made[-1]"),
    dropped("maximum not kept", r"row_max\[head, :, rows\] = new_max"),
    Mutation("next scores of this turn", r"turn if later > i else jnp\.minimum\(turn \+ 1, last_turn\)", "turn"),
    Mutation("parts of the first tokens", r"first \+ part\.start", "first"),
    Mutation(
        "values of the first tokens",
        r"values_and_ones\(slot, first, tokens, head\)$",
        "values_and_ones(slot, 0, tokens, head)",
    ),
    Mutation(
        "values of the first heads",
        r"values_and_ones\(slot, first, tokens, head\)$",
        "values_and_ones(slot, first, tokens, head - first_head)",
    ),
    Mutation("the sum before left out", r"rescale \* old_sum \+ ", ""),
    Mutation("the output before not rescaled", r"rescale \* by_register\(old_acc\)", "by_register(old_acc)"),
    Mutation("the sum of a row of values", r"output\[HEAD_DIM : HEAD_DIM \+ 8\]", "output[HEAD_DIM - 8 : HEAD_DIM]"),
    Mutation("old sum stays", r"jnp\.where\(begins, 0\.0, row_sum\[head, :, rows\]\)", "row_sum[head, :, rows]"),
    Mutation("old output stays", r"jnp\.where\(begins, 0\.0, acc\[head, :, rows\]\)", "acc[head, :, rows]"),
    Mutation("begins at every tile", r"begins & \(first == place\(0\)\[0\]\)", "begins"),
    Mutation("maximum of the first rows cleared", r"rows = pl\.ds\(lax\.rem\(piece, 2\) \* 128,", "rows = pl.ds(0,"),
    Mutation("output of the first rows for all", r"(def unsort\(piece\):\n.*\n.*multiple_of\()piece", r"\1 0"),
    Mutation("output not turned back", r"out\.astype\(out_rows\.dtype\)\.T", "out.astype(out_rows.dtype)[:, :128]"),
    Mutation("limits of another step", r"rows\.start // 128\]", "1 - rows.start // 128]"),
    Mutation("limit one too far", r"where\(token <= query, 0", "where(token <= query + 1, 0"),
    Mutation("limit one short", r"where\(token <= query, 0", "where(token < query, 0"),
    Mutation("lane of the next query", r"query_of\(row\) == lane", "query_of(row) + 1 == lane"),
    Mutation("a piece too few on the diagonal", r"flash_turns\(pieces \* 2,", "flash_turns(pieces * 2 - 1,"),
    dropped("clear_tail removed", r"clear_tail\(slot, valid\)"),
]
CARRIED = [
    Mutation("scores of this block for the next", r"jnp\.where\(goes_on, turns, turns - 1\)", "turns - 1"),
    Mutation("next block not waited for", r"(^ *)pl\.when\(goes_on & \(turn.*$", r"\1pass"),
]
OTHERS = [
    (
        LONG_WINDOW,
        Mutation(
            "a query more is seen",
            r"\(token <= query\) & \(token > query - WINDOW\)",
            "(token <= query) & (token >= query - WINDOW)",
        ),
    ),
    (LONG_WINDOW, Mutation("the row of another step", r"row = rows\.start \+ ", "row = ")),
    (LONG_WINDOW, Mutation("sinks of the first head", r"sinks\[head \* GROUP \+ i\]", "sinks[i]")),
    (
        LONG_WINDOW,
        Mutation("sinks of the first of a group", r"jnp\.where\(of_group == i, ", "jnp.where(of_group == 0, "),
    ),
    (LONG_WINDOW, Mutation("the sink not in the sum", r"jnp\.where\(begins, 1\.0, ", "jnp.where(begins, 0.0, ")),
    (
        LONG_WINDOW,
        Mutation(
            "logarithms of another head",
            r"log_rows\[pl\.ds\(i, 64, stride=GROUP\), :\]",
            "log_rows[pl.ds(0, 64, stride=GROUP), :]",
        ),
    ),
    (
        {"causal": False},
        Mutation("a token too many", r"\(scores\.shape, 0\) < valid - first", "(scores.shape, 0) <= valid - first"),
    ),
]


def small_plan(spec: Spec, kind: str) -> KernelPlan:
    """A plan by which a chunk is two query blocks, these two steps a head, a tile two turns and two pieces, a block two tiles."""
    plan = turns.small_plan(spec, kind)
    plan = retiled(spec, plan, block={"q_block": 64, "step_rows": 128})
    assert plan.recipe.block is not None
    assert plan.recipe.block.scores == "transposed"
    return plan


@pytest.mark.parametrize(
    ("target", "model", "turned"),
    [
        ("tpu7x", APART.model, True),
        ("v6e", APART.model, True),
        ("v5p", APART.model, False),  # the MXU is as wide as a head
        ("tpu7x", replace(APART.model, head_dim=256), False),
        ("tpu7x", replace(APART.model, q_heads=12), False),  # rows of three heads are no whole registers
        ("tpu7x", Attention(16, 4, 128, "float32", "float32", 128**-0.5), False),
    ],
)
def test_scores_are_turned_where_a_wide_mxu_would_be_half_empty(target: str, model: Attention, turned: bool) -> None:
    spec = replace(APART, model=model)
    for plan in plan_spec(spec, target):
        if plan.kind == "prefill":
            assert plan.recipe.block is not None
            assert (plan.recipe.block.scores == "transposed") == turned


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
def test_turned_kernels_agree_with_the_oracle_in_a_few_batches(layout: str, features: dict[str, Any]) -> None:
    spec = featured(SPECS[layout], features)
    assert failures(spec, small_plan(spec, "prefill"), few=True) == []


@pytest.mark.parametrize("mutation", [None, turns.STALE_MAXIMUM], ids=["as it is", turns.STALE_MAXIMUM.bug])
def test_scores_far_above_those_of_the_next_block_do_not_reach_it(mutation: Mutation | None) -> None:
    plan = small_plan(APART, "prefill")
    source = render(APART, plan)
    assert turns.holds_far_above(APART, plan, mutation.apply(source) if mutation else source) == (mutation is None)


@SLOW
@pytest.mark.parametrize("kind", ["prefill", "mixed"])
@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize("features", [{}, *FEATURES, *SHAPES, QUANTIZED], ids=str)
def test_turned_kernels_agree_with_the_oracle(features: dict[str, Any], layout: str, kind: str) -> None:
    spec = featured(SPECS[layout], features)
    assert failures(spec, small_plan(spec, kind)) == []


@pytest.mark.compile
@pytest.mark.parametrize(("target", "features"), [("tpu7x", UNCAPPED), ("v6e", {**UNCAPPED, "head_dim": 64})], ids=str)
def test_a_turned_kernel_with_all_compiles(target: str, features: dict[str, Any]) -> None:
    compiled(featured(APART, features), target, ("prefill",))


@SLOW
@pytest.mark.compile
@pytest.mark.parametrize("target", TPU_TARGETS)
@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize("features", [{}, *FEATURES, *SHAPES, QUANTIZED], ids=str)
def test_every_turned_kernel_compiles(features: dict[str, Any], layout: str, target: str) -> None:
    compiled(featured(SPECS[layout], features), target, ("prefill", "mixed"))


@pytest.mark.parametrize(
    "mutation",
    [STEPS[0], *(pytest.param(mutation, marks=SLOW) for mutation in [*STEPS[1:], *CARRIED])],
    ids=[mutation.bug for mutation in [*STEPS, *CARRIED]],
)
def test_a_bug_of_turned_steps_is_caught(mutation: Mutation) -> None:
    check_bug(APART, small_plan(APART, "prefill"), mutation)


@SLOW
@pytest.mark.parametrize(("features", "mutation"), OTHERS, ids=[mutation.bug for _, mutation in OTHERS])
def test_a_bug_of_turned_features_is_caught(features: dict[str, Any], mutation: Mutation) -> None:
    spec = featured(APART, features)
    check_bug(spec, small_plan(spec, "prefill"), mutation)
