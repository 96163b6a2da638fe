"""Shapes of the semaphores and of the tile queue, which kernels of one loop have in common whatever their cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rpac.kernels.constants import Constant, tile
from rpac.plan.page_table import BlockWindows

WAVE_SHAPES: Final[Mapping[str, str]] = {
    "tile_seq": "TILE_BUFFERS",
    "tile_first": "TILE_BUFFERS",
    "tile_left": "TILE_BUFFERS",
    "last_slot": "MAX_ROWS + 1",
    "tile_tokens": "TILE_BUFFERS",
    "good_rows": "1",
    "bad_row": "MAX_ROWS + 1",
    "written": "WRITE_BUFFERS",
    "windows": "TABLE_WINDOWS * WINDOW_ENTRIES",
    "windows_end": "TABLE_WAVES",
    "tile_place": "TABLE_WAVES * TILES_PER_WAVE",
    "kv_place": "TILE_BUFFERS",
    "window_sem": "TABLE_WAVES",
    "kv_sem": "WAVE_BUFFERS",
    "load_sem": "LOADS",
    "unit_sem": "WRITE_BUFFERS",
    "out_sem": "1",
}
BLOCK_WINDOW_SHAPES: Final[Mapping[str, str]] = {
    "windows": "TABLE_WINDOWS * WINDOW_ENTRIES",
    "window_place": "TABLE_WINDOWS",
    "table_at": "TABLE_POSITION",
    "kv_place": "KV_BUFFERS",
    "window_sem": "TABLE_WINDOWS",
}
BLOCK_SHAPES: Final[Mapping[str, str]] = {
    **BLOCK_WINDOW_SHAPES,
    "fetched": "KV_BUFFERS",
    "bad_row": "MAX_SEQS",
    "q_starts": "MAX_SEQS",
    "q_lens": "MAX_SEQS",
    "row_lens": "MAX_SEQS",
    "updated": "PAGE_BUFFERS",
    "table_rows": "TABLE_ROWS * LANES",
    "update_at": "2",
    "page_ids": "PAGE_BUFFERS",
    "row_sem": "TABLE_ROWS",
    "kv_sem": "KV_BUFFERS",
    "new_sem": "NEW_BUFFERS",
    "old_sem": "PAGE_BUFFERS",
    "write_sem": "PAGE_BUFFERS",
    "q_sem": "KV_BUFFERS",
    "out_sem": "1",
}


def window_constants(windows: BlockWindows) -> list[Constant]:
    """The constants of page tables in HBM, of a kernel by blocks."""
    return [
        tile("WINDOW_ENTRIES", windows.entries, "of the page tables, fetched at once"),
        tile("TABLE_LOOKAHEAD", windows.lookahead, "blocks from the fetch of page tables to that of their pages"),
        tile("TABLE_WINDOWS", windows.windows, "in SMEM"),
        tile("TABLE_POSITION", windows.position, "numbers that say where a block is"),
    ]
