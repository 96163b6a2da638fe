"""Whether wrong numbers of a batch stay in their rows: a batch with and without them, compared bit for bit.

A row whose numbers cannot be gets NaN. No other row may change, nor any page that is not of a row with a wrong number. What
cannot be is said here in numpy, and shares nothing with the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rpac.batch import Limits
from rpac.check.arrays import Arguments, Int32s
from rpac.check.compare import Difference, bits, owner
from rpac.check.execute import Outcome
from rpac.contract.arrays import cdiv
from rpac.spec import Spec

INT32: Final = np.iinfo(np.int32)
MOST_WRONG: Final = 3  # numbers of one batch


@dataclass(frozen=True)
class Wrong:
    """A number of a batch's metadata that is not what it should be."""

    array: str
    index: int
    value: int

    def __str__(self) -> str:
        return f"{self.array}[{self.index}] = {self.value}"


@dataclass(frozen=True)
class Rows:
    """What a kernel may make of a batch's numbers: sequence s has tokens [edges[s], edges[s + 1]).

    `is_decode` and `is_good` are of each sequence before `end`.
    """

    end: int
    edges: NDArray[np.int64]
    is_decode: NDArray[np.bool_]
    is_good: NDArray[np.bool_]


def draw_wrong(spec: Spec, kind: str, args: Arguments, rng: np.random.Generator) -> tuple[Wrong, ...]:
    """Up to MOST_WRONG wrong numbers for a call of a kind of batches, each of which the call's program reads."""
    limits, pages = Limits.of(spec), len(args.kv_cache)
    count, tokens = int(args.distribution[2]), len(args.queries)
    found = []
    for _ in range(int(rng.integers(1, MOST_WRONG + 1))):
        row = int(rng.integers(count))
        new, length = int(args.cu_q_lens[row + 1] - args.cu_q_lens[row]), int(args.kv_lens[row])
        page = int(rng.integers(cdiv(length, limits.page_size)))
        far = [INT32.min, INT32.max, -1, 10**6]
        values = {
            "page_indices": (row * limits.pages_per_seq + page, [*far[:3], pages, pages + int(rng.integers(1 << 20))]),
            "kv_lens": (row, [*far, 0, new - 1, limits.max_kv_len + 1, length + limits.page_size]),
            "cu_q_lens": (int(rng.integers(count + 1)), [*far, tokens + 1, int(args.cu_q_lens[row])]),
            "distribution": (int(rng.integers(3)), [*far, 0, limits.max_num_seqs + 1, row]),
        }
        names = [name for name in values if name != "cu_q_lens" or kind == "mixed"]
        name = names[int(rng.integers(len(names)))]
        index, choices = values[name]
        found.append(Wrong(name, index, int(choices[int(rng.integers(len(choices)))])))
    return tuple(found)


def with_wrong(args: Arguments, wrong: Sequence[Wrong]) -> Arguments:
    """The same call with wrong numbers in it."""
    arrays = {name: getattr(args, name).copy() for name in {one.array for one in wrong}}
    for one in wrong:
        arrays[one.array][one.index] = one.value
    return args._replace(**arrays)


