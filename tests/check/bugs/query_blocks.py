"""Bugs of prefill and mixed kernels by blocks of queries: fetches, masks, softmax and outputs."""

from __future__ import annotations

from functools import partial

from mutation import Bug, BugSuite, in_mixed
from small import INTERLEAVED, SEPARATE, small_plan

FETCHES = (
    Bug(
        "the next page fetched in place of each",
        "PagedKernel.start_page",
        "self.page_indices[first + page]",
        "self.page_indices[first + page + 1]",
    ),
    Bug(
        "the block in the next buffer attended to",
        "PrefillKernel.step",
        "lax.rem(step, KV_BUFFERS)",
        "lax.rem(step + 1, KV_BUFFERS)",
        hangs=True,
    ),
    Bug(
        "no wait for queries",
        "PrefillKernel.load_query_block",
        "self.for_query_copies(seq, q_block, lax.rem(q_step, KV_BUFFERS), wait_copy)",
    ),
    Bug(
        "the first block fetched before its pages are updated",
        "PrefillKernel.attend",
        "self.first_page(self.first_seq) >= self.block_pages",
        "jnp.bool_(True)",
    ),
)
SOFTMAX = (
    Bug("the sum not rescaled", "PrefillKernel.add_tokens", "alpha * old_sum", "old_sum"),
    Bug(
        "the output not rescaled", "PrefillKernel.add_tokens", "broadcast_lanes(alpha, HEAD_LANES) * old_acc", "old_acc"
    ),
    Bug("a token too many seen", "visible", "token <= query", "token <= query + 1"),
    Bug("a token too few seen", "visible", "token <= query", "token < query"),
    Bug(
        "a tile not masked that only begins before the first query",
        "PrefillKernel.attend_block",
        "lax.div(first_query + 1, TILE)",
        "pl.cdiv(first_query + 1, TILE)",
    ),
    Bug(
        "what lies behind the last token not cleared",
        "PrefillKernel.step",
        "pl.when(last)(functools.partial(self.clear_tail, buffer, valid))",
    ),
    Bug("queries of the wrong heads", "sort_rows", "head // GROUP", "lax.rem(head, KV_HEADS)"),
)
OUTPUTS = (
    Bug(
        "no wait for an output before its buffer is used again",
        "PrefillKernel.store_query_block",
        "pl.when(q_step > 0)(functools.partial(self.wait_output, sent))",
    ),
    Bug("no wait for the last output", "PrefillKernel.attend", "self.wait_output(sent)"),
)
# Interleaved K and V.
WORDS = (
    Bug(
        "K read for V",
        "PrefillKernel.head_values",
        "self.head_rows_of(self.v_words, first, tokens, head)",
        "self.head_rows_of(self.k_words, first, tokens, head)",
    ),
    Bug("no wait for a block", "PrefillKernel.step", "self.wait_block(end, block, buffer)"),
)
# Separate K and V.
HEADS = (
    Bug(
        "K read for V",
        "PrefillKernel.head_values",
        "self.head_rows_of(buffer, V_PLANE, first, tokens, head)",
        "self.head_rows_of(buffer, K_PLANE, first, tokens, head)",
    ),
    Bug(
        "no wait for a block",
        "PrefillKernel.step",
        "pl.when(~scored)(functools.partial(self.wait_block, end, block, buffer))",
    ),
    Bug("pages of the first tile read for each", "PrefillKernel.head_rows_of", "lax.div(first, PAGE_SIZE)", "0"),
    Bug(
        "the last token of V cleared",
        "PagedKernel.clear_elements",
        "first + token < valid",
        "first + token < valid - 1",
    ),
    Bug(
        "V cleared to the end of its page only",
        "PrefillKernel",
        "computed_tokens = DIAGONAL_BLOCK",
        "computed_tokens = PAGE_SIZE",
    ),
)
# Rows of mixed kernels, whose lengths differ.
ROWS = (
    Bug("prefill rows left out", "MixedKernel.checked_sequences", "self.distribution[0]", "self.distribution[1]"),
    Bug("mixed rows left out", "MixedKernel.checked_sequences", "self.distribution[2]", "self.distribution[1]"),
    Bug(
        "queries and outputs one row early",
        "MixedKernel.q_start",
        "self.q_starts[seq]",
        "jnp.maximum(self.q_starts[seq] - 1, 0)",
    ),
    Bug(
        "copies of one token left out",
        "MixedKernel.for_copies.act_on_part",
        "(tokens & size) > 0",
        "(tokens & size) > 1",
    ),
    Bug("the output of the decode rows lost", "attend_mixed", "{7: 1, 8: 0}", "{7: 1}"),
)

BOTH = FETCHES + SOFTMAX + OUTPUTS
prefill, mixed = partial(small_plan, kind="prefill"), partial(small_plan, kind="mixed")
SUITES = [
    BugSuite(
        "prefill, interleaved",
        INTERLEAVED,
        prefill,
        BOTH + WORDS,
        ordinary=(
            "no wait for queries",
            "the output not rescaled",
            "queries of the wrong heads",
        ),
    ),
    BugSuite(
        "prefill, separate",
        SEPARATE,
        prefill,
        BOTH + HEADS,
        ordinary=("what lies behind the last token not cleared",),
    ),
    # Made by the skeleton that makes the prefill kernel.
    BugSuite(
        "mixed, interleaved",
        INTERLEAVED,
        mixed,
        (*map(in_mixed, BOTH + WORDS), *ROWS),
        ordinary=("queries and outputs one row early",),
    ),
    BugSuite("mixed, separate", SEPARATE, mixed, ROWS),
]
