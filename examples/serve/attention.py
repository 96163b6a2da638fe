"""The one place where the model meets the engine: a step's attention over the paged caches of its layers."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

import rpac
from serve.toy import Attend


class PagedAttention:
    """The engine with a cache for each layer. The engine picks its program on the host, so a step is not one jit."""

    def __init__(self, engine: rpac.Engine, layers: int) -> None:
        self.engine = engine
        self._layers = layers
        self.reset()

    def reset(self) -> None:
        """Makes empty caches that replace the present ones, because a call that fails halfway may have lost one."""
        self._caches = [self.engine.new_cache() for _ in range(self._layers)]

    def copy_pages(self, copies: np.ndarray) -> None:
        """Copies pages in every cache. `copies` is `[n, 2]`, from and to, with n at most max_num_seqs."""
        if not len(copies):
            return
        # Always the same number, so that it is compiled once. The surplus goes to a page past the end, where it is dropped.
        padded = np.zeros((self.engine.limits.max_num_seqs, 2), np.int32)
        padded[:, 1] = self.engine.limits.num_pages
        padded[: len(copies)] = copies
        self._caches = [_copied(cache, padded) for cache in self._caches]

    def of(self, batch: rpac.Batch) -> Attend:
        """The attention function of one step."""

        def attend(layer: int, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            out, self._caches[layer] = self.engine(
                queries, keys, values, self._caches[layer],
                batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution,
                validate=False,  # Batch.build has validated it
            )  # fmt: skip
            return out

        return attend


@partial(jax.jit, donate_argnums=0)
def _copied(cache: jax.Array, copies: jax.Array) -> jax.Array:
    return cache.at[copies[:, 1]].set(cache[copies[:, 0]], mode="drop")
