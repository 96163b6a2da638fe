"""Which tiles the kernels of a case work with, and the fields of tiles that others decide."""

from __future__ import annotations

from typing import Final, TypeAlias

from rpac.plan.tiles import BlockTiles, DecodeTiles, GroupTiles, KernelPlan
from rpac.spec import Spec

MIN_Q_BLOCK: Final = 16

Tiles: TypeAlias = DecodeTiles | GroupTiles | BlockTiles


def is_legal(spec: Spec, plan: KernelPlan, tiles: Tiles) -> bool:
    """Whether the kernels work with these tiles at all."""
    model, serving = spec.model, spec.serving
    if isinstance(tiles, GroupTiles):
        return tiles.tile % serving.page_size == 0
    whole_pages = tiles.block % serving.page_size == 0 and tiles.block <= power_of_two_from(serving.max_model_len)
    if isinstance(tiles, DecodeTiles):
        return whole_pages and model.kv_heads % tiles.pair == 0
    whole_tiles = tiles.block % tiles.tile == 0 and tiles.tile % serving.page_size == 0
    copies = {copy_sizes_of(plan.kind, tiles.q_block, tokens) for tokens in plan.tokens}
    if plan.kind == "prefill":
        fitting = serving.prefill_chunk % tiles.q_block == 0
    else:
        fitting = tiles.q_block <= max(power_of_two_from(plan.tokens[-1]), MIN_Q_BLOCK)
    whole_turns = model.kv_heads % tiles.heads == 0 and model.kv_heads % tiles.diagonal_heads == 0
    two_chunks = tiles.q_block <= (model.attention_chunk or tiles.q_block)  # in which a block lies, at most
    return whole_pages and whole_tiles and whole_turns and fitting and two_chunks and len(copies) == 1


def copy_sizes_of(kind: str, q_block: int, tokens: int) -> tuple[int, ...]:
    """The sizes of copies, in tokens, that together make any part of a query block that a bucket can hold."""
    if kind == "prefill":
        return (q_block,)
    return tuple(1 << bit for bit in reversed(range(power_of_two_to(min(q_block, tokens)).bit_length())))


def step_rows_of(rows: int, most: int) -> int:
    """The largest part of a block of query rows, all parts alike, that is at most `most`."""
    return next(rows // parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= most)


def power_of_two_to(value: int) -> int:
    """The largest power of two that is not above `value` (at least 1)."""
    return 1 << (max(value, 1).bit_length() - 1)


def power_of_two_from(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()
