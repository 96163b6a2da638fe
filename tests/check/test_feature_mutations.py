"""Bugs of windows, chunks, soft caps and sinks, put into a kernel by hand: the check catches each."""

from __future__ import annotations

from typing import Any

import pytest
import test_block_mutations as turns
import test_mutations as tiles
from mutation import Mutation, check_bug, dropped
from test_features import ALL, SLOW, featured

from rpac.spec import Spec

SINKS = [
    Mutation("sinks in powers of two", r" \* LOG2_E", ""),
]
LSE_DECODE = [
    Mutation("lse of the group's first head", r"(self\.lse_rows\[.*\]) = sums\[rows\]", r"\1 = sums[rows][:1]"),
    dropped("no wait for the last lse", r"self\.lse_copy\(self\.num_seqs - 1 - index\)\.wait\(\)"),
    dropped("no wait for an lse before its buffer is used again", r"self\.lse_copy\(seq - WRITE_BUFFERS\)\.wait\(\)"),
    Mutation("lse without its maximum", r"log_of_sum\(self\.row_max\[\.\.\.\],", "log_of_sum(0 * self.row_max[...],"),
]
LSE_BLOCK = [
    Mutation("lse of the next head", r"(lse_rows\[pl\.ds\()head", r"\1lax.rem(head + 1, 4)"),
    Mutation("lse of the first KV head", r"kv_head = lax\.div\(head, GROUP\)", "kv_head = 0"),
    dropped("no wait for an lse", r"self\.for_copies\(\*sent, self\.lse_copy, wait_copy\)"),
    dropped("lse not taken", r"self\.store_log_sums\(\)"),
]
DECODE_FEW = [
    Mutation("window one too long", r"token >= first\)", "token >= first - 1)"),
    Mutation("sinks left out of the sum", r"full_like\(self\.row_sum, 1\.0\)", "full_like(self.row_sum, 0.0)"),
]
DECODE = [
    *SINKS,
    *LSE_DECODE,
    Mutation("window one short", r"token >= first\)", "token >= first + 1)"),
    Mutation(
        "a page before the window fetched", r"kv_lens\[seq\] - WINDOW, 0\)", "kv_lens[seq] - WINDOW - PAGE_SIZE, 0)"
    ),
    Mutation("fetched from the next page on", r"kv_lens\[seq\] - WINDOW, 0\)", "kv_lens[seq] - WINDOW + PAGE_SIZE, 0)"),
    Mutation("pages from the table's start", r"return seq \* PAGES_PER_SEQ \+ lax.*", "return seq * PAGES_PER_SEQ"),
    Mutation("not capped", r"cap_scores\((.*, axis=0\)) \* SCORE_SCALE\)", r"SOFT_CAP * SCORE_SCALE * \1"),
    Mutation("sinks no maximum", r"= self\.sink_rows\[\.\.\.\]", "= jnp.full_like(self.row_max, MASKED)"),
    Mutation("the first sink for all", r"self\.sinks\[head\]", "self.sinks[0]"),
]
WAVES_FEW = [
    Mutation("window one too long", r"token >= left - WINDOW\)", "token >= left - WINDOW - 1)"),
    Mutation("begins at token 0 alone", r" - self\.first_token\(some_seq\)$", ""),
]
WAVES = [
    *SINKS,
    Mutation("window one short", r"token >= left - WINDOW\)", "token > left - WINDOW)"),
    Mutation(
        "a page before the window fetched", r"kv_lens\[seq\] - WINDOW, 0\)", "kv_lens[seq] - WINDOW - PAGE_SIZE, 0)"
    ),
    Mutation("fetched from the next page on", r"kv_lens\[seq\] - WINDOW, 0\)", "kv_lens[seq] - WINDOW + PAGE_SIZE, 0)"),
    Mutation(
        "from token 0 but for the first sequence", r"self\.first_token\(jnp\.minimum\(seq, self\.num_seqs - 1\)\)", "0"
    ),
    Mutation("not capped", r"cap_scores\(scores \* SCORE_SCALE\)", "SOFT_CAP * SCORE_SCALE * scores"),
    Mutation("sinks left out of the sum", r"begins, 1\.0, old_sum", "begins, 0.0, old_sum"),
    Mutation("sinks no maximum", r"begins, self\.sink_rows\[\.\.\.\], old_max", "begins, MASKED, old_max"),
]
BLOCK_FEW = [
    Mutation("window one too long", r"token > query - WINDOW\)", "token >= query - WINDOW)"),
]
BLOCK = [
    Mutation("window one short", r"token > query - WINDOW\)", "token > query - WINDOW + 1)"),
    Mutation("left edge taken for full", r"begun = jnp\.clip\(lax\.div\(first_query \+ .*, 0, count\)", "begun = 0"),
    Mutation(
        "a page before the window fetched", r"first_query \+ 1 - WINDOW,", "first_query + 1 - WINDOW - PAGE_SIZE,"
    ),
    Mutation("fetched from the next page on", r"first_query \+ 1 - WINDOW,", "first_query + 1 - WINDOW + PAGE_SIZE,"),
    Mutation("window of the block's last query", r"first_query \+ 1 - WINDOW,", "first_query + 16 - WINDOW,"),
    Mutation("pages from the table's start", r"return seq \* PAGES_PER_SEQ \+ lax.*", "return seq * PAGES_PER_SEQ"),
    dropped("full tiles left out", r"FullTiles\(self, buffer, block == 0, begun, full\)\.run\(\)"),
    Mutation("tiles on the diagonal as those at the edge", r"index, index \+ full\)", "index, index)"),
    Mutation("a partial tile left out", r"for_each\(0, count - full,", "for_each(1, count - full,"),
]
ROWS = [
    *SINKS,
    Mutation("sinks left out of the sum", r"begins, (?:MIXED_)?SINK_SUM, ", "begins, 0.0, "),
]
CAPPED = [Mutation("not capped", r"cap_scores\((matmul.*, 1\)) \* SCORE_SCALE\)", r"SOFT_CAP * SCORE_SCALE * \1")]
BY_HEAD = [Mutation("the sink of another head", r"sinks\[q_head\]", "sinks[lax.rem(q_head, GROUP)]")]
BY_QUERY = [Mutation("sinks of the first KV head", r"sinks\[head \* GROUP \+ row % GROUP\]", "sinks[row % GROUP]")]
CHUNK_DECODE = [
    Mutation(
        "the chunk of the next token",
        r"first_query = jnp\.maximum\(self\.kv_lens\[seq\] - 1, 0\)",
        "first_query = self.kv_lens[seq]",
    ),
    Mutation(
        "tokens counted from the sequence's start",
        r"return self\.kv_lens\[seq\] - self\.first_token\(seq\)",
        "return self.kv_lens[seq]",
    ),
]
CHUNK_BLOCK_FEW = [
    Mutation("chunk one too long", r"token >= chunk_end\)", "token >= chunk_end - 1)"),
]
CHUNK_BLOCK = [
    Mutation("chunk one short", r"token >= chunk_end\)", "token > chunk_end)"),
    Mutation("the first chunk's queries see nothing", r"query < chunk_end\)", "query < chunk_end - 16)"),
    Mutation("tiles of two chunks taken for full", r"begun = jnp\.where\(.*>= chunk_end, begun, 0\)", "begun = 0"),
    Mutation("the end of the chunk in the first block alone", r"ATTENTION_CHUNK - block \* \w+", "ATTENTION_CHUNK"),
    Mutation("the chunk of the block's last query", r"lax\.div\(first_query, ATT", "lax.div(first_query + 15, ATT"),
]
LONG_CHUNKS = {"attention_chunk": 320}  # more than a block
BY_MXU = {"sliding_window": 300, "sinks": True}


