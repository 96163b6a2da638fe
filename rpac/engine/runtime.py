"""The calls into JAX's runtime: bytes whose hash was checked become something that runs.

Two tiers, one interface. The executable goes straight to the device's client, with no pickle around it; the portable
export is traced and compiled here. Raises TargetError where the runtime refuses bytes that are what was built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.extend.backend import get_compile_options

from rpac.contract.arrays import Shape, index_of
from rpac.contract.mesh import Mesh
from rpac.contract.program import Program
from rpac.devices.placement import Placement, put
from rpac.engine.custom_calls import refuse_custom_calls
from rpac.errors import BundleError, TargetError

# What a program returns: out, kv_cache, and what else its manifest says.
Results = tuple[jax.Array, ...]
Run = Callable[[Sequence[Any]], Results]
Traceable = Callable[..., Results]

SHOWN_ARRAYS = 20  # of a signature in a message


def load_traceable(data: bytes, program: Program, mesh: Mesh) -> Traceable:
    """An exported program as a function of its arguments that can be called inside jit; compiles nothing.

    Raises BundleError where the export is not of the manifest's shapes or calls what no program needs, TargetError where this
    jax cannot read it.
    """
    # Under a jit of its own, all the layers of a model share one copy of the program in the module that is compiled.
    traceable: Traceable = jax.jit(_exported(data, program, mesh).call)
    return traceable


def load_portable(data: bytes, program: Program, placement: Placement) -> Run:
    """Compiles an exported program for its devices; takes the time of one XLA compile.

    Raises BundleError where the export is not of the manifest's shapes or calls what no program needs.
    """
    exported = _exported(data, program, placement.mesh)
    taken, made = (tuple(placement.sharding(dims) for dims in part) for part in (program.args, program.results))
    donated = [index_of(program.args, "kv_cache")]
    compiled = compile_export(f"program {program.variant}", exported, taken, made, donated, placement)

    if all(sharding.is_fully_addressable for sharding in taken):
        return lambda args: tuple(compiled(*args))

    def run(args: Sequence[Any]) -> Results:
        # For devices of several processes a compiled program takes no arrays of the host.
        placed = (arg if isinstance(arg, jax.Array) else put(arg, to) for arg, to in zip(args, taken, strict=True))
        return tuple(compiled(*placed))

    return run


def compile_export(
    what: str,
    exported: export.Exported,
    taken: Sequence[jax.sharding.Sharding],
    made: Sequence[jax.sharding.Sharding],
    donated: Sequence[int],
    placement: Placement,
) -> Callable[..., Any]:
    """An export, compiled for its devices. `what` it is, for messages. Raises TargetError."""
    try:
        call = jax.jit(
            exported.call, in_shardings=tuple(taken), out_shardings=tuple(made), donate_argnums=tuple(donated)
        )
        compiled: Callable[..., Any] = call.lower(*exported.in_avals).compile()
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise unusable(what, f"compile its export for {placement}", error) from error
    return compiled


def load_native(data: bytes, program: Program, placement: Placement) -> Run:
    """Hands an executable's raw bytes to the client of its devices; nothing is traced or compiled.

    Raises TargetError where the client does not take them.
    """
    loaded = deserialized(data, f"program {program.variant}", placement)
    shardings = [placement.sharding(dims) for dims in program.args]
    joiners = [placement.joiner(dims) for dims in program.results]

    def run(args: Sequence[Any]) -> Results:
        # Only what lies on the host is moved: the cache must be donated as the caller's own array.
        results = loaded.execute_sharded(on_devices(args, shardings))
        parts = results.disassemble_into_single_device_arrays()
        return tuple(join(part) for join, part in zip(joiners, parts, strict=True))

    return run


def deserialized(data: bytes, what: str, placement: Placement) -> Any:
    """The runtime's own object of an executable's bytes. Raises TargetError where it does not take them."""
    # Without an assignment it would run on the device numbers that it was compiled for, whichever these are.
    ids = np.array([[device.id for device in placement.devices]])
    options = get_compile_options(num_replicas=1, num_partitions=ids.size, device_assignment=ids)
    try:
        return placement.devices[0].client.deserialize_executable(data, list(placement.devices), options)
    except jax.errors.JaxRuntimeError as error:
        raise TargetError(
            f"{what}: the runtime of {placement} does not take its executable ({error}); "
            "build the bundle again for these devices and this runtime"
        ) from error


def on_devices(arrays: Sequence[Any], shardings: Sequence[jax.sharding.Sharding]) -> list[jax.Array]:
    """The arrays, those of the host moved to where they belong; the others as they are."""
    there = [isinstance(array, jax.Array) for array in arrays]
    hosted = [(array, to) for array, to, known in zip(arrays, shardings, there, strict=True) if not known]
    if all(sharding.is_fully_addressable for _, sharding in hosted):
        moved = iter(jax.device_put([array for array, _ in hosted], [to for _, to in hosted]))
    else:
        moved = iter([put(array, to) for array, to in hosted])
    return [array if known else next(moved) for array, known in zip(arrays, there, strict=True)]


def read_export(data: bytes, what: str) -> export.Exported:
    """An export that this jax can read. Raises TargetError."""
    try:
        exported = export.deserialize(bytearray(data))
        _check_version(exported)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise unusable(what, "read its export", error) from error
    return exported


def _exported(data: bytes, program: Program, mesh: Mesh) -> export.Exported:
    what = f"program {program.variant}"
    exported = read_export(data, what)
    wanted = [(dims.dtype, dims.shape) for dims in map(mesh.whole, (*program.args, *program.results))]
    check_signature(what, exported, wanted)
    refuse_custom_calls(what, exported)
    return exported


def unusable(what: str, do: str, error: Exception) -> TargetError:
    """The error for an export that this jax cannot use."""
    return TargetError(
        f"{what}: jax {jax.__version__} cannot {do} ({error}); "
        "build the bundle again with this jax, or serve with the jax that built it"
    )


def _check_version(exported: export.Exported) -> None:
    """What JAX checks when it exports, and not when it reads."""
    low = export.minimum_supported_calling_convention_version
    high = export.maximum_supported_calling_convention_version
    found = exported.calling_convention_version
    if not low <= found <= high:
        raise ValueError(f"found calling convention {found}; must be {low} to {high}")


def check_signature(what: str, exported: export.Exported, arrays: Sequence[tuple[str, Shape]]) -> None:
    """Raises BundleError where an export does not take and return these arrays, each a dtype and a whole shape."""
    wanted = [f"{dtype}{list(shape)}" for dtype, shape in arrays]
    found = [f"{aval.dtype.name}{list(aval.shape)}" for aval in (*exported.in_avals, *exported.out_avals)]
    if found != wanted:
        at = next((index for index, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), -1)
        short = len(wanted) <= SHOWN_ARRAYS
        takes, must = (
            ", ".join(one) if short else f"{len(one)} arrays, number {at} {one[at]}" for one in (found, wanted)
        )
        raise BundleError(
            f"{what}: its export takes and returns {takes}; must be {must}, as the manifest says; build the bundle again"
        )
