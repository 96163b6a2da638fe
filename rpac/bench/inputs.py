"""The arrays of a timed call, on the device: numbers from a seed, and pages spread over the whole cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rpac.batch import Batch
from rpac.bench.batches import Case, batch_of
from rpac.contract.arrays import ArrayDims, index_of
from rpac.contract.kind import Int32s
from rpac.devices.placement import Placement
from rpac.engine import Engine
from rpac.engine.probe import filled_cache
from rpac.oracle import canary

HELD_PAGES = 64
"""Pages of different numbers; a batch of more pages repeats them, so that the host need not make a whole cache."""

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Inputs:
    """One call. `by_token` and `extra` are its arguments before and after the batch's, on the host; the i-th of the batch's
    `pages` holds `held[places[i]]`.
    """

    batch: Batch
    by_token: Mapping[str, Array]
    pages: Int32s
    held: Array
    places: NDArray[np.int64]
    extra: Mapping[str, Array]


def make_inputs(engine: Engine, case: Case, seed: int) -> Inputs:
    """The inputs of a case, the same on every machine. Raises as `batch_of`."""
    dims = engine.programs[case.variant].args
    batch, pages = batch_of(engine.limits, case)
    cache = index_of(dims, "kv_cache")
    places = np.arange(len(pages)) % HELD_PAGES
    shape = (min(len(pages), HELD_PAGES), *dims[cache].shape[1:])
    held = canary.numbers(shape, seed, cache + 1).astype(dims[cache].dtype)
    return Inputs(batch, canary.new_tokens(dims, batch, seed), pages, held, places, canary.extras(dims, seed))


def make_cache(placement: Placement, dims: ArrayDims, inputs: Inputs) -> jax.Array:
    """A cache that holds what `inputs` say, the same on each device."""
    if placement.devices[0].platform != "cpu":
        return filled_cache(placement, dims, inputs.pages, inputs.held, inputs.places)
    # On the host itself: XLA takes minutes there for a cache of bfloat16, whose elements it converts one by one.
    whole = np.zeros(dims.shape, dims.dtype)
    whole[inputs.pages] = inputs.held[inputs.places]
    return placement.joiner(dims)([jnp.array(whole, device=device) for device in placement.local])


class Calls:
    """Calls of a program on one set of inputs, one after the other. The cache that a call donates is the next one's.

    Each device of a mesh gets the same batch. Takes the device memory of one cache.
    """

    def __init__(self, engine: Engine, case: Case, inputs: Inputs) -> None:
        self._engine = engine
        args = {dims.name: dims for dims in engine.programs[case.variant].args}
        batch = inputs.batch
        given = {
            **inputs.by_token,
            "kv_lens": batch.kv_lens,
            "page_indices": batch.page_indices,
            "cu_q_lens": batch.cu_q_lens,
            "distribution": batch.distribution,
            **inputs.extra,
        }
        # All of them on the device, so that no call copies anything there.
        self._given = {
            name: jax.device_put(engine.placement.repeat(args[name], array), engine.sharding(name))
            for name, array in given.items()
        }
        self.kv_cache = make_cache(engine.placement, args["kv_cache"], inputs)

    def __call__(self) -> tuple[jax.Array, ...]:
        """Starts a call, and returns what it will have made without the cache, which is `kv_cache`."""
        out, self.kv_cache, *more = self._engine(**self._given, kv_cache=self.kv_cache, validate=False)
        return (out, *more)

    def wait(self) -> None:
        """Waits until every call so far is done: each of them takes the cache of the one before."""
        jax.block_until_ready(self.kv_cache)
