"""Continuous batching: which sequences compute which of their tokens in each step, and on which pages.

A sequence waits until it is admitted, first come, first served; then it runs in every step, a chunk of its prompt at a
time and after that one token at a time. Where pages run out, the youngest that runs gives all of its pages back and
waits again, before all that are younger; its tokens stay known and are computed again. The oldest sequence thereby
computes at least one token in every step, whatever the others do.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from rpac.batch import Batch, Limits
from rpac.batch.build import INT32, Int64s, Integers, integers
from rpac.contract.arrays import cdiv
from rpac.contract.kind import Int32s
from rpac.errors import BatchError, PageError
from rpac.serving.split import query_positions, split_budget
from rpac.serving.tables import PageTables


@dataclass(frozen=True, eq=False)
class Step:
    """What one call of the model computes.

    `token_ids` and `positions` are `[batch.tokens]` int32, a query row each, 0 in padding. `copies` is `[n, 2]`: pages
    of every layer's cache to copy, from and to, all at once before the model runs. `samples` are the query rows behind
    which a new token follows, `sampled` the sequences that it belongs to; `sequences` are those of the batch's rows.
    `preempted` gave their pages back; `shared` counts prompt tokens that were found in the cache.
    """

    batch: Batch
    sequences: tuple[int, ...]
    token_ids: Int32s
    positions: Int32s
    copies: Int32s
    samples: Int32s
    sampled: tuple[int, ...]
    preempted: tuple[int, ...]
    shared: int


@dataclass(eq=False)
class _Sequence:
    name: int
    tokens: Int32s  # room for all that it may have; the first `length` are known
    length: int
    head: bytes  # of its first page, for a quick look whether a prefix is shared
    table: int = -1  # its sequence of PageTables, while it runs
    computed: int = 0


class Scheduler:
    """The sequences that a server works on. Not safe to call from several threads.

    `share_prefixes` lets a sequence start on the pages of a running one that begins with the same tokens.
    """

    def __init__(self, limits: Limits, *, share_prefixes: bool = True) -> None:
        """Raises BatchError for programs whose decode rows have several new tokens, because there are no drafts here, and
        for the limits of one of several kinds of layers, because the tables here are for all layers of a model.
        """
        if limits.decode_len > 1:
            raise BatchError(
                f"decode_len is {limits.decode_len}; must be 1, the new tokens of a sequence that decodes here; build with\n"
                "serving:\n  decode_len: 1"
            )
        if limits.layer and limits.is_local:
            raise BatchError(
                f"the limits are of the layers {limits.layer!r} alone, which do not see all of a sequence; must be those of all "
                "layers that the page tables are for; pass rpac.Limits.joint([engine.limits for engine in engines.values()])"
            )
        self.limits = limits
        self.tables = PageTables(limits)
        self._share = share_prefixes
        self._most_rows = min(limits.max_num_seqs, limits.token_buckets[-1])
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # the oldest first
        self._known: dict[int, _Sequence] = {}
        self._pending: Step | None = None
        self._next = 0

    @property
    def running(self) -> tuple[int, ...]:
        """The sequences that have pages, the oldest first."""
        return tuple(one.name for one in self._running)

    @property
    def waiting(self) -> tuple[int, ...]:
        """The sequences that have none, the next to be admitted first."""
        return tuple(one.name for one in self._waiting)

    @property
    def max_tokens(self) -> int:
        """The most tokens that a sequence may have, its prompt and its new tokens together."""
        # The last new token is handed out and never computed, so it needs no place in the cache.
        limits = self.limits
        fits = limits.most_pages(limits.max_kv_len) <= limits.num_pages
        return (limits.max_kv_len if fits else limits.num_pages * limits.page_size) + 1

    def add(self, tokens: Integers, max_new_tokens: int) -> int:
        """A sequence that waits to be continued by up to `max_new_tokens`, one at least; returns its name.

        Raises BatchError where it is empty, or can never fit the page table or the cache.
        """
        prompt = integers("tokens", tokens, INT32.min)
        if not prompt.size:
            raise BatchError("tokens are empty; must be one at least, for the next follows from it")
        if max_new_tokens < 1 or prompt.size + max_new_tokens > self.max_tokens:
            raise BatchError(
                f"found {prompt.size} tokens and max_new_tokens {max_new_tokens}; must be 1 or more new tokens, and "
                f"at most {self.max_tokens} in all; shorten it, or build with a larger max_model_len and num_pages"
            )
        self._next += 1
        room = np.zeros(prompt.size + max_new_tokens, np.int32)
        room[: prompt.size] = prompt
        head = room[: self.limits.page_size].tobytes() if prompt.size > self.limits.page_size else b""
        one = _Sequence(self._next, room, prompt.size, head)
        self._known[one.name] = one
        self._waiting.append(one)
        return one.name

    def remove(self, sequence: int) -> None:
        """Ends a sequence at once, wherever it is; a pending step may still compute it. Raises PageError if unknown."""
        if sequence not in self._known:
            raise PageError(
                f"sequence {sequence} is not known here; must be one that add returned and that did not end"
            )
        self._end(self._known[sequence])

    def step(self) -> Step | None:
        """The next step, or None where there is nothing to do. `commit` or `undo` it before the next.

        Raises BatchError where the last one was not.
        """
        if self._pending is not None:
            raise BatchError("the last step is neither committed nor undone; commit it, or undo it, before the next")
        new, preempted = self._fit()
        shared = 0
        if not preempted:
            shared = self._admit(self.limits.token_buckets[-1] - int(new.sum()))
            new = self._split()
        rows = [one for one, count in zip(self._running, new, strict=True) if count]
        if not rows:
            return None
        self._pending = self._made(rows, new[new > 0], tuple(preempted), shared)
        return self._pending

    def commit(self, step: Step, tokens: Integers) -> list[int]:
        """Takes the token that follows each of `step.samples`; returns the sequences that are complete, and ended.

        Those that were removed meanwhile are passed over. Raises BatchError for another step than the last, or where
        `tokens` is not one for each.
        """
        self._check_pending(step)
        if len(tokens) != len(step.sampled):
            raise BatchError(f"found {len(tokens)} tokens; must be {len(step.sampled)}, one for each of step.samples")
        self._pending = None
        for name, kv_len in zip(step.sequences, step.batch.kv_lens[: len(step.batch)].tolist(), strict=True):
            if name in self._known:
                self._known[name].computed = kv_len
        complete = []
        for name, token in zip(step.sampled, tokens, strict=True):
            one = self._known.get(name)
            if one is None:
                continue
            one.tokens[one.length] = token
            one.length += 1
            if one.length == len(one.tokens):
                self._end(one)
                complete.append(name)
        return complete

    def undo(self, step: Step) -> None:
        """For a step that could not run: all that run give their pages back, wait, and are computed again.

        Nothing is taken to be in the cache any more, for a step that failed half-way may have lost it.
        """
        self._check_pending(step)
        self._pending = None
        while self._running:
            self._requeue(self._running.pop())

    def _check_pending(self, step: Step) -> None:
        if step is not self._pending:
            raise BatchError("the step is not the last one, or was committed or undone already; must be the last")

    def _split(self) -> Int64s:
        left = np.array([one.length - one.computed for one in self._running], np.int64)
        return split_budget(left, self.limits.prefill_chunk, self.limits.token_buckets[-1])

    def _fit(self) -> tuple[Int64s, list[int]]:
        """The new tokens of each running sequence, and those that had to be preempted for them."""
        preempted: list[int] = []
        while True:
            new = self._split()
            rows = [one.table for one, count in zip(self._running, new, strict=True) if count]
            if self.tables.pages_needed(rows, new[new > 0]) <= self.tables.num_free:
                return new, preempted
            youngest = self._running.pop()
            self._requeue(youngest)
            preempted.append(youngest.name)

    def _requeue(self, one: _Sequence) -> None:
        self.tables.free(one.table)
        one.table = -1
        self._waiting.appendleft(one)

    def _admit(self, budget: int) -> int:
        """Lets sequences run while all tokens of all that run have room in the cache; returns the tokens shared."""
        if not self._waiting or budget < 1 or len(self._running) >= self._most_rows:
            return 0
        # Pages are taken as chunks are computed: those that run will yet take some of the free ones.
        needed = sum(self.limits.most_pages(one.length) for one in self._running)
        free = self.tables.num_free - needed + int(self.tables.held([one.table for one in self._running]).sum())
        shared = 0
        while self._waiting and budget > 0 and len(self._running) < self._most_rows:
            one = self._waiting[0]
            donor, common = self._longest_prefix(one)
            # A page that is shared in part is copied once, so it counts as a new one.
            own = cdiv(one.length, self.limits.page_size) - common // self.limits.page_size
            needed = min(own, self.limits.most_pages(one.length))
            if needed > free:
                break
            free -= needed
            self._waiting.popleft()
            one.table = self.tables.add() if donor is None else self.tables.fork(donor.table, common)
            one.computed = common
            self._running.append(one)
            shared += common
            budget -= min(one.length - common, self.limits.prefill_chunk)
        return shared

    def _longest_prefix(self, one: _Sequence) -> tuple[_Sequence | None, int]:
        """The running sequence whose computed tokens share the longest start with this one, and its length."""
        best, longest = None, 0
        if not self._share or not one.head:
            return best, longest
        for other in self._running:
            most = min(other.computed, one.length - 1)  # the last is computed: the next token follows from it
            if other.head != one.head or most <= longest or most < self.limits.page_size:
                continue
            if other.tokens[longest] != one.tokens[longest]:  # it cannot share more than is found already
                continue
            different = one.tokens[:most] != other.tokens[:most]
            common = int(different.argmax()) if different.any() else most
            if common > longest and self.tables.can_fork(other.table, common):
                best, longest = other, common
        return best, longest

    def _made(self, rows: list[_Sequence], new: Int64s, preempted: tuple[int, ...], shared: int) -> Step:
        tables = [one.table for one in rows]
        copies = self.tables.extend(tables, new)
        context = np.array([one.computed for one in rows], np.int64)
        batch = Batch.build(self.limits, new, context, self.tables.tables(tables))
        ordered = [rows[index] for index in batch.order]
        token_ids = np.zeros(batch.tokens, np.int32)
        kv_lens = batch.kv_lens[: len(batch)].tolist()
        token_ids[: batch.num_tokens] = np.concatenate(
            [one.tokens[one.computed : end] for one, end in zip(ordered, kv_lens, strict=True)]
        )
        _, positions = query_positions(batch)
        whole = np.array([one.length == end for one, end in zip(ordered, kv_lens, strict=True)])
        names = tuple(one.name for one in ordered)
        return Step(
            batch=batch,
            sequences=names,
            token_ids=token_ids,
            positions=positions,
            copies=copies,
            samples=batch.cu_q_lens[1 : len(batch) + 1][whole] - 1,
            sampled=tuple(names[at] for at in np.flatnonzero(whole)),
            preempted=preempted,
            shared=shared,
        )

    def _end(self, one: _Sequence) -> None:
        del self._known[one.name]
        if one.table >= 0:
            self.tables.free(one.table)
            self._running.remove(one)
        else:
            self._waiting.remove(one)
