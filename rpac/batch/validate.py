"""Checks the metadata arrays of a call against the contract, fast enough to run on every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpac.batch.limits import Limits, bucket_lines
from rpac.contract import arrays as layout
from rpac.contract.kind import Int32s, row_kind
from rpac.errors import BatchError, SelectionError


def validate(
    limits: Limits,
    tokens: int,
    kv_lens: Int32s,
    page_indices: Int32s,
    cu_q_lens: Int32s,
    distribution: Int32s,
) -> None:
    """Raises BatchError naming the first row that breaks the contract, SelectionError where `tokens` is no bucket.

    Checks shapes and dtypes, the order of distribution and cu_q_lens, the query lengths of decode and prefill rows,
    lengths against the table, page ids, and that a page which takes new tokens belongs to one sequence alone;
    pages that are only read may be shared. Entries of a page table that no new token of its row sees, before a window or
    a chunk of attention, may hold anything. `tokens` is the leading size of queries, keys and values.
    """
    for dims, array in zip(
        layout.metadata_specs(limits), (kv_lens, page_indices, cu_q_lens, distribution), strict=True
    ):
        _check_array(dims, array)
    if tokens not in limits.token_buckets:
        raise SelectionError(
            f"queries have {tokens} rows; the token buckets built are {_listed(limits.token_buckets)}; "
            f"pad queries, keys and values to one of them, or build with\n"
            f"{bucket_lines([*limits.token_buckets, tokens])}"
        )
    i, j, k = distribution.tolist()
    if not 0 <= i <= j <= k <= limits.max_num_seqs:
        raise BatchError(
            f"distribution is ({i}, {j}, {k}); must be 0 <= i <= j <= k <= max_num_seqs ({limits.max_num_seqs}): "
            "the ends of the decode, prefill and mixed rows"
        )
    ends = cu_q_lens[: k + 1].astype(np.int64)  # wide, so that differences of garbage do not wrap around
    if ends[0] != 0:
        raise BatchError(f"cu_q_lens[0] is {ends[0]}; must be 0; queries of the first sequence start at row 0")
    q_lens = np.diff(ends)
    lens = kv_lens[:k].astype(np.int64)
    _check_lengths(limits, tokens, ends, q_lens, lens, distribution)
    _check_pages(limits, q_lens, lens, page_indices, distribution)


def _check_array(dims: layout.ArrayDims, array: Any) -> None:
    if not isinstance(array, np.ndarray):
        raise BatchError(
            f"{dims.name} is a {type(array).__name__}; must be a numpy array of int32 {_shape(dims.shape)}"
        )
    if array.dtype != np.int32:
        raise BatchError(f"{dims.name} has dtype {array.dtype}; must be int32; convert it with astype(numpy.int32)")
    if array.shape != dims.shape:
        raise BatchError(
            f"{dims.name} has shape {_shape(array.shape)}; must be {_shape(dims.shape)}; pad or flatten it to that"
        )


def _check_lengths(
    limits: Limits,
    tokens: int,
    ends: NDArray[np.int64],
    q_lens: NDArray[np.int64],
    lens: NDArray[np.int64],
    distribution: Int32s,
) -> None:
    i, j, k = distribution.tolist()

    def fail(bad: NDArray[np.bool_], what: str) -> None:
        """Raises for the first bad row; `what` may use r, q, kv, start and end."""
        row = int(bad.argmax())
        text = what.format(r=row, q=q_lens[row], kv=lens[row], start=ends[row], end=ends[row + 1])
        raise BatchError(f"row {row} ({row_kind(distribution, row)}): {text}{_more(int(bad.sum()) - 1)}")

    empty = q_lens < 1
    if empty.any():
        fail(empty, "cu_q_lens goes from {start} to {end}; must rise by at least 1 for each live row")
    if ends[k] > tokens:
        raise BatchError(f"cu_q_lens[{k}] is {ends[k]}; must be at most {tokens}, the rows of queries")
    off = np.zeros(k, np.bool_)
    off[:i] = q_lens[:i] != limits.decode_len
    if off.any():
        length = "1" if limits.decode_len == 1 else f"decode_len ({limits.decode_len})"
        fail(off, f"has {{q}} new tokens; decode rows must have {length}; move it after the decode rows")
    off[i:j] = q_lens[i:j] != limits.prefill_chunk
    if off.any():
        chunk = limits.prefill_chunk
        fail(
            off, f"has {{q}} new tokens; prefill rows must have prefill_chunk ({chunk}); move it after the prefill rows"
        )
    if limits.few_keys:
        none = lens < 1
        if none.any():
            fail(
                none,
                "kv_lens[{r}] is {kv}; must be 1 or more, the tokens that its queries see; leave the row out of the batch, "
                "and give it an lse of -inf where parts of an attention are merged",
            )
    short = lens < q_lens
    if short.any() and not limits.few_keys:
        fail(short, "kv_lens[{r}] is {kv}, below its {q} new tokens; kv_lens counts context and new tokens together")
    long = lens > limits.max_kv_len
    if long.any():
        size = f"{limits.max_kv_len} = pages_per_seq ({limits.pages_per_seq}) x page_size ({limits.page_size})"
        fail(long, f"kv_lens[{{r}}] is {{kv}}; must be at most {size}; build with a larger max_model_len")


def _check_pages(
    limits: Limits,
    q_lens: NDArray[np.int64],
    lens: NDArray[np.int64],
    page_indices: Int32s,
    distribution: Int32s,
) -> None:
    k = len(lens)
    # No further than the longest sequence: a table may have 2^16 entries for each.
    width = int(-(-lens.max(initial=0) // limits.page_size))
    column = np.arange(width)
    used = column < -(-lens // limits.page_size)[:, None]
    if limits.is_local:
        used &= column >= limits.first_entries(lens - q_lens)[:, None]
    table = page_indices.reshape(limits.max_num_seqs, limits.pages_per_seq)[:k, :width]
    ids = table[used]
    if not ids.size:
        return
    if ids.min() < 0 or ids.max() >= limits.num_pages:
        bad = used & ((table < 0) | (table >= limits.num_pages))
        row, entry = divmod(int(bad.argmax()), width)
        raise BatchError(
            f"row {row} ({row_kind(distribution, row)}): entry {entry} of its page table is {table[row, entry]}; "
            f"must be 0 to {limits.num_pages - 1}, the pages of the cache{_more(int(bad.sum()) - 1, 'entries')}"
        )
    ids.sort()
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if repeated.size:
        first_written = (lens - q_lens) // limits.page_size
        _check_repeated(table, used, column >= first_written[:, None], np.unique(repeated), distribution)


def _check_repeated(
    table: Int32s,
    used: NDArray[np.bool_],
    written: NDArray[np.bool_],
    repeated: Int32s,
    distribution: Int32s,
) -> None:
    """A page that occurs more than once must be read only, and in different rows."""
    rows, entries = np.nonzero(used & np.isin(table, repeated))
    ids = table[rows, entries]
    order = np.lexsort((entries, rows, ids))
    rows, entries, ids = rows[order], entries[order], ids[order]
    twice = np.flatnonzero((ids[1:] == ids[:-1]) & (rows[1:] == rows[:-1]))
    if twice.size:
        row, at = int(rows[twice[0]]), twice[0]
        raise BatchError(
            f"row {row} ({row_kind(distribution, row)}): page {ids[at]} is in its table twice, at entries "
            f"{entries[at]} and {entries[at + 1]}; every page of a sequence must be a different one"
        )
    writes = np.flatnonzero(written[rows, entries])
    if writes.size:
        at = int(writes[0])
        row = int(rows[at])
        other = int(rows[(ids == ids[at]) & (rows != row)][0])
        raise BatchError(
            f"row {row} ({row_kind(distribution, row)}): writes its new tokens to page {ids[at]}, which row {other} "
            f"({row_kind(distribution, other)}) uses too; a page that takes new tokens must belong to one sequence; "
            "copy it first"
        )


def _more(count: int, what: str = "rows") -> str:
    return f" (and {count} more {what})" if count else ""


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{_listed(shape)}]"
