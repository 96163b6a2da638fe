"""Records which bytes of HBM the DMAs of a kernel touch when the TPU interpreter runs it."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret import utils


class Extent(NamedTuple):
    """What one DMA read or wrote of an array in HBM: the array's shape, and the place in it in bytes."""

    shape: tuple[int, ...]
    written: bool
    offset: int
    size: int


@contextmanager
def recorded() -> Iterator[Counter[Extent]]:
    """How often the DMAs that run within it read and wrote each extent. A DMA runs once, in whichever mode."""
    found: Counter[Extent] = Counter()
    kind, state = interpreter.DMA, interpreter.DmaState
    read, write = kind.execute_read, kind.execute_write

    def execute_read(self: interpreter.DMA) -> None:
        if self.state == state.STARTED:
            note(self.src_device_id, self.src_memory_space, self.src_buffer_id, self.src_transforms, False)
        read(self)

    def execute_write(self: interpreter.DMA) -> None:
        if self.state != state.COMPLETED:
            note(self.dst_device_id, self.dst_memory_space, self.dst_buffer_id, self.dst_transforms, True)
        write(self)

    def note(device: int, space: int, buffer: int, transforms: object, written: bool) -> None:
        name = interpreter.TPU_MEMORY_SPACE_NAMES[space]
        if name not in ("any", "hbm"):
            return
        array = interpreter._get_shared_memory().mem[(name, buffer, device, 0)]
        places = _numbered(array.shape)[utils.to_range(transforms)]
        first, last = int(places.flat[0]), int(places.flat[-1])
        assert last - first + 1 == places.size, "not one piece of memory"
        step = array.dtype.itemsize
        found[Extent(array.shape, written, first * step, places.size * step)] += 1

    kind.execute_read, kind.execute_write = execute_read, execute_write  # type: ignore[method-assign]
    try:
        yield found
    finally:
        kind.execute_read, kind.execute_write = read, write  # type: ignore[method-assign]


@functools.cache
def _numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
