"""The check can fail: each of these bugs, put into a kernel by hand, is caught by it."""

from __future__ import annotations

import pytest
from mutation import SEED, Mutation, check_bug, dropped
from small import INTERLEAVED as SPEC
from small import SEPARATE, SPECS, small_plan

from rpac.check import check_source
from rpac.kernels import render
from rpac.spec import Spec

BLOCK = [
    Mutation(
        "KV of the next page",
        r"(page_indices\[seq \* PAGES_PER_SEQ \+ block \* self\.block_pages \+ page)\]",
        r"\1 + 1]",
    ),
    dropped("clear_tail removed", r"pl\.when\(last\)\(functools\.partial\(self\.clear_tail, buffer, valid\)\)"),
    Mutation("wrong buffer", r"^( *buffer = lax\.rem\(step), (\w*KV_BUFFERS)\)$", r"\1 + 1, \2)", hangs=True),
    Mutation("K for V", r"return self\.head_rows_of\(self\.v_words, ", "return self.head_rows_of(self.k_words, "),
    Mutation("sum not rescaled", r"= alpha \* old_sum \+", "= old_sum +"),
    Mutation("output not rescaled", r"= broadcast_lanes\(alpha, HEAD_LANES\) \* old_acc", "= old_acc"),
    Mutation("mask one too far", r"return token <= query$", "return token <= query + 1"),
    Mutation("mask one short", r"return token <= query$", "return token < query"),
    Mutation(
        "mask left out where a tile only begins before it",
        r"lax\.div\(first_query \+ 1, (\w*TILE)\)",
        r"pl.cdiv(first_query + 1, \1)",
    ),
    dropped("no wait for KV", r".*self\.wait_block(?:, |\()end, seq, block, buffer\)+"),
    dropped("no wait for queries", r"self\.for_query_copies\(.*, wait_copy\)"),
    Mutation(
        "no wait for new keys and values", r"(self\.new_token_copies\(.*, new_buffer\):\n *)copy\.wait\(\)", r"\1pass"
    ),
    dropped("no wait for a page that holds old tokens", r"self\.old_page_copy\(seq, page, buffer\)\.wait\(\)"),
    dropped(
        "no wait for a cache write before its buffer is used again",
        r"self\.page_write\(seq, page, buffer\)\.wait\(\).*",
    ),
    dropped("no wait for the last cache writes", r"self\.page_write\(self\.first_seq, .*\)\.wait\(\)"),
    dropped(
        "no wait for an output before its buffer is used again",
        r"pl\.when\(q_step > 0\)\(functools\.partial\(self\.wait_output, sent\)\)",
    ),
    dropped("no wait for the last output", r"self\.wait_output\(sent\)"),
    Mutation("update of the next page", r"(def page_write.*\n.*PAGES_PER_SEQ \+) page\]", r"\1 page + 1]"),
    Mutation("update keeps no old tokens", r"\(token >= first\) & ", ""),
    Mutation("update runs past its end", r" & \(token < end\)", ""),
    Mutation("update not made", r"self\.update_pages\((functools.*\))\)$", r"\1()"),
    Mutation("the first block fetched over pages on their way", r"early = .*$", "early = jnp.bool_(True)"),
    Mutation("wrong GQA head", r"q_rows\[head // GROUP, ", "q_rows[lax.rem(head, KV_HEADS), "),
]
MIXED = [
    Mutation("prefill rows left out", r"return self\.distribution\[0\], self", "return self.distribution[1], self"),
    Mutation("mixed rows left out", r"self\.distribution\[2\]$", "self.distribution[1]"),
    Mutation(
        "queries from the row before",
        r"return self\.cu_q_lens\[seq\]$",
        "return jnp.maximum(self.cu_q_lens[seq] - 1, 0)",
    ),
    Mutation("copies of one token left out", r"(tokens & size\) > )0", r"\1 1"),
    Mutation("output of the decode rows lost", r"7: 1, 8: 0", "7: 1"),
]


IN_WORDS = {"K for V", "update keeps no old tokens", "update runs past its end"}
BLOCK_APART = [
    *(mutation for mutation in BLOCK if mutation.bug not in IN_WORDS),
    Mutation("K for V", r"head_rows_of\(buffer, V_PLANE, first", "head_rows_of(buffer, K_PLANE, first"),
    Mutation("pages of the first tile", r"pages = pl\.ds\(lax\.div\(first, PAGE_SIZE\),", "pages = pl.ds(0,"),
    Mutation("new tokens a row off", r"pl\.ds\(PAGE_SIZE \+ start,", "pl.ds(PAGE_SIZE + start - 1,"),
    Mutation("new values for both", r"keys = self\.new_keys\[", "keys = self.new_values["),
    Mutation("new tokens of the first head", r"by_head\[head\]", "by_head[0]"),
    Mutation(
        "new tokens of another page",
        r"(buffer, new_buffer = .*), lax\.rem\(step, NEW_BUFFERS\)",
        r"\1, lax.rem(step + 1, NEW_BUFFERS)",
    ),
    Mutation("update keeps no old tokens", r"(low_mask = .*)\(low >= first\) & ", r"\1"),
    Mutation("update runs past its end", r"(low_mask = .*) & \(low < end\)", r"\1"),
    Mutation("update of the first head only", r"(page_rows\[buffer, plane,) head(, tokens\] = )", r"\1 0\2"),
    Mutation("the tail of V cleared from a token early", r"first \+ token < valid", "first + token < valid - 1"),
    Mutation("V cleared to the end of its page", r"computed_tokens = DIAGONAL_BLOCK", "computed_tokens = PAGE_SIZE"),
]


def cases(
    kind: str, mutations: list[Mutation], *marks: pytest.MarkDecorator, layout: str = "interleaved"
) -> list[object]:
    separate = "" if layout == "interleaved" else ", separate K and V"
    return [
        pytest.param(SPECS[layout], kind, mutation, id=f"{kind}{separate}: {mutation.bug}", marks=marks)
        for mutation in mutations
    ]


@pytest.mark.parametrize("kind", ["prefill", "mixed"])
@pytest.mark.parametrize("spec", [SPEC, pytest.param(SEPARATE, marks=pytest.mark.slow)], ids=list(SPECS))
def test_without_a_bug_there_is_nothing_to_catch(spec: Spec, kind: str) -> None:
    plan = small_plan(spec, kind)
    failed = [result for result in check_source(spec, plan, render(spec, plan), seed=SEED) if not result.ok]
    assert not failed


@pytest.mark.parametrize(
    ("spec", "kind", "mutation"),
    [
        *cases("prefill", BLOCK, pytest.mark.slow),
        *cases("mixed", MIXED, pytest.mark.slow),
        # Their kernel is made by the skeleton that makes the prefill kernel.
        *cases("mixed", BLOCK, pytest.mark.slow),
        *cases("prefill", BLOCK_APART, pytest.mark.slow, layout="separate"),
    ],
)
def test_a_bug_is_caught(spec: Spec, kind: str, mutation: Mutation) -> None:
    check_bug(spec, small_plan(spec, kind), mutation)
