"""Compiles a kernel of the design of `batched_rpa` for one target, in the environment that its package pins.

    python compile_experimental.py '{"kernel": "batched_rpa", "target": "tpu7x", "q_heads": 32, ...}'

`kernel` is `batched_rpa` or `stacked_rpa` (of the `tpu-inference` package), or `tokamax`. The call is the public one, with
its own choice of blocks unless the request has `blocks` for decode and for prefill. Queries and cache are donated, unless
`donate` says otherwise.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import sys
import types

import jax
import jax.numpy as jnp
from abstract_tpu import Device, bare_package
from jax.experimental import pallas as pl

WRAPPERS = {
    "batched_rpa": ("tpu_inference", "tpu_inference.kernels.experimental.batched_rpa.wrapper"),
    "stacked_rpa": ("tpu_inference", "tpu_inference.kernels.experimental.stacked_rpa.wrapper"),
    "tokamax": ("tokamax", "tokamax._src.ops.batched_rpa.kernel.wrapper"),
}


def load_wrapper(kernel: str) -> types.ModuleType:
    """The kernel's public module."""
    package, module = WRAPPERS[kernel]
    bare_package(package)
    logger = types.ModuleType("tpu_inference.logger")  # the package's own wants vLLM
    logger.init_logger = logging.getLogger
    sys.modules["tpu_inference.logger"] = logger
    # A kernel's metadata breaks the lines of the HLO text that a walk reads.
    plain = pl.pallas_call
    pl.pallas_call = lambda *arguments, metadata=None, **options: plain(*arguments, **options)
    return importlib.import_module(module)


def main(request: dict[str, object]) -> None:
    """Compiles the call."""
    wrapper = load_wrapper(request["kernel"])
    device = Device(request["target"])
    tokens, q_heads, kv_heads, head_dim = (request[k] for k in ("tokens", "q_heads", "kv_heads", "head_dim"))
    seqs, page = request["max_seqs"], request["page_size"]
    with jax.sharding.use_abstract_mesh(device.mesh()):
        cache = wrapper.get_kv_cache_shape(request["pages"], page, kv_heads, head_dim, jnp.bfloat16)
    arguments = [
        device.shape(tokens, q_heads, head_dim),
        device.shape(tokens, kv_heads, head_dim),
        device.shape(tokens, kv_heads, head_dim),
        device.shape(*cache),
        device.shape(seqs, dtype=jnp.int32),
        device.shape(seqs * (request["max_model_len"] // page), dtype=jnp.int32),
        device.shape(seqs + 1, dtype=jnp.int32),
        device.shape(3, dtype=jnp.int32),
    ]
    chosen = request.get("blocks", {})
    blocks = {f"{mode}_block_sizes": wrapper.configs.BlockSizes(*sizes) for mode, sizes in chosen.items()}
    scale = request.get("sm_scale", head_dim**-0.5)
    call = functools.partial(wrapper.ragged_paged_attention, sm_scale=scale, **blocks)
    device.compile(call, arguments, donate=tuple(request.get("donate", (0, 3))))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
