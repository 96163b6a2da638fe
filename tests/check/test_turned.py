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
APART = SPECS["apart"]
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
        "scores of another step",
        r"next_scores\[self\.at_tokens\(i, chunk\)",
        "next_scores[self.at_tokens(i + 1, chunk)",
    ),
    Mutation("largest of another step", r"old_max, self\.tile_max\(i\)", "old_max, self.tile_max(i + 1)"),
    Mutation(
        "largest of each sublane alone",
        r"max_in_all_rows\(jnp\.max\(jnp\.stack\(largest\), axis=0\)\)",
        "jnp.max(jnp.stack(largest), axis=0)",
    ),
    Mutation("largest of the last chunk", r"jnp\.max\(jnp\.stack\(largest\), axis=0\)", "largest[-1]"),
    dropped("maximum not kept", r"self\.row_max\[self\.at\(head, rows\)\] = new_max"),
    Mutation(
        "next scores of this iteration",
        r"iteration if later > i else jnp\.minimum\(iteration \+ 1, tiles\.last\)",
        "iteration",
    ),
    Mutation("chunks of the first tokens", r"first \+ chunk\.start", "first"),
    Mutation(
        "values of the first tokens",
        r"head_values\(tiles\.buffer, first, tiles\.tokens, head\)",
        "head_values(tiles.buffer, 0, tiles.tokens, head)",
    ),
    Mutation(
        "values of the first heads",
        r"head_values\(tiles\.buffer, first, tiles\.tokens, head\)",
        "head_values(tiles.buffer, first, tiles.tokens, head - first_head)",
    ),
    Mutation("the sum before left out", r"alpha \* old_sum \+ ", ""),
    Mutation("the output before not rescaled", r"alpha \* by_register\(old_acc\)", "by_register(old_acc)"),
    Mutation(
        "the sum of a row of values",
        r"pv\[VALUE_ROWS : VALUE_ROWS \+ SUBLANES\]",
        "pv[VALUE_ROWS - SUBLANES : VALUE_ROWS]",
    ),
    Mutation("old sum stays", r"jnp\.where\(begins, 0\.0, (self\.row_sum\[.*\])\)$", r"\1"),
    Mutation("old output stays", r"jnp\.where\(begins, 0\.0, (self\.acc\[.*\])\)$", r"\1"),
    Mutation("begins at every tile", r"tiles\.begins & \(first == tiles\.tile_of\(0\)\[0\]\)", "tiles.begins"),
    Mutation(
        "maximum of the first rows cleared",
        r"rows = pl\.ds\(lax\.rem\(step, ROW_STEPS\) \* STEP_ROWS,",
        "rows = pl.ds(0,",
    ),
    Mutation("output of the first rows for all", r"(def unsort_tokens.*\n.*\n.*\n.*multiple_of\()step", r"\1 0"),
    Mutation(
        "output not transposed back",
        r"out\.astype\(self\.out_rows\.dtype\)\.T",
        "out.astype(self.out_rows.dtype)[:, :128]",
    ),
    Mutation("bias of another step", r"rows\.start // STEP_ROWS\]", "1 - rows.start // STEP_ROWS]"),
    Mutation("bias one too far", r"return token <= query$", "return token <= query + 1"),
    Mutation("bias one short", r"return token <= query$", "return token < query"),
    Mutation("lane of the next query", r"self\.query_of\(row\) == lane", "self.query_of(row) + 1 == lane"),
    Mutation(
        "an iteration too few on the diagonal", r"blocks \* DIAGONAL_ITERATIONS$", "blocks * DIAGONAL_ITERATIONS - 1"
    ),
    dropped("clear_tail removed", r"pl\.when\(last\)\(functools\.partial\(self\.clear_tail, buffer, valid\)\)"),
]
CARRIED = [
    Mutation(
        "scores of this block for the next",
        r"jnp\.where\(self\.goes_on, self\.iterations, self\.iterations - 1\)",
        "self.iterations - 1",
    ),
    Mutation("next block not waited for", r"(^ *)pl\.when\(self\.goes_on & .*$", r"\1pass"),
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
        Mutation(
            "sinks of the first of a group", r"jnp\.where\(head_of_group == i, ", "jnp.where(head_of_group == 0, "
        ),
    ),
    (LONG_WINDOW, Mutation("the sink not in the sum", r"begins, SINK_SUM, ", "begins, 0.0, ")),
    (
        LONG_WINDOW,
        Mutation(
            "logarithms of another head",
            r"log_rows\[pl\.ds\(i, Q_BLOCK, stride=GROUP\), :\]",
            "log_rows[pl.ds(0, Q_BLOCK, stride=GROUP), :]",
        ),
    ),
    (
        {"causal": False},
        Mutation("a token too many", r"token < self\.valid - first", "token <= self.valid - first"),
    ),
]


def small_plan(spec: Spec, kind: str) -> KernelPlan:
    """A chunk is two query blocks, these two steps a head, a tile two iterations and two diagonal blocks, a block two tiles."""
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
        ("apart", {}),
        ("apart", LONG_WINDOW),
        ("apart", UNCAPPED),
        ("interleaved", {}),
        ("apart", QUANTIZED),
        ("apart", SHAPES[0]),
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
