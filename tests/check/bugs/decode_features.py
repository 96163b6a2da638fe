"""Bugs of windows, chunks, soft caps, sinks and log-sum-exps in decode kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mutation import Bug, BugSuite
from small import ALL_FEATURES, INTERLEAVED, LONG_CHUNKS, SEPARATE, blocks_plan, featured, small_plan

# What kernels by blocks and by waves do with the same code.
BOTH = (
    Bug(
        "a page before the window fetched",
        "DecodeKernel.first_token",
        "self.row_len(seq) - WINDOW",
        "self.row_len(seq) - WINDOW - PAGE_SIZE",
    ),
    Bug(
        "the first page of the window not fetched",
        "DecodeKernel.first_token",
        "self.row_len(seq) - WINDOW",
        "self.row_len(seq) - WINDOW + PAGE_SIZE",
    ),
    Bug(
        "sinks as logarithms to base 2",
        "DecodeKernel.load_sinks",
        "jnp.full((1, LANES), self.sinks[head]) * LOG2_E",
        "jnp.full((1, LANES), self.sinks[head])",
    ),
)
CHUNKS = (
    Bug(
        "the chunk of the next token seen",
        "DecodeKernel.first_token",
        "jnp.maximum(self.row_len(seq) - 1, 0)",
        "self.row_len(seq)",
    ),
)
# The rest of kernels by blocks.
BLOCKS = (
    Bug("a window one too long", "DecodeKernel.visible_tokens", "token >= first", "token >= first - 1"),
    Bug("a window one too short", "DecodeKernel.visible_tokens", "token >= first", "token >= first + 1"),
    Bug(
        "pages fetched from the start of the page table",
        "DecodeKernel.entry",
        "seq * PAGES_PER_SEQ + lax.div(self.first_token(seq), PAGE_SIZE)",
        "seq * PAGES_PER_SEQ",
    ),
    Bug(
        "scores not capped",
        "DecodeKernel.flash_step",
        "cap_scores(jnp.concatenate(scores, axis=0) * SCORE_SCALE)",
        "SOFT_CAP * SCORE_SCALE * jnp.concatenate(scores, axis=0)",
    ),
    Bug(
        "sinks left out of the sum",
        "DecodeKernel.clear_state",
        "jnp.full_like(self.row_sum, 1.0)",
        "jnp.full_like(self.row_sum, 0.0)",
    ),
    Bug(
        "sinks not the first maximum",
        "DecodeKernel.clear_state",
        "self.sink_rows[...]",
        "jnp.full_like(self.row_max, MASKED)",
    ),
    Bug("the first head's sink for all", "DecodeKernel.load_sinks", "self.sinks[head]", "self.sinks[0]"),
    Bug(
        "the log-sum-exp of a group's first head for all of it",
        "DecodeKernel.store_output",
        "sums[rows]",
        "sums[rows][:1]",
    ),
    Bug(
        "no wait for the last log-sum-exps",
        "DecodeKernel.drain",
        "self.lse_copy(self.num_seqs - 1 - index).wait()",
    ),
    Bug(
        "no wait for a log-sum-exp before its buffer is used again",
        "DecodeKernel.store_output.wait_for_buffer",
        "self.lse_copy(seq - WRITE_BUFFERS).wait()",
    ),
    Bug(
        "log-sum-exps without the maximum",
        "DecodeKernel.store_output",
        "log_of_sum(self.row_max[...], self.row_sum[...])",
        "jnp.log(self.row_sum[...])",
    ),
)
CHUNKS_OF_BLOCKS = (
    Bug(
        "tokens counted from the sequence's start",
        "DecodeKernel.seen_len",
        "self.row_len(seq) - self.first_token(seq)",
        "self.row_len(seq)",
    ),
)
# The rest of kernels by waves.
WAVES = (
    Bug("a window one too long", "DecodeKernel.visible_tokens", "token >= left - WINDOW", "token >= left - WINDOW - 1"),
    Bug("a window one too short", "DecodeKernel.visible_tokens", "token >= left - WINDOW", "token > left - WINDOW"),
    Bug(
        "a sequence begins at token 0 only",
        "DecodeKernel.fetch_tile",
        "first - self.first_token(some_seq)",
        "first",
    ),
    Bug(
        "all sequences but the first fetched from token 0",
        "DecodeKernel.next_tile",
        "self.first_token(jnp.minimum(seq, self.num_seqs - 1))",
        "0",
    ),
    Bug(
        "scores not capped",
        "DecodeKernel.softmax",
        "cap_scores(scores * SCORE_SCALE)",
        "SOFT_CAP * SCORE_SCALE * scores",
    ),
    Bug(
        "sinks left out of the sum",
        "DecodeKernel.merge",
        "jnp.where(begins, 1.0, old_sum)",
        "jnp.where(begins, 0.0, old_sum)",
    ),
    Bug(
        "sinks not the first maximum",
        "DecodeKernel.merge",
        "jnp.where(begins, self.sink_rows[...], old_max)",
        "jnp.where(begins, MASKED, old_max)",
    ),
    Bug(
        "log-sum-exps without the maximum",
        "DecodeKernel.store_output",
        "log_of_sum(row_max, row_sum)",
        "jnp.log(row_sum)",
    ),
)

plan = partial(small_plan, kind="decode")
SUITES = [
    BugSuite(
        "decode, blocks, features",
        featured(INTERLEAVED, ALL_FEATURES),
        blocks_plan,
        BOTH + BLOCKS,
        ordinary=("a window one too long", "no wait for the last log-sum-exps"),
    ),
    BugSuite(
        "decode, waves, features",
        featured(SEPARATE, ALL_FEATURES),
        plan,
        BOTH + WAVES,
        ordinary=("a sequence begins at token 0 only", "sinks left out of the sum"),
    ),
    BugSuite(
        "decode, blocks, chunks",
        featured(INTERLEAVED, LONG_CHUNKS),
        blocks_plan,
        CHUNKS + CHUNKS_OF_BLOCKS,
        ordinary=("tokens counted from the sequence's start",),
    ),
    # By waves, a sequence that ends with its chunk gets no tile, and the write of its new token is waited for forever.
    BugSuite(
        "decode, waves, chunks",
        featured(SEPARATE, LONG_CHUNKS),
        plan,
        tuple(replace(bug, hangs=True) for bug in CHUNKS),
    ),
]
