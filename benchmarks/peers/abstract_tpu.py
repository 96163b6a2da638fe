"""What the compile scripts share: a TPU that is not here, shapes on it, and packages imported in part."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import libtpu
from jax._src.mesh import AbstractDevice
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, SingleDeviceSharding

# One TensorCore as JAX describes it, and the generation that a kernel would read from a device that is not here.
TARGETS = {
    "tpu7x": ("tpu7x:2x2x1", 7),
    "v6e": ("v6e:2x2", 6),
    "v5p": ("v5p:2x2x1", 5),
    "v5e": ("v5e:2x2", 5),
}


def generation(target: str) -> int:
    return TARGETS[target][1]


def bare_package(name: str) -> None:
    """Makes modules of a package importable without its `__init__`, which may want a server's worth of dependencies."""
    found = importlib.util.find_spec(name)
    package = types.ModuleType(name)
    package.__path__ = [str(Path(found.origin).parent)]
    sys.modules[name] = package


class Device:
    """One core of a target that is not here."""

    def __init__(self, target: str) -> None:
        # JAX leaves the path of its compiler to its children: without this, a parent's would be loaded here.
        os.environ["TPU_LIBRARY_PATH"] = libtpu.get_library_path()
        self.device = topologies.get_topology_desc(TARGETS[target][0], "tpu").devices[0]

    def shape(self, *dims: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(self.device))

    def mesh(self) -> AbstractMesh:
        """To trace under, so that the kernels see the target."""
        kind = self.device.device_kind
        abstract = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
        return AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=abstract)

    def compile(self, call: Callable[..., object], arguments: list[object], donate: tuple[int, ...]) -> None:
        """Compiles the call; what the compiler dumps is the result. Prints the line that names the compiler."""
        with jax.sharding.use_abstract_mesh(self.mesh()):
            lowered = (
                jax.jit(call, donate_argnums=donate, keep_unused=True)
                .trace(*arguments)
                .lower(lowering_platforms=("tpu",))
            )
        print(f"libtpu {importlib.metadata.version('libtpu')}", flush=True)
        lowered.compile()
