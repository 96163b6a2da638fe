"""Moves arrays of new tokens between the caller's order of sequences and the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpac.contract.kind import Int32s
from rpac.errors import BatchError


def pack(arrays: Any, order: Sequence[int], cu_q_lens: Int32s, tokens: int) -> Any:
    """`[tokens, ...]` with the new tokens of every row at its place and zeros behind them.

    `arrays` has them in the caller's order: a list of one array a sequence, or one array of all. `order[row]` is the
    caller's index of a row's sequence. NumPy arrays make a NumPy array, JAX arrays a JAX array.
    """
    starts, lens = _in_callers_order(order, cu_q_lens)
    joined = _joined(arrays, lens)
    xp = joined.__array_namespace__()
    count = int(lens.sum())
    # Row after row, the places of its tokens in the caller's order.
    at = np.argsort(_places(starts, lens), kind="stable")
    padding = xp.zeros((tokens - count, *joined.shape[1:]), joined.dtype)
    return xp.concatenate([joined[at], padding])


def unpack(array: Any, order: Sequence[int], cu_q_lens: Int32s, tokens: int) -> list[Any]:
    """The part of each sequence, in the caller's order, of an array `[tokens, ...]` in the order of rows."""
    found = getattr(array, "shape", None)
    if not found or found[0] != tokens:
        what = f"a {type(array).__name__}" if found is None else f"an array of shape {list(found)}"
        raise BatchError(
            f"unpack was given {what}; must have {tokens} rows, the batch's token bucket; pass out as it came"
        )
    starts, lens = _in_callers_order(order, cu_q_lens)
    return [array[start : start + size] for start, size in zip(starts.tolist(), lens.tolist(), strict=True)]


def _in_callers_order(order: Sequence[int], cu_q_lens: Int32s) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each sequence's new tokens start, and how many it has."""
    count = len(order)
    rows = np.empty(count, np.int64)
    rows[np.array(order, np.int64)] = np.arange(count)
    ends = cu_q_lens[: count + 1].astype(np.int64)
    return ends[rows], np.diff(ends)[rows]


def _places(starts: NDArray[np.int64], lens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place in the batch of every token, in the caller's order."""
    before = np.cumsum(lens) - lens
    return np.repeat(starts - before, lens) + np.arange(int(lens.sum()))


def _joined(arrays: Any, lens: NDArray[np.int64]) -> Any:
    """All new tokens as one array, in the caller's order. Raises BatchError for one that is not as long as its sequence."""
    if isinstance(arrays, (list, tuple)):
        if len(arrays) != len(lens):
            raise BatchError(f"pack was given {len(arrays)} arrays; must be {len(lens)}, one for each sequence")
        for index, (array, wanted) in enumerate(zip(arrays, lens.tolist(), strict=True)):
            found = getattr(array, "shape", None)
            if not found or found[0] != wanted or found[1:] != arrays[0].shape[1:]:
                like = [wanted, *arrays[0].shape[1:]] if index else [wanted, "..."]
                raise BatchError(
                    f"sequence {index}: pack was given {_shown(array)}; must be an array {_axes(like)}, its new tokens"
                )
        if arrays:
            return arrays[0].__array_namespace__().concatenate(list(arrays))
        raise BatchError("pack was given no arrays; must be one array of no tokens where the batch has no sequences")
    found = getattr(arrays, "shape", None)
    if not found or found[0] != lens.sum():
        raise BatchError(
            f"pack was given {_shown(arrays)}; must be an array {_axes([int(lens.sum()), '...'])}, the new tokens of all "
            "sequences in your order, or a list of one array a sequence"
        )
    return arrays


def _shown(array: Any) -> str:
    shape = getattr(array, "shape", None)
    return f"a {type(array).__name__}" if shape is None else f"an array {_axes(shape)}"


def _axes(shape: Sequence[object]) -> str:
    return f"[{', '.join(map(str, shape))}]"
