"""tpu-inference's attention with a bundle installed, compiled for TPUs that are not here: the caches are updated in place.

Run by tests/adapters/test_real_packages.py as `compile_tpu_inference.py TOPOLOGY BUNDLE...`, for bundles with programs for its
TPUs, in the environment that rpac itself compiles in. Two layers' calls of the package's interface, on caches of the shape and
sharding that the package gives them, are compiled for one device and for all of the topology.
"""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Absent, claim
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rpac
from rpac.adapters import tpu_inference

Absent("vllm", "torch", "torchax", "sympy", "requests", "google", "tpu_info", "tpu_inference.env_override")

LAYERS = 2


def main(topology: str, *paths: str) -> None:
    devices = topologies.get_topology_desc(topology, "tpu").devices
    for path in paths:
        engine = rpac.load(path, device=devices[0], allow_compile=True)
        counts = (1,) if engine.model.rope_dim is not None else (1, len(devices))
        with tpu_inference.install(engine):
            for count in counts:
                compile_step(engine, Mesh(np.array(devices[:count]).reshape(1, count), ("data", "model")))


def compile_step(engine: Any, mesh: Mesh) -> None:
    from tpu_inference.runner.kv_cache import get_kv_cache_shape_with_mesh

    model, limits, dtype = engine.model, engine.limits, jnp.dtype(engine.model.kv_dtype)
    latent = model.rope_dim is not None
    width = model.head_dim + model.rope_dim if latent else model.head_dim
    heads = model.kv_heads * mesh.size
    shape = get_kv_cache_shape_with_mesh(mesh, limits.num_pages, limits.page_size, heads, width, dtype, latent)
    # As kv_cache.create_kv_caches shards them.
    axes = PartitionSpec("data") if latent else PartitionSpec("data", None, "model")
    cache = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes))
    step, tokens = (latent_step if latent else grouped_step)(engine, mesh)
    compiled = (
        jax.jit(step, donate_argnums=0)
        .trace([cache] * LAYERS, tokens, metadata(engine, mesh))
        .lower(lowering_platforms=("tpu",))
        .compile()
    )
    text, memory = compiled.as_text(), compiled.memory_analysis()
    local = cache.sharding.shard_shape(shape)
    size = dtype.itemsize * math.prod(local)
    what = f"{engine.name} on {mesh.size} devices, caches {list(shape)}"
    found = re.findall(rf"= \(?\w+\[{','.join(map(str, local))}\].* (?:copy|copy-start|transpose)\(.*", text)
    copies = [
        line for line in found if "S(1)" not in line
    ]  # not into VMEM, where a cache as small as these has its place
    claim(f"{what}: {len(copies)} copies of a cache", not copies, copies)
    claim(f"{what}: all layers' caches alias their results", memory.alias_size_in_bytes >= LAYERS * size)
    claim(
        f"{what}: compiled, {memory.temp_size_in_bytes} bytes beside caches of {size}", memory.temp_size_in_bytes < size
    )


def grouped_step(engine: Any, mesh: Mesh) -> tuple[Any, Any]:
    from tpu_inference.layers.common.attention_interface import attention

    model, tokens = engine.model, engine.limits.token_buckets[-1]
    by_head = NamedSharding(mesh, PartitionSpec(None, "model", None))
    heads = {"q": model.q_heads * mesh.size, "k": model.kv_heads * mesh.size, "v": model.kv_heads * mesh.size}
    arrays = {
        name: jax.ShapeDtypeStruct((tokens, count, model.head_dim), jnp.bfloat16, sharding=by_head)
        for name, count in heads.items()
    }
    if model.sinks:
        here = NamedSharding(mesh, PartitionSpec("model"))
        arrays["sinks"] = jax.ShapeDtypeStruct((heads["q"],), jnp.float32, sharding=here)

    def step(caches: Any, given: Any, metadata: Any) -> Any:
        sinks, q = given.get("sinks"), given["q"]
        for layer, cache in enumerate(caches):
            caches[layer], out = attention(cache, q, given["k"], given["v"], metadata, mesh, sinks=sinks)
            q = jnp.tanh(out)
        return caches, q

    return step, arrays


def latent_step(engine: Any, mesh: Mesh) -> tuple[Any, Any]:
    from tpu_inference.layers.common.attention_interface import mla_attention

    model, tokens = engine.model, engine.limits.token_buckets[-1]
    heads, rank, rope = model.q_heads, model.head_dim, model.rope_dim
    shapes = ((heads, tokens, rank), (tokens, heads, rope), (tokens, rank), (tokens, rope))
    here = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in shapes]

    def step(caches: Any, given: Any, metadata: Any) -> Any:
        queries, *rest = given
        for layer, cache in enumerate(caches):
            caches[layer], out = mla_attention(
                queries, *rest, cache, metadata, mesh, heads, rank, sm_scale=model.sm_scale
            )
            queries = jnp.tanh(out)
        return caches, queries

    return step, arrays


def metadata(engine: Any, mesh: Mesh) -> Any:
    from tpu_inference.layers.common.attention_metadata import AttentionMetadata

    limits, here = engine.limits, NamedSharding(mesh, PartitionSpec())

    def ints(count: int) -> Any:
        return jax.ShapeDtypeStruct((count,), jnp.int32, sharding=here)

    return AttentionMetadata(
        input_positions=ints(limits.token_buckets[-1]),
        block_tables=ints(limits.max_num_seqs * limits.pages_per_seq),
        seq_lens=ints(limits.max_num_seqs),
        query_start_loc=ints(limits.max_num_seqs + 1),
        request_distribution=ints(3),
        use_causal_mask=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[2:])
