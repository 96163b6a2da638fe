"""Compiles RPA v3 as it was in tpu-inference 0.11.1 for one target, with a jax that is newer than that package.

    python compile_rpa_v3_early.py '{"target": "tpu7x", "q_heads": 4, ..., "decode_tiles": [1, 2048, 1, 2048], ...}'

Run by `rpac.schedule.dump.dump_command`, which sets the dump flags. The line printed names the compiler.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import types

import jax.numpy as jnp
from abstract_tpu import Device, bare_package, generation
from jax._src import dtypes

VMEM_LIMIT_BYTES = 64 << 20
"""All of TPU7x's, half of v6e's."""


def stand_in(name: str, **members: object) -> None:
    """A module of the package that wants a server's dependencies, with what the kernel asks of it."""
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def main(request: dict[str, object]) -> None:
    """Compiles the call; `request` has the fields of `benchmarks.rpa_v3.Config`."""
    bare_package("tpu_inference")
    stand_in("tpu_inference.logger", init_logger=logging.getLogger)
    stand_in("tpu_inference.utils", get_device_name=lambda *_: "")
    dtypes.bit_width = dtypes.itemsize_bits  # its name in newer versions of jax
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel

    kernel.get_tpu_version = lambda: generation(request["target"])  # the one thing that asks for a real device
    device = Device(request["target"])
    tokens, q_heads, kv_heads, head_dim = (request[k] for k in ("tokens", "q_heads", "kv_heads", "head_dim"))
    seqs, page = request["max_seqs"], request["page_size"]
    arguments = [
        device.shape(tokens, q_heads, head_dim),
        device.shape(tokens, kv_heads, head_dim),
        device.shape(tokens, kv_heads, head_dim),
        device.shape(request["pages"], page, kv_heads, 2, head_dim),
        device.shape(seqs, dtype=jnp.int32),
        device.shape(seqs * (request["max_model_len"] // page), dtype=jnp.int32),
        device.shape(seqs + 1, dtype=jnp.int32),
        device.shape(3, dtype=jnp.int32),
    ]
    queries, block = request["decode_tiles"][:2]
    call = functools.partial(
        kernel.ragged_paged_attention,
        sm_scale=head_dim**-0.5,
        num_kv_pages_per_block=block // page,
        num_queries_per_block=queries,
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
    )
    device.compile(call, arguments, donate=(3,))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
