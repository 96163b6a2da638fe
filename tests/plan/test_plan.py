"""Plans: which programs a spec has, tiles that divide what they must, and bytes that are counted as they are declared."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpac.contract.arrays import LANES, kv_page_shape
from rpac.contract.attention import Attention, Serving
from rpac.contract.features import FEATURES
from rpac.devices.chip import TPU_TARGETS, chip
from rpac.errors import PlanError
from rpac.plan import (
    BlockRecipe,
    BlockTiles,
    Buffer,
    DecodeBlocks,
    DecodeRecipe,
    DecodeWaves,
    KernelPlan,
    Recipe,
    RowDims,
    XlaTiles,
    decode_blocks,
    kinds_of,
    plan_spec,
)
from rpac.plan.access import reads_all_heads
from rpac.plan.buffers import sublane_tile_tokens
from rpac.plan.decode_waves import LEAST_TILE_BYTES, WAVE_BYTES
from rpac.plan.families import vmem_need
from rpac.plan.planner import SMEM_RESERVE, VMEM_HEADROOM, smem_need
from rpac.plan.query_rows import Sets
from rpac.plan.sizes import IN_FLIGHT_BYTES, power_of_two_from, power_of_two_to
from rpac.plan.tuned import Entry, TunedTiles, key_of
from rpac.plan.words import BLOCK, DECODE, TITLES, decisions
from rpac.spec import Spec, load_spec

SPECS = [
    part for path in sorted((Path(__file__).parents[2] / "specs").glob("*.yaml")) for part in load_spec(path).parts
]
TINY = next(spec for spec in SPECS if spec.name == "tiny")


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any spec that the parser takes and a TPU kernel can have a chunk of."""
    group, kv_heads = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    dtype = draw(st.sampled_from(["bfloat16", "float32"]))
    model = Attention(group * kv_heads, kv_heads, draw(st.sampled_from([128, 256])), dtype, dtype, 0.1)
    page = 1 << draw(st.integers(4, 8))
    max_len = page * draw(st.integers(1, 64))
    new = draw(st.sampled_from([1, 1, 2, 4, 8]))
    buckets = tuple(sorted(draw(st.sets(st.integers(new, 2048), min_size=1, max_size=5)) | {256}))
    chunk = draw(st.sampled_from([size for size in (16, 48, 64, 256) if size <= max_len]))
    lengths = draw(st.lists(st.integers(1, max_len), min_size=1, max_size=3))
    layout = draw(st.sampled_from(["interleaved", "separate"]))
    seqs, lens = draw(st.integers(1, min(64, buckets[-1] // new))), tuple(sorted(lengths))
    tree = new > 1 and draw(st.booleans())
    serving = Serving(
        page, max_len, buckets[-1], buckets, seqs, chunk, lens, 512, layout, decode_len=new, tree_mask=tree
    )
    return Spec("any", model, serving, (*TPU_TARGETS, "cpu"), source="", file="any.yaml")


def plans_of(spec: Spec, target: str) -> tuple[KernelPlan, ...]:
    """The plans, or none where the spec is too large for the target."""
    try:
        return plan_spec(spec, target)
    except PlanError:
        return ()


def sequences(spec: Spec, plan: KernelPlan) -> set[int]:
    """How many decode rows each bucket of a plan holds."""
    return {min(tokens // spec.serving.decode_len, spec.serving.max_num_seqs) for tokens in plan.tokens}


targets = st.sampled_from([*TPU_TARGETS, "cpu"])
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name} {spec.layer}".strip())


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
def test_decode_tiles_are_whole_pages_and_registers_and_few_enough_to_wait_for(spec: Spec, target: str) -> None:
    for plan in plans_of(spec, target):
        tiles = plan.decode
        if not isinstance(tiles, DecodeBlocks):
            continue
        assert tiles.block % spec.serving.page_size == 0
        assert tiles.block % LANES == 0
        assert tiles.block % (2 * RowDims.of(spec.model).sublane_tile) == 0, (
            "its halves are split and its tail cleared by units"
        )
        assert tiles.buffers >= 2
        assert spec.model.kv_heads % tiles.heads_per_matmul == 0
        assert tiles.heads_per_matmul * spec.model.head_dim <= max(chip(target).mxu_size, spec.model.head_dim)
        assert {tiles.max_rows} == sequences(spec, plan)


@given(specs(), st.sampled_from(TPU_TARGETS))
def test_decode_goes_by_waves_where_k_and_v_are_separate_or_are_read_as_they_lie(spec: Spec, target: str) -> None:
    waves = spec.serving.kv_layout == "separate" or reads_all_heads(spec)
    for plan in plans_of(spec, target):
        if plan.decode is None:
            continue
        assert plan.recipe.decode is not None
        assert isinstance(plan.decode, DecodeWaves) == (plan.recipe.decode.skeleton == "waves")
        assert waves or isinstance(plan.decode, DecodeBlocks)
        if spec.serving.kv_layout == "interleaved":
            assert isinstance(plan.decode, DecodeWaves) == (plan.recipe.decode.read == "all_heads")


def test_all_heads_are_read_at_once_where_words_hold_k_and_v_of_whole_heads_and_queries_are_few() -> None:
    def read(decode_len: int = 1, **model: Any) -> str:
        spec = replace(TINY, model=replace(TINY.model, **model), serving=replace(TINY.serving, decode_len=decode_len))
        recipe = next(plan.recipe for plan in plan_spec(spec, "tpu7x", tuned=TunedTiles()) if plan.kind == "decode")
        assert recipe.decode is not None
        return recipe.decode.read

    assert read() == "all_heads"
    assert read(q_heads=32, kv_heads=8) == "all_heads"
    assert read(q_heads=10, kv_heads=1, head_dim=80) == "all_heads"
    assert read(decode_len=4) == "all_heads"
    assert read(q_heads=40, kv_heads=10) == "all_heads"
    assert read(q_heads=50, kv_heads=10) == "split_words", "so many rows of scores take longer than the fetch"
    assert read(q_heads=128, kv_heads=8) == "all_heads", "scores of one KV head's set are kept"
    assert read(decode_len=4, q_heads=32, kv_heads=8) == "all_heads"
    assert read(decode_len=8, q_heads=32, kv_heads=8) == "split_words", "so many rows of a matmul take longer, too"
    assert read(head_dim=256) == "all_heads", "a head is two rows of registers"
    assert read(head_dim=256, q_heads=10, kv_heads=5) == "split_words", (
        "lanes are of one KV head each only for powers of two"
    )
    assert read(head_dim=64) == "all_heads", "a row that holds K and V is taken as both"
    assert read(kv_dtype="float8_e4m3fn") == "all_heads", "a word holds K and V of two heads"
    assert read(kv_dtype="int8", head_dim=256) == "split_rows", (
        "heads of two registers are read so where they have 16 bits"
    )
    assert read(q_dtype="float32", kv_dtype="float32") == "strided"


def test_tuned_tiles_of_another_decode_loop_are_left_alone() -> None:
    decode, mixed = (next(one for one in plan_spec(TINY, "tpu7x") if one.kind == kind) for kind in ("decode", "mixed"))
    blocks = next(decode_blocks.choices(TINY, chip("tpu7x"), TINY.serving.token_buckets[-1]))
    evidence = {"score": 0.5, "seed": 0, "complete": True, "toolchain": {"libtpu": "1"}}
    for plan in (decode, mixed):
        block = asdict(replace(plan.block, tile=128)) if isinstance(plan.block, BlockTiles) else None
        data = {"decode": asdict(blocks), "block": block}
        entry = Entry(key_of(TINY, plan.kind, plan.tokens), data, evidence, "tuned.json: entries[0]")
        found = next(
            one
            for one in plan_spec(TINY, "tpu7x", tuned=TunedTiles([entry]))
            if one.tokens == plan.tokens and one.kind == plan.kind
        )
        assert found.decode == plan.decode
        rules = f"{entry.origin}; decode by the rule, whose loop is another"
        assert found.origin == ("rule: the tuned tiles are of another decode loop" if block is None else rules)


@given(specs(), st.sampled_from(TPU_TARGETS))
def test_tiles_of_a_wave_are_whole_pages_and_registers_and_no_longer_than_needed(spec: Spec, target: str) -> None:
    serving, model = spec.serving, spec.model
    for plan in plans_of(spec, target):
        tiles = plan.decode
        if not isinstance(tiles, DecodeWaves):
            continue
        assert tiles.tile % serving.page_size == 0
        assert tiles.tile % LANES == 0
        apart = serving.kv_layout == "separate"
        cleared = sublane_tile_tokens(model) if apart else RowDims.of(model).sublane_tile
        assert tiles.tile % cleared == 0, "its tail is cleared by sublane tiles"
        shortest, longest = [power_of_two_from(of(serving.context_lens)) for of in (min, max)]
        token_bytes = math.prod(kv_page_shape(spec)) // serving.page_size * np.dtype(model.kv_dtype).itemsize
        few_bytes = min(longest, power_of_two_to(LEAST_TILE_BYTES // token_bytes))
        needed = (serving.page_size, LANES, shortest, few_bytes)
        assert tiles.tile <= max(needed), "a tile is computed whole, however short the sequence"
        assert tiles.tile // 2 < max(needed)
        assert {tiles.max_rows} == sequences(spec, plan)


@given(specs(), st.sampled_from(TPU_TARGETS))
def test_waves_fit_and_are_fetched_far_enough_ahead_where_there_is_room(spec: Spec, target: str) -> None:
    for plan in plans_of(spec, target):
        tiles = plan.decode
        if not isinstance(tiles, DecodeWaves):
            continue
        assert 1 <= tiles.tiles_per_wave <= 8
        assert tiles.lookahead >= 2, "one wave has its scores made, one its probabilities, one is fetched"
        assert tiles.wave_buffers == tiles.lookahead + 1
        assert tiles.tiles_per_wave <= tiles.write_buffers, "a wave may end as many sequences"
        kv = next(buffer for buffer in tiles.scratch(spec, plan.recipe) if buffer.name == "kv")
        wave = kv.vmem_bytes // tiles.wave_buffers
        assert tiles.tiles_per_wave == 1 or wave <= WAVE_BYTES
        more = replace(tiles, lookahead=tiles.lookahead + 1)
        room = plan.vmem_bytes - plan.vmem_bytes // 16 - VMEM_HEADROOM
        assert (tiles.lookahead - 1) * wave >= IN_FLIGHT_BYTES or vmem_need(spec, more, plan.recipe) > room
        scalars = sum(math.prod(buffer.shape) for buffer in tiles.scratch(spec, plan.recipe) if buffer.dtype == "smem")
        assert 4 * scalars < SMEM_RESERVE // 2, "the budget does not count them"


@pytest.mark.parametrize("target", TPU_TARGETS)
@pytest.mark.parametrize(
    "spec",
    [spec for spec in SPECS if spec.serving.kv_layout == "separate"],
    ids=lambda s: f"{s.name} {s.layer}".strip(),
)
def test_decode_rows_of_a_mixed_program_go_by_smaller_waves_of_the_same_tiles(spec: Spec, target: str) -> None:
    found = {plan.kind: plan.decode for plan in plan_spec(spec, target, tuned=TunedTiles.of("cpu"))}  # the rules
    decode, mixed = found["decode"], found["mixed"]
    assert isinstance(decode, DecodeWaves) and isinstance(mixed, DecodeWaves)
    assert decode.tile == mixed.tile
    assert decode.tiles_per_wave > mixed.tiles_per_wave


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "wanted", "padded"),
    [
        # KV heads and rows of a set, sets; whether rows are no query's
        (8, 8, (8, 8, 1), False),
        (4, 2, (4, 8, 1), True),
        (32, 8, (2, 8, 4), False),
        (12, 3, (2, 8, 2), True),
        (9, 3, (1, 8, 3), True),
        (5, 1, (1, 8, 1), True),
        (16, 2, (1, 8, 2), False),
        (32, 2, (1, 16, 2), False),
    ],
)
def test_heads_share_the_rows_of_a_matmul_where_their_groups_fill_a_register(
    q_heads: int, kv_heads: int, wanted: tuple[int, ...], padded: bool
) -> None:
    model = Attention(q_heads, kv_heads, 128, "bfloat16", "bfloat16", 1.0)
    sets = Sets.of(replace(TINY, model=model), "separate")
    assert (sets.heads, sets.rows, sets.count) == wanted
    assert sets.padded(model) == padded
    assert sets.heads * model.group <= sets.rows
    assert sets.heads * sets.count >= kv_heads


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
        assert plan.smem_need == smem_need(spec) < plan.smem_bytes == device.smem_bytes


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
    assert np.dtype("int32").itemsize * (4 + 4 * 32 + 5 + 3) == smem_need(TINY)


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
        kernels = {"": 1, "decode": len(DECODE) if plan.recipe.decode else 0}
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
    assert smem_need(drafting) == smem_need(TINY) + 4 * TINY.serving.max_num_seqs * 4


def decode_plan(target: str, **changes: object) -> KernelPlan:
    """Of a spec with separate K and V."""
    served = {key: changes.pop(key) for key in ("context_lens", "max_model_len") if key in changes}
    serving = replace(TINY.serving, kv_layout="separate", page_size=128, num_pages=1024, **served)  # type: ignore[arg-type]
    spec = replace(TINY, model=replace(TINY.model, **changes), serving=serving)  # type: ignore[arg-type]
    return next(plan for plan in plan_spec(spec, target, tuned=TunedTiles()) if plan.kind == "decode")


@pytest.mark.parametrize("target", TPU_TARGETS)
def test_the_mxu_takes_8_bits_as_they_are_stored_where_it_has_such_a_product(target: str) -> None:
    def way(kv_dtype: str, q_dtype: str = "bfloat16") -> str:
        recipe = decode_plan(target, kv_dtype=kv_dtype, q_dtype=q_dtype).recipe.decode
        assert recipe is not None
        return recipe.kv_matmul

    assert way("bfloat16") == way("float8_e4m3fn") == way("float8_e5m2") == "as_stored"
    assert way("int8") == ("converted" if target == "tpu7x" else "int8_parts")
    assert way("float8_e4m3fn", "float32") == way("int8", "float32") == "converted"


def test_a_tile_of_few_heads_is_long_even_where_some_sequences_are_short() -> None:
    def tile(**changes: object) -> int:
        decode = decode_plan("tpu7x", q_heads=8, max_model_len=4096, **changes).decode
        assert isinstance(decode, DecodeWaves)
        return decode.tile

    assert tile(kv_heads=8, context_lens=(256, 4096)) == 256
    assert tile(kv_heads=1, context_lens=(256, 4096)) == 1024
    assert tile(kv_heads=1, context_lens=(256, 512)) == 512
    assert tile(kv_heads=1, context_lens=(256,)) == 256
    assert tile(kv_heads=1, context_lens=(256, 4096), kv_dtype="int8") == 1024  # at most, however few the bytes
    assert tile(kv_heads=1, context_lens=(2048, 4096), kv_dtype="int8") == 2048
