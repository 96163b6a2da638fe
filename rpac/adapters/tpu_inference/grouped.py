"""In place of tpu-inference's kernels of grouped attention, of version 0.32.0: RPA v3, its kernel of head_dim 64, batched RPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rpac.adapters._arguments import DEFAULT_MASK_VALUE, Programs, Result
from rpac.adapters._common import Adapter

PEER = "tpu-inference"
Blocks = tuple[int, int, int, int] | None


def ragged_paged_attention(engine: Programs, *, validate: bool = True) -> Callable[..., Result]:
    """A function of RPA v3's signature (kernels/ragged_paged_attention/v3/kernel.py) that runs `engine`: `(out, kv_cache)`,
    the peer's shapes and dtypes.

    Inside a trace it runs `engine.traced`, else `engine`; only `kv_cache` is donated. It raises SelectionError for
    what the bundle does not have, by the argument's name, and BatchError as the engine does. Without effect, because
    they tune or check the peer's kernel: `d_block_sizes`, `p_block_sizes`, `m_block_sizes`, `vmem_limit_bytes`,
    `disable_bounds_checks`, `disable_semaphore_checks`.
    """
    return rpa_v3(Adapter(engine, PEER, validate))


def ragged_paged_attention_hd64(engine: Programs, *, validate: bool = True) -> Callable[..., Result]:
    """As `ragged_paged_attention`, of the kernel for head_dim 64 (kernels/ragged_paged_attention/v3/kernel_hd64.py).

    Its cache is `[pages, page_size, ceil(kv_heads / packing), packing, 128]`, K in lanes 0 to 63 and V in lanes 64 to 127,
    which is the contract's. Without effect: `num_kv_pages_per_block`, `num_queries_per_block`, `vmem_limit_bytes`.
    """
    return rpa_hd64(Adapter(engine, PEER, validate))


def batched_ragged_paged_attention(engine: Programs, *, validate: bool = True) -> Callable[..., Result]:
    """As `ragged_paged_attention`, of batched RPA (kernels/experimental/batched_rpa/wrapper.py), which the server runs with
    USE_BATCHED_RPA_KERNEL set.

    `decode_query_size` must be 1 or the bundle's `decode_len`. The server's decode rows have up to so many new tokens; those
    of fewer, and those behind them, run as mixed rows. Without effect: `decode_block_sizes`, `prefill_block_sizes`,
    `vmem_limit_bytes`.
    """
    return batched_rpa(Adapter(engine, PEER, validate))


def rpa_v3(adapter: Adapter) -> Callable[..., Result]:
    """The function of RPA v3's signature over an adapter of any layout."""

    def attention(
        queries: Any,
        keys: Any,
        values: Any,
        kv_cache: Any,
        kv_lens: Any,
        page_indices: Any,
        cu_q_lens: Any,
        distribution: Any,
        *,
        use_causal_mask: bool = True,
        update_kv_cache: bool = True,
        skip_kv_mask: bool = False,
        sm_scale: float = 1.0,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        out_dtype: Any = None,
        mask_value: float | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        chunk_prefill_size: int | None = None,
        d_block_sizes: Blocks = None,
        p_block_sizes: Blocks = None,
        m_block_sizes: Blocks = None,
        vmem_limit_bytes: int | None = None,
        debug_mode: bool = False,
        disable_bounds_checks: bool = True,
        disable_semaphore_checks: bool = True,
    ) -> Result:
        return adapter.attend(
            queries,
            keys,
            values,
            kv_cache,
            kv_lens,
            page_indices,
            cu_q_lens,
            distribution,
            use_causal_mask=use_causal_mask,
            update_kv_cache=update_kv_cache,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            out_dtype=out_dtype,
            k_scale=k_scale,
            v_scale=v_scale,
            chunk_prefill_size=chunk_prefill_size,
            skip_kv_mask=skip_kv_mask,
            mask_value=mask_value,
            q_scale=q_scale,
            debug_mode=debug_mode,
        )

    return attention


def rpa_hd64(adapter: Adapter) -> Callable[..., Result]:
    """The function of the head_dim 64 kernel's signature over an adapter of any layout."""

    def attention(
        queries: Any,
        keys: Any,
        values: Any,
        kv_cache: Any,
        kv_lens: Any,
        page_indices: Any,
        cu_q_lens: Any,
        distribution: Any,
        attention_sink: Any = None,
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
        debug_mode: bool = False,
    ) -> Result:
        return adapter.attend(
            queries,
            keys,
            values,
            kv_cache,
            kv_lens,
            page_indices,
            cu_q_lens,
            distribution,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            k_scale=k_scale,
            v_scale=v_scale,
            chunk_prefill_size=chunk_prefill_size,
            mask_value=mask_value,
            q_scale=q_scale,
            debug_mode=debug_mode,
            sinks=adapter.sinks("attention_sink", attention_sink),
        )

    return attention


def batched_rpa(adapter: Adapter) -> Callable[..., Result]:
    """The function of batched RPA's signature over an adapter of any layout."""

    def attention(
        queries: Any,
        keys: Any,
        values: Any,
        kv_cache: Any,
        kv_lens: Any,
        page_indices: Any,
        cu_q_lens: Any,
        distribution: Any,
        *,
        sm_scale: float = 1.0,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        mask_value: float | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        chunk_prefill_size: int | None = None,
        decode_block_sizes: Any = None,
        prefill_block_sizes: Any = None,
        vmem_limit_bytes: int | None = None,
        debug_mode: bool = False,
        out_dtype: Any = None,
        use_causal_mask: bool = True,
        update_kv_cache: bool = True,
        kv_layout: Any = None,
        decode_query_size: int = 1,
    ) -> Result:
        adapter.require_drafts(decode_query_size)
        return adapter.attend(
            queries,
            keys,
            values,
            kv_cache,
            kv_lens,
            page_indices,
            cu_q_lens,
            distribution,
            use_causal_mask=use_causal_mask,
            update_kv_cache=update_kv_cache,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            out_dtype=out_dtype,
            k_scale=k_scale,
            v_scale=v_scale,
            chunk_prefill_size=chunk_prefill_size,
            mask_value=mask_value,
            q_scale=q_scale,
            debug_mode=debug_mode,
            kv_layout=kv_layout,
        )

    return attention
