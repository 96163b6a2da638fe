"""SGLang-JAX's own Llama on a CPU, with a bundle installed and with the package's own backend for CPUs.

Run by tests/adapters/test_real_packages.py as `serve_sglang_jax.py SEED BUNDLE...`. For each bundle the package's Llama runs a
prefill of some prompts and some steps of decode on the package's pool of pages: first with its backend `native`, then under
jit with its backend `fa` and the bundle installed. Compared are tokens, hidden states and pools.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Absent, TracedEngine, claim
from jax.sharding import Mesh
from serving import HIDDEN, PROMPTS, VOCABULARY, batches, require_close, require_tokens, spread

import rpac
from rpac.adapters import sglang_jax
from rpac.errors import SelectionError

# What the package imports for a server, and nothing called here uses.
Absent(
    "fastapi", "huggingface_hub", "modelscope", "msgpack", "orjson", "pandas", "psutil", "requests", "setproctitle",
    "safetensors", "sgl_jax.srt.configs", "sgl_jax.srt.managers", "sgl_jax.srt.utils.weight_utils", "transformers", "zmq",
)  # fmt: skip

LAYERS = 2


def registered(kind: type, register: Any = jax.tree_util.register_pytree_node_class) -> type:
    """The flax that goes with this jax registers modules itself; 0.0.2 is older, and does it again."""
    try:
        return register(kind)
    except ValueError:
        return kind


jax.tree_util.register_pytree_node_class = registered


def pool(engine: Any, mesh: Mesh) -> Any:
    """The package's pool; the page of padding that it adds is among the bundle's."""
    from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool

    model, limits = engine.model, engine.limits
    size = (limits.num_pages - 1) * limits.page_size
    heads = model.kv_heads * mesh.size
    return MHATokenToKVPool(size, limits.page_size, jnp.dtype(model.kv_dtype), heads, model.head_dim, LAYERS, mesh)


def llama(engine: Any, mesh: Mesh, seed: int) -> Any:
    from flax import nnx
    from sgl_jax.srt.models.llama import LlamaForCausalLM

    config = SimpleNamespace(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=engine.model.q_heads * mesh.size,
        num_key_value_heads=engine.model.kv_heads * mesh.size,
        head_dim=engine.model.head_dim,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        pad_token_id=0,
    )
    with jax.set_mesh(mesh):
        return spread(LlamaForCausalLM(config, rngs=nnx.Rngs(0), mesh=mesh).transformer, seed)


def forward_batch(engine: Any, batch: rpac.Batch, backend: Any, ids: Any, by_page: bool) -> Any:
    """The package's description of a batch: the tokens' places in the pool, of whole pages where the backend takes pages."""
    from sgl_jax.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    page_size, rows = engine.limits.page_size, list(batch)
    slots = [np.concatenate([np.arange(page_size) + page * page_size for page in row.pages]) for row in rows]
    positions, out = np.zeros(batch.tokens, np.int32), np.full(batch.tokens, -1, np.int32)
    for row, slot in zip(rows, slots, strict=True):
        own = slice(row.queries.start, row.queries.stop)
        positions[own] = np.arange(row.context_len, row.kv_len)
        out[own] = slot[row.context_len : row.kv_len]
    used = slots if by_page else [slot[: row.kv_len] for row, slot in zip(rows, slots, strict=True)]
    decode = all(row.q_len == 1 for row in rows)
    lengths = [np.array([getattr(row, name) for row in rows], np.int32) for name in ("kv_len", "q_len", "context_len")]
    described = SimpleNamespace(
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        seq_lens=lengths[0],
        extend_seq_lens=lengths[1],
        cache_loc=np.concatenate(used),
    )
    metadata = backend.get_forward_metadata(described)
    if metadata is not None:
        backend.forward_metadata = metadata
    return ForwardBatch(
        bid=0,
        forward_mode=described.forward_mode,
        batch_size=len(rows),
        input_ids=jnp.asarray(ids),
        req_pool_indices=jnp.arange(len(rows)),
        seq_lens=jnp.asarray(lengths[0]),
        out_cache_loc=jnp.asarray(out),
        positions=jnp.asarray(positions),
        attn_backend=backend,
        cache_loc=jnp.asarray(described.cache_loc, jnp.int32),
        extend_prefix_lens=jnp.asarray(lengths[2]),
        extend_seq_lens=jnp.asarray(lengths[1]),
    )


def in_servers_layout(engine: Any, buffer: Any, devices: int) -> np.ndarray:
    """A pool's array as the server itself would have it: tokens, K and V of each head in turn, lanes."""
    found = np.asarray(buffer)
    if engine.kv_layout != "separate":
        return found
    parts = []
    for part in np.split(found, devices, axis=1):  # each device has its own pages
        pages = part.reshape(engine.limits.num_pages, 2, engine.model.kv_heads, engine.limits.page_size, part.shape[-1])
        parts.append(pages.transpose(0, 3, 2, 1, 4).reshape(len(found), -1, part.shape[-1]))
    return np.concatenate(parts, axis=1)


