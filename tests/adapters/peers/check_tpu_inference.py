"""The adapter beside tpu-inference: its signature, its reference function, and its attention interface with ours inside."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
from common import Absent, TracedEngine, calls, claim, require_equal, require_signature
from jax.sharding import Mesh
from signatures import TPU_INFERENCE

from rpac.adapters.tpu_inference import ragged_paged_attention

# What the package's __init__ and its attention interface import of a server's, and no function called here needs.
Absent("vllm", "torch", "torchax", "sympy", "tpu_inference.env_override", "tpu_inference.logger")


def main(path: str, seed: int) -> None:
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel
    from tpu_inference.layers.common import attention_interface

    engine = TracedEngine(path)
    attention = ragged_paged_attention(engine)
    scale = engine.model.sm_scale
    require_signature("tpu-inference", TPU_INFERENCE, kernel.ragged_paged_attention, attention)

    attention_interface.ragged_paged_attention = attention
    mesh = Mesh(jax.devices()[:1], attention_interface.ShardingAxisName.ATTN_HEAD)
    print(mesh)
    for call in calls(engine, seed):
        wanted = kernel.ref_ragged_paged_attention(
            *call.arrays, *call.metadata, sm_scale=scale, out_dtype=jnp.float32
        )
        require_equal("as the reference", call, attention(*call.arrays, *call.metadata, sm_scale=scale), wanted)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
