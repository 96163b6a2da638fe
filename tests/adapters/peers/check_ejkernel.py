"""The adapters beside ejkernel: both signatures, its reference and XLA functions, and its registry with ours inside."""

from __future__ import annotations

import sys
from functools import partial

import jax
import numpy as np
from common import TracedEngine, calls, claim, require_equal, require_signature
from jax.sharding import Mesh, PartitionSpec
from signatures import EJKERNEL, EJKERNEL_KERNEL

from rpac.adapters import ejkernel as adapters


def main(path: str, seed: int) -> None:
    from ejkernel.kernels import Backend, Platform, kernel_registry
    from ejkernel.kernels._pallas.tpu.ragged_page_attention_v3 import _pallas_impl_fwd, ragged_page_attention_v3
    from ejkernel.modules import RaggedPageAttentionv3Config
    from ejkernel.modules import ragged_page_attention_v3 as operation

    engine = TracedEngine(path)
    attention = adapters.ragged_page_attention_v3(engine)
    kernel = adapters.ragged_page_attention_v3_kernel(engine)
    require_signature("ejkernel's operation", EJKERNEL, operation, attention)
    require_signature("ejkernel's kernel", EJKERNEL_KERNEL, ragged_page_attention_v3, kernel)

    scale, chunk = engine.model.sm_scale, engine.limits.prefill_chunk
    mesh, here = Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec()
    sharded = {"mesh": mesh, "in_specs": (here,) * 9, "out_specs": (here, here)}
    xla = kernel_registry.get("ragged_page_attention_v3", platform=Platform.XLA)
    register = kernel_registry.register("ragged_page_attention_v3", Platform.XLA, Backend.ANY, priority=1)
    register(kernel)  # the line that a server adds; on a TPU with Platform.PALLAS, Backend.TPU
    config = RaggedPageAttentionv3Config(num_kv_pages_per_block=4, num_queries_per_block=4, platform="xla")
    for call in calls(engine, seed):
        reference = partial(_pallas_impl_fwd.ref_ragged_paged_attention, softmax_scale=scale)
        wanted = reference(*call.arrays, *call.metadata)
        require_equal("host", call, attention(*call.arrays, *call.metadata, softmax_scale=None), wanted)
        fixed = kernel(*call.arrays, *call.metadata, softmax_scale=scale, chunk_prefill_size=chunk)
        require_equal("host, prefill chunks as built", call, fixed, wanted)
        require_equal("as its XLA kernel", call, fixed, xla(*call.arrays, *call.metadata, softmax_scale=scale))
        got = attention(*call.arrays, *call.metadata, softmax_scale=scale, **sharded)
        require_equal("sharded", call, got, wanted)
        traces = engine.traces
        in_server = jax.jit(partial(operation, softmax_scale=scale, platform="xla", cfg=config))
        got = in_server(*call.arrays, *call.metadata)
        claim("its operation in jit called engine.traced", engine.traces > traces)
        require_equal("its operation in jit", call, got, wanted)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
