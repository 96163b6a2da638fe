"""Compiles RPA v3 of the `tpu-inference` package for one target, in that package's own environment.

    python compile_rpa_v3.py '{"target": "tpu7x", "q_heads": 32, ..., "decode_tiles": [1, 4096, 1, 4096], ...}'

Run by `rpac.schedule.dump.dump_command`, which sets the dump flags. The line printed names the compiler.
"""

from __future__ import annotations

import functools
import json
import sys

import jax.numpy as jnp
from abstract_tpu import Device, bare_package, generation


def main(request: dict[str, object]) -> None:
    """Compiles the call; `request` has the fields of `benchmarks.rpa_v3.Config`."""
    bare_package("tpu_inference")
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel

    kernel.get_tpu_version = lambda: generation(request["target"])  # the one thing that asks for a real device
    device = Device(request["target"])
    tokens, q_heads, kv_heads, head_dim = (request[k] for k in ("tokens", "q_heads", "kv_heads", "head_dim"))
    seqs, page = request["max_seqs"], request["page_size"]
    dtype = jnp.dtype(request.get("kv_dtype", "bfloat16"))
    scales = {} if dtype == jnp.bfloat16 else {"k_scale": 0.5, "v_scale": 0.5}
    arguments = [
        device.shape(tokens, q_heads, head_dim),
        device.shape(tokens, kv_heads, head_dim, dtype=dtype),
        device.shape(tokens, kv_heads, head_dim, dtype=dtype),
        device.shape(*kernel.get_kv_cache_shape(request["pages"], page, kv_heads, head_dim, dtype), dtype=dtype),
        device.shape(seqs, dtype=jnp.int32),
        device.shape(seqs * (request["max_model_len"] // page), dtype=jnp.int32),
        device.shape(seqs + 1, dtype=jnp.int32),
        device.shape(3, dtype=jnp.int32),
    ]
    call = functools.partial(
        kernel.ragged_paged_attention,
        sm_scale=head_dim**-0.5,
        d_block_sizes=tuple(request["decode_tiles"]) if request["decode_tiles"] else None,
        m_block_sizes=tuple(request["mixed_tiles"]) if request["mixed_tiles"] else None,
        **scales,
    )
    device.compile(call, arguments, donate=(0, 1, 2, 3))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
