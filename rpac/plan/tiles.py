"""The names of tiles, from the modules of their families; for imports that have not moved yet."""

from rpac.plan.buffers import MERGE_TOKENS, NEW_BUFFERS, PAGE_BUFFERS, UPDATE_AHEAD
from rpac.plan.decode_blocks import DecodeTiles
from rpac.plan.decode_waves import GroupTiles
from rpac.plan.portable import XlaTiles
from rpac.plan.prefill import PACED_ROWS as TIED_ROWS
from rpac.plan.prefill import BlockTiles

__all__ = [
    "MERGE_TOKENS",
    "NEW_BUFFERS",
    "PAGE_BUFFERS",
    "TIED_ROWS",
    "UPDATE_AHEAD",
    "BlockTiles",
    "DecodeTiles",
    "GroupTiles",
    "XlaTiles",
]
