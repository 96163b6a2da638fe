"""What kernels with bounds checks keep of a batch: the scratch arrays that say which of its sequences cannot be.

A sequence is *bad* if its length, its new tokens or one of its page ids cannot be. It gets NaN, and neither reads nor writes
a page with a bad id.
"""

from __future__ import annotations

from rpac.plan.buffers import Buffer
from rpac.plan.recipe import PageTable
from rpac.spec import Spec

_BAD = "whether each sequence is bad"


def wave_checks(spec: Spec, table: PageTable, buffers: int, max_rows: int, write_buffers: int) -> tuple[Buffer, ...]:
    """Those of a decode kernel by waves."""
    if not spec.serving.bounds_checks:
        return ()
    return (
        *(
            (Buffer("tile_tokens", (buffers,), "smem", "tokens of it whose pages are fetched"),)
            if table == "hbm"
            else ()
        ),
        Buffer("bad_row", (max_rows + 1,), "smem", f"{_BAD}, so far"),
        Buffer("good_rows", (1,), "smem", "how many sequences are not bad, of those that have come to their end"),
        *_written(spec, write_buffers),
    )


def block_checks(spec: Spec, buffers: int, max_rows: int, write_buffers: int) -> tuple[Buffer, ...]:
    """Those of a decode kernel by blocks."""
    if not spec.serving.bounds_checks:
        return ()
    return (*_fetched(buffers, max_rows), *_written(spec, write_buffers))


def query_checks(spec: Spec, buffers: int, pages: int) -> tuple[Buffer, ...]:
    """Those of a kernel of query blocks that updates `pages` pages at once; MIXED are for mixed batches alone."""
    if not spec.serving.bounds_checks:
        return ()
    rows = spec.serving.max_num_seqs
    updates = (Buffer("updated", (pages,), "smem", "whether each page under update is written"),)
    return (
        *_fetched(buffers, rows),
        Buffer("q_starts", (rows,), "smem", "the row of each sequence's first new token"),
        Buffer("q_lens", (rows,), "smem", "the number of its new tokens"),
        Buffer("row_lens", (rows,), "smem", "the number of its tokens"),
        *(updates if spec.model.update_cache else ()),
    )


MIXED = ("q_starts", "q_lens", "row_lens")


def _fetched(buffers: int, rows: int) -> tuple[Buffer, ...]:
    return (
        Buffer("fetched", (buffers,), "smem", "pages that are fetched into each buffer"),
        Buffer("bad_row", (rows,), "smem", _BAD),
    )


def _written(spec: Spec, write_buffers: int) -> tuple[Buffer, ...]:
    """How many writes of a sequence are on their way, where it may have several."""
    if spec.serving.decode_len == 1 or not spec.model.update_cache:
        return ()
    return (Buffer("written", (write_buffers,), "smem", "copies to the cache that are on their way, of each sequence"),)
