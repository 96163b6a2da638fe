"""In place of `tokamax.ops.ragged_paged_attention`, also called `batched_ragged_paged_attention`, of version 0.0.17."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rpac.adapters._arguments import Programs, Result, spec_lines
from rpac.adapters._common import Adapter
from rpac.errors import SelectionError

REFERENCE_AXES = 4  # of the cache that the peer's reference takes


def ragged_paged_attention(engine: Programs, *, validate: bool = True) -> Callable[..., Result]:
    """A function of tokamax's signature that runs `engine`: `(out, kv_cache)`, or `(out, kv_cache, lse)` with `return_lse`,
    for which the bundle needs `serving.log_sum_exp`.

    `kv_cache` has the five axes that the peer's kernel takes, or the four of its reference, and returns as it came.
    `decode_query_size` must be 1 or the bundle's `decode_len`. A value of an 8-bit cache is what is stored times its scale, as
    the peer's kernel has it; its reference divides. Inside a trace it runs `engine.traced`, else `engine`; only `kv_cache` is
    donated. It raises SelectionError for what the bundle does not have, by the argument's name, and BatchError as the engine.
    Without effect, because they choose or tune the peer's kernel: `implementation`, `decode_block_sizes`,
    `prefill_block_sizes`, `vmem_limit_bytes`.
    """
    adapter = Adapter(engine, "tokamax", validate)

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
        skip_kv_update: bool = False,
        kv_layout: str = "head_along_sublane",
        decode_query_size: int = 1,
        cp_group_size: int | None = None,
        cp_rank: Any = None,
        attention_scope: str = "full",
        return_lse: bool = False,
        implementation: str | None = None,
    ) -> Result:
        adapter.require_neutral(
            mask_value=mask_value,
            q_scale=q_scale,
            debug_mode=debug_mode,
            kv_layout=kv_layout,
            cp_group_size=cp_group_size,
            cp_rank=cp_rank,
            attention_scope=attention_scope,
        )
        adapter.require_built(use_causal_mask=use_causal_mask, sliding_window=sliding_window, soft_cap=soft_cap)
        updates = engine.model.update_cache
        if skip_kv_update == updates:
            raise SelectionError(
                f"skip_kv_update is {skip_kv_update}; must be {not updates}, the update_cache of {adapter.bundle}; pass that, or "
                "build with this, where a spec allows it" + spec_lines(model={"update_cache": not updates})
            )
        adapter.require_scale("sm_scale", sm_scale)
        adapter.require_out_dtype(out_dtype)
        adapter.require_drafts(decode_query_size)
        if return_lse:
            adapter.require_lse("return_lse")
        by_head = np.ndim(kv_cache) == REFERENCE_AXES
        out, cache, *lse = adapter.run(
            queries,
            keys,
            values,
            adapter.in_layout("kv_cache", kv_cache) if by_head else kv_cache,
            kv_lens,
            page_indices,
            cu_q_lens,
            distribution,
            chunk_prefill_size=chunk_prefill_size,
            results=3 if return_lse else 2,
            **adapter.kv_scales(k_scale, v_scale),
        )
        return (out, cache.reshape(kv_cache.shape) if by_head else cache, *lse)

    return attention
