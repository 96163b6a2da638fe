"""Pages are handed out once, shared as asked, and never written by two; what is refused changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rpac.batch import Batch, Limits
from rpac.contract.attention import first_seen
from rpac.errors import BatchError, OutOfPagesError, PageError
from rpac.serving import PagePool, PageTables

LIMITS = Limits(page_size=4, pages_per_seq=4, max_num_seqs=40, num_pages=12, prefill_chunk=3, token_buckets=(512,))
WINDOW = replace(LIMITS, pages_per_seq=9, num_pages=10, sliding_window=5)
CHUNK = replace(LIMITS, pages_per_seq=9, num_pages=10, attention_chunk=8)


class AgainstTheCache(RuleBasedStateMachine):
    """Beside the tables, what every sequence must read, and a cache in which each token is a number of its own."""

    LIMITS: ClassVar[Limits] = LIMITS

    def __init__(self) -> None:
        super().__init__()
        self.limits = self.LIMITS
        self.tables = PageTables(self.limits)
        self.texts: dict[int, list[int]] = {}
        self.cache = np.full((self.limits.num_pages, self.limits.page_size), -1)
        self.token = 0

    def some(self, data: st.DataObject) -> int | None:
        return data.draw(st.sampled_from(sorted(self.texts))) if self.texts else None

    @rule()
    def add(self) -> None:
        self.texts[self.tables.add()] = []

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.some(data)
        if parent is not None:
            tokens = data.draw(st.integers(0, len(self.texts[parent])))
            if not self.tables.can_fork(parent, tokens):
                assert self.limits.is_local
                with pytest.raises(PageError, match=f"a fork of {tokens} tokens reads some of them"):
                    self.tables.fork(parent, tokens)
                return
            self.texts[self.tables.fork(parent, tokens)] = self.texts[parent][:tokens]

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        gone = self.some(data)
        if gone is not None:
            self.tables.free(gone)
            del self.texts[gone]
            with pytest.raises(PageError, match=f"sequence {gone} is not known"):
                self.tables.free(gone)

    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.texts)), unique=True)) if self.texts else []
        room = {one: self.limits.max_kv_len - len(self.texts[one]) for one in chosen}
        new = {one: data.draw(st.integers(1, min(room[one], 6))) for one in chosen if room[one]}
        before, free = self.held(), self.tables.num_free
        needed = self.tables.pages_needed(list(new), list(new.values()))
        if needed > free:
            with pytest.raises(OutOfPagesError, match=rf"\d+ pages were asked for; the pool has {free} free of 1\d"):
                self.tables.extend(list(new), list(new.values()))
            assert (self.held(), self.tables.num_free) == (before, free)
            return
        copies = self.tables.extend(list(new), list(new.values()))
        assert self.tables.num_free >= free - needed  # more, where the last user of a page was moved off it
        self.cache[copies[:, 1]] = self.cache[copies[:, 0]]
        self.run(new)

    def run(self, new: dict[int, int]) -> None:
        """A step: its batch is accepted, and it writes each new token where the batch says."""
        context = [len(self.texts[one]) for one in new]
        batch = Batch.build(self.limits, list(new.values()), context, self.tables.tables(list(new)))
        for row in batch:
            one = list(new)[batch.order[row.row]]
            for position in range(row.context_len, row.kv_len):
                self.token += 1
                self.texts[one].append(self.token)
                self.cache[row.pages[position // self.limits.page_size], position % self.limits.page_size] = self.token

    def held(self) -> dict[int, list[int]]:
        """The pages of each sequence that it did not give back."""
        counts = dict(zip(self.texts, self.tables.held(list(self.texts)).tolist(), strict=True))
        tables = self.tables.tables(list(self.texts)).tolist()
        ends = {one: -(-len(text) // self.limits.page_size) for one, text in self.texts.items()}
        return {one: row[ends[one] - counts[one] : ends[one]] for one, row in zip(self.texts, tables, strict=True)}

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for one, pages in self.held().items():
            text = self.texts[one]
            first = -(-len(text) // self.limits.page_size) - len(pages)
            at = first * self.limits.page_size
            assert self.cache[pages].reshape(-1)[: len(text) - at].tolist() == text[at:]
            assert at <= first_seen(len(text), self.limits.sliding_window, self.limits.attention_chunk)

    @invariant()
    def a_page_is_free_or_in_a_table(self) -> None:
        used = {page for pages in self.held().values() for page in pages}
        assert self.tables.num_free == self.limits.num_pages - len(used)
        assert len(self.tables) == len(self.texts)
        assert self.tables.lens(list(self.texts)).tolist() == [len(text) for text in self.texts.values()]


class WithAWindow(AgainstTheCache):
    LIMITS = WINDOW


class InChunks(AgainstTheCache):
    LIMITS = CHUNK


TestAgainstTheCache = AgainstTheCache.TestCase
TestWithAWindow = WithAWindow.TestCase
TestInChunks = InChunks.TestCase
for case in (TestAgainstTheCache, TestWithAWindow, TestInChunks):
    case.settings = settings(max_examples=60, stateful_step_count=40)


@pytest.mark.parametrize("limits", [WINDOW, CHUNK], ids=["window", "chunk"])
def test_a_long_sequence_holds_no_more_than_its_tokens_see(limits: Limits) -> None:
    tables = PageTables(limits)
    one, held = tables.add(), []
    for _ in range(12):
        tables.extend([one], [3])
        held.append(int(tables.held([one])[0]))
    assert tables.lens([one]).tolist() == [36]
    assert max(held) <= limits.most_pages(36) < 9
    tables.free(one)
    assert tables.num_free == limits.num_pages


def test_pages_that_a_step_gives_back_may_be_those_that_it_takes() -> None:
    tables = PageTables(replace(WINDOW, num_pages=3))
    one = tables.add()
    tables.extend([one], [12])
    assert tables.num_free == 0
    assert tables.pages_needed([one], [1]) == -1  # it takes one and gives two back
    tables.extend([one], [1])
    assert (tables.num_free, tables.held([one]).tolist()) == (1, [2])


def test_several_kinds_of_layers_hold_what_one_of_them_sees() -> None:
    shorter = replace(WINDOW, sliding_window=3, layer="local")
    assert Limits.joint([shorter, replace(WINDOW, layer="far")]) == WINDOW
    assert Limits.joint([shorter, replace(WINDOW, sliding_window=None, layer="global")]) == replace(
        WINDOW, sliding_window=None
    )
    assert not Limits.joint([shorter, replace(CHUNK, layer="chunk")]).is_local
    assert Limits.joint([shorter]) == shorter
    for wrong in ([], [WINDOW, LIMITS]):
        with pytest.raises(ValueError, match="must be those of the layers of one bundle"):
            Limits.joint(wrong)


def filled(tokens: int) -> tuple[PageTables, int]:
    tables = PageTables(LIMITS)
    one = tables.add()
    tables.extend([one], [tokens])
    return tables, one


def test_a_page_that_is_filled_is_shared_without_a_copy() -> None:
    tables, one = filled(8)
    other = tables.fork(one, 8)
    assert tables.extend([one, other], [1, 1]).tolist() == []
    assert tables.tables([one])[0, :2].tolist() == tables.tables([other])[0, :2].tolist()
    assert tables.num_free == 12 - 4


def test_of_the_users_of_a_partly_filled_page_the_last_one_keeps_it() -> None:
    tables, one = filled(6)
    forks = [tables.fork(one, 6), tables.fork(one, 5)]
    page = tables.tables([one])[0, 1]
    assert tables.pages_needed([one, *forks], [1, 1, 1]) == 2
    copies = tables.extend([one, *forks], [1, 1, 1])
    assert copies[:, 0].tolist() == [page, page]
    assert tables.tables([one, *forks])[:, 1].tolist() == [*copies[:, 1].tolist(), page]


def test_a_copy_counts_as_a_page_that_must_be_free() -> None:
    tables, one = filled(16)
    tables.extend([tables.add()], [16])
    last = tables.add()
    tables.extend([last], [13])
    tables.fork(last, 13)
    with pytest.raises(OutOfPagesError, match="1 pages were asked for; the pool has 0 free of 12; free a sequence"):
        tables.extend([last], [1])
    tables.free(one)
    assert len(tables.extend([last], [1])) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda tables: tables.free(99), PageError, "sequence 99 is not known here; must be one that add or fork"),
        (lambda tables: tables.fork(1, 7), PageError, "sequence 1 has 6 tokens; a fork of 7 must have at most as many"),
        (lambda tables: tables.fork(1, -1), PageError, "a fork of -1"),
        (lambda tables: tables.extend([1, 1], [1, 1]), PageError, "sequence 1 was given twice; must be given once"),
        (lambda tables: tables.extend([1], [0]), BatchError, r"new_tokens are \[0\]; must be 1 or more for each of 1"),
        (lambda tables: tables.extend([1], [1, 1]), BatchError, r"new_tokens are \[1, 1\]; must be 1 or more"),
        (lambda tables: tables.extend([1], [11]), BatchError, "of 6 tokens was to grow by 11; must be at most 16 in"),
    ],
)
def test_what_is_refused_says_why_and_changes_nothing(call: Any, error: type[Exception], message: str) -> None:
    tables, one = filled(6)
    with pytest.raises(error, match=message):
        call(tables)
    assert (tables.num_free, tables.lens([one]).tolist(), len(tables)) == (10, [6], 1)


def test_more_sequences_than_at_first_keep_their_tables() -> None:
    tables = PageTables(LIMITS)
    names = [tables.add() for _ in range(40)]
    for name in names[:12]:
        tables.extend([name], [1])
    assert sorted(tables.tables(names[:12])[:, 0].tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda pool: pool.release([3]),
            PageError,
            "page 3 has 0 users and was given 1 times; must be in use that often",
        ),
        (lambda pool: pool.release([0, 1, 0]), PageError, "page 0 has 1 users and was given 2 times"),
        (lambda pool: pool.release([1, 4]), PageError, "page 4 is not of this pool; must be 0 to 3"),
        (lambda pool: pool.release([-1]), PageError, "page -1 is not of this pool"),
        (lambda pool: pool.share([1, 3]), PageError, "page 3 has 0 users"),
        (lambda pool: pool.share([0.5]), BatchError, r"pages\[0\] is 0\.5; must be an integer from -2147483648"),
        (lambda pool: pool.allocate(3), OutOfPagesError, "3 pages were asked for; the pool has 2 free of 4"),
        (lambda pool: pool.allocate(-1), PageError, "-1 pages were asked for; must be 0 or more"),
    ],
)
def test_the_pool_refuses_all_or_does_all(call: Any, error: type[Exception], message: str) -> None:
    pool = PagePool(4)
    assert pool.allocate(2).tolist() == [0, 1]
    with pytest.raises(error, match=message):
        call(pool)
    assert pool.num_free == 2
    assert pool.uses(np.arange(4)).tolist() == [1, 1, 0, 0]
    pool.release([1, 0])
    assert sorted(pool.allocate(4).tolist()) == [0, 1, 2, 3]
