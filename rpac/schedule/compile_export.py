"""Child process of `dump.py`: compiles one serialized export for one target, and says by which libtpu.

python -m rpac.schedule.compile_export FILE TARGET DONATED_ARGUMENTS_AS_JSON
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import jax
from jax.experimental import topologies

from rpac.devices.chip import chip


def main(path: str, target: str, donated: str) -> None:
    """Compiles the export at `path`; the compiler's dump is the result."""
    exported = jax.export.deserialize(bytearray(Path(path).read_bytes()))
    device = topologies.get_topology_desc(chip(target).topology, "tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    shape = jax.ShapeDtypeStruct
    arguments = [shape(a.shape, a.dtype, sharding=sharding) for a in exported.in_avals]
    print(f"libtpu {importlib.metadata.version('libtpu')}", flush=True)
    call = jax.jit(exported.call, donate_argnums=tuple(json.loads(donated)))
    call.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


if __name__ == "__main__":
    main(*sys.argv[1:])
