"""In place of SGLang-JAX's `ragged_paged_attention`: its main branch's, and the older one that the index has (0.0.2).

Its batches differ from the contract: pages of all sequences lie behind each other, each row's from cu_kv_lens on; a
batch has as many rows as its own bucket; and rows are marked by what the scheduler does, not by their length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from rpac.adapters._arguments import DEFAULT_MASK_VALUE, Programs, Result, require_axes, traced
from rpac.adapters._common import Adapter
from rpac.contract import arrays as layout
from rpac.errors import BatchError

PEER = "sglang-jax"
Blocks = tuple[int, int, int, int] | None


def ragged_paged_attention_v3(engine: Programs, *, validate: bool = True) -> Callable[..., Result]:
    """A function of the main branch's signature (kernels/ragged_paged_attention/ragged_paged_attention_v3.py).

    It runs `engine.traced` inside a trace, else `engine`, and returns `(out, kv_cache_fused)`, the cache as it came:
    `[pages, page_size, ceil(2 * kv_heads / packing), packing, head_dim]`, donated. It raises SelectionError for what
    the bundle does not have, by the argument's name, and BatchError as the engine does. Without effect, because they
    tune or check the peer's kernel: `d_block_sizes`, `p_block_sizes`, `m_block_sizes`, `vmem_limit_bytes`,
    `disable_semaphore_checks`.
    """
    adapter = Adapter(engine, PEER, validate)

    def attention(
        queries: Any,
        keys: Any,
        values: Any,
        kv_cache_fused: Any,
        kv_lens: Any,
        page_indices: Any,
        cu_q_lens: Any,
        cu_kv_lens: Any,
        distribution: Any,
        custom_mask: Any,
        attention_sink: Any = None,
        *,
        causal: int = 1,
        sm_scale: float = 1.0,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        mask_value: float | None = DEFAULT_MASK_VALUE,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        xai_temperature_len: float | None = None,
        softmax_dtype: Any = None,
        chunk_prefill_size: int | None = None,
        d_block_sizes: Blocks = None,
        p_block_sizes: Blocks = None,
        m_block_sizes: Blocks = None,
        vmem_limit_bytes: int | None = None,
        out_dtype: Any = None,
        skip_kv_mask: bool = False,
        disable_semaphore_checks: bool = True,
        debug_mode: bool = False,
        mask_aligned_to_cu_kv: bool = False,
    ) -> Result:
        adapter.require_neutral(
            custom_mask=custom_mask,
            mask_value=mask_value,
            q_scale=q_scale,
            xai_temperature_len=xai_temperature_len,
            softmax_dtype=softmax_dtype,
            skip_kv_mask=skip_kv_mask,
            debug_mode=debug_mode,
            mask_aligned_to_cu_kv=mask_aligned_to_cu_kv,
        )
        adapter.require_built(causal=causal, update_kv_cache=True, sliding_window=sliding_window, soft_cap=soft_cap)
        adapter.require_scale("sm_scale", sm_scale)
        adapter.require_out_dtype(out_dtype)
        extra = {**adapter.sinks("attention_sink", attention_sink), **adapter.kv_scales(k_scale, v_scale)}
        arrays = queries, keys, values, kv_cache_fused
        metadata = kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution
        return _run(adapter, arrays, metadata, chunk_prefill_size, **extra)

    return attention


def ragged_paged_attention(engine: Programs, *, validate: bool = True) -> Callable[..., Result]:
    """A function of 0.0.2's signature (srt/layers/attention/flash_attn_kernel/flash_attention.py).

    As `ragged_paged_attention_v3`, but the cache comes as `[pages, page_size, 2 * kv_heads, head_dim]` and returns as
    `[pages * page_size, 2 * kv_heads, head_dim]`. Outside a trace both reshapes copy it. Without effect, because they
    tune the peer's kernel: `num_kv_pages_per_block`, `num_queries_per_block`, `vmem_limit_bytes`.
    """
    return fused(Adapter(engine, PEER, validate))


def fused(adapter: Adapter) -> Callable[..., Result]:
    """The function of 0.0.2's signature over an adapter of any layout of whole rows of lanes.

    With `kv_layout: separate` the bytes of a page are K and V, heads, tokens, lanes, whatever axes the server gives them.
    """

    def attention(
        queries: Any,
        keys: Any,
        values: Any,
        kv_cache_fused: Any,
        kv_lens: Any,
        page_indices: Any,
        cu_q_lens: Any,
        cu_kv_lens: Any,
        distribution: Any,
        *,
        sm_scale: float = 1.0,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        mask_value: float | None = DEFAULT_MASK_VALUE,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        chunk_prefill_size: int | None = None,
        num_kv_pages_per_block: int | None = None,
        num_queries_per_block: int | None = None,
        vmem_limit_bytes: int | None = None,
    ) -> Result:
        adapter.require_neutral(mask_value=mask_value, q_scale=q_scale)
        adapter.require_built(causal=True, update_kv_cache=True, sliding_window=sliding_window, soft_cap=soft_cap)
        adapter.require_scale("sm_scale", sm_scale)
        arrays = queries, keys, values, adapter.in_layout("kv_cache_fused", kv_cache_fused)
        metadata = kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution
        scales = adapter.kv_scales(k_scale, v_scale)
        out, kv_cache = _run(adapter, arrays, metadata, chunk_prefill_size, **scales)
        return out, kv_cache.reshape(-1, *kv_cache_fused.shape[2:])

    return attention


def _run(
    adapter: Adapter, arrays: tuple[Any, ...], metadata: tuple[Any, ...], chunk_prefill_size: int | None, **extra: Any
) -> Result:
    """The call on the contract's metadata, made from the peer's."""
    in_trace = traced((*arrays, *metadata))
    _require_metadata(metadata)
    xp: Any = jnp if in_trace else np
    kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution = map(xp.asarray, metadata)
    limits, rows = adapter.engine.limits, len(kv_lens)
    require_axes(("queries", "keys", "values", "kv_cache_fused"), arrays, Adapter.axes[:4])
    adapter.require_sizes([*adapter.array_sizes(*arrays), adapter.rows_size(rows)])

    first: Any = layout.cdiv(cu_kv_lens[:-1], limits.page_size)  # of each row's pages
    if not in_trace and adapter.validate:
        _require_pages(first, layout.cdiv(kv_lens, limits.page_size), len(page_indices), int(distribution[2]))
    # Only a row's own pages are read: what follows them, and dead rows, may be any entry that is there.
    places = xp.clip(first[:, None] + np.arange(limits.pages_per_seq), 0, len(page_indices) - 1)
    if chunk_prefill_size is None:
        single = (cu_q_lens[1:] - cu_q_lens[:-1] == 1) & (np.arange(rows) < distribution[2])
        decodes = xp.cumprod(single.astype(np.int32)).sum()  # those before the first longer one
        distribution = xp.stack([decodes, decodes, distribution[2]]).astype(np.int32)
    table = page_indices[places].reshape(-1)
    return adapter.run(*arrays, kv_lens, table, cu_q_lens, distribution, chunk_prefill_size=chunk_prefill_size, **extra)


def _require_metadata(metadata: tuple[Any, ...]) -> None:
    names = "kv_lens", "page_indices", "cu_q_lens", "cu_kv_lens", "distribution"
    require_axes(names, metadata, (1, 1, 1, 1, 1))
    rows, entries = len(metadata[0]), len(metadata[1])
    for name, array, size in zip(names, metadata, (rows, max(entries, 1), rows + 1, rows + 1, 3), strict=True):
        if len(array) != size or array.dtype != np.int32:
            raise BatchError(
                f"{name} is {array.dtype}[{len(array)}]; must be int32[{size}], for kv_lens of {rows} rows"
            )


def _require_pages(first: Any, pages: Any, entries: int, live: int) -> None:
    """Raises BatchError for a live row whose pages are not all in `page_indices`."""
    ends = (first + pages)[: max(live, 0)]
    bad = (first[: len(ends)] < 0) | (ends > entries)
    if bad.any():
        row = int(bad.argmax())
        raise BatchError(
            f"row {row}: its pages are entries {first[row]} to {ends[row]} of page_indices, which has {entries}; "
            "cu_kv_lens must count each sequence's tokens, rounded up to whole pages"
        )
