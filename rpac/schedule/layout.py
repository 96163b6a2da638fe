"""Where the elements of an array lie in memory, by the layout that XLA chose."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rpac.schedule.hlo import Array


def places(array: Array) -> np.ndarray[Any, Any] | None:
    """The place of each element in memory, counted in elements with padding, in the shape of the array.

    None for a layout with tiles inside of tiles, which elements of 32 bits never have.
    """
    if len(array.tiles) > 1:
        return None
    tile = array.tiles[0] if array.tiles else ()
    sizes = [array.dims[i] for i in reversed(array.order)]
    missing = max(len(tile) - len(sizes), 0)
    sizes = [1] * missing + sizes
    steps = [1] * (len(sizes) - len(tile)) + list(tile)
    outer = inner = np.zeros((), np.int64)
    for axis, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        index = np.arange(size).reshape([-1 if i == axis else 1 for i in range(len(sizes))])
        outer = outer * -(-size // step) + index // step
        inner = inner * step + index % step
    found = np.broadcast_to(outer * math.prod(tile) + inner, sizes).reshape(sizes[missing:])
    return found.transpose([len(array.dims) - 1 - array.order.index(i) for i in range(len(array.dims))])


def is_linear(array: Array) -> bool:
    """Whether elements lie in memory in the order of their indices, with nothing between them."""
    if len(array.dims) < 2:
        return len(array.tiles) < 2
    found = places(array)
    return found is not None and bool((found.reshape(-1) == np.arange(array.count)).all())
