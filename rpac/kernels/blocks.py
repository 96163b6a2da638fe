"""What the decode kernel by blocks shows, where K and V are interleaved: one block of one sequence at a time."""

from __future__ import annotations

import math
from typing import Final

from rpac.contract.arrays import packing
from rpac.kernels.assemble import Kernel
from rpac.kernels.calls import call_of
from rpac.kernels.constants import Constant, tile
from rpac.kernels.model_constants import model_constants
from rpac.kernels.semaphores import BLOCK_WINDOW_SHAPES, window_constants
from rpac.kernels.shared import CLEARED_AT_ONCE, query_row_shapes, scratch_of
from rpac.plan import DecodeBlocks, KernelPlan, RowDims
from rpac.plan.page_table import BlockWindows
from rpac.plan.query_rows import head_rows
from rpac.plan.recipe import Recipe
from rpac.spec import Spec

SPLIT_PHASES: Final = 2  # of an iteration that the split of the next block is spread over: matmuls with K and with V
SPLIT_ROWS: Final = 128  # rows of 16 bits of each part that are split at once beside other work: 8 registers
SHORT_SPLIT_ROWS: Final = 256  # the same in a program with another kernel: slower by 5%, for half as much code

_NAMES: Final = {"unit_out": "new_out", "unit_sem": "write_sem"}
_SHAPES: Final = {
    "kv": "KV_BUFFERS, BLOCK * TOKEN_ROWS, LANES",
    "k_words": "2, PART_TOKENS * WORD_ROWS, LANES",
    "v_words": "2, PART_TOKENS * WORD_ROWS, LANES",
    "row_words": "2, PACKING, PART_TOKENS * WORD_ROWS, LANES",
    "q_all": "MAX_TOKENS, Q_HEADS, HEAD_DIM",
    "new_keys": "MAX_TOKENS, KV_HEADS, HEAD_DIM",
    "new_values": "MAX_TOKENS, KV_HEADS, HEAD_DIM",
    "packed": "SUBLANE_TILE * WORD_ROWS, LANES",
    "q_rows": "KV_HEADS * HEAD_QUERY_ROWS, HEADS_PER_MATMUL * HEAD_LANES",
    **query_row_shapes("KV_HEADS * HEAD_QUERY_ROWS"),
    "row_max": "KV_HEADS * HEAD_QUERY_ROWS, LANES",
    "row_sum": "KV_HEADS * HEAD_QUERY_ROWS, LANES",
    "acc": "KV_HEADS * HEAD_QUERY_ROWS, HEAD_LANES",
    **BLOCK_WINDOW_SHAPES,
    "fetched": "KV_BUFFERS",
    "bad_row": "MAX_ROWS",
    "written": "WRITE_BUFFERS",
    "kv_sem": "KV_BUFFERS",
    "load_sem": "LOADS",
    "unit_sem": "WRITE_BUFFERS",
    "out_sem": "WRITE_BUFFERS",
    "lse_sem": "WRITE_BUFFERS",
}


def decode_blocks(spec: Spec, plan: KernelPlan, recipe: Recipe) -> Kernel:
    """The decode kernel of a plan."""
    tiles = plan.decode
    assert isinstance(tiles, DecodeBlocks)
    constants = [*model_constants(spec, plan), *_tile_constants(spec, tiles, shared=plan.block is not None)]
    call = call_of(spec, "decode", plan.recipe)
    several = spec.serving.decode_len > 1
    tokens = "WRITE_BUFFERS, DECODE_LEN" if several else "WRITE_BUFFERS"
    shapes = _SHAPES | {
        "unit_out": f"WRITE_BUFFERS, {'NEW_TILES, ' if several else ''}SUBLANE_TILE_ROWS, LANES",
        "out_rows": f"{tokens}, Q_HEADS, HEAD_DIM",
        "lse_rows": f"{tokens}, PADDED_Q_HEADS, LANES",
    }
    context = {
        "call": call,
        "kernel_class": "DecodeKernel",
        "heads_per_matmul": "one" if tiles.heads_per_matmul == 1 else "several",
        "new_words": "on_demand",
        "write_buffers": "ring",
        "scratch": scratch_of(tiles.scratch(spec, plan.recipe), shapes, constants, _NAMES),
    }
    return Kernel("skeletons/decode_blocks.py.jinja", context, constants, "DECODE_")


def _tile_constants(spec: Spec, tiles: DecodeBlocks, *, shared: bool) -> list[Constant]:
    """The tiles, and what follows from them. `shared`: the program has another kernel."""
    model, drafts = spec.model, spec.serving.decode_len
    rows, pack = RowDims.of(model), packing(model.kv_dtype)
    part_rows = tiles.block // pack * rows.token_rows
    split_rows = math.gcd(part_rows, SHORT_SPLIT_ROWS if shared else SPLIT_ROWS)
    steps = part_rows // split_rows
    matmuls = model.kv_heads // tiles.heads_per_matmul
    return [
        tile("BLOCK", tiles.block, "tokens of a KV block"),
        tile("BLOCK_PAGES", "BLOCK // PAGE_SIZE"),
        tile("KV_BUFFERS", tiles.buffers, "blocks in VMEM: one that is computed, the others on their way"),
        tile("LOOKAHEAD", "KV_BUFFERS - 1", "iterations that the fetch is ahead"),
        *window_constants(BlockWindows.of_decode(spec, tiles.block, tiles.buffers)),
        tile("WRITE_BUFFERS", tiles.write_buffers, "sequences whose results may be on their way out"),
        tile("MAX_ROWS", tiles.max_rows, "sequences of the largest batch"),
        tile("MAX_TOKENS", tiles.max_rows * drafts, "new tokens, loaded all at once"),
        tile("LOADS", 3 if model.update_cache else 1, "arrays of new tokens"),
        tile("HEAD_QUERY_ROWS", head_rows(spec), "query rows of a KV head, up to whole sublane tiles"),
        tile("HEADS_PER_MATMUL", tiles.heads_per_matmul, "KV heads side by side in a matmul"),
        tile(
            "NEW_TILES",
            (drafts - 2) // rows.sublane_tile + 2,
            "sublane tiles that the new tokens of a sequence may lie in",
        ),
        tile(
            "CLEARED_TILES",
            math.gcd(tiles.block // rows.sublane_tile, CLEARED_AT_ONCE),
            "sublane tiles that are cleared at once",
        ),
        tile("PART_TOKENS", "BLOCK // PACKING", "a word holds one token of each of PACKING parts of a block"),
        tile("PART_ROWS", "PART_TOKENS * TOKEN_ROWS"),
        tile("PACKING_BITS", pack.bit_length() - 1, "log2(PACKING)"),
        tile("SPLIT_ROWS", split_rows, "rows of each part that a step of the split takes"),
        tile("SPLIT_WORDS", "SPLIT_ROWS // PACKING"),
        tile("SPLIT_STEPS", "PART_ROWS // SPLIT_ROWS"),
        tile(
            "SPLIT_STEPS_PER_MATMUL",
            math.ceil(steps / (SPLIT_PHASES * matmuls)),
            "so that the split ends with the block",
        ),
    ]
