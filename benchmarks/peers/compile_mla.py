"""Compiles tpu-inference's latent attention (MLA v2) for one target, in the peers' environment.

    python compile_mla.py '{"target": "tpu7x", "q_heads": 128, ..., "rope_dim": 64, "kv_block": 1024, "rows": 1}' [PARAMETERS]

`kv_block` in tokens; `rows`: sequences that a block of decode holds. With the values of a batch's parameters, by number, as
JSON it does not compile: it prints the scalars that the call computes for its kernels.
"""

from __future__ import annotations

import functools
import json
import sys

import jax.numpy as jnp
from abstract_tpu import Device
from follow import compile_or_follow
from stand_ins import bare_tpu_inference


def main(request: dict[str, object], values: dict[str, list[int]] | None) -> None:
    """Compiles the call, or follows its scalars."""
    bare_tpu_inference(request["target"])
    from tpu_inference.kernels.mla.v2 import kernel

    device = Device(request["target"])
    tokens, q_heads, rank, rope = (request[k] for k in ("tokens", "q_heads", "head_dim", "rope_dim"))
    seqs, page = request["max_seqs"], request["page_size"]
    lanes = 128
    width = -(-rank // lanes) * lanes + -(-rope // lanes) * lanes
    arguments = [
        device.shape(q_heads, tokens, rank),
        device.shape(tokens, q_heads, rope),
        device.shape(tokens, rank),
        device.shape(tokens, rope),
        device.shape(*kernel.get_kv_cache_shape(request["pages"], page, width, jnp.bfloat16)),
        device.shape(seqs, dtype=jnp.int32),
        device.shape(seqs * (request["max_model_len"] // page), dtype=jnp.int32),
        device.shape(seqs + 1, dtype=jnp.int32),
        device.shape(3, dtype=jnp.int32),
    ]
    call = functools.partial(
        kernel.mla_ragged_paged_attention,
        sm_scale=(128 + rope) ** -0.5,
        num_kv_pages_per_block=request["kv_block"] // page,
        num_queries_per_block=8,
        decode_batch_size=request["rows"],
    )
    compile_or_follow(device, call, arguments, (0, 4), values)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else None)
