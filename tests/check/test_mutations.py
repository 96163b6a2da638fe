"""The check can fail: each of these bugs, put into a kernel by hand, is caught by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mutation import SEED, Mutation, check_bug, dropped, no_wait, retiled

from rpac.check import check_source
from rpac.kernels import render
from rpac.plan import BlockTiles, DecodeBlocks, DecodeWaves, KernelPlan, plan_spec
from rpac.spec import Spec, load_spec

TINY = load_spec(Path(__file__).parents[2] / "specs" / "tiny.yaml")
# More sequences than a kernel has buffers for their outputs and their new tokens, and chunks of more pages than it has
# buffers for those under update, so that the buffers are used again.
SPEC = replace(TINY, serving=replace(TINY.serving, max_num_seqs=6, max_num_tokens=64, token_buckets=(8, 64)))
# Larger pages: the interpreter takes seconds to compile a decode kernel that fetches many.
APART = replace(SPEC, serving=replace(SPEC.serving, kv_layout="separate", page_size=64))
SPECS = {"interleaved": SPEC, "apart": APART}

BOTH = [
    Mutation("KV of the next page", r"(page_indices\[seq \* PAGES_PER_SEQ \+ block \* \d+ \+ page)\]", r"\1 + 1]"),
    dropped("clear_tail removed", r"clear_tail\(slot, (?:valid|kv_len - block \* \d+)\)"),
    Mutation("wrong slot", r"^( *slot = lax\.rem\(step), (\d+)\)(?=\n *(kv_len|end) =)", r"\1 + 1, \2)", hangs=True),
    Mutation("K for V", r"return head_of\(v_words, ", "return head_of(k_words, "),
    Mutation("sum not rescaled", r"= rescale \* (row_sum\[.*\]|old_sum) \+", r"= \1 +"),
    Mutation("output not rescaled", r"= .*rescale.* \* (acc\[head|old_acc)", r"= \1"),
]
DECODE = [
    *BOTH,
    Mutation("mask one too far", r"< valid, scores, MASKED", "< valid + 1, scores, MASKED"),
    Mutation("mask one short", r"< valid, scores, MASKED", "< valid - 1, scores, MASKED"),
    dropped("no wait for KV", r"wait_block\(kv_len, seq, block, slot\)"),
    Mutation("whole blocks not waited for", r"^( *)pltpu\.make_async_copy\(kv\.at\[slot\], .*\.wait\(\).*$", r"\1pass"),
    Mutation("the next block split from this one", r"next_slot = lax\.rem\(step \+ 1,", "next_slot = lax.rem(step,"),
    Mutation(
        "the next block split over this one", r"split = Split\(next_slot, 1 - here\)", "split = Split(next_slot, here)"
    ),
    dropped("first block not split", r"Split\(0, 0\)\.finish\(\)"),
    dropped("the next block does not arrive", r"arrive\(step \+ 1, \*following\)", hangs=True),
    dropped("no wait for queries, keys and values", r"load\.wait\(\)"),
    dropped("no wait for a cache write before its buffer is used again", r"unit_copy\(seq - \d\)\.wait\(\)"),
    dropped("no wait for the last cache writes", r"unit_copy\(num_seqs - 1 - i\)\.wait\(\)"),
    dropped("no wait for an output before its buffer is used again", r"out_copy\(seq - \d\)\.wait\(\)"),
    dropped("no wait for the last outputs", r"out_copy\(num_seqs - 1 - i\)\.wait\(\)"),
    Mutation("update of the next page", r"\+ position // PAGE_SIZE\]", "+ (position + 1) // PAGE_SIZE]"),
    Mutation(
        "update of the token before", r"position = kv_lens\[seq\] - 1$", "position = jnp.maximum(kv_lens[seq] - 2, 0)"
    ),
    dropped("update not attended to", r"kv\[slot, rows\] = words_as_rows\(words\)"),
    dropped("update not written", r"unit_copy\(seq\)\.start\(\)", hangs=True),
    Mutation("wrong GQA head", r"queries\[head \* GROUP : \(head \+ 1\) \* GROUP\]", "queries[head : head + GROUP]"),
    Mutation(
        "a block too few",
        r"last = \(block \+ 1\) \* (\d+) >= kv_lens\[seq\]",
        r"last = (block + 2) * \1 > kv_lens[seq]",
        hangs=True,
    ),
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


# Of the decode kernel where K and V lie apart.
GROUPS_FEW = [
    Mutation("mask one too far", r"< left, scores", "< left + 1, scores"),
    Mutation("new token a row off", r"(in_unit = .*lax\.rem\(token), UNIT\)", r"\1 + 1, UNIT)"),
    dropped("no wait for a tile that is not whole", r"wait_for\(kv\.at\[slot, 0\]\)"),
]
GROUPS = [
    *GROUPS_FEW,
    Mutation("the next group's values", r"total, weigh\(group, i, weights\)", "total, weigh(group + 1, i, weights)"),
    Mutation("mask one short", r"< left, scores", "< left - 1, scores"),
    Mutation("KV of the next page", r"(page_indices\[pages \+ page)\]", r"\1 + 1]"),
    Mutation("a page too few", r"page \* PAGE_SIZE < left", "page * PAGE_SIZE < left - 1", hangs=True),
    Mutation("a page too many", r"page \* PAGE_SIZE < left", "page * PAGE_SIZE <= left"),
    dropped("no wait for a group that is not whole", r"wait_tile\(tile_left.*\)"),
    dropped("no wait for a whole group", r"wait_for\(kv\.at\[pl\.ds\(first_slot, 2\)\]\)"),
    dropped("no wait for a whole tile", r"wait_for\(kv\.at\[slot\]\)"),
    Mutation("the last page not waited for", r"pl\.cdiv\(left, PAGE_SIZE\), one_page", "left // PAGE_SIZE, one_page"),
    dropped("no group arrives", r"arrive\(group \+ 1\)", hangs=True),
    Mutation("a group arrives late", r"arrive\(group \+ 1\)", "arrive(group)"),
    Mutation("a group of another's semaphore", r"(first_slot, sem = .*lax\.rem\(group), 3", r"\1 + 1, 3", hangs=True),
    Mutation("fetched over the group before", r"fetch\(group \+ 2,", "fetch(group + 3,", hangs=True),
    Mutation("fetched over the group that comes", r"fetch\(group \+ 2,", "fetch(group + 1,", hangs=True),
    Mutation("a group not fetched at first", r"range\(1, 2\)", "range(1, 1)", hangs=True),
    dropped("no group before the first", r"lax\.fori_loop\(0, 6, no_tile, 0\)"),
    Mutation("a sequence's last tile taken for another", r"last = left <= 128", "last = left < 128"),
    Mutation("a tile too few", r"last = left <= 128", "last = left <= 129", hangs=True),
    Mutation("ends of a group's last tile unseen", r"(?<=0\)\] )<= 256\)", "< 256)"),
    Mutation("ends at a tile's end unseen", r"\(left <= 128\)\)", "(left < 128))", hangs=True),
    Mutation("tiles of no sequence taken for ends", r"\(left > 0\) & ", ""),
    Mutation("sum of the sequence before", r"jnp\.where\(begins, 0\.0, old_sum\)", "old_sum"),
    Mutation("output of the sequence before", r"jnp\.where\(begins, 0\.0, old_acc\)", "old_acc"),
    Mutation("maximum of the sequence before", r"old_max = jnp\.where\(begins, MASKED, old_max\)", "pass"),
    Mutation("begins ignored", r"begins = (.*) == 0$", r"begins = \1 < 0"),
    Mutation("begins at every tile", r"begins = (.*) == 0$", r"begins = \1 >= 0"),
    Mutation("sum not rescaled", r"(old_sum\)) \* kept", r"\1"),
    Mutation("sum of a tile not rescaled", r"total \* added", "total"),
    Mutation("output not rescaled", r"(old_acc\)) \* widen\(kept, HEAD_DIM\)", r"\1"),
    Mutation("output of a tile not rescaled", r"part \* widen\(added, HEAD_DIM\)", "part"),
    Mutation("output of the first tile stays", r"^( *)(out_all\[tile_seq.*)$", r"\1if i == 0: \2"),
    Mutation("queries of the group before", r"= score\(group \+ 1, i\)", "= score(group, i)"),
    Mutation(
        "lengths of the next group", r"tile_left\[slot_of\(group, i\)\]\) for", "tile_left[slot_of(group + 1, i)]) for"
    ),
    Mutation("merged as the next group", r"state = merge\(group, i, state", "state = merge(group + 1, i, state"),
    dropped("state not kept from turn to turn", r"row_max\[\.\.\.\], row_sum\[\.\.\.\], acc\[\.\.\.\] = state"),
    Mutation("a turn too few", r"(more = tile_left\[slot_of\(group \+) 1", r"\1 2"),
    Mutation("K for V", r"kv\[slot_of\(group, i\), :, 1, head\]", "kv[slot_of(group, i), :, 0, head]"),
    Mutation("rows of the head before", r"row >= i \* GROUP", "row > i * GROUP"),
    Mutation("rows of the next head", r"row >= i \* GROUP", "row >= i * GROUP - 1"),
    dropped("clear_tail removed", r"clear_tail\(slot_of\(group, i\), left\)"),
    Mutation("the tail of V cleared from a token early", r"token \+ row < valid", "token + row < valid - 1"),
    Mutation("the tail of V cleared from a token late", r"token \+ row < valid", "token + row <= valid"),
    Mutation("V cleared to the end of its page", r"pl\.cdiv\(valid, 128\) \* 8", "pl.cdiv(valid, PAGE_SIZE) * 4"),
    dropped("no wait for queries, keys and values", r"load\.wait\(\)"),
    dropped("no wait for a cache write before its buffer is used again", r"unit_copy\(seq - 4\)\.wait\(\)"),
    dropped("no wait for the last cache writes", r"unit_copy\(num_seqs - 1 - i\)\.wait\(\)"),
    dropped("no wait for the outputs", r"out_copy\.wait\(\)"),
    Mutation("update of the next page", r"\+ position // PAGE_SIZE\]", "+ (position + 1) // PAGE_SIZE]"),
    Mutation(
        "update of the unit before", r"position = kv_lens\[seq\] - 1$", "position = jnp.maximum(kv_lens[seq] - 17, 0)"
    ),
    Mutation("new token of the next tile's place", r"(update_cache\(seq, .*), left - 1\)", r"\1, left)"),
    Mutation("new value for both", r"enumerate\(\(new_keys, new_values\)\)", "enumerate((new_values, new_values))"),
    Mutation("new token of the first head", r"both_halves\[head : head \+ 1\]", "both_halves[0:1]"),
    dropped("update not made", r"update_cache\(seq, slot_of.*", hangs=True),
    dropped("update not attended to", r"kv\[slot, page, kind, head, tokens\] = rows"),
    dropped("update not in what is written", r"unit_out\[write, kind, head\] = rows"),
    dropped("update not written", r"unit_copy\(seq\)\.start\(\)", hangs=True),
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


def small_plan(spec: Spec, kind: str) -> KernelPlan:
    """A plan for the largest bucket with tiles so small that a full table is several blocks of several tiles."""
    plan = next(plan for plan in reversed(plan_spec(spec, "tpu7x")) if plan.kind == kind)
    if isinstance(plan.decode, DecodeBlocks):
        plan = retiled(spec, plan, decode={"block": 128})
    if isinstance(plan.decode, DecodeWaves):
        plan = retiled(spec, plan, decode={"tile": 128, "tiles_per_wave": 2, "lookahead": 2, "write_buffers": 4})
    if isinstance(plan.block, BlockTiles):
        tiles = {"q_block": 16, "step_rows": 16 * spec.model.group, "block": 256, "tile": 128}
        if spec is SPEC:  # else whole registers
            tiles["merge_tokens"] = 4
        plan = retiled(spec, plan, block=tiles)
    return plan


def cases(
    kind: str, mutations: list[Mutation], *marks: pytest.MarkDecorator, layout: str = "interleaved"
) -> list[object]:
    apart = "" if layout == "interleaved" else ", K and V apart"
    return [
        pytest.param(SPECS[layout], kind, mutation, id=f"{kind}{apart}: {mutation.bug}", marks=marks)
        for mutation in mutations
    ]


@pytest.mark.parametrize("kind", ["decode", "prefill", "mixed"])
@pytest.mark.parametrize("spec", [SPEC, pytest.param(APART, marks=pytest.mark.slow)], ids=list(SPECS))
def test_without_a_bug_there_is_nothing_to_catch(spec: Spec, kind: str) -> None:
    plan = small_plan(spec, kind)
    failed = [result for result in check_source(spec, plan, render(spec, plan), seed=SEED) if not result.ok]
    assert not failed


@pytest.mark.parametrize(
    ("spec", "kind", "mutation"),
    [
        *cases("decode", DECODE),
        *cases("prefill", BLOCK, pytest.mark.slow),
        *cases("mixed", MIXED, pytest.mark.slow),
        # Their kernel is made by the template that makes the prefill kernel.
        *cases("mixed", BLOCK, pytest.mark.slow),
        *cases("decode", GROUPS_FEW, layout="apart"),
        *cases("decode", GROUPS[len(GROUPS_FEW) :], pytest.mark.slow, layout="apart"),
        *cases("prefill", BLOCK_APART, pytest.mark.slow, layout="apart"),
    ],
)
def test_a_bug_is_caught(spec: Spec, kind: str, mutation: Mutation) -> None:
    check_bug(spec, small_plan(spec, kind), mutation)


@pytest.mark.slow
def test_a_page_table_that_ends_within_a_tile_and_is_read_past_its_end_is_caught() -> None:
    spec = replace(APART, serving=replace(APART.serving, max_model_len=9 * APART.serving.page_size))
    bug = Mutation("page table past its end", r"jnp\.minimum\(pages \+ page, \d+\)", "pages + page")
    plan = small_plan(spec, "decode")
    results = check_source(spec, plan, bug.apply(render(spec, plan)), seed=SEED)
    caught = next((result for result in results if not result.ok), None)
    assert caught is not None and "Out-of-bounds read" in caught.notes[0]
