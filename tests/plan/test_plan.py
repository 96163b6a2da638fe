"""Plans: which programs a spec has, tiles that divide what they must, and bytes that are counted as they are declared."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from drawn_specs import TINY, each_spec, plans_of, specs, targets
from hypothesis import given
from hypothesis import strategies as st

from rpac.contract.arrays import LANES
from rpac.contract.attention import Attention
from rpac.contract.features import FEATURES
from rpac.devices.chip import TPU_TARGETS, chip
from rpac.plan import (
    BlockRecipe,
    BlockTiles,
    Buffer,
    DecodeRecipe,
    KernelPlan,
    Recipe,
    RowDims,
    XlaTiles,
    kinds_of,
    plan_spec,
)
from rpac.plan.buffers import sublane_tile_tokens
from rpac.plan.families import smem_need, vmem_need
from rpac.plan.page_table import scalar_bytes
from rpac.plan.query_rows import Sets
from rpac.plan.sizes import power_of_two_from, power_of_two_to
from rpac.plan.words import BLOCK, DECODE, TITLES, decisions
from rpac.spec import Spec

# ---- which programs


@each_spec
@pytest.mark.parametrize("target", [*TPU_TARGETS, "cpu"])
def test_every_bucket_has_decode_and_mixed_and_those_of_a_chunk_have_prefill(spec: Spec, target: str) -> None:
    found = {(plan.kind, tokens) for plan in plan_spec(spec, target) for tokens in plan.tokens}
    wanted = {
        (kind, tokens)
        for tokens in spec.serving.token_buckets
        for kind in ("decode", "prefill", "mixed")
        if kind != "prefill" or tokens >= spec.serving.prefill_chunk
    }
    assert found == wanted
    assert {tokens: set(kinds_of(spec, tokens)) for tokens in spec.serving.token_buckets} == {
        tokens: {kind for kind, bucket in wanted if bucket == tokens} for tokens in spec.serving.token_buckets
    }


@given(specs(), targets)
def test_no_variant_is_planned_twice_and_paths_tell_plans_apart(spec: Spec, target: str) -> None:
    plans = plans_of(spec, target)
    variants = [(plan.kind, tokens) for plan in plans for tokens in plan.tokens]
    assert len(set(variants)) == len(variants)
    assert len({plan.path for plan in plans}) == len(plans)
    for plan in plans:
        alone = sum(other.kind == plan.kind for other in plans) == 1
        assert plan.path == f"{target}/{plan.kind}" + ("" if alone else f"_t{plan.tokens[-1]}") + ".py"


@given(specs(), targets)
def test_a_plan_holds_the_tiles_of_its_own_kernels_and_no_others(spec: Spec, target: str) -> None:
    for plan in plans_of(spec, target):
        assert (plan.decode is None) == (plan.kind == "prefill")
        assert (plan.block is None) == (plan.kind == "decode")
        for tiles in filter(None, (plan.decode, plan.block)):
            assert isinstance(tiles, XlaTiles) == (target == "cpu")


@given(specs(), targets)
def test_the_same_spec_gives_the_same_plans(spec: Spec, target: str) -> None:
    assert plans_of(spec, target) == plans_of(replace(spec, source="# another text", file="elsewhere.yaml"), target)


# ---- tiles


@given(specs(), st.sampled_from(TPU_TARGETS))
def test_block_tiles_divide_each_other(spec: Spec, target: str) -> None:
    serving = spec.serving
    for plan in plans_of(spec, target):
        tiles = plan.block
        if not isinstance(tiles, BlockTiles):
            continue
        assert tiles.block % serving.page_size == 0
        assert tiles.block % tiles.tile == 0
        assert tiles.tile % LANES == 0
        assert tiles.tile % (2 * RowDims.of(spec.model).sublane_tile) == 0
        assert (spec.model.group * tiles.q_block) % tiles.step_rows == 0
        assert serving.page_size % tiles.merge_tokens == 0
        assert tiles.merge_tokens % RowDims.of(spec.model).sublane_tile == 0
        if serving.kv_layout == "separate":
            assert tiles.merge_tokens % sublane_tile_tokens(spec.model) == 0
        assert tiles.new_tokens <= min(serving.page_size, *plan.tokens)
        if plan.kind == "prefill":
            assert serving.prefill_chunk % tiles.q_block == 0, "no block of a chunk is partial"
            assert tiles.copy_sizes == (tiles.q_block,)
        else:
            most = min(tiles.q_block, plan.tokens[-1])
            for tokens in range(1, most + 1):
                assert sum(size for size in tiles.copy_sizes if tokens & size) == tokens, "copies make up any block"


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "dtype", "wanted"),
    [
        # lane tiles, packed rows and rows of a token, tokens of a unit, rows of a unit
        (8, 128, "bfloat16", (1, 8, 16, 1, 16)),
        (1, 128, "bfloat16", (1, 1, 2, 8, 16)),
        (2, 128, "bfloat16", (1, 2, 4, 4, 16)),
        (3, 128, "bfloat16", (1, 3, 6, 8, 48)),
        (2, 256, "bfloat16", (2, 4, 8, 2, 16)),
        (2, 128, "float32", (1, 4, 4, 2, 8)),
        (3, 256, "float32", (2, 12, 12, 2, 24)),
    ],
)
def test_a_unit_is_the_fewest_tokens_that_fill_whole_register_tiles(
    kv_heads: int, head_dim: int, dtype: str, wanted: tuple[int, ...]
) -> None:
    rows = RowDims.of(Attention(kv_heads, kv_heads, head_dim, dtype, dtype, 1.0))
    assert (rows.lane_tiles, rows.packed_rows, rows.token_rows, rows.sublane_tile, rows.sublane_tile_rows) == wanted


# ---- bytes


@given(specs(), st.sampled_from(TPU_TARGETS))
def test_what_is_counted_is_what_is_declared_and_fits(spec: Spec, target: str) -> None:
    device = chip(target)
    for plan in plans_of(spec, target):
        kernels = [tiles for tiles in (plan.decode, plan.block) if tiles and not isinstance(tiles, XlaTiles)]
        for tiles in kernels:
            dtypes = {"dma": None, "smem": None, "bfloat16": 2, "float32": 4, "uint32": 4, "int32": 4}
            declared = sum(
                math.prod(buffer.shape) * (dtypes[buffer.dtype] or 0) for buffer in tiles.scratch(spec, plan.recipe)
            )
            assert declared + tiles.temporaries(spec, plan.recipe) <= vmem_need(spec, tiles, plan.recipe)
        assert plan.vmem_need == max(vmem_need(spec, tiles, plan.recipe) for tiles in kernels)
        assert plan.vmem_need < plan.vmem_limit < plan.vmem_bytes == device.vmem_bytes
        assert plan.smem_need == smem_need(spec, plan.recipe, *kernels) < plan.smem_bytes == device.smem_bytes


def test_a_portable_plan_counts_no_vmem() -> None:
    assert {(plan.vmem_need, plan.vmem_limit, plan.smem_need) for plan in plan_spec(TINY, "cpu")} == {(0, 0, 0)}


@pytest.mark.parametrize(
    ("shape", "dtype", "wanted"),
    [
        ((16, 128), "bfloat16", 16 * 128 * 2),
        ((8, 128), "float32", 8 * 128 * 4),
        ((3, 5, 200), "float32", 3 * 8 * 256 * 4),
        ((4, 2, 128), "bfloat16", 4 * 2 * 128 * 2),
        ((4, 3, 128), "bfloat16", 4 * 4 * 128 * 2),
        ((4, 1, 128), "float32", 4 * 1 * 128 * 4),
        ((8,), "dma", 0),
        ((8,), "smem", 0),
    ],
)
def test_a_buffer_takes_the_registers_tiles_that_it_touches(shape: tuple[int, ...], dtype: str, wanted: int) -> None:
    assert Buffer("any", shape, dtype, "").vmem_bytes == wanted


@given(st.integers(1, 1 << 20))
def test_powers_of_two_are_the_nearest_on_either_side(value: int) -> None:
    low, high = power_of_two_to(value), power_of_two_from(value)
    assert low <= value <= high
    assert {low, high} <= {1 << bit for bit in range(21)}
    assert high == low or high == 2 * low


def test_a_plan_is_plain_data_for_a_manifest() -> None:
    for plan in plan_spec(TINY, "v6e"):
        data = json.loads(json.dumps(plan.as_dict()))
        assert data["kind"] == plan.kind
        assert data["tokens"] == list(plan.tokens)
    assert np.dtype("int32").itemsize * (4 + 4 * 32 + 5 + 3) == sum(scalar_bytes(TINY, "smem"))


# ---- the recipe


@each_spec
@pytest.mark.parametrize("target", [*TPU_TARGETS, "cpu"])
def test_a_recipe_has_a_part_for_each_kernel_of_a_tpu_program_and_the_features_of_any(spec: Spec, target: str) -> None:
    for plan in plan_spec(spec, target):
        on_tpu = target != "cpu"
        assert (plan.recipe.decode is not None) == (on_tpu and plan.kind != "prefill")
        assert (plan.recipe.block is not None) == (on_tpu and plan.kind != "decode")
        wanted = {feature.key for feature in FEATURES if feature.in_kernel(spec.model, spec.serving)}
        assert set(plan.recipe.features) == wanted


@each_spec
@pytest.mark.parametrize("target", TPU_TARGETS)
def test_a_plan_is_the_same_by_way_of_json(spec: Spec, target: str) -> None:
    for plan in plan_spec(spec, target):
        data = json.loads(json.dumps(plan.as_dict()))
        assert Recipe.from_dict(data["recipe"]) == plan.recipe
        if spec.model.rope_dim is None:
            assert KernelPlan.from_dict(data) == plan


@each_spec
@pytest.mark.parametrize("target", [*TPU_TARGETS, "cpu"])
def test_a_program_is_told_one_choice_and_one_reason_for_each_decision(spec: Spec, target: str) -> None:
    for plan in plan_spec(spec, target):
        told = list(decisions(plan.recipe, plan.kind))
        assert len({(one.kernel, one.name) for one in told}) == len(told)
        program = 1 + (target != "cpu") + bool(plan.recipe.by_head)
        kernels = {"": program, "decode": len(DECODE) if plan.recipe.decode else 0}
        kernels |= {} if plan.recipe.block is None else {plan.kind: len(BLOCK)}
        assert Counter(one.kernel for one in told) == {name: count for name, count in kernels.items() if count}
        assert all(one.choice and one.why for one in told)


@pytest.mark.parametrize(("recipe", "table"), [(DecodeRecipe, DECODE), (BlockRecipe, BLOCK)])
def test_every_value_of_every_decision_has_words(recipe: type, table: Mapping[str, Mapping[object, object]]) -> None:
    types = {name: hint for name, hint in get_type_hints(recipe).items() if get_origin(hint) is Literal or hint is bool}
    values = {name: {True, False} if hint is bool else set(get_args(hint)) for name, hint in types.items()}
    if recipe is BlockRecipe:  # numbers, and what follows from other fields
        values |= {"softmax": {"plain", "paced", "transposed"}, "lookahead": {True, False}}
    assert {name: set(words) for name, words in table.items()} == values
    assert set(table) <= set(TITLES)


def test_new_tokens_of_a_decode_row_take_rows_of_a_matmul_as_heads_of_a_group_do() -> None:
    def sets_of(q_heads: int, decode_len: int) -> Sets:
        model = replace(TINY.model, q_heads=q_heads, kv_heads=4)
        return Sets.of(replace(TINY, model=model, serving=replace(TINY.serving, decode_len=decode_len)), "separate")

    for group, new in ((1, 2), (2, 2), (4, 2), (8, 2), (4, 4), (3, 5)):
        assert sets_of(4 * group, new) == sets_of(4 * group * new, 1)


def test_a_tree_takes_its_part_of_smem() -> None:
    drafting = replace(TINY, serving=replace(TINY.serving, decode_len=4, tree_mask=True))
    more = sum(scalar_bytes(drafting, "smem")) - sum(scalar_bytes(TINY, "smem"))
    assert more == 4 * TINY.serving.max_num_seqs * 4
