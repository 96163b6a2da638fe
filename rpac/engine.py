"""Loads a bundle, picks the program for each batch, runs it, and counts what ran.

Nothing here knows specs, templates or kernels' sources. A program is made ready at its first use or by `warm`:
a TPU executable by handing its bytes to the runtime, a portable program by one XLA compile.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import jax
import numpy as np

from rpac.batch import Limits
from rpac.batch import validate as validate_metadata
from rpac.batch.kind import Int32s
from rpac.bundle import Dims, LoadedTarget, Manifest, Program, Target, Variant, read_target
from rpac.errors import BatchError, TargetError
from rpac.layout import ArrayDims
from rpac.runtime import KV_CACHE_ARG, Run, build_string, load_native, load_portable
from rpac.select import select

_LOG = logging.getLogger("rpac")


@dataclass(frozen=True)
class Count:
    """What one program did: calls, live sequences, their new tokens, and rows of queries that were padding."""

    calls: int = 0
    rows: int = 0
    tokens: int = 0
    padding: int = 0


def load(
    path: str | os.PathLike[str],
    target: str | None = None,
    *,
    device: jax.Device | None = None,
    allow_compile: bool = False,
) -> Engine:
    """The engine of the bundle at `path` for one device, by default this process's first (`target="cpu"`: its CPU).

    `target` is by default the one built for exactly this kind of device. Reads and hashes the bytes of all its
    programs; none is deserialized before its hash, the device kind and the libtpu build match. `allow_compile=True`
    lets a TPU target whose executables do not fit this libtpu compile its portable programs instead, and logs that.
    Raises BundleError, or TargetError naming what the bundle has and what was found.
    """
    device = _first_device(target) if device is None else device
    loaded = read_target(path, partial(_choose, os.fspath(path), target, device))
    return Engine(loaded, device, _use_executables(os.fspath(path), loaded.target, device, allow_compile))


class Engine:
    """The programs of one target on one device; made by `load`. Safe to call from several threads."""

    def __init__(self, loaded: LoadedTarget, device: jax.Device, use_executables: bool) -> None:
        self.name: str = loaded.manifest.name
        self.model: Dims = loaded.manifest.model
        self.kv_layout: str = loaded.manifest.kv_layout
        self.limits: Limits = loaded.manifest.limits
        self.target: str = loaded.target.name
        self.device = device
        self._slots = {
            program.variant: _Slot(program, self.kv_layout, loaded.blobs, device, use_executables)
            for program in loaded.target.programs
        }
        self._counts: dict[Variant, Count] = {}
        self._counting = threading.Lock()

    @property
    def programs(self) -> Mapping[Variant, Program]:
        """What the bundle says of each variant that this engine can run."""
        return {variant: slot.program for variant, slot in self._slots.items()}

    @property
    def counts(self) -> Mapping[Variant, Count]:
        """What ran so far, by variant; those that never ran are absent."""
        with self._counting:
            return dict(self._counts)

    def select(self, tokens: int, distribution: Sequence[int] | Int32s) -> Variant:
        """The variant that runs a batch; `rpac.select.select` over what this engine holds."""
        return select(self._slots, self.limits, tokens, distribution)

    def warm(self, variants: Iterable[Variant] | None = None) -> None:
        """Makes programs ready now, all by default, several at once; after it a call to them compiles nothing."""
        slots = [self._slots[variant] for variant in (self._slots if variants is None else variants)]
        with ThreadPoolExecutor() as pool:
            for ready in [pool.submit(slot.ready) for slot in slots]:
                ready.result()

    def __call__(
        self,
        queries: Any,
        keys: Any,
        values: Any,
        kv_cache: Any,
        kv_lens: Any,
        page_indices: Any,
        cu_q_lens: Any,
        distribution: Any,
        *,
        validate: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs one batch: `(out, kv_cache)`, shapes and dtypes as in the batch contract (`rpac.layout`).

        `kv_cache` is a jax array on this engine's device; it is donated, use the one returned. The others are jax
        arrays there, or numpy arrays. Metadata is read on the host: give it as numpy, because an array on a TPU is
        waited for and copied back first. `validate=False` leaves out the check of the metadata's values, for callers
        that built it with `rpac.Batch`; shapes, dtypes and devices are always checked.

        Rows of `out` past cu_q_lens[k] are padding and hold anything. Raises BatchError, or SelectionError with the
        spec lines that would add the batch; `kv_cache` is then still the caller's.
        """
        tokens = self._tokens(queries)
        metadata = (kv_lens, page_indices, cu_q_lens, distribution)
        ends, parts = np.asarray(cu_q_lens), np.asarray(distribution)
        if validate:
            validate_metadata(self.limits, tokens, np.asarray(kv_lens), np.asarray(page_indices), ends, parts)
        elif parts.shape != (3,):
            _refuse(ArrayDims("distribution", (3,), "int32"), distribution)
        variant = self.select(tokens, parts)
        slot = self._slots[variant]
        args = (queries, keys, values, kv_cache, *metadata)
        slot.check(args)
        result = slot.ready()(args)
        self._count(variant, rows=int(parts[2]), tokens=int(ends[parts[2]]))
        return result

    def _tokens(self, queries: Any) -> int:
        if isinstance(queries, jax.core.Tracer):
            raise BatchError(
                "queries are traced; must be arrays with values: the program is chosen on the host; "
                "call the engine outside jit"
            )
        if len(getattr(queries, "shape", ())) != 3:
            shape = f"[tokens, {self.model.q_heads}, {self.model.head_dim}]"
            raise BatchError(f"queries are {_shown(queries)}; must be {self.model.q_dtype}{shape}; reshape them")
        return int(queries.shape[0])

    def _count(self, variant: Variant, rows: int, tokens: int) -> None:
        with self._counting:
            old = self._counts.get(variant, Count())
            padding = old.padding + variant.tokens - tokens
            self._counts[variant] = Count(old.calls + 1, old.rows + rows, old.tokens + tokens, padding)


