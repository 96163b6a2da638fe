"""In place of tpu-inference's kernel of latent attention, of version 0.32.0 (kernels/mla/v2/kernel.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from rpac.adapters._arguments import Programs, Result, require_axes
from rpac.adapters._common import LatentAdapter
from rpac.adapters.tpu_inference.grouped import PEER

PACKED_AXES = 4  # of the peer's own cache


def mla_ragged_paged_attention(engine: Programs, *, validate: bool = True) -> Callable[..., Result]:
    """A function of MLA v2's signature that runs `engine`, a bundle of latent attention: `(out, cache_kv)`.

    `ql_nope` is `[q_heads, tokens, kv_lora_rank]` and so is the output, heads first as the peer has them; XLA transposes
    both. `cache_kv` is the contract's, `[pages, page_size, align(kv_lora_rank + rope_dim, 128)]`, which `install` gives
    the server, or the peer's own, `[pages, page_size / packing, packing, ...]` of the same bytes, and returns as it came.
    It raises as `ragged_paged_attention` does. Without effect, because they tune the peer's kernel:
    `num_kv_pages_per_block`, `num_queries_per_block`, `vmem_limit_bytes`, `decode_batch_size`, `mixed_q_split`, `s_dtype`,
    `two_step_flash_attention`, `p_same_dtype_as_v`.
    """
    return mla(LatentAdapter(engine, PEER, validate))


def mla(adapter: LatentAdapter) -> Callable[..., Result]:
    """The function of MLA v2's signature over an adapter."""

    def attention(
        ql_nope: Any,
        q_pe: Any,
        new_kv_c: Any,
        new_k_pe: Any,
        cache_kv: Any,
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
        num_kv_pages_per_block: tuple[int, int, int] | int | None = None,
        num_queries_per_block: tuple[int, int, int] | int | None = None,
        vmem_limit_bytes: int | None = None,
        decode_batch_size: int = 1,
        mixed_q_split: int = 1,
        s_dtype: Any = jnp.bfloat16,
        transpose_kv_cache: bool = False,
        two_step_flash_attention: bool = True,
        p_same_dtype_as_v: bool = True,
        debug_mode: bool = False,
    ) -> Result:
        adapter.require_neutral(
            mask_value=mask_value, q_scale=q_scale, transpose_kv_cache=transpose_kv_cache, debug_mode=debug_mode
        )
        adapter.require_built(
            use_causal_mask=True, update_kv_cache=True, sliding_window=sliding_window, soft_cap=soft_cap
        )
        adapter.require_scale("sm_scale", sm_scale)
        adapter.kv_scales(k_scale, v_scale)
        require_axes(("ql_nope",), (ql_nope,), (3,))
        packed = np.ndim(cache_kv) == PACKED_AXES
        out, cache = adapter.run(
            ql_nope.swapaxes(0, 1),
            q_pe,
            new_kv_c,
            new_k_pe,
            cache_kv.reshape(len(cache_kv), -1, cache_kv.shape[-1]) if packed else cache_kv,
            kv_lens,
            page_indices,
            cu_q_lens,
            distribution,
            chunk_prefill_size=chunk_prefill_size,
        )
        return out.swapaxes(0, 1), cache.reshape(cache_kv.shape) if packed else cache

    return attention
