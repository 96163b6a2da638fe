"""Where the arrays of a program lie: on one device, or cut into parts on the devices of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from rpac.contract.arrays import ArrayDims, Shape
from rpac.contract.mesh import AXES, Cut, Mesh


class Placement:
    """The devices of a program, in the order of its mesh, and what lies where."""

    def __init__(self, mesh: Mesh, devices: Sequence[jax.Device]) -> None:
        self.mesh = mesh
        self.devices = tuple(devices)
        if len(self.devices) > 1:
            self._devices = jax.sharding.Mesh(np.array(self.devices).reshape(_sizes(mesh)), AXES, axis_types=_TYPES)

    def __str__(self) -> str:
        return listed(self.devices)

    def sharding(self, dims: ArrayDims) -> jax.sharding.Sharding:
        """Of an argument or a result of a program."""
        return self.cut(self.mesh.cuts(dims))

    def cut(self, cuts: Sequence[Cut]) -> jax.sharding.Sharding:
        """Of an array that is cut so along its axes; one without an entry is whole."""
        if len(self.devices) == 1:
            return jax.sharding.SingleDeviceSharding(self.devices[0])
        return NamedSharding(self._devices, PartitionSpec(*(cut or None for cut in cuts)))

    @property
    def local(self) -> tuple[jax.Device, ...]:
        """Those of the devices that belong to this process, where a mesh is spread over several."""
        here = self.devices[0].client.process_index()
        return tuple(device for device in self.devices if device.process_index == here)

    def repeat(self, dims: ArrayDims, part: NDArray[Any]) -> NDArray[Any]:
        """The whole array in which every device's part is `part`."""
        return np.tile(part, self.mesh.repeats(dims)) if len(self.devices) > 1 else part

    def joiner(self, dims: ArrayDims) -> Callable[[Sequence[jax.Array]], jax.Array]:
        """What makes the whole array of one part on each device of this process, in their order; nothing is copied."""
        return self.joiner_of(self.mesh.whole(dims).shape, self.mesh.cuts(dims))

    def joiner_of(self, shape: Shape, cuts: Sequence[Cut]) -> Callable[[Sequence[jax.Array]], jax.Array]:
        """As `joiner`, of a whole array of this shape that is cut so."""
        if len(self.devices) == 1:
            return lambda parts: parts[0]
        sharding = self.cut(cuts)
        return lambda parts: jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

    def parts(self, array: jax.Array) -> list[jax.Array]:
        """The parts of an array that lie on this process's devices, in the order of these."""
        found = {shard.device: shard.data for shard in array.addressable_shards}
        return [found[device] for device in self.local]


def put(array: NDArray[Any], sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of the host where a program takes it. Of several processes each gives the same whole array."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # Not device_put, which would compare the processes' arrays in every call.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def listed(devices: Sequence[jax.Device]) -> str:
    """Devices by name, for messages."""
    return ", ".join(map(str, devices)) + " in this device order" * (len(devices) > 1)


_TYPES = (AxisType.Auto,) * len(AXES)


def partition(mesh: Mesh, dims: ArrayDims) -> PartitionSpec:
    """How an argument or a result is cut, as JAX says it."""
    return PartitionSpec(*(cut or None for cut in mesh.cuts(dims)))


def on_mesh(
    program: Callable[..., Any],
    mesh: Mesh,
    args: Sequence[ArrayDims],
    results: Sequence[ArrayDims],
    devices: Sequence[Any] = (),
) -> tuple[Callable[..., Any], list[jax.sharding.Sharding | None]]:
    """A program of one device's part as one of whole arrays, with the shardings of its arguments.

    `devices`: those that it is compiled for; without them it is for any.
    """
    if mesh.devices == 1:
        one = jax.sharding.SingleDeviceSharding(devices[0]) if devices else None
        return program, [one for _ in args]
    of_devices = (
        jax.sharding.Mesh(np.array(devices[: mesh.devices]).reshape(_sizes(mesh)), AXES, axis_types=_TYPES)
        if devices
        else AbstractMesh(_sizes(mesh), AXES, axis_types=_TYPES)
    )
    spread = jax.shard_map(
        program,
        mesh=of_devices,
        in_specs=tuple(partition(mesh, dims) for dims in args),
        out_specs=tuple(partition(mesh, dims) for dims in results),
        check_vma=False,  # of a kernel nothing is known
    )
    return spread, [NamedSharding(of_devices, partition(mesh, dims)) for dims in args]


def _sizes(mesh: Mesh) -> tuple[int, ...]:
    return tuple(getattr(mesh, axis) for axis in AXES)
