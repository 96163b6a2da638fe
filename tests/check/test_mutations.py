"""The check can fail: each of these bugs, put into a kernel by hand, is caught by it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rpac.check import Result, check_source
from rpac.plan import KernelPlan, plan_spec
from rpac.render import Source, render
from rpac.spec import Spec, load_spec

TINY = load_spec(Path(__file__).parents[2] / "specs" / "tiny.yaml")
# More sequences than a kernel has buffers for their outputs and their new tokens, so that the buffers are used again.
SPEC = replace(TINY, serving=replace(TINY.serving, max_num_seqs=6))
SEED = 0
HANG = 5.0  # seconds


@dataclass(frozen=True)
class Mutation:
    """A bug: what it is, and the edit of the generated text that makes it."""

    bug: str
    pattern: str  # a regular expression; ^ and $ match at lines
    replacement: str

    def apply(self, source: Source) -> Source:
        """The source with the bug in its last kernel. Fails where the template no longer has what it edits."""
        before, start, kernel = source.text.rpartition("_kernel(\n")
        kernel, count = re.subn(self.pattern, self.replacement, kernel, flags=re.MULTILINE)
        assert count == 1, f"{self.bug}: found {count} of {self.pattern!r} in {source.path}"
        return Source(source.path, before + start + kernel)


def dropped(bug: str, statement: str) -> Mutation:
    """A statement of one line that is not there."""
    return Mutation(bug, rf"^( *){statement}$", r"\1pass")


BOTH = [
    Mutation("KV of the next page", r"(page_indices\[seq \* PAGES_PER_SEQ \+ block \* \d+ \+ page)\]", r"\1 + 1]"),
    dropped("clear_tail removed", r"clear_tail\(slot, valid\)"),
    Mutation("wrong slot", r"^( *slot = lax\.rem\(step), (\d)\)(?=\n *(kv_len|end) =)", r"\1 + 1, \2)"),
    Mutation("K for V", r"return head_of\(v_words, head\)", "return head_of(k_words, head)"),
    Mutation("sum not rescaled", r"= rescale \* (row_sum\[.*\]) \+", r"= \1 +"),
]
DECODE = [
    *BOTH,
    Mutation("mask one too far", r"< valid, scores, MASKED", "< valid + 1, scores, MASKED"),
    Mutation("mask one short", r"< valid, scores, MASKED", "< valid - 1, scores, MASKED"),
    dropped("no wait for KV", r"each_page\(kv_len, seq, block, slot, lambda copy: copy\.wait\(\)\)"),
    dropped("no wait for queries, keys and values", r"load\.wait\(\)"),
    dropped("no wait for a cache write before its buffer is used again", r"unit_copy\(seq - \d\)\.wait\(\)"),
    dropped("no wait for the last cache writes", r"unit_copy\(num_seqs - 1 - i\)\.wait\(\)"),
    dropped("no wait for an output before its buffer is used again", r"out_copy\(seq - \d\)\.wait\(\)"),
    dropped("no wait for the last outputs", r"out_copy\(num_seqs - 1 - i\)\.wait\(\)"),
    Mutation("update of the next page", r"\+ position // PAGE_SIZE\]", "+ (position + 1) // PAGE_SIZE]"),
    Mutation("update of the token before", r"position = kv_lens\[seq\] - 1$", "position = jnp.maximum(kv_lens[seq] - 2, 0)"),
    dropped("update not attended to", r"kv\[slot, rows\] = words_as_rows\(words\)"),
    dropped("update not written", r"unit_copy\(seq\)\.start\(\)"),
    Mutation("output not rescaled", r"= .*rescale.* \* (acc\[heads)", r"= \1"),
    Mutation("wrong GQA head", r"queries\[head \* GROUP : \(head \+ 1\) \* GROUP\]", "queries[head : head + GROUP]"),
    Mutation("a block too few", r"last = \(block \+ 1\) \* (\d+) >= kv_lens\[seq\]", r"last = (block + 2) * \1 > kv_lens[seq]"),
]
BLOCK = [
    *BOTH,
    Mutation("mask one too far", r"<= query, scores, MASKED", "<= query + 1, scores, MASKED"),
    Mutation("mask one short", r"<= query, scores, MASKED", "< query, scores, MASKED"),
    Mutation("mask left out where the tile only begins before it", r"\+ \d+ > first_query", "> first_query"),
    dropped("no wait for KV", r"each_page\(end, seq, block, slot, lambda copy: copy\.wait\(\)\)"),
    Mutation("no wait for queries", r"(query_copies\(.*\), lambda copy: )copy\.wait\(\)", r"\1None"),
    dropped("no wait for new keys and values", r"copy\.wait\(\)"),
    dropped("no wait for a page that holds old tokens", r"old_page_copy\(seq, page, slot\)\.wait\(\)"),
    dropped("no wait for a cache write before its buffer is used again", r"page_write\(seq, page, slot\)\.wait\(\).*"),
    dropped("no wait for the last cache writes", r"page_write\(first_seq, .*\)\.wait\(\)"),
    Mutation("no wait for an output before its buffer is used again", r"^( {20}out_copies\(.*lambda copy: )copy\.wait\(\)", r"\1None"),
    Mutation("no wait for the last output", r"^( {8}out_copies\(.*lambda copy: )copy\.wait\(\)", r"\1None"),
    Mutation("update of the next page", r"(def page_write.*\n.*PAGES_PER_SEQ \+) page\]", r"\1 page + 1]"),
    Mutation("update keeps no old tokens", r"\(token >= first\) & ", ""),
    Mutation("update runs past its end", r" & \(token < end\)", ""),
    dropped("update not made", r"update_cache\(\)"),
    Mutation("output not rescaled", r"= .*rescale.* \* (acc\[head)", r"= \1"),
    Mutation("wrong GQA head", r"q_rows\[head // GROUP, ", "q_rows[head % KV_HEADS, "),
    Mutation("query block not fetched whole", r"(tokens & size\) > )0", r"\1 1"),
]
MIXED = [
    Mutation("prefill and mixed rows start at the first row", r"first_seq = distribution\[0\]", "first_seq = jnp.int32(0)"),
    Mutation("mixed rows left out", r"end_seq = distribution\[2\]", "end_seq = distribution[1]"),
    Mutation("queries from the row before", r"return cu_q_lens\[seq\]$", "return jnp.maximum(cu_q_lens[seq] - 1, 0)"),
    Mutation("output of the decode rows lost", r"7: 1, 8: 0", "7: 1"),
]


def plan_of(kind: str) -> KernelPlan:
    """The plan of a kind whose token bucket is the largest."""
    return next(plan for plan in reversed(plan_spec(SPEC, "tpu7x")) if plan.kind == kind)


def check(plan: KernelPlan, source: Source) -> Iterator[Result]:
    return check_source(SPEC, plan, source, seed=SEED, time_limit=HANG)


def cases(kind: str, mutations: list[Mutation], *marks: pytest.MarkDecorator) -> list[object]:
    return [pytest.param(kind, mutation, id=f"{kind}: {mutation.bug}", marks=marks) for mutation in mutations]


@pytest.mark.parametrize(
    ("kind", "mutation"),
    [
        *cases("decode", DECODE),
        *cases("prefill", [mutation for mutation in BLOCK if mutation.bug != "query block not fetched whole"]),
        *cases("mixed", MIXED),
        *cases("mixed", BLOCK, pytest.mark.slow),
    ],
)
def test_a_bug_is_caught(kind: str, mutation: Mutation) -> None:
    plan = plan_of(kind)
    source = mutation.apply(render(SPEC, plan))
    caught = next((result for result in check(plan, source) if not result.ok), None)
    assert caught is not None, f"{kind}: {mutation.bug} goes unseen"
    print(caught)
