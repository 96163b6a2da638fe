"""What templates show of tiles: each number that follows from those of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rpac.contract.arrays import LANES, SUBLANES, packing
from rpac.contract.attention import Attention
from rpac.kernels.decode import interleaved_rows, separate_rows
from rpac.plan import BlockRecipe, BlockTiles, Buffer, DecodeBlocks, DecodeWaves, Recipe, RowDims, XlaTiles
from rpac.plan.buffers import new_buffers, page_buffers, sublane_tile_tokens
from rpac.plan.prefill import PACED_ROWS
from rpac.spec import Spec

MASKED = -2.0e38  # a score that weighs nothing
CLEAR_UNITS = 16  # zeroed by one turn of a loop: enough to hide what the turn itself costs
SPLIT_PHASES = 2  # of a decode step that the split of the next block is spread over: products with K and with V
SPLIT_PIECE = 128  # bfloat16 rows that are split at once beside other work: 8 registers
SHORT_SPLIT_PIECE = 256  # likewise where a decode kernel shares its program: slower by 5%, for half as many operations
SPLIT_ROWS = 512  # bfloat16 rows that are split into K and V in one turn of a loop: 32 registers
SORT_TOKENS = 16  # tokens of a query block that one turn of a loop moves; divides every query block


def tile_context(
    spec: Spec,
    tiles: DecodeBlocks | DecodeWaves | BlockTiles | XlaTiles | None,
    recipe: Recipe,
    *,
    shared: bool = False,
) -> Mapping[str, Any]:
    """The numbers of a plan's tiles. `shared`: a decode kernel that shares its program with another."""
    if tiles is None:
        return {}
    if isinstance(tiles, DecodeWaves):
        return _group_context(spec, tiles, recipe)
    page = spec.serving.page_size
    context: dict[str, Any] = {**old_fields(tiles), "block_pages": tiles.block // page}
    if isinstance(tiles, XlaTiles):
        return context
    rows = RowDims.of(spec.model)
    context |= {
        "ahead": tiles.buffers - 1,
        "buffers_declared": [declared(buffer) for buffer in tiles.scratch(spec, recipe)],
    }
    if isinstance(tiles, DecodeBlocks):
        groups = spec.model.kv_heads // tiles.heads_per_matmul
        context |= {
            "tile": tiles.block,
            **_clear_context(tiles.block, rows),
            **_split_context(
                tiles.block, rows, SHORT_SPLIT_PIECE if shared else SPLIT_PIECE, packing(spec.model.kv_dtype)
            ),
            "groups": groups,
            **interleaved_rows(spec, tiles.heads_per_matmul),
        }
        context["split_share"] = math.ceil(context["splits"] / (SPLIT_PHASES * groups))
        return context
    kernel = recipe.block
    assert kernel is not None
    return context | {
        **_clear_context(tiles.diagonal_block(page), rows),
        **_split_context(tiles.diagonal_block(page), rows, SPLIT_ROWS, packing(spec.model.kv_dtype)),
        "tiles": tiles.block // tiles.tile,
        # Added to the position of a block's first query and divided by a tile: the tiles that some query's window leaves.
        "window_offset": tiles.q_block - (spec.model.sliding_window or 0) + tiles.tile - 1,
        "tile_rows": tiles.tile * rows.token_rows,
        "computed_units": tiles.diagonal_block(page) // sublane_tile_tokens(spec.model),
        "piece": tiles.diagonal_block(page),
        "pieces": tiles.tile // tiles.diagonal_block(page),
        "q_rows": spec.model.group * tiles.q_block,
        "row_steps": tiles.steps(spec.model, 1),
        **_sort_context(spec.model, tiles.q_block, kernel),
        "carries": kernel.pipelined,
        **_tie_context(kernel),
        "diagonal_turns": spec.model.kv_heads // tiles.diagonal_heads,
        "masks_by_mxu": kernel.mask == "matmul",
        "clear_keys": kernel.mask == "matmul",
        "turns": spec.model.kv_heads // tiles.heads,
        **update_context(tiles.update_lookahead),
        "merge_rows": tiles.merge_tokens * rows.token_rows,
    }


def _tie_context(kernel: BlockRecipe) -> Mapping[str, Any]:
    """How far ahead of their weights scores are made, and what the weights wait for; how the sums of weights lie."""
    pacing, transposed = kernel.pacing, kernel.scores == "transposed"
    by_lane = pacing is not None and not transposed  # a part of each sum in every lane, so of a sink's
    context: dict[str, Any] = {
        "turned": transposed,
        "own_values": kernel.unpadded_values,
        "tied": pacing is not None,
        "sum_of": "across({})".format if by_lane else str,  # of what row_sum holds
        "sum_of_sink": "1 / 128" if by_lane else "1.0",
        "scores_ahead": kernel.lookahead[0],
        "diagonal_ahead": kernel.lookahead[1],
    }
    if pacing is None:
        return context
    return context | {
        "tied_to": pacing.wait_for[0],
        "diagonal_tied_to": pacing.wait_for[1],
        "score_slots": pacing.slots,
        "score_tokens": pacing.tokens,
        "tied_rows": PACED_ROWS,
    }


def _sort_context(model: Attention, q_block: int, kernel: BlockRecipe) -> Mapping[str, Any]:
    """How the rows of a query block go from their order by token to one by head, and back."""
    exchange = kernel.transposed_heads
    context = {"sort_tokens": SORT_TOKENS, "sort_pieces": q_block // SORT_TOKENS, "exchange": exchange}
    if not exchange:
        return {**context, "sort_rows": SORT_TOKENS * model.q_heads}
    # Where rows lie along lanes, whole registers of them are sorted back, several at a time: one hides the other's waits.
    at_once = 2 if kernel.splits_words else 4
    transposed = kernel.scores == "transposed"
    back = min(at_once * max(LANES // model.group, SORT_TOKENS), q_block) if transposed else SORT_TOKENS
    return {
        **context,
        "back_tokens": back,
        "back_pieces": q_block // back,
        "back_rows": back * model.group,
        "back_groups": back // exchange,
        "exchanges": tuple(1 << bit for bit in reversed(range(exchange.bit_length() - 1))),
        "head_words": model.group // packing(model.q_dtype),
        "vector_rows": SUBLANES * packing(model.q_dtype),
        "sort_rows": SORT_TOKENS * model.group,
        "sort_groups": SORT_TOKENS // exchange,
    }


def _clear_context(computed: int, rows: RowDims) -> Mapping[str, Any]:
    """How tokens behind a sequence's end are cleared where K and V are interleaved, and `computed` are computed at once."""
    clear_units = math.gcd(computed // rows.sublane_tile, CLEAR_UNITS)
    return {
        "computed": computed,
        "clear_units": clear_units,
        "clears": computed // (rows.sublane_tile * clear_units),
    }


def _split_context(piece: int, rows: RowDims, at_once: int, pack: int) -> Mapping[str, Any]:
    """How words of K and V are split, `at_once` rows in one go, within pieces of `piece` tokens: its parts, `pack` of them,
    share words.
    """
    part_rows = piece // pack * rows.token_rows
    split_rows = math.gcd(part_rows, at_once)
    return {
        "part": piece // pack,
        "part_rows": part_rows,
        "piece_rows": pack * part_rows,
        "split_rows": split_rows,
        "split_words": split_rows // pack,
        "splits": part_rows // split_rows,
    }


def _group_context(spec: Spec, tiles: DecodeWaves, recipe: Recipe) -> Mapping[str, Any]:
    model, kernel = spec.model, recipe.decode
    assert kernel is not None
    return {
        **old_fields(tiles),
        "groups": tiles.wave_buffers,
        "slots": tiles.wave_buffers * tiles.tiles_per_wave,
        "group_tokens": tiles.tiles_per_wave * tiles.tile,
        "tile_pages": tiles.tile // spec.serving.page_size,
        "computed": tiles.tile,
        "computed_units": tiles.tile // sublane_tile_tokens(model),
        "clear_keys": False,
        # A window begins at any page, and so do its tiles.
        "even": model.sliding_window is None
        and math.gcd(model.attention_chunk or 0, spec.serving.max_model_len) % tiles.tile == 0,
        "table_end": spec.serving.max_num_seqs * spec.serving.pages_per_seq - 1,
        **separate_rows(spec, kernel.read == "token_pairs"),
        "buffers_declared": [declared(buffer) for buffer in tiles.scratch(spec, recipe)],
    }


def update_context(lookahead: int) -> Mapping[str, Any]:
    """How far ahead of the merging a page's new tokens are fetched, and how many of these and of pages are in flight."""
    return {
        "update_ahead": lookahead,
        "new_buffers": new_buffers(lookahead),
        "page_buffers": page_buffers(lookahead),
    }


def declared(buffer: Buffer) -> Mapping[str, str]:
    """How a scratch array is written in a kernel's call."""
    if buffer.dtype == "smem":
        declaration = f"pltpu.SMEM({buffer.shape}, jnp.int32)"
    elif buffer.dtype == "dma":
        declaration = f"pltpu.SemaphoreType.DMA({buffer.shape})"
    else:
        declaration = f"pltpu.VMEM({buffer.shape}, jnp.{buffer.dtype})"
    old = {"query_onehot": "query_onehot", "mask_bias": "mask_bias", "kv_swapped": "kv_swapped"}
    return {"name": old.get(buffer.name, buffer.name), "declaration": declaration, "note": buffer.note}


def old_fields(tiles: Any) -> dict[str, Any]:
    """The fields of tiles by the names that the old templates know."""
    old = {
        "heads_per_matmul": "pair",
        "tiles_per_wave": "step",
        "lookahead": "ahead",
        "write_buffers": "writes",
        "max_rows": "loaded",
        "spare_mxu_lanes": "spare",
    }
    return {old.get(name, name): value for name, value in vars(tiles).items()}
