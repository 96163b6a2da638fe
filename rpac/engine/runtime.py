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

from rpac.contract.arrays import index_of
from rpac.contract.mesh import Mesh
from rpac.contract.program import Program
from rpac.devices.placement import Placement, put
from rpac.engine.custom_calls import refuse_custom_calls
from rpac.errors import BundleError, TargetError

# What a program returns: out, kv_cache, and what else its manifest says.
Results = tuple[jax.Array, ...]
Run = Callable[[Sequence[Any]], Results]
Traceable = Callable[..., Results]


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
    try:
        taken, made = (tuple(placement.sharding(dims) for dims in part) for part in (program.args, program.results))
        donated = index_of(program.args, "kv_cache")
        call = jax.jit(exported.call, in_shardings=taken, out_shardings=made, donate_argnums=donated)
        compiled = call.lower(*exported.in_avals).compile()
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise _unusable(program, f"compile its export for {placement}", error) from error

    if all(sharding.is_fully_addressable for sharding in taken):
        return lambda args: tuple(compiled(*args))

    def run(args: Sequence[Any]) -> Results:
        # For devices of several processes a compiled program takes no arrays of the host.
        placed = (arg if isinstance(arg, jax.Array) else put(arg, to) for arg, to in zip(args, taken, strict=True))
        return tuple(compiled(*placed))

    return run


def load_native(data: bytes, program: Program, placement: Placement) -> Run:
    """Hands an executable's raw bytes to the client of its devices; nothing is traced or compiled.

    Raises TargetError where the client does not take them.
    """
    # Without an assignment it would run on the device numbers that it was compiled for, whichever these are.
    ids = np.array([[device.id for device in placement.devices]])
    options = get_compile_options(num_replicas=1, num_partitions=ids.size, device_assignment=ids)
    try:
        loaded = placement.devices[0].client.deserialize_executable(data, list(placement.devices), options)
    except jax.errors.JaxRuntimeError as error:
        raise TargetError(
            f"program {program.variant}: the runtime of {placement} does not take its executable ({error}); "
            "build the bundle again for these devices and this runtime"
        ) from error
    shardings = [placement.sharding(dims) for dims in program.args]
    joiners = [placement.joiner(dims) for dims in program.results]
    here = all(sharding.is_fully_addressable for sharding in shardings)

    def run(args: Sequence[Any]) -> Results:
        # Only what lies on the host is moved: the cache must be donated as the caller's own array.
        there = [isinstance(arg, jax.Array) for arg in args]
        hosted = [(arg, to) for arg, to, known in zip(args, shardings, there, strict=True) if not known]
        if here:
            moved = iter(jax.device_put([arg for arg, _ in hosted], [to for _, to in hosted]))
        else:
            moved = iter([put(arg, to) for arg, to in hosted])
        results = loaded.execute_sharded(
            [arg if known else next(moved) for arg, known in zip(args, there, strict=True)]
        )
        parts = results.disassemble_into_single_device_arrays()
        return tuple(join(part) for join, part in zip(joiners, parts, strict=True))

    return run


def _exported(data: bytes, program: Program, mesh: Mesh) -> export.Exported:
    try:
        exported = export.deserialize(bytearray(data))
        _check_version(exported)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise _unusable(program, "read its export", error) from error
    _check_signature(program, exported, mesh)
    refuse_custom_calls(f"program {program.variant}", exported)
    return exported


def _unusable(program: Program, what: str, error: Exception) -> TargetError:
    return TargetError(
        f"program {program.variant}: jax {jax.__version__} cannot {what} ({error}); "
        "build the bundle again with this jax, or serve with the jax that built it"
    )


def _check_version(exported: export.Exported) -> None:
    """What JAX checks when it exports, and not when it reads."""
    low = export.minimum_supported_calling_convention_version
    high = export.maximum_supported_calling_convention_version
    found = exported.calling_convention_version
    if not low <= found <= high:
        raise ValueError(f"found calling convention {found}; must be {low} to {high}")


def _check_signature(program: Program, exported: export.Exported, mesh: Mesh) -> None:
    wanted = [f"{dims.dtype}{list(dims.shape)}" for dims in map(mesh.whole, (*program.args, *program.results))]
    found = [f"{aval.dtype.name}{list(aval.shape)}" for aval in (*exported.in_avals, *exported.out_avals)]
    if found != wanted:
        raise BundleError(
            f"program {program.variant}: its export takes and returns {', '.join(found)}; must be {', '.join(wanted)}, "
            "as the manifest says; build the bundle again"
        )
