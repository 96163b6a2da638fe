"""Where kernels have the page tables: whole in SMEM, or in HBM, from where they fetch parts ahead of the pages.

A part is a *window*: some consecutive entries of the tables, all sequences' one after another, that one DMA brings to SMEM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from rpac.contract.arrays import LANES, align, extra_specs, metadata_specs
from rpac.devices.chip import Chip
from rpac.plan.buffers import Buffer, page_buffers
from rpac.plan.recipe import PageTable, Recipe
from rpac.plan.sizes import power_of_two_from
from rpac.spec import Spec

SMEM_RESERVE: Final = 64 << 10  # for what the compiler keeps there itself
INT32_BYTES: Final = 4
LEAST_ENTRIES: Final = 1024  # of page tables in HBM: more than a window has


def options(spec: Spec, device: Chip | None) -> tuple[PageTable, ...]:
    """Where the page tables may be, the rule's first: in SMEM, if they fit beside the other scalars of the batch."""
    fits = device is None or sum(scalar_bytes(spec, "smem")) <= smem_usable(device)
    return ("smem", "hbm") if fits else ("hbm",)


def smem_usable(device: Chip) -> int:
    """Bytes of SMEM that a kernel's scalars and windows may take."""
    return device.smem_bytes - SMEM_RESERVE


def scalar_bytes(spec: Spec, table: PageTable) -> Iterator[int]:
    """Bytes of each array of scalars of a call that kernels have in SMEM."""
    for dims in metadata_specs(spec.serving):
        if dims.name != "page_indices" or table == "smem":
            yield dims.nbytes
    yield from (dims.nbytes for dims in extra_specs(spec) if dims.name == "tree")  # of other arguments there is little


def window_bytes(buffers: Iterable[Buffer]) -> int:
    """Bytes of the windows among a kernel's scratch arrays in SMEM, of what belongs to them, and of what checks keep."""
    return sum(INT32_BYTES * math.prod(one.shape) for one in buffers if one.name in _IN_SMEM)


def entries_of(spec: Spec) -> int:
    """Entries of the page tables of all sequences."""
    return spec.serving.max_num_seqs * spec.serving.pages_per_seq


def window_entries(spec: Spec, pages: int) -> int:
    """Entries of a window, a power of two: it begins at a whole row of 128, as DMAs do, and has `pages` pages from any place in
    that row on where a block of so many may begin.
    """
    model, serving = spec.model, spec.serving
    step = math.gcd(serving.pages_per_seq, pages, LANES)
    if model.sliding_window is not None:
        step = 1
    if model.attention_chunk is not None:
        step = math.gcd(step, model.attention_chunk // serving.page_size)
    entries = power_of_two_from(align(LANES - step + pages, LANES))
    assert entries <= LEAST_ENTRIES, f"a block of {pages} pages"
    return entries


def padded_entries(spec: Spec) -> int:
    """Entries of the page tables with those that are added where they are no whole rows, or fewer than any window has."""
    return max(align(entries_of(spec), LANES), LEAST_ENTRIES)


@dataclass(frozen=True)
class WaveWindows:
    """The windows of a decode kernel by waves: of `entries`, fetched `lookahead` waves before the pages that they name.

    `waves` may have windows on their way, and `windows` are in SMEM at once: those of waves whose pages are fetched later,
    and of waves in flight, up to their patches. Both are powers of two.
    """

    entries: int
    lookahead: int
    waves: int
    windows: int

    @classmethod
    def of(cls, spec: Spec, tile: int, tiles_per_wave: int, lookahead: int) -> WaveWindows:
        """Those of such waves: the fetch of windows runs as far ahead of that of pages as this ahead of their use."""
        ahead = lookahead - 1
        return cls(
            entries=window_entries(spec, tile // spec.serving.page_size),
            lookahead=ahead,
            waves=power_of_two_from(ahead + lookahead),
            windows=power_of_two_from((ahead + lookahead) * tiles_per_wave + 1),
        )

    def buffers(self, tiles_per_wave: int, tile_buffers: int) -> tuple[Buffer, ...]:
        """The scratch arrays."""
        tiles = self.waves * tiles_per_wave
        return (
            Buffer("windows", (self.windows * self.entries,), "smem", "windows of the page tables"),
            Buffer("windows_end", (self.waves,), "smem", "windows fetched up to the end of each wave"),
            Buffer("tile_place", (tiles,), "smem", "where the pages of each tile to be fetched are in `windows`"),
            Buffer("kv_place", (tile_buffers,), "smem", "the same for each tile in flight"),
            Buffer("window_sem", (self.waves,), "dma", "fetches of windows"),
        )


@dataclass(frozen=True)
class BlockWindows:
    """The windows of a kernel by blocks: each block has its own, of `entries`, fetched `lookahead` blocks before its pages.

    `windows` are in SMEM at once. `position`: how many numbers say where a block is.
    """

    entries: int
    lookahead: int
    windows: int
    position: int

    @classmethod
    def of_decode(cls, spec: Spec, block: int, buffers: int) -> BlockWindows:
        """Those of blocks of decode rows, whose patches need them to the end of a block's fetch, `lookahead` blocks later."""
        lookahead = buffers - 1
        return cls(window_entries(spec, block // spec.serving.page_size), lookahead, 2 * lookahead + 1, 2)

    @classmethod
    def of_queries(cls, spec: Spec, block: int, buffers: int) -> BlockWindows:
        """Those of blocks that query blocks attend to."""
        return cls(window_entries(spec, block // spec.serving.page_size), buffers - 1, buffers, 4)

    def buffers(self, kv_buffers: int) -> tuple[Buffer, ...]:
        """The scratch arrays."""
        return (
            Buffer("windows", (self.windows * self.entries,), "smem", "windows of the page tables"),
            Buffer("window_place", (self.windows,), "smem", "where the block's first page is, for each of them"),
            Buffer("table_at", (self.position,), "smem", "where the block is whose window is fetched next"),
            Buffer("kv_place", (kv_buffers,), "smem", "where the pages of each buffer are in `windows`"),
            Buffer("window_sem", (self.windows,), "dma", "fetches of windows"),
        )


def update_buffers(lookahead: int, pages: int) -> tuple[Buffer, ...]:
    """The scratch arrays of an update of `pages` pages at once: the rows of page tables that name the next ones."""
    rows = lookahead + 1
    return (
        Buffer("table_rows", (rows * LANES,), "smem", "rows of the page tables that name pages to update"),
        Buffer("update_at", (2,), "smem", "the sequence and the page whose row is fetched next"),
        Buffer("page_ids", (pages,), "smem", "pages under update"),
        Buffer("row_sem", (rows,), "dma", "fetches of rows"),
    )


def query_windows(spec: Spec, recipe: Recipe, block: int, buffers: int, update_lookahead: int) -> tuple[Buffer, ...]:
    """The scratch arrays of a kernel of query blocks that has page tables in HBM; none where they are in SMEM."""
    if recipe.page_table == "smem":
        return ()
    windows = BlockWindows.of_queries(spec, block, buffers)
    return (*windows.buffers(buffers), *update_buffers(update_lookahead, page_buffers(update_lookahead)))


_IN_SMEM: Final = frozenset(
    (
        "bad_row",
        "q_starts",
        "q_lens",
        "row_lens",
        "windows",
        "windows_end",
        "tile_place",
        "kv_place",
        "window_place",
        "table_at",
        "table_rows",
        "update_at",
        "page_ids",
    )
)
