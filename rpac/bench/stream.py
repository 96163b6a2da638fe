"""The memory bandwidth that a device reaches: what a program can be held against where no peak is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rpac.bench.time import Plan, between_fences

ARRAY_BYTES = 256 << 20  # more than the caches of a chip
TIMES = 5


def stream_bandwidth(device: jax.Device) -> float:
    """Bytes per second, reads and writes both counted, of adding a number to every element of an array in place: from the
    least of some times.
    """
    calls = _Adds(device)
    calls()
    return 2 * ARRAY_BYTES / min(between_fences(calls, Plan(TIMES, 1)))


class _Adds:
    def __init__(self, device: jax.Device) -> None:
        # A number that the compiler does not know, else it could hand the array back as it is. In place, because to make a
        # new array takes a host longer than to fill it.
        self._add = jax.jit(lambda array, number: array + number, donate_argnums=0)
        self._array = jnp.zeros(ARRAY_BYTES // 4, jnp.float32, device=device)
        self._number = jnp.zeros((), jnp.float32, device=device)

    def __call__(self) -> None:
        self._array = self._add(self._array, self._number)

    def wait(self) -> None:
        jax.block_until_ready(self._array)
