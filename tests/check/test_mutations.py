"""The check can fail: each of these bugs, put into a kernel by hand, is caught by it."""

from __future__ import annotations

import pytest
from mutation import SEED, Mutation, check_bug, dropped, no_wait
from small import INTERLEAVED as SPEC
from small import SEPARATE, SPECS, small_plan

from rpac.check import check_source
from rpac.kernels import render
from rpac.spec import Spec

BOTH = [
    Mutation("KV of the next page", r"(page_indices\[seq \* PAGES_PER_SEQ \+ block \* \d+ \+ page)\]", r"\1 + 1]"),
    dropped("clear_tail removed", r"clear_tail\(slot, (?:valid|kv_len - block \* \d+)\)"),
    Mutation("wrong slot", r"^( *slot = lax\.rem\(step), (\d+)\)(?=\n *(kv_len|end) =)", r"\1 + 1, \2)", hangs=True),
    Mutation("K for V", r"return head_of\(v_words, ", "return head_of(k_words, "),
    Mutation("sum not rescaled", r"= rescale \* (row_sum\[.*\]|old_sum) \+", r"= \1 +"),
    Mutation("output not rescaled", r"= .*rescale.* \* (acc\[head|old_acc)", r"= \1"),
]
BLOCK = [
    *BOTH,
    Mutation("mask one too far", r"<= query, scores, MASKED", "<= query + 1, scores, MASKED"),
    Mutation("mask one short", r"<= query, scores, MASKED", "< query, scores, MASKED"),
    Mutation("mask left out where a tile only begins before it", r"lax\.div\(seen \+ 1, ", "pl.cdiv(seen + 1, "),
    dropped("no wait for KV", r"wait_block\(end, seq, block, slot\)"),
    no_wait("queries", r" *query_copies\("),
    dropped("no wait for new keys and values", r"copy\.wait\(\)"),
    dropped("no wait for a page that holds old tokens", r"old_page_copy\(seq, page, slot\)\.wait\(\)"),
    dropped("no wait for a cache write before its buffer is used again", r"page_write\(seq, page, slot\)\.wait\(\).*"),
    dropped("no wait for the last cache writes", r"page_write\(first_seq, .*\)\.wait\(\)"),
    no_wait("an output before its buffer is used again", r" {20}out_copies\("),
    no_wait("the last output", r" {8}out_copies\("),
    Mutation("update of the next page", r"(def page_write.*\n.*PAGES_PER_SEQ \+) page\]", r"\1 page + 1]"),
    Mutation("update keeps no old tokens", r"\(token >= first\) & ", ""),
    Mutation("update runs past its end", r" & \(token < end\)", ""),
    Mutation("update not made", r"update_cache\(lambda: (.*)\)$", r"\1"),
    Mutation("the first block fetched over pages on their way", r"early = .*$", "early = jnp.bool_(True)"),
    Mutation("wrong GQA head", r"q_rows\[head // GROUP, ", "q_rows[lax.rem(head, KV_HEADS), "),
]
MIXED = [
    Mutation("prefill rows left out", r"first_seq = distribution\[0\]", "first_seq = distribution[1]"),
    Mutation("mixed rows left out", r"end_seq = distribution\[2\]", "end_seq = distribution[1]"),
    Mutation("queries from the row before", r"return cu_q_lens\[seq\]$", "return jnp.maximum(cu_q_lens[seq] - 1, 0)"),
    Mutation("copies of one token left out", r"(tokens & size\) > )0", r"\1 1"),
    Mutation("output of the decode rows lost", r"7: 1, 8: 0", "7: 1"),
]


IN_WORDS = {"K for V", "update keeps no old tokens", "update runs past its end"}
BLOCK_APART = [
    *(mutation for mutation in BLOCK if mutation.bug not in IN_WORDS),
    Mutation("K for V", r"head_of\(slot, 1, first", "head_of(slot, 0, first"),
    Mutation("pages of the first tile", r"pages = pl\.ds\(lax\.div\(first, PAGE_SIZE\),", "pages = pl.ds(0,"),
    Mutation("new tokens a row off", r"pl\.ds\(PAGE_SIZE \+ start,", "pl.ds(PAGE_SIZE + start - 1,"),
    Mutation("new values for both", r"in \(new_keys, new_values\)\]", "in (new_values, new_values)]"),
    Mutation("new tokens of the first head", r"by_head\[head\]", "by_head[0]"),
    Mutation("new tokens of another page", r"(slot, new_slot = .*), lax\.rem\(step, 5\)", r"\1, lax.rem(step + 1, 5)"),
    Mutation("update keeps no old tokens", r"(low_mask = .*)\(low >= first\) & ", r"\1"),
    Mutation("update runs past its end", r"(low_mask = .*) & \(low < end\)", r"\1"),
    Mutation("update of the first head only", r"(page_rows\[slot, kind,) head(, tokens\] = )", r"\1 0\2"),
    Mutation("the tail of V cleared from a token early", r"token \+ row < valid", "token + row < valid - 1"),
    Mutation("V cleared to the end of its page", r"pl\.cdiv\(valid, 128\) \* 8", "pl.cdiv(valid, PAGE_SIZE) * 4"),
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
        # Their kernel is made by the template that makes the prefill kernel.
        *cases("mixed", BLOCK, pytest.mark.slow),
        *cases("prefill", BLOCK_APART, pytest.mark.slow, layout="separate"),
    ],
)
def test_a_bug_is_caught(spec: Spec, kind: str, mutation: Mutation) -> None:
    check_bug(spec, small_plan(spec, kind), mutation)