def serve(engine: Any, seed: int, devices: int) -> None:
    from flax import nnx
    from sgl_jax.srt.layers.attention.flashattention_backend import FlashAttention
    from sgl_jax.srt.layers.attention.native_backend import NativeAttention

    what = f"Llama on {devices} devices, bundle {engine.name}"
    alone, mesh = (Mesh(np.array(jax.devices()[:count]), ("tensor",)) for count in (1, devices))
    model = llama(engine, mesh, seed)
    graph, state = nnx.split(model)
    embedding = np.asarray(model.embed_tokens.embedding.value, np.float32)
    heads = engine.model.q_heads * devices, engine.model.kv_heads * devices
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, VOCABULARY, prompt) for prompt in PROMPTS]

    def step(state: Any, buffers: Any, given: Any, kept: Any) -> Any:
        kept.kv_buffer = buffers
        hidden, buffers, _ = nnx.merge(graph, state)(given, kept)
        return buffers, hidden

    own = pool(engine, mesh)
    own.kv_buffer = [jax.device_put(np.asarray(buffer)) for buffer in own.kv_buffer]
    native = NativeAttention(*heads)
    wanted, fed = [], []
    here = jax.tree.map(lambda array: jax.device_put(np.asarray(array), alone.devices.flat[0]), state)
    for batch in batches(engine):
        fed.append(batch.pack([np.asarray(each, np.int32) for each in ids]))
        given = forward_batch(engine, batch, native, fed[-1], by_page=False)
        own.kv_buffer, hidden = step(here, own.kv_buffer, given, own)
        last = np.asarray(hidden, np.float32)[[row.queries.stop - 1 for row in batch]]
        wanted.append(last)
        ids = [None] * len(PROMPTS)
        for row, at in enumerate(batch.order):
            ids[at] = [int((last[row] @ embedding.T).argmax())]

    got = []
    with sglang_jax.install(engine) as installed:
        claim(f"{what}: {len(installed.replaced)} names replaced", bool(installed.replaced))
        kept = pool(engine, mesh)
        backend = FlashAttention(*heads, engine.model.head_dim, page_size=engine.limits.page_size, mesh=mesh)
        buffers = kept.kv_buffer
        for batch, tokens, last in zip(batches(engine), fed, wanted, strict=True):
            given = forward_batch(engine, batch, backend, tokens, by_page=True)
            with jax.set_mesh(mesh):
                buffers, hidden = jax.jit(step)(state, buffers, given, kept)
            got.append(np.asarray(hidden, np.float32)[[row.queries.stop - 1 for row in batch]])
            require_close(f"{what}: hidden states of {batch.kind}", got[-1], last)
        if engine.kv_layout == "separate":
            try:
                kept.get_kv_buffer(0)
            except SelectionError as error:
                claim(f"{what}: single tokens of the pool are refused", "get_kv_buffer is called" in str(error))
    pages = sorted({page for row in batch for page in row.pages})
    size = engine.limits.page_size
    slots = np.concatenate([np.arange(size) + page * size for page in pages])
    for layer in range(LAYERS):
        mine = in_servers_layout(engine, buffers[layer], devices)
        require_close(f"{what}: pool of layer {layer}", mine[slots], np.asarray(own.kv_buffer[layer])[slots])
    require_tokens(what, np.concatenate(got) @ embedding.T, np.concatenate(wanted) @ embedding.T)
    claim(f"{what}: engine.traced was called", engine.traces > 0)


def main(seed: int, *paths: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    for path in paths:
        for devices in (1, 2):
            serve(TracedEngine(path), seed, devices)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
