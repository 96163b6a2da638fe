"""Selection inside jit, where nothing can raise and the batch's distribution is known on the device alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rpac.batch import Limits
from rpac.contract.arrays import ArrayDims, index_of
from rpac.contract.kind import KINDS, Kind
from rpac.engine.runtime import Results, Traceable

KV_CACHE_RESULT = 1


def run_selected(
    programs: Mapping[Kind, Traceable],
    limits: Limits,
    taken: Sequence[ArrayDims],
    args: Sequence[Any],
    more: Sequence[Any],
) -> Results:
    """The one program of `programs` that the distribution needs; all are of one token bucket and take `args`, `taken`.

    `more` are arrays of the shapes of the results after the cache.

    Where the distribution is none, or its program is missing: the cache is as it was, and all else that is returned NaN.
    """
    queries, kv_cache, distribution = (args[index_of(taken, name)] for name in ("queries", "kv_cache", "distribution"))
    names = [dims.name for dims in taken]
    wanted = _kind_index(distribution)
    i, j, k = distribution
    is_one = (i >= 0) & (i <= j) & (j <= k) & (k <= limits.max_num_seqs)
    found = is_one & jnp.array([kind in programs for kind in KINDS])[wanted]
    # An empty batch leaves the cache as it was. To hand the cache on instead would be to copy it.
    safe = jnp.where(found, distribution, 0)
    first = KINDS.index(next(iter(programs)))
    chosen = jnp.where(found, wanted, first)
    results = (queries, kv_cache, *more)  # of the results' shapes; the program that runs replaces them
    for kind, program in programs.items():

        def body(_: jax.Array, results: Any, program: Traceable = program) -> Any:
            changed = {"kv_cache": results[1], "distribution": safe}
            return program(*(changed.get(name, arg) for name, arg in zip(names, args, strict=True)))

        # Not lax.switch: XLA for cpu copies the whole cache into each branch. A loop's state stays in place everywhere.
        iterations = (chosen == KINDS.index(kind)).astype(jnp.int32)
        results = lax.fori_loop(0, iterations, body, results)
    return tuple(
        one if index == KV_CACHE_RESULT else jnp.where(found, one, jnp.nan) for index, one in enumerate(results)
    )


def _kind_index(distribution: Any) -> jax.Array:
    """`rpac.batch.select_kind` on the device, as an index of `KINDS`."""
    i, j, k = distribution
    return jnp.where(i == k, 0, jnp.where((i == 0) & (j == k), 1, 2))
