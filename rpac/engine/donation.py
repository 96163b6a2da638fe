"""Which caches are being donated right now: two calls that are given one cache at once must not both start.

Between the check that a cache is whole and its donation another thread may donate it; the runtime's own error for that
comes late, and says neither which argument nor what to do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import jax

from rpac.errors import BatchError

# Of the process, because the engines of several kinds of layers may share a cache.
_lock = threading.Lock()
_donating: set[int] = set()


@contextlib.contextmanager
def donating(*caches: jax.Array) -> Iterator[None]:
    """Within it no other call donates these caches. Raises BatchError where one does, or did, or one is given twice."""
    keys = {id(cache) for cache in caches}  # which nothing else has while the caller holds the arrays
    if len(keys) < len(caches):
        raise BatchError(
            "one kv_cache is given twice; must be an array of its own for each layer; make them with new_caches()"
        )
    with _lock:
        taken = not _donating.isdisjoint(keys)
        if not taken:
            _donating.update(keys)
    if taken:
        raise BatchError(
            "kv_cache is being donated to another call, in another thread; must be one call's alone; give each thread a cache "
            "of its own, or pass on the one that the other call returns"
        )
    try:
        if any(cache.is_deleted() for cache in caches):
            raise deleted("kv_cache")
        yield
    finally:
        with _lock:
            _donating.difference_update(keys)


def deleted(name: str) -> BatchError:
    """The error for an array that was donated before."""
    return BatchError(
        f"{name} was deleted or donated; must hold values; pass on the kv_cache that the last call returned"
    )
