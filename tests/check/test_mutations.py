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
    Mutation(
        "KV of the next page",
        r"(page_indices\[seq \* PAGES_PER_SEQ \+ block \* self\.block_pages \+ page)\]",
        r"\1 + 1]",
    ),
    dropped("clear_tail removed", r"self\.clear_tail\(buffer, kv_len - block \* BLOCK\)"),
    Mutation("wrong buffer", r"^( *buffer = lax\.rem\(iteration), KV_BUFFERS\)$", r"\1 + 1, KV_BUFFERS)", hangs=True),
    Mutation("K for V", r"return self\.head_rows\(self\.v_words, ", "return self.head_rows(self.k_words, "),
    Mutation("sum not rescaled", r"= alpha \* (self\.row_sum\[.*\]) \+", r"= \1 +"),
    Mutation("output not rescaled", r"= broadcast_lanes\(alpha.* \* (self\.acc\[rows\])", r"= \1"),
    Mutation("mask one too far", r"return token < end$", "return token < end + 1"),
    Mutation("mask one short", r"return token < end$", "return token < end - 1"),
    dropped("no wait for KV", r"self\.wait_block\(kv_len, seq, block, buffer\)"),
    Mutation("whole blocks not waited for", r"^( *)pltpu\.make_async_copy\(whole, .*\.wait\(\).*$", r"\1pass"),
    Mutation(
        "the next block split from this one",
        r"next_buffer = lax\.rem\(iteration \+ 1,",
        "next_buffer = lax.rem(iteration,",
    ),
    Mutation(
        "the next block split over this one",
        r"Deinterleave\(self, next_buffer, 1 - half\)",
        "Deinterleave(self, next_buffer, half)",
    ),
    dropped("first block not split", r"Deinterleave\(self, 0, 0\)\.finish\(\)"),
    dropped("the next block does not arrive", r"self\.wait_and_patch\(iteration \+ 1, \*following\)", hangs=True),
    dropped("no wait for queries, keys and values", r"load\.wait\(\)"),
    dropped(
        "no wait for a cache write before its buffer is used again", r"self\.wait_for_writes\(seq - WRITE_BUFFERS\)"
    ),
    dropped("no wait for the last cache writes", r"self\.wait_for_writes\(self\.num_seqs - 1 - index\)"),
    dropped(
        "no wait for an output before its buffer is used again", r"self\.out_copy\(seq - WRITE_BUFFERS\)\.wait\(\)"
    ),
    dropped("no wait for the last outputs", r"self\.out_copy\(self\.num_seqs - 1 - index\)\.wait\(\)"),
    Mutation("update of the next page", r"\+ position // PAGE_SIZE\]", "+ (position + 1) // PAGE_SIZE]"),
    Mutation(
        "update of the token before",
        r"position = self\.kv_lens\[seq\] - 1$",
        "position = jnp.maximum(self.kv_lens[seq] - 2, 0)",
    ),
    dropped("update not attended to", r"self\.kv\[buffer, rows\] = words_as_rows\(words\)"),
    dropped("update not written", r"self\.cache_write\(seq\)\.start\(\)", hangs=True),
    Mutation("wrong GQA head", r"= queries\[heads\]$", "= queries[head : head + GROUP]"),
    Mutation(
        "a block too few",
        r"last = \(block \+ 1\) \* BLOCK >= self\.kv_lens\[seq\]",
        "last = (block + 2) * BLOCK > self.kv_lens[seq]",
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


# Of the decode kernel where K and V are separate.
WAVES_FEW = [
    Mutation("mask one too far", r"return token < left$", "return token < left + 1"),
    Mutation("new token a row off", r"(place = .*lax\.rem\(token), SUBLANE_TILE\)", r"\1 + 1, SUBLANE_TILE)"),
    dropped("no wait for a partial tile", r"wait_for_bytes\(self\.kv\.at\[slot, 0\], sem\)"),
]
WAVES = [
    *WAVES_FEW,
    Mutation("the next wave's values", r"self\.accumulate_pv\(wave, i, p\)\)", "self.accumulate_pv(wave + 1, i, p))"),
    Mutation("mask one short", r"return token < left$", "return token < left - 1"),
    Mutation("KV of the next page", r"(page_indices\[first_entry \+ page)\]", r"\1 + 1]"),
    Mutation("a page too few", r"page \* PAGE_SIZE < left", "page * PAGE_SIZE < left - 1", hangs=True),
    Mutation("a page too many", r"page \* PAGE_SIZE < left", "page * PAGE_SIZE <= left"),
    dropped("no wait for a partial wave", r"self\.wait_for_tile\(self\.tile_left.*\)"),
    dropped("no wait for a full wave", r"wait_for_bytes\(self\.kv\.at\[pl\.ds\(first_slot, TILES_PER_WAVE\)\], sem\)"),
    dropped("no wait for a full tile", r"wait_for_bytes\(self\.kv\.at\[slot\], sem\)"),
    Mutation("the last page not waited for", r"pl\.cdiv\(left, PAGE_SIZE\), functools", "left // PAGE_SIZE, functools"),
    dropped("no wave arrives", r"self\.wait_and_patch\(wave \+ 1\)", hangs=True),
    Mutation("a wave arrives late", r"self\.wait_and_patch\(wave \+ 1\)", "self.wait_and_patch(wave)"),
    Mutation(
        "a wave of another's semaphore", r"(first_slot, sem = .*lax\.rem\(wave), WAVE", r"\1 + 1, WAVE", hangs=True
    ),
    Mutation(
        "fetched over the wave before",
        r"fetch_wave\(wave \+ LOOKAHEAD,",
        "fetch_wave(wave + LOOKAHEAD + 1,",
        hangs=True,
    ),
    Mutation("fetched over the wave that comes", r"fetch_wave\(wave \+ LOOKAHEAD,", "fetch_wave(wave + 1,", hangs=True),
    Mutation("a wave not fetched at first", r"range\(1, LOOKAHEAD\)", "range(1, LOOKAHEAD - 1)", hangs=True),
    dropped("no wave before the first", r"for_each\(0, TILE_BUFFERS, self\.clear_slot\)"),
    Mutation("a sequence's last tile taken for another", r"last = left <= TILE", "last = left < TILE"),
    Mutation("a tile too few", r"last = left <= TILE", "last = left <= TILE + 1", hangs=True),
    Mutation("ends of a wave's last tile unseen", r"(?<=0\)\] )<= WAVE_TOKENS\)", "< WAVE_TOKENS)"),
    Mutation("ends at a tile's end unseen", r"\(left <= TILE\)\)", "(left < TILE))", hangs=True),
    Mutation("tiles of no sequence taken for ends", r"\(left > 0\) & ", ""),
    Mutation("sum of the sequence before", r"jnp\.where\(begins, 0\.0, old_sum\)", "old_sum"),
    Mutation("output of the sequence before", r"jnp\.where\(begins, 0\.0, old_acc\)", "old_acc"),
    Mutation("maximum of the sequence before", r"old_max = jnp\.where\(begins, MASKED, old_max\)", "pass"),
    Mutation("begins ignored", r"begins = (.*) == 0$", r"begins = \1 < 0"),
    Mutation("begins at every tile", r"begins = (.*) == 0$", r"begins = \1 >= 0"),
    Mutation("sum not rescaled", r"(old_sum\)) \* alpha", r"\1"),
    Mutation("sum of a tile not rescaled", r"tile_sum \* beta", "tile_sum"),
    Mutation("output not rescaled", r"(old_acc\)) \* broadcast_lanes\(alpha, HEAD_LANES\)", r"\1"),
    Mutation("output of a tile not rescaled", r"values \* broadcast_lanes\(beta, HEAD_LANES\)", "values"),
    Mutation("output of the first tile stays", r"^( *)(self\.out_all\[self\.tile_seq.*)$", r"\1if i == 0: \2"),
    Mutation("queries of the wave before", r"= self\.compute_scores\(wave \+ 1, i\)", "= self.compute_scores(wave, i)"),
    Mutation(
        "lengths of the next wave",
        r"(left = self\.tile_left\[self\.slot\(wave), i\)\](?=\n *token = lax)",
        r"\1 + 1, i)]",
    ),
    Mutation(
        "merged as the next wave", r"state = self\.merge\(wave, i, state", "state = self.merge(wave + 1, i, state"
    ),
    Mutation(
        "state not kept from iteration to iteration",
        r"self\.row_max\[\.\.\.\], self\.row_sum\[\.\.\.\], self\.acc\[\.\.\.\] = (self.*)$",
        r"\1",
    ),
    Mutation("an iteration too few", r"(more = self\.tile_left\[self\.slot\(wave \+) 1", r"\1 2"),
    Mutation("K for V", r"(self\.kv\[self\.slot\(wave, i\), :,) V_PLANE, head\]", r"\1 K_PLANE, head]"),
    Mutation("rows of the head before", r"row >= i \* HEAD_QUERY_ROWS", "row > i * HEAD_QUERY_ROWS"),
    Mutation("rows of the next head", r"row >= i \* HEAD_QUERY_ROWS", "row >= i * HEAD_QUERY_ROWS - 1"),
    dropped("clear_tail removed", r"self\.clear_tail\(self\.slot\(wave, i\), left\)"),
    Mutation("the tail of V cleared from a token early", r"first \+ token < valid", "first + token < valid - 1"),
    Mutation("the tail of V cleared from a token late", r"first \+ token < valid", "first + token <= valid"),
    Mutation("V cleared to the end of its page", r"computed_tokens = TILE", "computed_tokens = PAGE_SIZE"),
    dropped("no wait for queries, keys and values", r"load\.wait\(\)"),
    dropped(
        "no wait for a cache write before its buffer is used again", r"self\.wait_for_writes\(seq - WRITE_BUFFERS\)"
    ),
    dropped("no wait for the last cache writes", r"self\.wait_for_writes\(self\.num_seqs - 1 - i\)"),
    dropped("no wait for the outputs", r"result\.wait\(\)"),
    Mutation("update of the next page", r"\+ position // PAGE_SIZE\]", "+ (position + 1) // PAGE_SIZE]"),
    Mutation(
        "update of the sublane tile before",
        r"position = self\.kv_lens\[seq\] - 1$",
        "position = jnp.maximum(self.kv_lens[seq] - 17, 0)",
    ),
    Mutation("new token of the next one's place", r"token = left - 1$", "token = left"),
    Mutation(
        "new value for both", r"in \(self\.new_keys, self\.new_values\):", "in (self.new_values, self.new_values):"
    ),
    Mutation("new token of the first head", r"new\[head : head \+ 1\]", "new[0:1]"),
    dropped("update not made", r"self\.update_cache\(seq, self\.slot.*", hangs=True),
    dropped("update not attended to", r"self\.kv\[slot, page, plane, head, tokens\] = rows"),
    dropped("update not in what is written", r"self\.new_out\[buffer, plane, head\] = rows"),
    dropped("update not written", r"self\.cache_write\(seq\)\.start\(\)", hangs=True),
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
    apart = "" if layout == "interleaved" else ", separate K and V"
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
        *cases("decode", WAVES_FEW, layout="apart"),
        *cases("decode", WAVES[len(WAVES_FEW) :], pytest.mark.slow, layout="apart"),
        *cases("prefill", BLOCK_APART, pytest.mark.slow, layout="apart"),
    ],
)
def test_a_bug_is_caught(spec: Spec, kind: str, mutation: Mutation) -> None:
    check_bug(spec, small_plan(spec, kind), mutation)


@pytest.mark.slow
def test_a_page_table_that_ends_within_a_tile_and_is_read_past_its_end_is_caught() -> None:
    spec = replace(APART, serving=replace(APART.serving, max_model_len=9 * APART.serving.page_size))
    bug = Mutation("page table past its end", r"jnp\.minimum\(first_entry \+ page, LAST_ENTRY\)", "first_entry + page")
    plan = small_plan(spec, "decode")
    results = check_source(spec, plan, bug.apply(render(spec, plan)), seed=SEED)
    caught = next((result for result in results if not result.ok), None)
    assert caught is not None and "Out-of-bounds read" in caught.notes[0]
