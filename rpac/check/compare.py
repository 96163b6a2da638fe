"""What a kernel returned against what the oracle says: attention within a tolerance, the cache bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpac.check.arrays import Arguments, Array
from rpac.contract.arrays import TOKEN_AXES
from rpac.oracle.tolerance import TOLERANCE, attention_error


@dataclass(frozen=True)
class Difference:
    """`error` is the largest of any token and head, infinite where the output is no number; `notes` say where."""

    error: float
    tolerance: float
    cache_ok: bool
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance and self.cache_ok


def compare(
    args: Arguments,
    out: Array,
    cache: Array,
    want_out: NDArray[np.float32],
    want_cache: Array,
    *,
    kv_layout: str = "interleaved",
) -> Difference:
    """Rows of padding are not compared: nobody reads them. Every bit of the cache is, poison included."""
    dtype = args.queries.dtype.name
    live = int(args.cu_q_lens[args.distribution[2]])
    notes = []
    error, where = attention_error(out[:live].astype(np.float32), want_out[:live])
    tolerance = TOLERANCE[dtype]
    if not error <= tolerance:
        token, head = where
        notes.append(f"attention of query head {head} at {place(args, token)} is off by {error:.2g}")
    differs = np.moveaxis(bits(cache) != bits(want_cache), TOKEN_AXES[kv_layout], 1)
    differs = differs.any(axis=tuple(range(2, differs.ndim)))
    if differs.any():
        page, slot = (int(index[0]) for index in np.nonzero(differs))
        first = owner(args, page, slot, page_size=differs.shape[1])
        notes.append(f"cache differs in {int(differs.sum())} tokens, first {first}")
    return Difference(error, tolerance, not differs.any(), tuple(notes))


def lse_notes(args: Arguments, lse: Array | None, want: NDArray[np.float32]) -> tuple[str, ...]:
    """What is wrong with the logarithms of the softmax's denominators, whose absolute error is a relative one of these."""
    live = int(args.cu_q_lens[args.distribution[2]])
    if lse is None:
        return ("the program returns no lse",)
    errors = np.abs(lse[:live] - want[:live])
    worst = errors.max(initial=0)
    if worst <= TOLERANCE[args.queries.dtype.name]:
        return ()
    token, head = np.unravel_index(int(np.where(np.isfinite(errors), errors, np.inf).argmax()), errors.shape)
    return (f"lse of query head {head} at row {row_of(args, int(token))} is off by {worst:.2g}",)


def bits(array: Array) -> NDArray[Any]:
    """The same bits as integers."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def row_of(args: Arguments, token: int) -> int:
    """The row of the batch that new token `token` is of."""
    count = int(args.distribution[2])
    return int(np.searchsorted(args.cu_q_lens[: count + 1], token, side="right")) - 1


def place(args: Arguments, token: int) -> str:
    """Where new token `token` is, in words."""
    row = row_of(args, token)
    return f"row {row}, position {args.kv_lens[row] - args.cu_q_lens[row + 1] + token}"


def owner(args: Arguments, page: int, slot: int, page_size: int) -> str:
    """Whose token a place in the cache is, in words."""
    table = args.page_indices.reshape(len(args.kv_lens), -1)
    for row in range(int(args.distribution[2])):
        kv_len = int(args.kv_lens[row])
        entries = np.flatnonzero(table[row, : -(-kv_len // page_size)] == page)
        if entries.size:
            position = int(entries[0]) * page_size + slot
            q_len = int(args.cu_q_lens[row + 1] - args.cu_q_lens[row])
            kind = "past its end" if position >= kv_len else "new" if position >= kv_len - q_len else "old"
            return f"at page {page}, slot {slot}: row {row}, position {position} ({kind})"
    return f"at page {page}, slot {slot}: of no sequence"
