"""Plans of decode kernels: which loop they have, its tiles and its waves."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from drawn_specs import SPECS, TINY, plans_of, sequences, specs
from hypothesis import given
from hypothesis import strategies as st

from rpac.contract.arrays import LANES, kv_page_shape
from rpac.contract.attention import Attention
from rpac.devices.chip import TPU_TARGETS, chip
from rpac.plan import (
    BlockTiles,
    DecodeBlocks,
    DecodeWaves,
    KernelPlan,
    RowDims,
    decode_blocks,
    plan_spec,
)
from rpac.plan.access import reads_all_heads
from rpac.plan.buffers import sublane_tile_tokens
from rpac.plan.decode_waves import LEAST_TILE_BYTES, WAVE_BYTES
from rpac.plan.families import vmem_need
from rpac.plan.page_table import SMEM_RESERVE
from rpac.plan.planner import VMEM_HEADROOM
from rpac.plan.query_rows import Sets
from rpac.plan.sizes import IN_FLIGHT_BYTES, most_visible_tokens, power_of_two_from, power_of_two_to
from rpac.plan.tuned import Entry, TunedTiles, key_of
from rpac.spec import Spec


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
    assert read(head_dim=256, q_heads=10, kv_heads=5) == "split_words", "a lane is not of one KV head alone"
    assert read(head_dim=64) == "all_heads", "a row that holds K and V is taken as both"
    assert read(kv_dtype="float8_e4m3fn") == "all_heads", "a word holds K and V of two heads"
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
        few_tiles = most_visible_tokens(spec, spec.serving.decode_len) <= 2 * tiles.tile
        assert 1 <= tiles.tiles_per_wave <= (16 if few_tiles else 8)
        assert tiles.lookahead >= 2, "one wave has its scores made, one its probabilities, one is fetched"
        assert tiles.wave_buffers == tiles.lookahead + 1
        assert min(tiles.tiles_per_wave, tiles.max_rows) <= tiles.write_buffers, "a wave may end as many sequences"
        kv = next(buffer for buffer in tiles.scratch(spec, plan.recipe) if buffer.name == "kv")
        wave = kv.vmem_bytes // tiles.wave_buffers
        assert tiles.tiles_per_wave == 1 or wave <= WAVE_BYTES
        more = replace(tiles, lookahead=tiles.lookahead + 1)
        room = plan.vmem_bytes - plan.vmem_bytes // 16 - VMEM_HEADROOM
        tiles_of_all = tiles.max_rows * math.ceil(most_visible_tokens(spec, spec.serving.decode_len) / tiles.tile)
        whole_batch = tiles.lookahead * tiles.tiles_per_wave >= tiles_of_all
        enough = (tiles.lookahead - 1) * wave >= IN_FLIGHT_BYTES or whole_batch
        assert enough or vmem_need(spec, more, plan.recipe) > room
        scalars = sum(math.prod(buffer.shape) for buffer in tiles.scratch(spec, plan.recipe) if buffer.dtype == "smem")
        if plan.recipe.page_table == "smem":
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
