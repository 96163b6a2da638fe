"""Writes K and V of whole sequences to a cache that programs only read: an encoder's, for cross attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from rpac.batch import Limits
from rpac.batch.build import INT32, Integers, integers
from rpac.contract import arrays as layout
from rpac.contract.attention import Attention
from rpac.errors import BatchError

Int64s = NDArray[np.int64]


def places(limits: Limits, kv_lens: Integers, page_tables: Sequence[Integers]) -> tuple[Int64s, Int64s]:
    """The pages that sequences of these lengths fill, and for each place on them `[pages, page_size]` the token that lies
    there, -1 past the end of a sequence. Tokens are counted through all sequences.

    Raises BatchError for a table that is too short, a page that the cache has not, or one that is given twice.
    """
    lens = integers("kv_lens", kv_lens, 1)
    if len(page_tables) != len(lens):
        raise BatchError(
            f"found {len(lens)} kv_lens and {len(page_tables)} page_tables; must be one of each for a sequence"
        )
    size = limits.page_size
    pages: list[int] = []
    tokens: list[Int64s] = []
    start = 0
    for index, (length, table) in enumerate(zip(lens.tolist(), page_tables, strict=True)):
        ids, needed = integers(f"page_tables[{index}]", table, INT32.min), layout.cdiv(length, size)
        if len(ids) < needed:
            raise BatchError(
                f"sequence {index}: page_tables[{index}] has {len(ids)} pages of {size} tokens; must hold its {length} tokens; "
                f"give it {needed} pages"
            )
        pages += ids[:needed].tolist()
        own = np.arange(needed * size)
        tokens.append(np.where(own < length, start + own, -1).reshape(needed, size))
        start += length
    for at, page in enumerate(pages):
        if not 0 <= page < limits.num_pages:
            raise BatchError(
                f"page {page} is in a page table; must be 0 to {limits.num_pages - 1}, the pages of the cache"
            )
        if page in pages[:at]:
            raise BatchError(f"page {page} is given twice; must be given once: each page takes tokens of one sequence")
    return np.array(pages, np.int64), np.concatenate([np.zeros((0, size), np.int64), *tokens])


@partial(jax.jit, static_argnames=("model", "kv_layout"), donate_argnames="kv_cache")
def fill(
    kv_cache: jax.Array, keys: jax.Array, values: jax.Array, pages: Any, tokens: Any, model: Attention, kv_layout: str
) -> jax.Array:
    """The donated cache with K and V of `tokens` on `pages`, as `places` has them; `[tokens, kv_heads, head_dim]` each."""
    blank = (tokens < 0)[..., None, None]
    k, v = (jnp.where(blank, 0, array[tokens]) for array in (keys, values))
    new = _pages(k, v, model, kv_layout)

    def write(index: jax.Array, kv_cache: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(kv_cache, new[index].reshape(kv_cache.shape[1:]), pages[index], 0)

    # Page by page, because a scatter of them all would take a second cache.
    return lax.fori_loop(0, len(pages), write, kv_cache)


def _pages(keys: jax.Array, values: jax.Array, model: Attention, kv_layout: str) -> jax.Array:
    """Pages in the layout of the cache, with zeros in its padding, of K and V `[pages, page_size, kv_heads, head_dim]`."""
    if layout.joins_rows(model):
        rows = jnp.concatenate([keys, values], axis=-1)[..., None, :]
    else:
        lanes = [(0, 0)] * 3 + [(0, layout.head_lanes(model) - model.head_dim)]
        rows = jnp.stack([jnp.pad(array, lanes) for array in (keys, values)], axis=-2)
    if kv_layout == "separate":
        return rows.transpose(0, 3, 2, 1, 4)
    words, packing, lanes_of_row = layout.kv_row_shape(model)
    flat = rows.reshape(*rows.shape[:2], layout.kv_rows(model), lanes_of_row)
    return jnp.pad(flat, [(0, 0), (0, 0), (0, words * packing - flat.shape[2]), (0, 0)])
