"""Kernels that take new tokens by head, as XLA keeps them where the heads of a token fill no sublane tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from mutation import retiled
from small import SEPARATE, SPECS, TRANSPOSED, featured, plan_of, small_plan
from test_features import SLOW, failures
from test_token_pairs import compiled

from rpac.plan.by_head import fills_sublane_tiles
from rpac.spec import Spec

HEADS: dict[str, dict[str, Any]] = {
    "keys and values": {"q_heads": 8, "kv_heads": 1},
    "queries too": {"q_heads": 5, "kv_heads": 1},
    "several heads": {"q_heads": 12, "kv_heads": 3},
    "two new tokens": {"q_heads": 3, "kv_heads": 1, "decode_len": 2},
    "8 bits": {"q_heads": 6, "kv_heads": 2, "kv_dtype": "float8_e4m3fn"},
    "the cache is read alone": {"q_heads": 5, "kv_heads": 1, "update_cache": False},
    "joined rows": {"q_heads": 6, "kv_heads": 3, "head_dim": 64},
}
ALL = ("queries", "keys", "values")
KEYS = HEADS["keys and values"]
QUICK = [("queries too", "interleaved"), ("several heads", "separate")]


def by_head(layout: str, **features: Any) -> Spec:
    """A spec with as many sequences as are sorted at once, and pages so short that copies for them can begin early."""
    spec = featured(SPECS[layout], features, "by-head")
    sizes = {"max_num_seqs": 16, "token_buckets": (16, 64), "page_size": 32, "prefill_chunk": 64}
    return replace(spec, serving=replace(spec.serving, **sizes))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("heads", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in QUICK else SLOW)
        for name in HEADS
        for layout in SPECS
        if (name, layout) != ("8 bits", "interleaved")  # by blocks
    ],
)
def test_decode_kernels_agree_with_the_oracle_in_the_interpreter(heads: str, layout: str) -> None:
    spec = by_head(layout, **HEADS[heads])
    plan = small_plan(spec, "decode")
    assert plan.recipe.by_head
    assert failures(spec, plan, few=(heads, layout) in QUICK) == []


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("layout", "features", "arrays"),
    [
        ("separate", {}, ALL),
        pytest.param("interleaved", KEYS, ALL[1:], marks=SLOW),
        pytest.param("interleaved", {"soft_cap": 2.0}, ALL, marks=SLOW),
        pytest.param("separate", {"sliding_window": 30, "kv_dtype": "float32", "q_dtype": "float32"}, ALL, marks=SLOW),
        pytest.param("separate", {"update_cache": False}, ALL[:1], marks=SLOW),
        pytest.param("interleaved", {"kv_dtype": "float8_e4m3fn"}, ALL, marks=SLOW),
        pytest.param("separate", {"kv_dtype": "float8_e4m3fn"}, ALL, marks=SLOW),
        pytest.param("separate", {"log_sum_exp": True}, ALL[1:], marks=SLOW),
    ],
    ids=str,
)
def test_prefill_kernels_agree_with_the_oracle_in_the_interpreter(
    layout: str, features: dict[str, Any], arrays: tuple[str, ...]
) -> None:
    spec = by_head(layout, **(HEADS["several heads"] | features))
    plan = small_plan(spec, "prefill")
    assert plan.recipe.by_head == arrays
    assert failures(spec, plan, few=not features) == []


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("layout", SPECS)
def test_prefill_kernels_with_transposed_scores_do_too(layout: str) -> None:
    spec = featured(TRANSPOSED[layout], {"q_heads": 10, "kv_heads": 5}, "by-head")
    tiles = {"q_block": 128, "step_rows": 128, "heads": 5, "diagonal_heads": 5}
    plan = retiled(spec, plan_of(spec, "prefill"), block={**tiles, "block": 1024, "tile": 512})
    assert plan.recipe.block is not None
    assert (plan.recipe.block.query_order, plan.recipe.block.scores) == ("by_head", "transposed")
    assert failures(spec, plan) == []


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("layout", "features"),
    [
        ("separate", {"sinks": True}),
        pytest.param("interleaved", {"sinks": True, "sliding_window": 300}, marks=SLOW),
        pytest.param("separate", {"soft_cap": 2.0, "attention_chunk": 640}, marks=SLOW),
        pytest.param("separate", {"kv_dtype": "float8_e4m3fn", "kv_scale": "head", "quantize": "kernel"}, marks=SLOW),
        pytest.param("separate", {"causal": False}, marks=SLOW),
    ],
    ids=str,
)
def test_prefill_kernels_of_tokens_along_lanes_do_too(layout: str, features: dict[str, Any]) -> None:
    spec = featured(TRANSPOSED[layout], {"head_dim": 64, "q_heads": 8, "kv_heads": 2, **features}, "by-lane")
    tiles = {"q_block": 128, "step_rows": 128, "heads": 2, "diagonal_heads": 2}
    plan = retiled(spec, plan_of(spec, "prefill"), block={**tiles, "block": 1024, "tile": 512})
    assert plan.recipe.queries_by_lane
    assert failures(spec, plan, few=features == {"sinks": True}) == []


@pytest.mark.compile
@pytest.mark.slow
def test_a_decode_kernel_compiles() -> None:
    spec = by_head("separate", **HEADS["several heads"])
    compiled([(spec, plan_of(spec, "decode", "tpu7x"))])


def test_only_heads_that_fill_no_sublane_tiles_come_by_head() -> None:
    """XLA's default layouts of `[tokens, heads, 128]`, read from modules that libtpu 0.0.42.1 compiled for each target."""
    filling = {
        dtype: [h for h in range(1, 17) if fills_sublane_tiles(h, dtype)] for dtype in ("float32", "bfloat16", "int8")
    }
    assert filling == {"float32": [1, 2, 4, 8, 16], "bfloat16": [2, 4, 8, 16], "int8": [4, 8, 16]}


def test_other_programs_take_them_by_token() -> None:
    """A mixed batch begins its sequences at any token, and a few sequences are no whole sublane tile."""
    mixed, few = by_head("separate", **HEADS["several heads"]), featured(SEPARATE, HEADS["several heads"])
    assert plan_of(mixed, "mixed").recipe.by_head == ()
    assert plan_of(few, "decode").recipe.by_head == ()
