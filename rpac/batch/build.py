"""Builds the metadata arrays of a call from plain lists, and reads them back row by row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rpac.batch.limits import Limits
from rpac.batch.pack import pack, unpack
from rpac.batch.validate import validate
from rpac.contract import arrays as layout
from rpac.contract.arrays import Served
from rpac.contract.kind import KINDS, Int32s, Kind, row_kind, select_kind
from rpac.errors import BatchError

Int64s = NDArray[np.int64]
Integers = Sequence[int] | NDArray[np.integer[Any]]
INT32 = np.iinfo(np.int32)


class SequenceView(NamedTuple):
    """One live row of a batch; `queries` are the rows of its new tokens, `pages` the entries of its page table up to its
    end, of which those before a window or a chunk of attention may be no pages.
    """

    row: int
    kind: Kind
    queries: range
    kv_len: int
    pages: tuple[int, ...]

    @property
    def q_len(self) -> int:
        return len(self.queries)

    @property
    def context_len(self) -> int:
        """Tokens that were in the cache before this call; below 0 where there are fewer of them than queries."""
        return self.kv_len - self.q_len


@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """Validated metadata of one call: read-only int32 arrays in the contract's shapes.

    `tokens` is the bucket that queries, keys and values are padded to, `num_tokens` how many of them are real,
    `kind` the program that takes the batch. `order[r]` is the caller's index of the sequence in row r, because rows are
    sorted by their kind: `pack` puts queries, keys and values into the order of rows, `unpack` takes the output back.
    """

    kv_lens: Int32s
    page_indices: Int32s
    cu_q_lens: Int32s
    distribution: Int32s
    tokens: int
    kind: Kind
    order: tuple[int, ...]
    limits: Limits

    def __repr__(self) -> str:
        rows = ", ".join(f"{stop - start} {name}" for name, start, stop in self._parts() if stop > start)
        lens = self.kv_lens[: len(self.order)]
        shown = f"; {rows}; {self.num_tokens} new tokens; lengths {lens.min()} to {lens.max()}" if rows else "; empty"
        return f"<Batch for {self.kind}/{self.tokens}{shown}>"

    def _parts(self) -> Iterator[tuple[Kind, int, int]]:
        """The rows of each kind, from and up to."""
        yield from zip(KINDS, (0, *self.distribution[:2].tolist()), self.distribution.tolist(), strict=True)

    @classmethod
    def build(
        cls,
        limits: Limits | Served,
        q_lens: Integers,
        context_lens: Integers | None,
        page_tables: Sequence[Integers] | NDArray[np.integer[Any]],
        *,
        kv_lens: Integers | None = None,
    ) -> Batch:
        """The batch of some sequences, given in any order.

        `q_lens` counts each sequence's new tokens, `context_lens` its tokens already in the cache; `page_tables`
        lists its pages, which must hold both (an entry that no new token sees, before a window or a chunk of attention, may
        be anything, such as -1); one array `[sequences, entries]` is read faster than lists. Rows are
        sorted into decode, prefill and mixed, in the caller's order within each, so give queries, keys and values
        through `pack`; a sequence of exactly `decode_len` tokens (1 unless the spec says more) is decode, one of exactly
        `prefill_chunk` is prefill. The token bucket is the smallest that fits. In place of `context_lens`, which is then
        None, `kv_lens` may count all tokens of each sequence that its queries see: with `causal: false` and
        `update_cache: false` these may be fewer than its queries, as in cross attention to a short source. Raises
        BatchError, or SelectionError where no bucket is large enough.
        """
        limits = limits if isinstance(limits, Limits) else Limits.of(limits)
        new = integers("q_lens", q_lens, 1)
        if (context_lens is None) == (kv_lens is None):
            which = "both" if kv_lens is not None else "neither"
            raise BatchError(f"found {which} of context_lens and kv_lens; must be one of the two; give context_lens")
        name, given, least = ("kv_lens", kv_lens, 1) if context_lens is None else ("context_lens", context_lens, 0)
        known = integers(name, given, least)  # type: ignore[arg-type]  # one of the two is no None
        pages, sizes = _page_lists(page_tables)
        if not len(known) == len(sizes) == len(new):
            raise BatchError(
                f"found {len(new)} q_lens, {len(known)} {name} and {len(sizes)} page_tables; "
                "must be one of each for every sequence"
            )
        lens = known if context_lens is None else new + known
        _check_sizes(limits, new, lens, sizes)
        ranks = np.where(new == limits.decode_len, 0, np.where(new == limits.prefill_chunk, 1, 2))
        order = np.argsort(ranks, kind="stable")
        decodes, prefills, k = int((ranks == 0).sum()), int((ranks == 1).sum()), len(order)

        lens_of_rows = np.zeros(layout.kv_lens_shape(limits), np.int32)
        lens_of_rows[:k] = lens[order]
        cu_q_lens = np.zeros(layout.cu_q_lens_shape(limits), np.int32)
        cu_q_lens[1 : k + 1] = np.cumsum(new[order])
        cu_q_lens[k + 1 :] = cu_q_lens[k]
        width = int(sizes.max(initial=0))
        as_given = np.zeros((k, width), np.int32)
        as_given[np.arange(width) < sizes[:, None]] = pages
        page_indices = np.zeros(layout.page_indices_shape(limits), np.int32)
        page_indices.reshape(limits.max_num_seqs, limits.pages_per_seq)[:k, :width] = as_given[order]
        distribution = np.array([decodes, decodes + prefills, k], np.int32)
        tokens = limits.bucket(int(cu_q_lens[k]))
        arrays = lens_of_rows, page_indices, cu_q_lens, distribution
        for array in arrays:
            array.flags.writeable = False
        return cls.of_arrays(limits, tokens, *arrays, order=tuple(order.tolist()))

    @classmethod
    def of_arrays(
        cls,
        limits: Limits,
        tokens: int,
        kv_lens: Int32s,
        page_indices: Int32s,
        cu_q_lens: Int32s,
        distribution: Int32s,
        order: tuple[int, ...] | None = None,
    ) -> Batch:
        """The batch that the arrays of a call describe; they are copied. Raises as `validate` does."""
        validate(limits, tokens, kv_lens, page_indices, cu_q_lens, distribution)
        return cls(
            kv_lens=_frozen(kv_lens),
            page_indices=_frozen(page_indices),
            cu_q_lens=_frozen(cu_q_lens),
            distribution=_frozen(distribution),
            tokens=tokens,
            kind=select_kind(distribution),
            order=tuple(range(distribution[2])) if order is None else order,
            limits=limits,
        )

    def __len__(self) -> int:
        """Live sequences."""
        return int(self.distribution[2])

    def __iter__(self) -> Iterator[SequenceView]:
        """The live rows, first to last."""
        return (self._row(row) for row in range(len(self)))

    @property
    def num_tokens(self) -> int:
        """New tokens without padding."""
        return int(self.cu_q_lens[len(self)])

    @property
    def metadata(self) -> tuple[Int32s, Int32s, Int32s, Int32s]:
        """The four arrays of a call, in argument order: kv_lens, page_indices, cu_q_lens, distribution."""
        return self.kv_lens, self.page_indices, self.cu_q_lens, self.distribution

    def pack(self, arrays: Any) -> Any:
        """Queries, keys or values as a call takes them, `[tokens, ...]`: in the order of rows, zeros behind them.

        `arrays` are a list of one array `[new tokens, ...]` for each sequence, in the order that `build` was given, or
        one array of all their tokens in that order. NumPy arrays make a NumPy array, JAX arrays a JAX array. Raises
        BatchError where an array is not as long as its sequence has new tokens.
        """
        return pack(arrays, self.order, self.cu_q_lens, self.tokens)

    def unpack(self, array: Any) -> list[Any]:
        """The inverse of `pack`: what each sequence has of an output `[tokens, ...]` (`out` or `lse`), in the order that
        `build` was given. Raises BatchError for another number of rows.
        """
        return unpack(array, self.order, self.cu_q_lens, self.tokens)

    def _row(self, row: int) -> SequenceView:
        kv_len = int(self.kv_lens[row])
        first = row * self.limits.pages_per_seq
        pages = self.page_indices[first : first + layout.cdiv(kv_len, self.limits.page_size)]
        queries = range(int(self.cu_q_lens[row]), int(self.cu_q_lens[row + 1]))
        return SequenceView(row, row_kind(self.distribution, row), queries, kv_len, tuple(pages.tolist()))


def integers(name: str, values: Integers, low: int) -> Int64s:
    """The list as an array. Raises BatchError for the first element that is no integer from `low` to int32's end."""
    try:
        array = np.asarray(values)
    except ValueError:  # a list of lists of several lengths
        array = np.array(None)
    if array.ndim == 1 and not array.size:
        return np.zeros(0, np.int64)
    if array.ndim == 1 and array.dtype.kind in "iu" and low <= array.min() and array.max() <= INT32.max:
        return array.astype(np.int64)
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise BatchError(f"{name} is a {type(values).__name__}; must be a list of integers")
    for index, value in enumerate(values):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value <= INT32.max:
            raise BatchError(f"{name}[{index}] is {value}; must be an integer from {low} to {INT32.max}")
    raise BatchError(f"{name} has dtype {array.dtype}; must be a list of integers")


