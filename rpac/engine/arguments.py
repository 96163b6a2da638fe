"""Holds the arguments of a call against what its program takes: shapes, dtypes, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax

from rpac.batch import Batch, SequenceView
from rpac.contract.arrays import ArrayDims, index_of
from rpac.contract.features import ARGUMENTS
from rpac.contract.program import Program
from rpac.devices.placement import Placement, listed
from rpac.engine.donation import deleted
from rpac.errors import BatchError

_SPEC_LINES = {one.name: one.spec_lines for one in ARGUMENTS}  # what a spec says for a program to take it


class Arguments:
    """What a program takes, and where: on its devices, in the order of its own device assignment."""

    def __init__(self, program: Program, kv_layout: str, placement: Placement) -> None:
        self._expected = [(placement.mesh.whole(dims), jax.numpy.dtype(dims.dtype)) for dims in program.args]
        self._shardings = [placement.sharding(dims) for dims in program.args]
        self._cache_index = index_of(program.args, "kv_cache")
        self._kv_layout = kv_layout
        self._placement = placement

    def check(self, args: Sequence[Any]) -> None:
        """Raises BatchError for the first argument that is not what the program takes."""
        self.check_shapes(args)
        for (dims, _), wanted, arg in zip(self._expected, self._shardings, args, strict=True):
            if isinstance(arg, jax.Array):
                check_placed(dims.name, wanted, arg, self._placement)
        self._check_donated(args[self._cache_index])

    def check_cache(self, cache: Any) -> None:
        """As `check`, of the cache alone."""
        dims, dtype = self._expected[self._cache_index]
        self._check_array(dims, dtype, cache)
        self._check_donated(cache)
        check_placed(dims.name, self._shardings[self._cache_index], cache, self._placement)

    def _check_donated(self, cache: Any) -> None:
        if not isinstance(cache, jax.Array):
            raise BatchError(
                f"kv_cache is a {type(cache).__name__}; must be a jax array on {self._placement}, because it is donated; "
                "start with engine.new_cache(), then pass on the one that each call returns"
            )

    def check_shapes(self, args: Sequence[Any]) -> None:
        """As `check`, of shapes and dtypes alone: all that is known of a traced argument."""
        for (dims, dtype), arg in zip(self._expected, args, strict=True):
            self._check_array(dims, dtype, arg)

    def _check_array(self, dims: ArrayDims, dtype: Any, arg: Any) -> None:
        if getattr(arg, "shape", None) != dims.shape or getattr(arg, "dtype", None) != dtype:
            refuse(dims, arg, f", kv_layout {self._kv_layout}" if dims.name == "kv_cache" else "")


def check_placed(
    name: str, wanted: jax.sharding.Sharding, array: jax.Array, placement: Placement, fix: str = ""
) -> None:
    """Raises BatchError for an array that was deleted, or does not lie on the devices of `placement` as `wanted`.

    `fix`: what to do about another sharding; by default for an argument of a program's call.
    """
    if array.is_deleted():
        raise deleted(name)
    if device_order(array.sharding) != placement.devices:
        found = device_order(array.sharding) or sorted(array.devices(), key=lambda device: device.id)
        raise BatchError(f"{name} is on {listed(found)}; must be on {placement}; move it with jax.device_put")
    if len(placement.devices) > 1 and not array.sharding.is_equivalent_to(wanted, array.ndim):
        fix = fix or f'put it into engine.sharding("{name}")'
        raise BatchError(f"{name} is sharded as {array.sharding}; must be as {wanted}; {fix}")


def in_order(taken: Sequence[ArrayDims], args: Sequence[Any], extra: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call in the order in which its program takes them: `args`, then those by name.

    One by name that is None is as if it were not given. Raises BatchError for one that is missing, unknown or given twice.
    """
    for dims, array in zip(taken, args, strict=False):
        if isinstance(array, (Batch, SequenceView)):
            raise BatchError(
                f"{dims.name} is a {type(array).__name__}; must be {dims.dtype}{list(dims.shape)}; pass the arrays of the batch: "
                "engine(..., *batch.metadata)"
            )
    if not extra and len(args) == len(taken):  # most calls
        return tuple(args)
    given = {name: value for name, value in extra.items() if value is not None}
    if len(args) > len(taken):
        takes = ", ".join(dims.name for dims in taken)
        raise BatchError(f"found {len(args)} arguments; must be {takes}; leave out the rest")
    names = [dims.name for dims in taken[len(args) :]]
    for name in given:
        if name not in names:
            takes = ", ".join(dims.name for dims in taken)
            build = f", or build with\n{_SPEC_LINES[name]}" if name in _SPEC_LINES else ""
            raise BatchError(
                f"{name} is not an argument of this bundle's programs, which take {takes}; leave it out{build}"
            )
    for dims in taken[len(args) :]:
        if dims.name not in given:
            why = (
                f", as this bundle's spec has `{_SPEC_LINES[dims.name].split()[1]}`" if dims.name in _SPEC_LINES else ""
            )
            raise BatchError(
                f"{dims.name} is not given; must be {dims.dtype}{list(dims.shape)}{why}; pass it by name: {dims.name}=..."
            )
    return (*args, *(given[name] for name in names))


def device_order(sharding: jax.sharding.Sharding) -> tuple[jax.Device, ...] | None:
    """The devices of an array in the order of its parts, which for a mesh is the mesh's; None where it is not known."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return tuple(sharding.mesh.devices.flat)
    return tuple(sharding.device_set) if len(sharding.device_set) == 1 else None


def refuse(dims: ArrayDims, found: Any, note: str = "") -> NoReturn:
    """Raises the BatchError for an argument of another shape or dtype."""
    wanted = f"{dims.dtype}{list(dims.shape)}{note}"
    raise BatchError(f"{dims.name} is {shown(found)}; must be {wanted}; see docs/batch-contract.md")


def shown(array: Any) -> str:
    """The dtype and shape of an argument, or what it is instead of an array."""
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    return f"a {type(array).__name__}" if shape is None else f"{dtype}{list(shape)}"
