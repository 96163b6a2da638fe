"""Compiles an experimental kernel of the `tpu-inference` package for one target, in the environment that it pins.

    python compile_experimental.py '{"kernel": "batched_rpa", "target": "tpu7x", "q_heads": 32, ...}'

`kernel` is `batched_rpa` or `stacked_rpa`; the call is the public one, with its own choice of blocks.
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


def load_wrapper(name: str) -> types.ModuleType:
    """The kernel's public module."""
    bare_package("tpu_inference")
    logger = types.ModuleType("tpu_inference.logger")  # the package's own wants vLLM
    logger.init_logger = logging.getLogger
    sys.modules["tpu_inference.logger"] = logger
    # A kernel's metadata breaks the lines of the HLO text that a walk reads.
    plain = pl.pallas_call
    pl.pallas_call = lambda *arguments, metadata=None, **options: plain(*arguments, **options)
    return importlib.import_module(f"tpu_inference.kernels.experimental.{name}.wrapper")


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
    call = functools.partial(wrapper.ragged_paged_attention, sm_scale=head_dim**-0.5)
    device.compile(call, arguments, donate=(0, 3))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
