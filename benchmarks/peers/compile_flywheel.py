"""Compiles flywheel-tpu's attention over its paged cache for one target, in the peers' environment.

    python compile_flywheel.py '{"target": "tpu7x", "q_heads": 32, ..., "q_block": null}'

`q_block` null compiles its decode call. Otherwise its two kernels for packed tokens, one after the other as its own
function calls them, but with the lengths that it has XLA compute as arguments (a walk knows only arguments);
`q_block` is the block of queries that it chooses itself, which the last of these arguments depends on.
"""

from __future__ import annotations

import functools
import json
import sys

import flywheel_tpu
import jax
import jax.numpy as jnp
from abstract_tpu import Device
from flywheel_tpu import flash_attn_interface, tuned_block_sizes
from flywheel_tpu.pallas import block_sizes, flash_fwd_kvcache_varlen, flash_fwd_varlen_paged


def decode(request: dict[str, object], device: Device) -> None:
    """Its public call: one new token a sequence."""
    seqs, q_heads, kv_heads, head_dim = (request[k] for k in ("max_seqs", "q_heads", "kv_heads", "head_dim"))

    plain = flash_attn_interface.flash_attn_kvcache_pallas

    def call(q, cache, k, v, cached, table, active, rows):
        # Which row of the cache is whose: an argument, where its own function has XLA count them.
        flash_attn_interface.flash_attn_kvcache_pallas = lambda *given, **options: plain(*given[:-1], rows, **options)
        return flywheel_tpu.flash_attn_with_kvcache(
            q, cache, None, k, v, cache_seqlens=cached, block_table=table, num_active=active, causal=True
        )

    arguments = [
        device.shape(seqs, 1, q_heads, head_dim),
        _cache(request, device),
        device.shape(seqs, 1, kv_heads, head_dim),
        device.shape(seqs, 1, kv_heads, head_dim),
        device.shape(seqs, dtype=jnp.int32),
        device.shape(seqs, request["max_model_len"] // request["page_size"], dtype=jnp.int32),
        device.shape(1, dtype=jnp.int32),
        device.shape(seqs, dtype=jnp.int32),
    ]
    device.compile(call, arguments, donate=(0, 1))


def packed(request: dict[str, object], device: Device) -> None:
    """Appends the new tokens, then attends."""
    tokens, seqs, head_dim = (request[k] for k in ("tokens", "max_seqs", "head_dim"))
    page, q_heads, kv_heads = (request[k] for k in ("page_size", "q_heads", "kv_heads"))
    per_seq = request["max_model_len"] // page

    def call(q, cache, k, v, cached, table, active, cu_q, kv_lens, blocks_before):
        def prefix(cu, q_block):
            if q_block != request["q_block"]:
                raise ValueError(f"q_block must be {q_block}, which flywheel-tpu chooses here")
            return blocks_before

        flash_fwd_varlen_paged.per_seq_qblk_prefix = prefix
        cache = flash_fwd_kvcache_varlen.append_ragged(
            cache, k, v, cu_q, cached, table, active, page_size=page, pages_per_seq=per_seq, interpret=False
        )
        out = flash_fwd_varlen_paged.flash_attn_varlen_paged(
            q.transpose(1, 0, 2),
            cache,
            cu_q,
            kv_lens,
            table.reshape(seqs, per_seq),
            max_seqlen_q=tokens,
            max_seqlen_k=per_seq * page,
            causal=True,
            q_scale=block_sizes.LOG2E * head_dim**-0.5,
            return_lse=False,
            interpret=False,
        )
        return out.transpose(1, 0, 2), cache

    integers = functools.partial(device.shape, dtype=jnp.int32)
    arguments = [
        device.shape(tokens, q_heads, head_dim),
        _cache(request, device),
        device.shape(tokens, kv_heads, head_dim),
        device.shape(tokens, kv_heads, head_dim),
        *(integers(n) for n in (seqs, seqs * per_seq, 1, seqs + 1, seqs, seqs + 1)),
    ]
    device.compile(call, arguments, donate=(0, 1))


def _cache(request: dict[str, object], device: Device) -> jax.ShapeDtypeStruct:
    return device.shape(request["pages"], request["page_size"], 2 * request["kv_heads"], request["head_dim"])


def main(request: dict[str, object]) -> None:
    """Compiles the call."""
    device = Device(request["target"])
    jax.default_backend = lambda: "tpu"  # what asks for a real device
    tuned_block_sizes.jax.devices = lambda *_: [device.device]
    (decode if request["q_block"] is None else packed)(request, device)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
