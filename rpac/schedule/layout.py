"""Arrays as they lie in memory: XLA's layouts, for scalar operands that a kernel copies to SMEM."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

WORD_BYTES: Final = 4
_TILES = re.compile(r"T((?:\([\d,]+\))+)")
_PADDING: Final = -1


class Image(list[int]):
    """The 32-bit words of an array as they lie in memory, with the padding of its tiles, which reads as 0."""


def words(values: Sequence[int], dims: Sequence[int], layout: str, itemsize: int) -> Sequence[int]:
    """An array's 32-bit words. `values`: flattened, the last dimension first to vary.

    `layout`: as XLA writes it, such as `1,0:T(8,128)(4,1)`: dimensions from the one that varies first, then tiles, of which
    each applies to the last dimensions that the one before left. `itemsize`: bytes of an element, 1, 2 or 4. The values
    themselves where they lie like that and are words; otherwise an `Image`.
    """
    places = _places(dims, layout)
    if itemsize == WORD_BYTES and places[: len(values)] == list(range(len(values))):
        return values
    elements = [0 if place == _PADDING else values[place] for place in places]
    count = WORD_BYTES // itemsize
    return Image(_word(group, itemsize) for group in _groups(elements, count))


def _places(dims: Sequence[int], layout: str) -> list[int]:
    """For each element in memory its index in the flattened array."""
    order, _, tiling = layout.partition(":")
    array = np.arange(math.prod(dims)).reshape(dims)
    if order:
        array = array.transpose([int(dim) for dim in reversed(order.split(","))])
    tiles = _TILES.match(tiling)
    for tile in re.findall(r"[\d,]+", tiles[1]) if tiles else ():
        array = _tiled(array, [int(size) for size in tile.split(",")])
    return [int(place) for place in array.reshape(-1)]


def _tiled(array: NDArray[np.int_], tile: Sequence[int]) -> NDArray[np.int_]:
    """[..., n] -> [..., ceil(n / tile), tile] for all dimensions of a tile at once: first which tile, then where in it."""
    array = array.reshape((1,) * (len(tile) - array.ndim) + array.shape)
    kept = array.ndim - len(tile)
    padding = [(0, 0)] * kept + [(0, -n % t) for n, t in zip(array.shape[kept:], tile, strict=True)]
    array = np.pad(array, padding, constant_values=_PADDING)
    split = [size for n, t in zip(array.shape[kept:], tile, strict=True) for size in (n // t, t)]
    outer = [kept + 2 * i for i in range(len(tile))]
    order = [*range(kept), *outer, *(place + 1 for place in outer)]
    return array.reshape(*array.shape[:kept], *split).transpose(order)


def _groups(elements: Sequence[int], count: int) -> Iterator[Sequence[int]]:
    return (elements[first : first + count] for first in range(0, len(elements), count))


def _word(elements: Sequence[int], itemsize: int) -> int:
    """The signed 32-bit word of its elements, the first in its lowest bits."""
    data = b"".join(element.to_bytes(5, "little", signed=True)[:itemsize] for element in elements)
    return int.from_bytes(data, "little", signed=True)
