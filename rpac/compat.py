"""What differs between the versions of JAX that are supported (0.10.1 to 0.12), and what JAX keeps private."""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax
from jax._src.mesh import AbstractDevice
from jax.sharding import AbstractMesh, AxisType


def target_mesh(device_kind: str) -> AbstractContextManager[object]:
    """Within it, Pallas lowers for TensorCores of `device_kind`, although no such device is there."""
    # v6e's lowering refuses other axis types.
    device = AbstractDevice(device_kind=device_kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
