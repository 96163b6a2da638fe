"""Compiles RPA v3's kernel for head_dim 64 of the `tpu-inference` package for one target, in the peers' environment.

    python compile_rpa_v3_hd64.py '{"target": "tpu7x", ..., "kv_block": 2048, "q_block": 8, "sliding_window": 128}' [PARAMETERS]

Blocks in tokens; null for the kernel's own table. It takes sinks. PARAMETERS are as in `compile_mla.py`.
"""

from __future__ import annotations

import functools
import json
import sys

import jax.numpy as jnp
from abstract_tpu import Device, generation
from follow import compile_or_follow
from stand_ins import bare_tpu_inference


def main(request: dict[str, object], values: dict[str, list[int]] | None) -> None:
    """Compiles the call, or follows its scalars."""
    bare_tpu_inference(request["target"])
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel_hd64 as kernel
    from tpu_inference.kernels.ragged_paged_attention.v3 import tuned_block_sizes_hd64 as tuned

    for module in (kernel, tuned):  # what asks for a real device
        module.get_tpu_version = lambda: generation(request["target"])
    device = Device(request["target"])
    tokens, q_heads, kv_heads, head_dim = (request[k] for k in ("tokens", "q_heads", "kv_heads", "head_dim"))
    seqs, page = request["max_seqs"], request["page_size"]
    arguments = [
        device.shape(tokens, q_heads, head_dim),
        device.shape(tokens, kv_heads, head_dim),
        device.shape(tokens, kv_heads, head_dim),
        device.shape(*kernel.get_kv_cache_shape(request["pages"], page, kv_heads, head_dim, jnp.bfloat16)),
        device.shape(seqs, dtype=jnp.int32),
        device.shape(seqs * (request["max_model_len"] // page), dtype=jnp.int32),
        device.shape(seqs + 1, dtype=jnp.int32),
        device.shape(3, dtype=jnp.int32),
        device.shape(q_heads, dtype=jnp.float32),
    ]
    call = functools.partial(
        kernel.ragged_paged_attention_hd64,
        sm_scale=head_dim**-0.5,
        sliding_window=request["sliding_window"],
        num_kv_pages_per_block=request["kv_block"] and request["kv_block"] // page,
        num_queries_per_block=request["q_block"],
    )
    compile_or_follow(device, call, arguments, (0, 1, 2, 3), values)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else None)
