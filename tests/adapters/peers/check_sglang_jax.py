"""The adapters beside sglang-jax: its signature, its reference function, and its attention backend with ours inside."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Absent, Call, TracedEngine, calls, claim, require_equal, require_signature
from jax.sharding import Mesh
from signatures import SGLANG_JAX

from rpac.adapters import sglang_jax

# What the attention backend imports for a server, and nothing called here uses.
Absent(
    "fastapi", "huggingface_hub", "modelscope", "msgpack", "orjson", "pandas", "psutil", "requests", "setproctitle",
    "sgl_jax.srt.managers", "transformers", "zmq",
)  # fmt: skip


def main(path: str, seed: int) -> None:
    from sgl_jax.srt.layers.attention import flashattention_backend
    from sgl_jax.srt.layers.attention.flash_attn_kernel import flash_attention

    engine = TracedEngine(path)
    scale = engine.model.sm_scale
    old, main_branch = sglang_jax.ragged_paged_attention(engine), sglang_jax.ragged_paged_attention_v3(engine)
    require_signature("sglang-jax", SGLANG_JAX, flash_attention.ragged_paged_attention, old)

    flashattention_backend.ragged_paged_attention = old  # the line that a server adds
    for call in calls(engine, seed):
        wanted = expected(flash_attention, call, scale)
        backend, arguments = server(flashattention_backend, engine, call)
        metadata = backend.forward_metadata
        rows = metadata.seq_lens, metadata.page_indices, metadata.cu_q_lens, metadata.cu_kv_lens, metadata.distribution
        queries, keys, values, kv_cache = call.arrays
        got = main_branch(queries, keys, values, kv_cache, *rows, None, sm_scale=scale)
        expected_v3 = wanted[0], wanted[1].reshape(kv_cache.shape)
        require_equal("main branch, host", call, got, expected_v3)
        in_jit = jax.jit(lambda *args: main_branch(*args, None, sm_scale=scale))
        require_equal("main branch, in jit", call, in_jit(*call.arrays, *rows), expected_v3)
        got = old(*arguments[:3], flat_heads(call.kv_cache), *rows, sm_scale=scale)
        require_equal("host", call, got, wanted)
        require_equal("attention backend in jit", call, in_server(backend, engine, arguments), wanted)
    claim("the backend called engine.traced", engine.traces > 0)


def flat_heads(kv_cache: Any) -> Any:
    """The contract's cache as 0.0.2 keeps it: heads on one axis."""
    pages, page_size, *_, head_dim = kv_cache.shape
    return jnp.array(kv_cache).reshape(pages, page_size, -1, head_dim)


def expected(flash_attention: Any, call: Call, scale: float) -> tuple[Any, Any]:
    """The reference's output, on a cache that has the new tokens written as the package lays them out."""
    cache = np.array(flat_heads(call.kv_cache))
    size = cache.shape[1]
    for row in call.batch:
        for token, position in zip(row.queries, range(row.context_len, row.kv_len), strict=True):
            slot = cache[row.pages[position // size], position % size]
            slot[0::2], slot[1::2] = np.asarray(call.keys)[token], np.asarray(call.values)[token]
    table = call.batch.page_indices.reshape(len(call.batch.kv_lens), -1)
    out = flash_attention.ref_ragged_paged_attention_fused(
        jnp.array(call.queries),
        jnp.array(cache),
        call.batch.kv_lens,
        table,
        call.batch.cu_q_lens,
        call.batch.distribution[2:],
        sm_scale=scale,
    )
    return out, cache.reshape(-1, *cache.shape[2:])


def server(module: Any, engine: TracedEngine, call: Call) -> tuple[Any, list[Any]]:
    """The package's backend with the metadata that it makes of a batch, and a layer's arguments."""
    model, page_size = engine.model, engine.limits.page_size
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    rows = list(call.batch)
    decode = all(row.q_len == 1 for row in rows)
    padded = len(rows) + (len(rows) < engine.limits.max_num_seqs)  # a bucket of rows that is neither's
    batch = SimpleNamespace(
        forward_mode=module.ForwardMode.DECODE if decode else module.ForwardMode.EXTEND,
        seq_lens=np.array([row.kv_len for row in rows] + [0] * (padded - len(rows)), np.int32),
        extend_seq_lens=np.array([row.q_len for row in rows] + [0] * (padded - len(rows)), np.int32),
        cache_loc=np.concatenate([np.arange(page_size) + page * page_size for row in rows for page in row.pages]),
    )
    backend = module.FlashAttention(model.q_heads, model.kv_heads, model.head_dim, page_size=page_size, mesh=mesh)
    backend.forward_metadata = backend.get_forward_metadata(batch)
    return backend, [*call.arrays[:3], flat_heads(call.kv_cache)]


def in_server(backend: Any, engine: TracedEngine, arguments: list[Any]) -> tuple[Any, Any]:
    """A layer's call as a model makes it: under jit, on a mesh, queries and cache with their axes merged."""
    from sgl_jax.srt.layers.radix_attention import RadixAttention

    model = engine.model
    layer = RadixAttention(model.q_heads, model.head_dim, model.sm_scale, model.kv_heads, layer_id=0)
    *tokens, kv_cache = arguments

    @jax.jit
    def forward(backend, q, k, v, fused):
        return backend(q, k, v, layer, None, SimpleNamespace(get_fused_kv_buffer=lambda layer_id: fused))

    flat = [array.reshape(array.shape[0], -1) for array in tokens]
    with jax.set_mesh(backend.mesh):
        out, fused = forward(backend, *flat, kv_cache.reshape(-1, *kv_cache.shape[2:]))
    return out.reshape(tokens[0].shape), fused


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
