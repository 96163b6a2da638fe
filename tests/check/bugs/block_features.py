"""Bugs of windows, chunks, soft caps, sinks and log-sum-exps in kernels by blocks of queries."""

from __future__ import annotations

from functools import partial

from mutation import Bug, BugSuite, in_mixed
from small import ALL_FEATURES, INTERLEAVED, ITERATED, LONG_CHUNKS, SEPARATE, featured, iterated_plan, small_plan

WINDOW = (
    Bug("a window one too long", "visible", "token > query - WINDOW", "token >= query - WINDOW"),
    Bug("a window one too short", "visible", "query - WINDOW", "query - WINDOW + 1"),
    Bug(
        "tiles on the window's edge taken for full",
        "PrefillKernel.attend_block",
        "jnp.clip(lax.div(first_query + WINDOW_OFFSET, TILE), 0, count)",
        "0",
    ),
    Bug(
        "a page before the window fetched",
        "PrefillKernel.first_token",
        "first_query + 1 - WINDOW",
        "first_query + 1 - WINDOW - PAGE_SIZE",
    ),
    Bug(
        "the first page of the window not fetched",
        "PrefillKernel.first_token",
        "first_query + 1 - WINDOW",
        "first_query + 1 - WINDOW + PAGE_SIZE",
    ),
    Bug(
        "the window of a block's last query fetched", "PrefillKernel.first_token", "first_query + 1", "first_query + 16"
    ),
    Bug(
        "pages fetched from the start of the table",
        "PrefillKernel.entry",
        "seq * PAGES_PER_SEQ + lax.div(self.first_token(seq, q_block), PAGE_SIZE)",
        "seq * PAGES_PER_SEQ",
    ),
    Bug("full tiles left out", "PrefillKernel.attend_block", "FullTiles(self, buffer, block == 0, begun, full).run()"),
    Bug(
        "tiles on the window's edge attended to again for those on the diagonal",
        "PrefillKernel.attend_partial_tile",
        "index + full",
        "index",
    ),
    Bug(
        "a partial tile left out",
        "PrefillKernel.attend_block",
        "for_each(0, count - full, partial_tile)",
        "for_each(1, count - full, partial_tile)",
    ),
)
FEATURES = (
    Bug(
        "sinks taken as logarithms to base 2",
        "PrefillKernel.set_to_sink",
        "jnp.full((rows.size, LANES), self.sinks[q_head]) * LOG2_E",
        "jnp.full((rows.size, LANES), self.sinks[q_head])",
    ),
    Bug(
        "sinks left out of the sum",
        "PrefillKernel.state_before",
        "jnp.where(begins, SINK_SUM, self.row_sum[self.at(head, rows)])",
        "jnp.where(begins, 0.0, self.row_sum[self.at(head, rows)])",
    ),
    Bug(
        "the sink of another head",
        "PrefillKernel.set_to_sink",
        "self.sinks[q_head]",
        "self.sinks[lax.rem(q_head, GROUP)]",
    ),
    Bug(
        "scores not capped",
        "PrefillKernel.scores_of",
        "cap_scores(matmul(queries, keys, 1) * SCORE_SCALE)",
        "SOFT_CAP * SCORE_SCALE * matmul(queries, keys, 1)",
    ),
    Bug(
        "the log-sum-exp of another head",
        "PrefillKernel.store_log_sums_of",
        "pl.ds(head, Q_BLOCK, stride=PADDED_Q_HEADS)",
        "pl.ds(lax.rem(head + 1, 4), Q_BLOCK, stride=PADDED_Q_HEADS)",
    ),
    Bug("the log-sum-exp of the first KV head for all", "PrefillKernel.store_log_sums_of", "lax.div(head, GROUP)", "0"),
    Bug("no wait for a log-sum-exp", "PrefillKernel.wait_output", "self.for_copies(*sent, self.lse_copy, wait_copy)"),
    Bug("no log-sum-exp computed", "PrefillKernel.store_query_block", "self.store_log_sums()"),
)
CHUNKS = (
    Bug("a chunk one too long", "visible", "token >= chunk_end", "token >= chunk_end - 1"),
    Bug("a chunk one too short", "visible", "token >= chunk_end", "token > chunk_end"),
    Bug(
        "the last queries of the first chunk taken for those of the next",
        "visible",
        "query < chunk_end",
        "query < chunk_end - 16",
    ),
    Bug(
        "tiles of two chunks taken for full",
        "PrefillKernel.attend_block",
        "jnp.where(first_query + (Q_BLOCK - 1) >= chunk_end, begun, 0)",
        "0",
    ),
    Bug(
        "the chunk's end not moved by the blocks before",
        "PrefillKernel.attend_block",
        "ATTENTION_CHUNK - block * KV_BLOCK",
        "ATTENTION_CHUNK",
    ),
    Bug(
        "the chunk of a block's last query fetched",
        "PrefillKernel.first_token",
        "lax.div(first_query, ATTENTION_CHUNK)",
        "lax.div(first_query + 15, ATTENTION_CHUNK)",
    ),
)
# Where the matmul masks.
MATMUL = (
    Bug("a window one too long", "visible", "token > query - WINDOW", "token >= query - WINDOW"),
    Bug(
        "sinks taken as logarithms to base 2",
        "PrefillKernel.load_sinks",
        "jnp.full((1, LANES), self.sinks[head * GROUP + row % GROUP]) * LOG2_E",
        "jnp.full((1, LANES), self.sinks[head * GROUP + row % GROUP])",
    ),
    Bug(
        "sinks left out of the sum",
        "PrefillKernel.state_before",
        "jnp.where(begins, SINK_SUM, self.row_sum[self.at(head, rows)])",
        "jnp.where(begins, 0.0, self.row_sum[self.at(head, rows)])",
    ),
    Bug("sinks of the first KV head for all", "PrefillKernel.load_sinks", "head * GROUP + row % GROUP", "row % GROUP"),
)

prefill, mixed = partial(small_plan, kind="prefill"), partial(small_plan, kind="mixed")
SUITES = [
    BugSuite(
        "prefill, interleaved, features",
        featured(INTERLEAVED, ALL_FEATURES),
        prefill,
        WINDOW + FEATURES,
        ordinary=("a window one too long", "sinks left out of the sum", "no wait for a log-sum-exp"),
    ),
    BugSuite(
        "prefill, separate, features",
        featured(SEPARATE, ALL_FEATURES),
        prefill,
        WINDOW,
        ordinary=("the first page of the window not fetched",),
    ),
    BugSuite("mixed, features", featured(INTERLEAVED, ALL_FEATURES), mixed, tuple(map(in_mixed, WINDOW))),
    BugSuite("prefill, chunks", featured(SEPARATE, LONG_CHUNKS), prefill, CHUNKS, ordinary=("a chunk one too long",)),
    BugSuite("mixed, chunks", featured(INTERLEAVED, LONG_CHUNKS), mixed, tuple(map(in_mixed, CHUNKS))),
    BugSuite(
        "prefill, features, masks in the matmul",
        featured(ITERATED["separate"], {"sliding_window": 300, "sinks": True}),
        partial(iterated_plan, kind="prefill"),
        MATMUL,
    ),
]
