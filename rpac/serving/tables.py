"""Page tables of many sequences over one pool: grown, shared for a common prefix, and copied before a shared page is written.

With a window or a chunk of attention in the limits, pages that no later token of a sequence sees are given back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rpac.batch import Limits
from rpac.batch.build import Int64s
from rpac.contract.arrays import cdiv
from rpac.contract.kind import Int32s
from rpac.errors import BatchError, PageError
from rpac.serving.pool import PagePool

FIRST_ROWS = 16


class PageTables:
    """The pages of each sequence, as rows of one array. Every method does all of its work or, raising, none.

    The layers that share these tables see what `limits` say: for several kinds of layers, give `Limits.joint` of theirs.
    A sequence is named by the number that `add` or `fork` returned. Numbers are never used again, so one that was
    freed is refused for ever. Lengths are in tokens. Not safe to call from several threads.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pool = PagePool(limits.num_pages)
        self._rows: dict[int, int] = {}
        self._spare = list(range(FIRST_ROWS))
        self._table = np.zeros((FIRST_ROWS, limits.pages_per_seq), np.int32)
        self._lens = np.zeros(FIRST_ROWS, np.int64)
        self._first = np.zeros(FIRST_ROWS, np.int64)  # the first entry of each table whose page is still held
        self._next = 0

    @property
    def num_free(self) -> int:
        """Pages that no sequence uses."""
        return self._pool.num_free

    def __len__(self) -> int:
        """Sequences that are not freed."""
        return len(self._rows)

    def add(self) -> int:
        """A new sequence without tokens."""
        row = self._new_row()
        self._lens[row] = self._first[row] = 0
        return self._named(row)

    def fork(self, sequence: int, tokens: int) -> int:
        """A new sequence that starts with the first `tokens` tokens of another, on the same pages.

        No page is copied here: `extend` has the last one copied, where both use it, before one of them writes to it.
        Raises PageError where the other has fewer tokens, or gave pages back that the new one would read.
        """
        (parent,) = self._rows_of([sequence])
        if not 0 <= tokens <= self._lens[parent]:
            raise PageError(
                f"sequence {sequence} has {self._lens[parent]} tokens; a fork of {tokens} must have at most as many"
            )
        if not self.can_fork(sequence, tokens):
            raise PageError(
                f"sequence {sequence} gave the pages before token {self._first[parent] * self._limits.page_size} back, which "
                f"no later token of it sees; a fork of {tokens} tokens reads some of them; fork at a later token, or compute "
                "the sequence anew"
            )
        first, end = self._seen_from(tokens), cdiv(tokens, self._limits.page_size)
        pages = self._table[parent, first:end].copy()
        self._pool.share(pages)
        row = self._new_row()
        self._table[row, first:end] = pages
        self._lens[row], self._first[row] = tokens, first
        return self._named(row)

    def can_fork(self, sequence: int, tokens: int) -> bool:
        """Whether a sequence still has all pages that a fork of its first `tokens` tokens reads."""
        (parent,) = self._rows_of([sequence])
        return bool(self._first[parent] <= self._seen_from(tokens))

    def free(self, sequence: int) -> None:
        """Gives back the pages of a sequence; those that others share stay theirs."""
        (row,) = self._rows_of([sequence])
        self._pool.release(self._table[row, self._first[row] : cdiv(int(self._lens[row]), self._limits.page_size)])
        del self._rows[sequence]
        self._spare.append(int(row))

    def pages_needed(self, sequences: Sequence[int], new_tokens: Sequence[int] | Int64s) -> int:
        """How many free pages `extend` would take, beside those that it gives back itself; below 0 where these are more."""
        rows = self._rows_of(sequences)
        growth, copied = self._needs(rows, np.asarray(new_tokens, np.int64))
        return int(growth.sum()) + len(copied) - self._pool.freed_by(self._unseen(rows))

    def extend(self, sequences: Sequence[int], new_tokens: Sequence[int] | Int64s) -> Int32s:
        """Makes room behind each sequence for its new tokens, one at least, and counts them to its length.

        Pages that none of the new tokens sees are given back first; their entries in the table hold anything from then on.
        Returns `[copies, 2]`: pages of the cache to copy, from and to, all at once before anything is written to the
        cache. Each is the partly filled last page of a sequence that shares it: a page that takes new tokens must
        belong to one sequence alone. Raises OutOfPagesError where the pool has too few pages for all of them.
        """
        rows, new = self._rows_of(sequences), np.asarray(new_tokens, np.int64)
        growth, copied = self._needs(rows, new)
        unseen, count = self._unseen(rows), int(growth.sum()) + len(copied)
        if count <= self._pool.num_free + self._pool.freed_by(
            unseen
        ):  # else nothing is given back before it is refused
            self._pool.release(unseen)
            self._first[rows] = np.maximum(self._first[rows], self._limits.first_entries(self._lens[rows]))
        pages = self._pool.allocate(count)
        held = self._pages_of(self._lens[rows])
        start = 0
        for at in np.flatnonzero(growth):
            count = int(growth[at])
            self._table[rows[at], held[at] : held[at] + count] = pages[start : start + count]
            start += count
        owners = rows[copied]
        entries = self._lens[owners] // self._limits.page_size
        sources = self._table[owners, entries]
        self._table[owners, entries] = pages[start:]
        self._pool.release(sources)
        self._lens[rows] += new
        return np.stack([sources, pages[start:]], axis=1)

    def lens(self, sequences: Sequence[int]) -> Int64s:
        """The length of each sequence, in tokens."""
        return self._lens[self._rows_of(sequences)]

    def held(self, sequences: Sequence[int]) -> Int64s:
        """How many pages each sequence uses."""
        rows = self._rows_of(sequences)
        return self._pages_of(self._lens[rows]) - self._first[rows]

    def tables(self, sequences: Sequence[int]) -> Int32s:
        """`[sequences, pages_per_seq]`, as `Batch.build` takes them; entries before and past a sequence's pages hold anything."""
        return self._table[self._rows_of(sequences)]

    def _rows_of(self, sequences: Sequence[int]) -> Int64s:
        try:
            rows = [self._rows[sequence] for sequence in sequences]
        except KeyError as error:
            raise PageError(
                f"sequence {error.args[0]} is not known here; must be one that add or fork returned and free did not end"
            ) from None
        if len(set(rows)) < len(rows):
            twice = Counter(sequences).most_common(1)[0][0]
            raise PageError(f"sequence {twice} was given twice; must be given once")
        return np.array(rows, np.int64)

    def _seen_from(self, tokens: int) -> int:
        """The first entry of its table that a sequence of so many tokens reads for the next one."""
        return int(self._limits.first_entries(np.array(tokens, np.int64)))

    def _unseen(self, rows: Int64s) -> Int32s:
        """The pages of some rows that no token behind their ends sees."""
        if not self._limits.is_local:
            return np.zeros(0, np.int32)
        ends = self._limits.first_entries(self._lens[rows])
        parts = [self._table[row, first:end] for row, first, end in zip(rows, self._first[rows], ends, strict=True)]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def _pages_of(self, lens: Int64s) -> Int64s:
        return -(-lens // self._limits.page_size)

    def _needs(self, rows: Int64s, new: Int64s) -> tuple[Int64s, list[int]]:
        """How many pages each row grows by, and which rows must have their last page copied."""
        if new.shape != rows.shape or (new < 1).any():
            raise BatchError(f"new_tokens are {new.tolist()}; must be 1 or more for each of {len(rows)} sequences")
        lens = self._lens[rows]
        ends = lens + new
        if (ends > self._limits.max_kv_len).any():
            longest = ends.argmax()
            raise BatchError(
                f"a sequence of {lens[longest]} tokens was to grow by {new[longest]}; must be at most {self._limits.max_kv_len} "
                f"in all = pages_per_seq ({self._limits.pages_per_seq}) x page_size ({self._limits.page_size})"
            )
        entries, filled = np.divmod(lens, self._limits.page_size)
        partial = np.flatnonzero(filled)
        last = self._table[rows[partial], entries[partial]]
        uses = self._pool.uses(last)
        copied = []
        left = dict(zip(last.tolist(), uses.tolist(), strict=True))
        for at in np.flatnonzero(uses > 1):
            if left[int(last[at])] > 1:  # the last user that is left keeps the page
                copied.append(int(partial[at]))
                left[int(last[at])] -= 1
        return self._pages_of(ends) - self._pages_of(lens), copied

    def _new_row(self) -> int:
        if not self._spare:
            rows = len(self._lens)
            self._spare.extend(range(rows, 2 * rows))
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._lens, self._first = (np.concatenate([one, np.zeros_like(one)]) for one in (self._lens, self._first))
        return self._spare.pop()

    def _named(self, row: int) -> int:
        self._next += 1
        self._rows[self._next] = row
        return self._next
