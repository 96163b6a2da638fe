"""Shapes of the semaphores and of the tile queue, which kernels of one loop have in common whatever their cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

WAVE_SHAPES: Final[Mapping[str, str]] = {
    "tile_seq": "TILE_BUFFERS",
    "tile_first": "TILE_BUFFERS",
    "tile_left": "TILE_BUFFERS",
    "last_slot": "MAX_ROWS + 1",
    "kv_sem": "WAVE_BUFFERS",
    "load_sem": "LOADS",
    "unit_sem": "WRITE_BUFFERS",
    "out_sem": "1",
}
BLOCK_SHAPES: Final[Mapping[str, str]] = {
    "kv_sem": "KV_BUFFERS",
    "new_sem": "NEW_BUFFERS",
    "old_sem": "PAGE_BUFFERS",
    "write_sem": "PAGE_BUFFERS",
    "q_sem": "KV_BUFFERS",
    "out_sem": "1",
}
