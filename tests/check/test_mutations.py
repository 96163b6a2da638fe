"""The check can fail: each of these bugs, put into a kernel by hand, is caught by it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rpac.check import check_source
from rpac.plan import BlockTiles, DecodeTiles, KernelPlan, plan_spec
from rpac.render import Source, render
from rpac.spec import load_spec

TINY = load_spec(Path(__file__).parents[2] / "specs" / "tiny.yaml")
# More sequences than a kernel has buffers for their outputs and their new tokens, so that the buffers are used again.
SPEC = replace(TINY, serving=replace(TINY.serving, max_num_seqs=6))
SEED = 0
SECONDS = 120.0  # a run takes less than one, on a machine with nothing else to do
HANG = 10.0  # of a run that will not end


@dataclass(frozen=True)
class Mutation:
    """A bug: what it is, and the edit of the generated text that makes it."""

    bug: str
    pattern: str  # a regular expression; ^ and $ match at lines
    replacement: str
    hangs: bool = False

    def apply(self, source: Source) -> Source:
        """The source with the bug in its last kernel. Fails where the template no longer has what it edits."""
        before, start, kernel = source.text.rpartition("_kernel(\n")
        kernel, count = re.subn(self.pattern, self.replacement, kernel, flags=re.MULTILINE)
        assert count == 1, f"{self.bug}: found {count} of {self.pattern!r} in {source.path}"
        return Source(source.path, before + start + kernel)


def dropped(bug: str, statement: str, hangs: bool = False) -> Mutation:
    """A statement of one line that is not there."""
    return Mutation(bug, rf"^( *){statement}$", r"\1pass", hangs)


def no_wait(bug: str, statement: str) -> Mutation:
    """A wait that is not there, of the copies that a function is called for with `copy.wait()`."""
    return Mutation(f"no wait for {bug}", rf"^({statement}.*lambda copy: )copy\.wait\(\)\)$", r"\1None)")


BOTH = [
    Mutation("KV of the next page", r"(page_indices\[seq \* PAGES_PER_SEQ \+ block \* \d+ \+ page)\]", r"\1 + 1]"),
    dropped("clear_tail removed", r"clear_tail\(slot, (?:valid|kv_len - block \* \d+)\)"),
    Mutation("wrong slot", r"^( *slot = lax\.rem\(step), (\d+)\)(?=\n *(kv_len|end) =)", r"\1 + 1, \2)", hangs=True),
    Mutation("K for V", r"return head_of\(v_words,((?: here,)?) head\)", r"return head_of(k_words,\1 head)"),
    Mutation("sum not rescaled", r"= rescale \* (row_sum\[.*\]) \+", r"= \1 +"),
    Mutation("output not rescaled", r"= .*rescale.* \* (acc\[head)", r"= \1"),
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
    Mutation("mask left out where a tile only begins before it", r"\+ \d+ > first_query", "> first_query"),
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
    dropped("update not made", r"update_cache\(\)"),
    Mutation("wrong GQA head", r"q_rows\[head // GROUP, ", "q_rows[lax.rem(head, KV_HEADS), "),
]
MIXED = [
    Mutation("prefill rows left out", r"first_seq = distribution\[0\]", "first_seq = distribution[1]"),
    Mutation("mixed rows left out", r"end_seq = distribution\[2\]", "end_seq = distribution[1]"),
    Mutation("queries from the row before", r"return cu_q_lens\[seq\]$", "return jnp.maximum(cu_q_lens[seq] - 1, 0)"),
    Mutation("copies of one token left out", r"(tokens & size\) > )0", r"\1 1"),
    Mutation("output of the decode rows lost", r"7: 1, 8: 0", "7: 1"),
]


def small_plan(kind: str) -> KernelPlan:
    """A plan for the largest bucket with tiles so small that a full table is several blocks of several tiles."""
    plan = next(plan for plan in reversed(plan_spec(SPEC, "tpu7x")) if plan.kind == kind)
    if isinstance(plan.decode, DecodeTiles):
        plan = replace(plan, decode=replace(plan.decode, block=128))
    if isinstance(plan.block, BlockTiles):
        tiles = {"q_block": 16, "step_rows": 16 * SPEC.model.group, "block": 256, "tile": 128, "merge_tokens": 4}
        plan = replace(plan, block=replace(plan.block, **tiles))
    return plan


def cases(kind: str, mutations: list[Mutation], *marks: pytest.MarkDecorator) -> list[object]:
    return [pytest.param(kind, mutation, id=f"{kind}: {mutation.bug}", marks=marks) for mutation in mutations]


@pytest.mark.parametrize("kind", ["decode", "prefill", "mixed"])
def test_without_a_bug_there_is_nothing_to_catch(kind: str) -> None:
    plan = small_plan(kind)
    failed = [result for result in check_source(SPEC, plan, render(SPEC, plan), seed=SEED) if not result.ok]
    assert not failed


@pytest.mark.parametrize(
    ("kind", "mutation"),
    [
        *cases("decode", DECODE),
        *cases("prefill", BLOCK, pytest.mark.slow),
        *cases("mixed", MIXED, pytest.mark.slow),
        # Their kernel is made by the template that makes the prefill kernel.
        *cases("mixed", BLOCK, pytest.mark.slow),
    ],
)
def test_a_bug_is_caught(kind: str, mutation: Mutation) -> None:
    plan = small_plan(kind)
    time_limit = HANG if mutation.hangs else SECONDS
    results = check_source(SPEC, plan, mutation.apply(render(SPEC, plan)), seed=SEED, time_limit=time_limit)
    caught = next((result for result in results if not result.ok), None)
    assert caught is not None, "the bug goes unseen"
    print(caught)
    assert mutation.hangs or not any("did not end" in note for note in caught.notes)
