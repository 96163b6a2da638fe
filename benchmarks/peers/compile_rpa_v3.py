"""Compiles RPA v3 of the `tpu-inference` package for one target, in that package's own environment.

    python compile_rpa_v3.py '{"target": "tpu7x", "q_heads": 32, ..., "decode_tiles": [1, 4096, 1, 4096], ...}'

Run by `rpac.schedule.dump.dump_command`, which sets the dump flags. It imports only the kernel's own module: the
package's `__init__` wants a server's worth of dependencies. The line printed names the compiler.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, SingleDeviceSharding

# One TensorCore as JAX describes it, and the generation that the kernel would read from a device that is not here.
TARGETS = {
    "tpu7x": ("tpu7x:2x2x1", 7),
    "v6e": ("v6e:2x2", 6),
    "v5p": ("v5p:2x2x1", 5),
    "v5e": ("v5e:2x2", 5),
}


def load_kernel(generation: int) -> types.ModuleType:
    """The kernel's module, with the one thing patched that asks for a real device."""
    spec = importlib.util.find_spec("tpu_inference")
    package = types.ModuleType("tpu_inference")
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules["tpu_inference"] = package
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel

    kernel.get_tpu_version = lambda: generation
    return kernel


def main(request: dict[str, object]) -> None:
    """Compiles the call; `request` has the fields of `benchmarks.rpa_v3.Config`."""
    topology, generation = TARGETS[request["target"]]
    kernel = load_kernel(generation)
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    from jax._src.mesh import AbstractDevice

    mesh = AbstractMesh(
        (1,),
        ("x",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu"),
    )
    sharding = SingleDeviceSharding(device)

    def shape(*dims: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    tokens, q_heads, kv_heads, head_dim = (request[k] for k in ("tokens", "q_heads", "kv_heads", "head_dim"))
    seqs, page = request["max_seqs"], request["page_size"]
    arguments = [
        shape(tokens, q_heads, head_dim),
        shape(tokens, kv_heads, head_dim),
        shape(tokens, kv_heads, head_dim),
        shape(request["pages"], page, kv_heads, 2, head_dim),
        shape(seqs, dtype=jnp.int32),
        shape(seqs * (request["max_model_len"] // page), dtype=jnp.int32),
        shape(seqs + 1, dtype=jnp.int32),
        shape(3, dtype=jnp.int32),
    ]
    call = functools.partial(
        kernel.ragged_paged_attention,
        sm_scale=head_dim**-0.5,
        d_block_sizes=tuple(request["decode_tiles"]) if request["decode_tiles"] else None,
        m_block_sizes=tuple(request["mixed_tiles"]) if request["mixed_tiles"] else None,
    )
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(call, donate_argnums=(0, 1, 2, 3)).trace(*arguments).lower(lowering_platforms=("tpu",))
    print(f"libtpu {importlib.metadata.version('libtpu')}", flush=True)
    lowered.compile()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