class _Slot:
    """One program: its checked bytes until it is ready, then what runs it."""

    def __init__(
        self, program: Program, kv_layout: str, blobs: Mapping[str, bytes], device: jax.Device, use_executable: bool
    ) -> None:
        self.program = program
        self._kv_layout = kv_layout
        self._device = device
        if use_executable and program.executable is not None:
            self._load = partial(load_native, blobs[program.executable.sha256], program, device)
        else:
            self._load = partial(load_portable, blobs[program.exported.sha256], program, device)
        self._expected = [(dims, jax.numpy.dtype(dims.dtype)) for dims in program.args]
        self._run: Run | None = None
        self._loading = threading.Lock()

    def ready(self) -> Run:
        """What runs the program; loads or compiles it the first time."""
        if self._run is None:
            with self._loading:
                if self._run is None:
                    self._run = self._load()
        return self._run

    def check(self, args: Sequence[Any]) -> None:
        """Raises BatchError for the first argument that is not what the program takes."""
        for (dims, dtype), arg in zip(self._expected, args, strict=True):
            if getattr(arg, "shape", None) != dims.shape or getattr(arg, "dtype", None) != dtype:
                _refuse(dims, arg, f", kv_layout {self._kv_layout}" if dims.name == "kv_cache" else "")
            if isinstance(arg, jax.Array):
                self._check_placed(dims, arg)
        cache = args[KV_CACHE_ARG]
        if not isinstance(cache, jax.Array):
            raise BatchError(
                f"kv_cache is a {type(cache).__name__}; must be a jax array on {self._device}, because it is donated; "
                "put it there once with jax.device_put"
            )

    def _check_placed(self, dims: ArrayDims, array: jax.Array) -> None:
        if array.is_deleted():
            raise BatchError(
                f"{dims.name} was deleted or donated; must hold values; "
                "pass on the kv_cache that the last call returned"
            )
        if array.devices() != {self._device}:
            found = ", ".join(sorted(map(str, array.devices())))
            raise BatchError(f"{dims.name} is on {found}; must be on {self._device}; move it with jax.device_put")


def _refuse(dims: ArrayDims, found: Any, note: str = "") -> NoReturn:
    wanted = f"{dims.dtype}{list(dims.shape)}{note}"
    raise BatchError(f"{dims.name} is {_shown(found)}; must be {wanted}; see the batch contract")


def _shown(array: Any) -> str:
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    return f"a {type(array).__name__}" if shape is None else f"{dtype}{list(shape)}"


def _first_device(target: str | None) -> jax.Device:
    platform = "cpu" if target == "cpu" else None
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError as error:
        wanted = "a CPU" if platform else "any device"
        raise TargetError(
            f"JAX does not find {wanted} ({error}); check JAX_PLATFORMS and what it has installed"
        ) from error


def _choose(path: str, target: str | None, device: jax.Device, manifest: Manifest) -> Target:
    kind = device.device_kind
    fitting = [one for one in manifest.targets.values() if one.device_kind == kind and target in (None, one.name)]
    if fitting:
        return fitting[0]
    has = ", ".join(f"{one.name} ({one.device_kind})" for one in manifest.targets.values())
    asked = "" if target is None else f"target {target!r} and "
    raise TargetError(
        f"{path}: found {asked}device {device} of kind {kind!r}; the bundle has {has}; "
        "load a target of this device's kind, or build one"
    )


def _use_executables(path: str, target: Target, device: jax.Device, allow_compile: bool) -> bool:
    """Whether the executables run here. Raises TargetError where they do not and nothing else may."""
    without = [str(program.variant) for program in target.programs if program.executable is None]
    built, found = target.toolchain.get("libtpu_build"), build_string(device.client)
    if without and device.platform == "cpu":
        return False  # a CPU target has the portable tier alone
    if without:
        why = f"holds no executable of {', '.join(without)}; must hold one of every program; build it again"
    elif built != found:
        version = target.toolchain.get("libtpu", "of that build")
        why = (
            f"was compiled by libtpu build {built!r}; this process has {found!r}; must be the same; "
            f"install libtpu {version}, build the bundle with this one"
        )
    else:
        return True
    if not allow_compile:
        raise TargetError(
            f"{path}: target {target.name} {why}, or compile its portable programs here with allow_compile=True"
        )
    _LOG.warning("%s: target %s %s; compiling its portable programs (allow_compile)", path, target.name, why)
    return False
