"""In place of ejkernel's `ragged_page_attention_v3` (0.0.80.3): the operation that models call, and a kernel behind it.

ejkernel's names: block_tables are the contract's page_indices, query_start_loc its cu_q_lens, softmax_scale sm_scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from rpac.adapters._arguments import Programs, Result
from rpac.adapters._common import Adapter


def ragged_page_attention_v3(engine: Programs, *, validate: bool = True) -> Callable[..., Result]:
    """A function of `ejkernel.modules.ragged_page_attention_v3`'s signature that runs `engine`: `(out, kv_cache)`.

    Where `mesh`, `in_specs` and `out_specs` are all given the call is wrapped in `jax.shard_map`, as the peer does.
    Raises as `ragged_page_attention_v3_kernel` does. Without effect, because they choose or tune the peer's kernels:
    `platform`, `vmem_limit_bytes`, and all of `cfg` but its `chunk_prefill_size`.
    """
    kernel = ragged_page_attention_v3_kernel(engine, validate=validate)

    def attention(
        queries: Any,
        keys: Any,
        values: Any,
        kv_cache: Any,
        kv_lens: Any,
        block_tables: Any,
        query_start_loc: Any,
        distribution: Any,
        softmax_aux: Any = None,
        /,
        *,
        softmax_scale: float | None = 1.0,
        sliding_window: int | None = None,
        logits_soft_cap: float | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        vmem_limit_bytes: int | None = None,
        platform: str | None = None,
        cfg: Any = None,
        mesh: Any = None,
        in_specs: Any = None,
        out_specs: Any = None,
    ) -> Result:
        call: Callable[..., Result] = partial(
            kernel,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            chunk_prefill_size=getattr(cfg, "chunk_prefill_size", None),
        )
        if mesh is not None and in_specs is not None and out_specs is not None:
            call = jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return call(queries, keys, values, kv_cache, kv_lens, block_tables, query_start_loc, distribution, softmax_aux)

    return attention


def ragged_page_attention_v3_kernel(engine: Programs, *, validate: bool = True) -> Callable[..., Result]:
    """A kernel for ejkernel's registry, of its `ragged_page_attention_v3` kernels' signature: `(out, kv_cache)`.

    Inside a trace it runs `engine.traced`, else `engine`; only `kv_cache` is donated. It raises SelectionError for
    what the bundle does not have, by the argument's name, and BatchError as the engine does. Without effect, because
    they tune the peer's kernel: `num_kv_pages_per_block`, `num_queries_per_block`, `vmem_limit_bytes`.
    """
    adapter = Adapter(engine, "ejkernel", validate)

    def attention(
        queries: Any,
        keys: Any,
        values: Any,
        kv_cache: Any,
        kv_lens: Any,
        block_tables: Any,
        query_start_loc: Any,
        distribution: Any,
        softmax_aux: Any = None,
        *,
        softmax_scale: float | None = 1.0,
        sliding_window: int | None = None,
        logits_soft_cap: float | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        chunk_prefill_size: int | None = None,
        num_kv_pages_per_block: int | None = None,
        num_queries_per_block: int | None = None,
        vmem_limit_bytes: int | None = None,
    ) -> Result:
        adapter.require_neutral(q_scale=q_scale)
        adapter.require_built(
            causal=True, update_kv_cache=True, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap
        )
        # None is the peer's word for its default.
        scale = queries.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        adapter.require_scale("softmax_scale", scale)
        return adapter.run(
            queries,
            keys,
            values,
            kv_cache,
            kv_lens,
            block_tables,
            query_start_loc,
            distribution,
            chunk_prefill_size=chunk_prefill_size,
            **adapter.sinks("softmax_aux", softmax_aux),
            **adapter.kv_scales(k_scale, v_scale),
        )

    return attention
