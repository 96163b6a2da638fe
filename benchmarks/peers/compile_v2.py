"""Compiles JAX's own ragged paged attention (v2) for one target, in the peers' environment.

    python compile_v2.py '{"target": "tpu7x", "q_heads": 32, ..., "kv_block": 2048, "q_block": 16, "vmem_mib": 60}'

Blocks in tokens; null for the kernel's own table. It reads a cache that already holds the new tokens.
"""

from __future__ import annotations

import functools
import json
import sys

import jax.numpy as jnp
from abstract_tpu import Device, generation
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel, tuned_block_sizes


def main(request: dict[str, object]) -> None:
    """Compiles the call."""
    version = generation(request["target"])
    tuned_block_sizes.get_tpu_version = lambda: version  # what asks for a real device
    tuned_block_sizes.get_device_name = lambda num_devices=None: f"TPU v{version}"
    device = Device(request["target"])
    seqs, page, head_dim = (request[k] for k in ("max_seqs", "page_size", "head_dim"))
    arguments = [
        device.shape(request["tokens"], request["q_heads"], head_dim),
        device.shape(request["pages"], page, 2 * request["kv_heads"], head_dim),
        device.shape(seqs, dtype=jnp.int32),
        device.shape(seqs, request["max_model_len"] // page, dtype=jnp.int32),
        device.shape(seqs + 1, dtype=jnp.int32),
        device.shape(1, dtype=jnp.int32),
    ]
    call = functools.partial(
        kernel.ragged_paged_attention,
        sm_scale=head_dim**-0.5,
        num_kv_pages_per_block=request["kv_block"] and request["kv_block"] // page,
        num_queries_per_block=request["q_block"],
        vmem_limit_bytes=request["vmem_mib"] << 20,
    )
    device.compile(call, arguments, donate=())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
