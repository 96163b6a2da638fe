"""The adapter beside tpu-inference: its signature, its reference function, and its attention interface with ours inside."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from common import Absent, Call, TracedEngine, calls, claim, require_equal, require_signature
from jax.sharding import Mesh
from signatures import TPU_INFERENCE, TPU_INFERENCE_BATCHED, TPU_INFERENCE_HD64, TPU_INFERENCE_MLA

from rpac.adapters import tpu_inference
from rpac.adapters.tpu_inference import ragged_paged_attention
from rpac.contract.attention import Attention
from rpac.errors import SelectionError

# What the package's __init__ and its attention interface import for a server, and nothing called here uses.
Absent("vllm", "torch", "torchax", "sympy", "requests", "tpu_inference.env_override")


class Latent:
    """What an adapter asks of an engine of latent attention before any call."""

    name, kv_layout = "latent", "latent"
    model = Attention(16, 1, 128, "bfloat16", "bfloat16", 0.07, rope_dim=64)


def main(path: str, seed: int) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    from tpu_inference.kernels.experimental.batched_rpa import wrapper
    from tpu_inference.kernels.mla.v2 import kernel as mla
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel, kernel_hd64
    from tpu_inference.layers.common import attention_interface

    engine = TracedEngine(path)
    attention = ragged_paged_attention(engine)
    require_signature("tpu-inference", TPU_INFERENCE, kernel.ragged_paged_attention, attention)

    narrow = tpu_inference.ragged_paged_attention_hd64(engine)
    batched = tpu_inference.batched_ragged_paged_attention(engine)
    require_signature("its kernel of head_dim 64", TPU_INFERENCE_HD64, kernel_hd64.ragged_paged_attention_hd64, narrow)
    require_signature("its batched RPA", TPU_INFERENCE_BATCHED, wrapper.ragged_paged_attention, batched)
    latent = tpu_inference.mla_ragged_paged_attention(Latent())
    require_signature("its MLA v2", TPU_INFERENCE_MLA, mla.mla_ragged_paged_attention, latent)

    scale, chunk = engine.model.sm_scale, engine.limits.prefill_chunk
    attention_interface.ragged_paged_attention = attention  # the line that a server adds
    for call in calls(engine, seed):
        reference = partial(kernel.ref_ragged_paged_attention, sm_scale=scale, out_dtype=jnp.float32)
        wanted = reference(*call.arrays, *call.metadata)
        require_equal(
            "host, prefill chunks open", call, attention(*call.arrays, *call.metadata, sm_scale=scale), wanted
        )
        fixed = attention(*call.arrays, *call.metadata, sm_scale=scale, chunk_prefill_size=chunk)
        require_equal("host, prefill chunks as built", call, fixed, wanted)
        require_equal("attention interface in jit", call, in_server(attention_interface, call), wanted)
        both = halves(call)
        out, kv_cache = in_server(attention_interface, joined(*both), devices=2)
        parts = zip(jnp.split(out, 2, axis=1), jnp.split(kv_cache, 2, axis=2), strict=True)
        for device, (half, got) in enumerate(zip(both, parts, strict=True)):
            wanted = reference(*half.arrays, *half.metadata)
            require_equal(f"attention interface in jit, device {device} of 2", half, got, wanted)
        out, kv_cache = in_server(attention_interface, stacked(*both), replicas=2)
        parts = zip(jnp.split(out, 2), jnp.split(kv_cache, 2), strict=True)
        for replica, (half, got) in enumerate(zip(both, parts, strict=True)):
            wanted = reference(*half.arrays, *half.metadata)
            require_equal(f"attention interface in jit, replica {replica} of 2", half, got, wanted)
    claim("the interface called engine.traced", engine.traces > 0)
    try:
        in_server(attention_interface, call, attention_chunk_size=4096)
    except SelectionError as error:
        claim("the interface's window is refused by name", "sliding_window is 4096" in str(error))


def halves(call: Call) -> tuple[Call, Call]:
    """Two calls of one batch on different arrays: what two devices have of a model of twice the heads."""
    other = replace(call, queries=-call.queries, keys=call.values, values=call.keys, kv_cache=call.kv_cache[::-1])
    return call, other


def joined(first: Call, second: Call) -> Call:
    """The call of all heads."""
    heads = {name: [getattr(one, name) for one in (first, second)] for name in ("queries", "keys", "values")}
    cache = jnp.concatenate([first.kv_cache, second.kv_cache], axis=2)
    return replace(first, kv_cache=cache, **{name: jnp.concatenate(both, axis=1) for name, both in heads.items()})


def stacked(first: Call, second: Call) -> Call:
    """The call of two data-parallel replicas, each with tokens and pages of its own; the batch is of one."""
    names = ("queries", "keys", "values", "kv_cache")
    return replace(first, **{name: jnp.concatenate([getattr(one, name) for one in (first, second)]) for name in names})


def in_server(
    interface: object, call: Call, devices: int = 1, replicas: int = 1, **layer: object
) -> tuple[jax.Array, jax.Array]:
    """A layer's call as a model makes it: under jit, on a mesh."""
    mesh = Mesh(np.array(jax.devices()[: devices * replicas]).reshape(replicas, devices), ("data", "model"))
    kv_lens, page_indices, cu_q_lens, distribution = (jnp.tile(array, replicas) for array in call.as_mixed)
    metadata = interface.AttentionMetadata(
        input_positions=jnp.zeros(call.batch.tokens * replicas, jnp.int32),
        block_tables=page_indices,
        seq_lens=kv_lens,
        query_start_loc=cu_q_lens,
        request_distribution=distribution,
    )

    @partial(jax.jit, donate_argnums=0)
    def model(kv_cache, q, k, v, metadata):
        return interface.attention(kv_cache, q, k, v, metadata, mesh, **layer)

    queries, keys, values, kv_cache = call.arrays
    kv_cache, out = model(kv_cache, queries, keys, values, metadata)
    return out, kv_cache


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