def cases(layout: str, kind: str, mutations: list[Mutation], *marks: pytest.MarkDecorator) -> list[object]:
    return [pytest.param(layout, kind, one, id=f"{kind}, {layout}: {one.bug}", marks=marks) for one in mutations]


@pytest.mark.parametrize(
    ("layout", "kind", "mutation"),
    [
        *cases("interleaved", "decode", DECODE_FEW),
        *cases("apart", "decode", WAVES_FEW),
        *cases("interleaved", "prefill", BLOCK_FEW),
        *cases("interleaved", "decode", DECODE, SLOW),
        *cases("apart", "decode", WAVES, SLOW),
        *cases("interleaved", "prefill", [*BLOCK, *ROWS, *LSE_BLOCK, *CAPPED, *BY_HEAD], SLOW),
        *cases("apart", "prefill", [*BLOCK_FEW, *BLOCK], SLOW),
        *cases("interleaved", "mixed", [*BLOCK_FEW, *BLOCK], SLOW),
    ],
)
def test_a_bug_of_a_feature_is_caught(layout: str, kind: str, mutation: Mutation) -> None:
    spec = featured(tiles.SPECS[layout], ALL)
    check_bug(spec, tiles.small_plan(spec, kind), mutation)


@pytest.mark.parametrize(
    ("layout", "kind", "mutation"),
    [
        *cases("apart", "prefill", CHUNK_BLOCK_FEW),
        *cases("interleaved", "decode", CHUNK_DECODE, SLOW),
        *cases("apart", "decode", CHUNK_DECODE[:1], SLOW),
        *cases("apart", "prefill", CHUNK_BLOCK, SLOW),
        *cases("interleaved", "mixed", [*CHUNK_BLOCK_FEW, *CHUNK_BLOCK], SLOW),
    ],
)
def test_a_bug_of_chunks_is_caught(layout: str, kind: str, mutation: Mutation) -> None:
    spec = featured(tiles.SPECS[layout], LONG_CHUNKS)
    check_bug(spec, tiles.small_plan(spec, kind), mutation)


@SLOW
@pytest.mark.parametrize("mutation", [*BLOCK_FEW, *ROWS, *BY_QUERY], ids=lambda one: one.bug)
def test_a_bug_of_a_feature_is_caught_where_the_mxu_masks(mutation: Mutation) -> None:
    spec: Spec = featured(turns.SPECS["apart"], dict[str, Any](BY_MXU))
    check_bug(spec, turns.small_plan(spec, "prefill"), mutation)