def rows_of(spec: Spec, kind: str, args: Arguments) -> Rows:
    """What may be made of a call's numbers."""
    limits, model, tokens = Limits.of(spec), spec.model, len(args.queries)
    i, j, k = (int(one) for one in args.distribution)
    decodes = min(max(i, 0), limits.max_num_seqs, tokens // limits.decode_len)
    new = {"decode": limits.decode_len, "prefill": limits.prefill_chunk}.get(kind, 0)
    if kind == "mixed":
        end = min(max(k, decodes), limits.max_num_seqs)
        given = args.cu_q_lens.astype(np.int64).clip(0, tokens)
        given[: decodes + 1] = np.arange(decodes + 1) * limits.decode_len
        edges = np.maximum.accumulate(given)
    else:
        end = decodes if kind == "decode" else min(max(j, 0), limits.max_num_seqs, tokens // new)
        decodes = end if kind == "decode" else 0
        edges = np.arange(limits.max_num_seqs + 1, dtype=np.int64) * new
    good = []
    table = args.page_indices.reshape(limits.max_num_seqs, -1)
    for row in range(end):
        count, length = int(edges[row + 1] - edges[row]), int(args.kv_lens[row])
        least = 1 if limits.few_keys else count
        fits = least <= length <= limits.max_kv_len
        first = model.first_seen(length - count) // limits.page_size if fits else 0
        used = table[row, first : cdiv(length, limits.page_size)] if fits else table[row, :0]
        good.append(fits and bool(((used >= 0) & (used < len(args.kv_cache))).all()))
    return Rows(end, edges, np.arange(end) < decodes, np.array(good, bool))


def pages_of(args: Arguments, row: int) -> Int32s:
    """The pages of the cache that a row's part of the page tables names."""
    table: Int32s = args.page_indices.reshape(len(args.kv_lens), -1)[row]
    return table[(table >= 0) & (table < len(args.kv_cache))]


def contained(spec: Spec, kind: str, args: Arguments, clean: Outcome, spoiled: Arguments, found: Outcome) -> Difference:
    """How far a run of `spoiled` is from `clean`, the run of `args`, where it must not be off by a bit."""
    if clean.out is None or clean.kv_cache is None or found.out is None or found.kv_cache is None:
        return Difference(math.inf, 0.0, False, found.notes or ("the batch without wrong numbers did not run",))
    before, after = rows_of(spec, kind, args), rows_of(spec, kind, spoiled)
    notes = list(found.notes)
    same = [row for row in range(min(before.end, after.end)) if _is_same(spec, args, spoiled, before, after, row)]
    results = {"attention": (clean.out, found.out), "lse": (clean.lse, found.lse)}
    for name, (wanted, got) in results.items():
        if wanted is None or got is None:
            continue
        for row in range(after.end):
            mine = slice(int(after.edges[row]), int(after.edges[row + 1]))
            if row in same and (bits(wanted[mine]) != bits(got[mine])).any():
                notes.append(f"{name} of row {row} changes, whose numbers are right")
            if not after.is_good[row] and not np.isnan(got[mine].astype(np.float32)).all():
                notes.append(f"{name} of row {row} is not NaN, though its numbers cannot be")
    moved = _moved_pages(args, clean.kv_cache, spoiled, found.kv_cache, same, after.end)
    if len(moved):
        notes.append(
            f"{len(moved)} pages of the cache change, first {owner(args, int(moved[0]), 0, spec.serving.page_size)}"
        )
    bad = len(notes) > len(found.notes)
    return Difference(math.inf if bad else 0.0, 0.0, not len(moved), tuple(notes))


def _is_same(spec: Spec, args: Arguments, spoiled: Arguments, before: Rows, after: Rows, row: int) -> bool:
    """Whether a row is what it was: then so are its results."""
    pages = slice(row * spec.serving.pages_per_seq, (row + 1) * spec.serving.pages_per_seq)
    return bool(
        after.is_good[row]
        and before.is_decode[row] == after.is_decode[row]
        and (before.edges[row : row + 2] == after.edges[row : row + 2]).all()
        and args.kv_lens[row] == spoiled.kv_lens[row]
        and (args.page_indices[pages] == spoiled.page_indices[pages]).all()
    )


def _moved_pages(
    args: Arguments,
    clean: NDArray[np.generic],
    spoiled: Arguments,
    found: NDArray[np.generic],
    same: Sequence[int],
    end: int,
) -> NDArray[np.int64]:
    """The pages that changed and may not: a row that is what it was has its own, and other live rows may write theirs."""
    want = args.kv_cache.copy()
    free = np.zeros(len(want), bool)
    for row in range(end):
        free[pages_of(spoiled, row)] = True
    for row in same:
        mine = pages_of(spoiled, row)
        want[mine] = clean[mine]
        free[mine] = False
    differs = (bits(found) != bits(want)).reshape(len(want), -1).any(axis=1)
    return np.flatnonzero(differs & ~free)
