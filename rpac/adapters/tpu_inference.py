"""In place of tpu-inference's `ragged_paged_attention` (kernels/ragged_paged_attention/v3/kernel.py, 0.32.0)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rpac.adapters._common import Adapter, Programs, Result

Blocks = tuple[int, int, int, int] | None


def ragged_paged_attention(engine: Programs, *, validate: bool = True) -> Callable[..., Result]:
    """A function of tpu-inference's signature that runs `engine`: `(out, kv_cache)`, the peer's shapes and dtypes.

    Inside a trace it runs `engine.traced`, else `engine`; only `kv_cache` is donated. It raises SelectionError for
    what the bundle does not have, by the argument's name, and BatchError as the engine does. Without effect, because
    they tune or check the peer's kernel: `d_block_sizes`, `p_block_sizes`, `m_block_sizes`, `vmem_limit_bytes`,
    `disable_bounds_checks`, `disable_semaphore_checks`.
    """
    adapter = Adapter(engine, "tpu-inference", validate)

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
        adapter.require_neutral(
            skip_kv_mask=skip_kv_mask,
            mask_value=mask_value,
            q_scale=q_scale,
            debug_mode=debug_mode,
        )
        adapter.require_built(
            use_causal_mask=use_causal_mask,
            update_kv_cache=update_kv_cache,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
        )
        adapter.require_scale("sm_scale", sm_scale)
        adapter.require_out_dtype(out_dtype)
        return adapter.run(
            queries,
            keys,
            values,
            kv_cache,
            kv_lens,
            page_indices,
            cu_q_lens,
            distribution,
            chunk_prefill_size=chunk_prefill_size,
            **adapter.kv_scales(k_scale, v_scale),
        )

    return attention
