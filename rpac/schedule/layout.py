"""Where the elements of an array lie in memory, by the layout that XLA chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from rpac.schedule.hlo import BITS, Array

WORD_BYTES: Final = 4
_PADDING: Final = -1

Indices = np.ndarray[Any, Any]


class Image(list[int | None]):
    """The 32-bit words of an array as they lie in memory, with the padding of its tiles, which reads as 0."""


def places(array: Array) -> Indices:
    """The place of each element in memory, counted in elements with padding, in the shape of the array."""
    order = _in_memory(array)
    found = np.empty(array.count, np.int64)
    held = np.flatnonzero(order != _PADDING)
    found[order[held]] = held
    return found.reshape(array.dims)


def is_linear(array: Array) -> bool:
    """Whether elements lie in memory in the order of their indices, with nothing between them."""
    if len(array.dims) == 1 and all(len(tile) == 1 for tile in array.tiles):
        return True  # not counted: a list may be long
    return bool((places(array).reshape(-1) == np.arange(array.count)).all())


def words(values: Sequence[int], array: Array) -> Sequence[int | None]:
    """An array's 32-bit words. `values`: its integers of 8, 16 or 32 bits, flattened, the last dimension first to vary.

    The values themselves where they lie like that and are words; otherwise an `Image`.
    """
    itemsize = BITS[array.dtype] // 8
    if itemsize == WORD_BYTES and is_linear(array):
        return values
    elements = [0 if place == _PADDING else values[place] for place in _in_memory(array).tolist()]
    count = WORD_BYTES // itemsize
    return Image(_word(elements[first : first + count], itemsize) for first in range(0, len(elements), count))


def _in_memory(array: Array) -> Indices:
    """For each place in memory the index of the element there, flattened, or _PADDING."""
    found = np.arange(array.count).reshape(array.dims).transpose(array.order[::-1])
    for tile in array.tiles:
        found = _tiled(found, tile)
    return found.reshape(-1)


def _tiled(array: Indices, tile: Sequence[int]) -> Indices:
    """[..., n] -> [..., ceil(n / tile), tile] for all dimensions of a tile at once: first which tile, then where in it.

    A tile applies to the last dimensions that the one before left.
    """
    array = array.reshape((1,) * (len(tile) - array.ndim) + array.shape)
    kept = array.ndim - len(tile)
    padding = [(0, 0)] * kept + [(0, -n % t) for n, t in zip(array.shape[kept:], tile, strict=True)]
    array = np.pad(array, padding, constant_values=_PADDING)
    split = [size for n, t in zip(array.shape[kept:], tile, strict=True) for size in (n // t, t)]
    outer = [kept + 2 * i for i in range(len(tile))]
    order = [*range(kept), *outer, *(place + 1 for place in outer)]
    return array.reshape(*array.shape[:kept], *split).transpose(order)


def _word(elements: Sequence[int], itemsize: int) -> int:
    """The signed 32-bit word of its elements, the first in its lowest bits."""
    data = b"".join(element.to_bytes(5, "little", signed=True)[:itemsize] for element in elements)
    return int.from_bytes(data, "little", signed=True)
