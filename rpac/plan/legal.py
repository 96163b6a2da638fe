"""Which tiles the kernels of a case work with, and the fields of tiles that others decide."""

from __future__ import annotations

from typing import Final, TypeAlias

from rpac.plan.kernel_plan import KernelPlan
from rpac.plan.sizes import copy_sizes_of, power_of_two_from
from rpac.plan.tiles import BlockTiles, DecodeTiles, GroupTiles
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
