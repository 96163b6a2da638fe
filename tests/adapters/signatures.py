"""The peers' signatures, as `str(inspect.signature(...))` shows them without annotations, and where they stand.

Those of the packages on the index are compared with the real ones by the slow tests (test_real_packages.py). SGLang-JAX's
main branch is on no index: its signature was read in the repository, at the commit named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

# tpu-inference 0.32.0, tpu_inference/kernels/ragged_paged_attention/v3/kernel.py
TPU_INFERENCE = (
    "(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, *, use_causal_mask=True, "
    "update_kv_cache=True, skip_kv_mask=False, sm_scale=1.0, sliding_window=None, soft_cap=None, out_dtype=None, "
    "mask_value=None, q_scale=None, k_scale=None, v_scale=None, chunk_prefill_size=None, d_block_sizes=None, "
    "p_block_sizes=None, m_block_sizes=None, vmem_limit_bytes=None, debug_mode=False, disable_bounds_checks=True, "
    "disable_semaphore_checks=True)"
)

# tpu-inference 0.32.0, tpu_inference/kernels/ragged_paged_attention/v3/kernel_hd64.py
TPU_INFERENCE_HD64 = (
    "(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, attention_sink=None, *, sm_scale=1.0, "
    "sliding_window=None, soft_cap=None, mask_value=-2.381976426469702e+38, q_scale=None, k_scale=None, v_scale=None, "
    "chunk_prefill_size=None, num_kv_pages_per_block=None, num_queries_per_block=None, vmem_limit_bytes=None, "
    "debug_mode=False)"
)

# tpu-inference 0.32.0, tpu_inference/kernels/experimental/batched_rpa/wrapper.py
TPU_INFERENCE_BATCHED = (
    "(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, *, sm_scale=1.0, sliding_window=None, "
    "soft_cap=None, mask_value=None, q_scale=None, k_scale=None, v_scale=None, chunk_prefill_size=None, "
    "decode_block_sizes=None, prefill_block_sizes=None, vmem_limit_bytes=None, debug_mode=False, out_dtype=None, "
    "use_causal_mask=True, update_kv_cache=True, kv_layout=None, decode_query_size=1)"
)

# tpu-inference 0.32.0, tpu_inference/kernels/mla/v2/kernel.py
TPU_INFERENCE_MLA = (
    "(ql_nope, q_pe, new_kv_c, new_k_pe, cache_kv, kv_lens, page_indices, cu_q_lens, distribution, *, sm_scale=1.0, "
    "sliding_window=None, soft_cap=None, mask_value=None, q_scale=None, k_scale=None, v_scale=None, chunk_prefill_size=None, "
    "num_kv_pages_per_block=None, num_queries_per_block=None, vmem_limit_bytes=None, decode_batch_size=1, mixed_q_split=1, "
    "s_dtype=<class 'jax.numpy.bfloat16'>, transpose_kv_cache=False, two_step_flash_attention=True, p_same_dtype_as_v=True, "
    "debug_mode=False)"
)

# tokamax 0.0.17, tokamax/_src/ops/batched_rpa/api.py; its enumerations are strings
TOKAMAX = (
    "(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, *, sm_scale=1.0, sliding_window=None, "
    "soft_cap=None, mask_value=None, q_scale=None, k_scale=None, v_scale=None, chunk_prefill_size=None, "
    "decode_block_sizes=None, prefill_block_sizes=None, vmem_limit_bytes=None, debug_mode=False, out_dtype=None, "
    "use_causal_mask=True, skip_kv_update=False, kv_layout='head_along_sublane', decode_query_size=1, cp_group_size=None, "
    "cp_rank=None, attention_scope='full', return_lse=False, implementation=None)"
)

# sglang-jax 0.0.2, sgl_jax/srt/layers/attention/flash_attn_kernel/flash_attention.py
SGLANG_JAX = (
    "(queries, keys, values, kv_cache_fused, kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution, *, "
    "sm_scale=1.0, sliding_window=None, soft_cap=None, mask_value=-2.381976426469702e+38, q_scale=None, k_scale=None, "
    "v_scale=None, chunk_prefill_size=None, num_kv_pages_per_block=None, num_queries_per_block=None, "
    "vmem_limit_bytes=None)"
)

# github.com/sgl-project/sglang-jax at 02e8030abfeb523b5410670dc0b0636f2d913785,
# python/sgl_jax/srt/kernels/ragged_paged_attention/ragged_paged_attention_v3.py
SGLANG_JAX_V3 = (
    "(queries, keys, values, kv_cache_fused, kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution, custom_mask, "
    "attention_sink=None, *, causal=1, sm_scale=1.0, sliding_window=None, soft_cap=None, mask_value=-2.381976426469702e+38, "
    "q_scale=None, k_scale=None, v_scale=None, xai_temperature_len=None, softmax_dtype=None, chunk_prefill_size=None, "
    "d_block_sizes=None, p_block_sizes=None, m_block_sizes=None, vmem_limit_bytes=None, out_dtype=None, "
    "skip_kv_mask=False, disable_semaphore_checks=True, debug_mode=False, mask_aligned_to_cu_kv=False)"
)

# ejkernel 0.0.80.3, ejkernel/modules/operations/ragged_page_attention_v3.py
EJKERNEL = (
    "(queries, keys, values, kv_cache, kv_lens, block_tables, query_start_loc, distribution, softmax_aux=None, /, *, "
    "softmax_scale=1.0, sliding_window=None, logits_soft_cap=None, q_scale=None, k_scale=None, v_scale=None, "
    "vmem_limit_bytes=None, platform=None, cfg=None, mesh=None, in_specs=None, out_specs=None)"
)

# ejkernel 0.0.80.3, ejkernel/kernels/_pallas/tpu/ragged_page_attention_v3/_interface.py
EJKERNEL_KERNEL = (
    "(queries, keys, values, kv_cache, kv_lens, block_tables, query_start_loc, distribution, softmax_aux=None, *, "
    "softmax_scale=1.0, sliding_window=None, logits_soft_cap=None, q_scale=None, k_scale=None, v_scale=None, "
    "chunk_prefill_size=None, num_kv_pages_per_block=None, num_queries_per_block=None, vmem_limit_bytes=None)"
)


def signature(function: Callable[..., Any]) -> str:
    """A function's parameters: names, order, kinds and defaults."""
    bare = []
    for one in inspect.signature(function).parameters.values():
        default = str(one.default) if isinstance(one.default, str) else one.default
        bare.append(one.replace(annotation=inspect.Parameter.empty, default=default))
    return str(inspect.Signature(bare))
