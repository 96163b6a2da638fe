"""The calls into JAX's runtime: bytes whose hash was checked become something that runs.

Two tiers, one interface. The executable goes straight to the device's client, with no pickle around it; the portable
export is traced and compiled here. Raises TargetError where the runtime refuses bytes that are what was built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import export
from jax.extend.backend import get_compile_options

from rpac.errors import BundleError, TargetError
from rpac.layout import index_of

if TYPE_CHECKING:
    from rpac.bundle import Program

# What a program returns: out, kv_cache, and what else its manifest says.
Results = tuple[jax.Array, ...]
Run = Callable[[Sequence[Any]], Results]
Traceable = Callable[..., Results]


def build_string(client: Any) -> str:
    """The build of the runtime behind a client, as an executable depends on it: on TPU, libtpu's date and change.

    A client at serving time and the compile-only one of a topology name themselves differently in the lines before.
    """
    return str(client.platform_version).splitlines()[-1]


def load_traceable(data: bytes, program: Program) -> Traceable:
    """An exported program as a function of its arguments that can be called inside jit; compiles nothing.

    Raises BundleError where the export is not of the manifest's shapes, TargetError where this jax cannot read it.
    """
    # Under a jit of its own, all the layers of a model share one copy of the program in the module that is compiled.
    traceable: Traceable = jax.jit(_exported(data, program).call)
    return traceable


def load_portable(data: bytes, program: Program, device: jax.Device) -> Run:
    """Compiles an exported program for `device`; takes the time of one XLA compile.

    Raises BundleError where the export is not of the manifest's shapes.
    """
    exported = _exported(data, program)
    try:
        sharding = jax.sharding.SingleDeviceSharding(device)
        donated = index_of(program.args, "kv_cache")
        call = jax.jit(exported.call, in_shardings=sharding, out_shardings=sharding, donate_argnums=donated)
        compiled = call.lower(*exported.in_avals).compile()
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise _unusable(program, f"compile its export for {device}", error) from error

    def run(args: Sequence[Any]) -> Results:
        return tuple(compiled(*args))

    return run


def load_native(data: bytes, program: Program, device: jax.Device) -> Run:
    """Hands an executable's raw bytes to `device`'s client; nothing is traced or compiled.

    Raises TargetError where the client does not take them.
    """
    # Without an assignment it would run on the device number that it was compiled for, whichever `device` is.
    options = get_compile_options(num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]]))
    try:
        loaded = device.client.deserialize_executable(data, [device], options)
    except jax.errors.JaxRuntimeError as error:
        raise TargetError(
            f"program {program.variant}: the runtime of {device} does not take its executable ({error}); "
            "build the bundle again for this device and runtime"
        ) from error

    def run(args: Sequence[Any]) -> Results:
        # Only what lies on the host is moved: the cache must be donated as the caller's own array.
        moved = iter(jax.device_put([arg for arg in args if not isinstance(arg, jax.Array)], device))
        results = loaded.execute_sharded([arg if isinstance(arg, jax.Array) else next(moved) for arg in args])
        return tuple(one for (one,) in results.disassemble_into_single_device_arrays())

    return run


def _exported(data: bytes, program: Program) -> export.Exported:
    try:
        exported = export.deserialize(bytearray(data))
        _check_version(exported)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise _unusable(program, "read its export", error) from error
    _check_signature(program, exported)
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


def _check_signature(program: Program, exported: export.Exported) -> None:
    wanted = [f"{dims.dtype}{list(dims.shape)}" for dims in (*program.args, *program.results)]
    found = [f"{aval.dtype.name}{list(aval.shape)}" for aval in (*exported.in_avals, *exported.out_avals)]
    if found != wanted:
        raise BundleError(
            f"program {program.variant}: its export takes and returns {', '.join(found)}; must be {', '.join(wanted)}, "
            "as the manifest says; build the bundle again"
        )