def _page_lists(page_tables: Sequence[Integers] | NDArray[np.integer[Any]]) -> tuple[Int64s, Int64s]:
    """All pages, sequence after sequence, and how many each sequence has."""
    if not isinstance(page_tables, (list, tuple, np.ndarray)):
        raise BatchError(f"page_tables is a {type(page_tables).__name__}; must be a list of lists of integers")
    try:
        if isinstance(page_tables, np.ndarray) and page_tables.ndim == 2:
            # Read whole: a list of its elements would take long.
            return integers("pages", page_tables.reshape(-1), INT32.min), np.full(*page_tables.shape)
        sizes = np.array([len(pages) for pages in page_tables], np.int64)
        return integers("pages", list(itertools.chain.from_iterable(page_tables)), INT32.min), sizes
    except (BatchError, TypeError):
        # Once more list by list, which is slower and knows where.
        tables = [integers(f"page_tables[{n}]", pages, INT32.min) for n, pages in enumerate(page_tables)]
        return np.concatenate(tables), np.array([len(table) for table in tables])


def _check_sizes(limits: Limits, new: Int64s, lens: Int64s, sizes: Int64s) -> None:
    """What `validate` cannot see, because arrays of these sizes could not be made."""
    count = len(new)
    if count > limits.max_num_seqs:
        raise BatchError(
            f"found {count} sequences; must be at most max_num_seqs ({limits.max_num_seqs}); split the batch"
        )
    needed = -(-lens // limits.page_size)
    bad = (needed > limits.pages_per_seq) | (sizes > limits.pages_per_seq) | (sizes < needed)
    if not bad.any():
        return
    index = int(bad.argmax())
    held = f"{lens[index] - new[index]} context and {new[index]} new tokens"
    if limits.few_keys:
        held = f"{lens[index]} tokens"
    if needed[index] > limits.pages_per_seq:
        raise BatchError(
            f"sequence {index}: has {held}; must be at most {limits.max_kv_len} in all = pages_per_seq "
            f"({limits.pages_per_seq}) x page_size ({limits.page_size}); build with a larger max_model_len"
        )
    table = f"sequence {index}: page_tables[{index}] has {sizes[index]} pages"
    if sizes[index] > limits.pages_per_seq:
        raise BatchError(
            f"{table}; must be at most pages_per_seq ({limits.pages_per_seq}); build with a larger max_model_len"
        )
    raise BatchError(f"{table} of {limits.page_size} tokens; must hold its {held}; give it {needed[index]} pages")


def _frozen(array: Int32s) -> Int32s:
    """The array where it can be written no more and is no view of another, else a copy: page tables may be of 256 MiB."""
    if array.flags.owndata and not array.flags.writeable:
        return array
    copy = array.copy()
    copy.flags.writeable = False
    return copy
