"""Decode rows of several new tokens, with and without a tree of them: checked alone and with partners, and compiled."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from small import drafting, small_plan
from test_features import KINDS, LAYOUTS, SEED, SLOW, compiled, failures

from rpac.check import batches_of
from rpac.devices.chip import TPU_TARGETS
from rpac.kernels import render
from rpac.plan import plan_spec
from rpac.plan.buffers import sublane_tile_tokens

FLOAT8 = {"kv_dtype": "float8_e4m3fn", "kv_scale": "head"}
WITH_TREES: dict[str, dict[str, Any]] = {
    "alone": {},
    "soft cap, sinks and lse": {"soft_cap": 2.0, "sinks": True, "log_sum_exp": True},
    "8 bits": FLOAT8,
    "8 bits, made in the program": {"kv_dtype": "int8", "kv_scale": "tensor", "quantize": "kernel"},
    "float32": {"q_dtype": "float32", "kv_dtype": "float32"},
    "head_dim 64, odd heads": {"head_dim": 64, "q_heads": 15, "kv_heads": 3},
    "heads that share a register, and lse": {"q_heads": 3, "kv_heads": 3, "log_sum_exp": True},
    "head_dim 96, one KV head": {"head_dim": 96, "q_heads": 3, "kv_heads": 1},
    "head_dim 256": {"head_dim": 256, "q_heads": 16},
}
PARTNERS = {
    **WITH_TREES,
    "window": {"sliding_window": 150},
    "a window shorter than the new tokens": {"sliding_window": 3},
    "window, soft cap, sinks, lse and 8 bits": {
        **WITH_TREES["soft cap, sinks and lse"],
        "sliding_window": 150,
        **FLOAT8,
    },
}
CASES = [
    pytest.param(layout, decode_len, tree, partners, id=f"{layout}, {decode_len}{', tree' if tree else ''}: {name}")
    for layout in LAYOUTS
    for tree in (False, True)
    for name, partners in (WITH_TREES if tree else PARTNERS).items()
    for decode_len in (2, 4, 5, 8)
]
# All features at once, with a tree and without.
WINDOW, TREE = "4: window, soft cap, sinks, lse and 8 bits", "4, tree: soft cap, sinks and lse"
every_case = ("layout", "decode_len", "tree", "partners")


def slow_but(*quick: str) -> list[Any]:
    return [pytest.param(*case.values, id=case.id, marks=[] if case.id in quick else [SLOW]) for case in CASES]


@pytest.mark.parametrize(every_case, slow_but(f"interleaved, {WINDOW}"))
def test_portable_programs_have_them(layout: str, decode_len: int, tree: bool, partners: dict[str, Any]) -> None:
    """Programs of mixed batches, whose decode rows are computed as those of batches of decode rows alone."""
    spec = drafting(layout, decode_len, tree, **partners)
    plan = next(plan for plan in reversed(plan_spec(spec, "cpu")) if plan.kind == "mixed")
    assert failures(spec, plan) == []


@pytest.mark.parametrize(("layout", "tree"), [("interleaved", False), ("separate", True)])
def test_portable_programs_of_decode_rows_have_them(layout: str, tree: bool) -> None:
    spec = drafting(layout, 4, tree, log_sum_exp=True)
    plan = next(plan for plan in reversed(plan_spec(spec, "cpu")) if plan.kind == "decode")
    assert failures(spec, plan, few=True) == []


@pytest.mark.interpreter
@pytest.mark.parametrize(every_case, slow_but(f"interleaved, {TREE}", f"separate, {WINDOW}"))
def test_kernels_have_them(layout: str, decode_len: int, tree: bool, partners: dict[str, Any]) -> None:
    spec = drafting(layout, decode_len, tree, **partners)
    assert failures(spec, small_plan(spec, "decode"), few=True) == []


@pytest.mark.interpreter
@SLOW
@pytest.mark.parametrize("kind", ["decode", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tree", [False, True])
def test_kernels_have_them_in_every_batch(tree: bool, layout: str, kind: str) -> None:
    spec = drafting(layout, 4, tree)
    assert failures(spec, small_plan(spec, kind)) == []


@pytest.mark.parametrize("target", ["tpu7x", "cpu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_new_token_is_once_the_first_past_a_page_a_unit_and_a_tile(layout: str, target: str) -> None:
    spec = drafting(layout, 4)
    plan = next(plan for plan in reversed(plan_spec(spec, target)) if plan.kind == "decode")
    lengths = {length for batch in batches_of(spec, plan, np.random.default_rng(SEED), 0) for length in batch.kv_lens}
    tile = plan.decode.tile if hasattr(plan.decode, "tile") else plan.decode.block
    for size in (spec.serving.page_size, sublane_tile_tokens(spec.model), tile):
        assert {size + new for new in range(5) if size + new >= 4} <= lengths


@pytest.mark.compile
@pytest.mark.once
@pytest.mark.parametrize(("target", "layout"), [("tpu7x", "separate"), pytest.param("v5e", "interleaved", marks=SLOW)])
def test_a_mixed_program_compiles(target: str, layout: str) -> None:
    compiled(drafting(layout, 4, True, **WITH_TREES["soft cap, sinks and lse"]), target, ("mixed",))


@SLOW
@pytest.mark.compile
@pytest.mark.parametrize("target", TPU_TARGETS)
@pytest.mark.parametrize(every_case, CASES)
def test_every_program_compiles(
    layout: str, decode_len: int, tree: bool, partners: dict[str, Any], target: str
) -> None:
    compiled(drafting(layout, decode_len, tree, **partners), target, tuple(KINDS))


def test_a_kernel_holds_no_trace_of_what_its_spec_does_not_use() -> None:
    for target, layout, kind in itertools.product(("tpu7x", "cpu"), LAYOUTS, KINDS):
        for decode_len, tree in ((1, False), (4, False), (4, True)):
            spec = drafting(layout, decode_len, tree)
            plan = next(plan for plan in plan_spec(spec, target) if plan.kind == kind)
            text = render(spec, plan).body
            assert ("DECODE_LEN" in text) == (decode_len > 1 and kind != "prefill"), (target, layout, kind)
            # Every program takes the tree; of one of chunks alone that is all.
            assert text.count("tree") > 1 if tree and kind != "prefill" else text.count("tree") == tree
