"""One step of a bundle: its checked bytes until it is ready, then what runs it on flat arrays."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from rpac.batch import Limits
from rpac.contract.arrays import ArrayDims, metadata_specs
from rpac.contract.step import TOKEN_ARRAYS, StepArray, StepProgram, builder
from rpac.devices.placement import Placement, put
from rpac.engine.custom_calls import COMPILED_AWAY, refuse_custom_calls
from rpac.engine.events import ProgramReady, Recorder, Tier
from rpac.engine.prepared import Prepared
from rpac.engine.runtime import check_signature, compile_export, deserialized, on_devices, read_export
from rpac.engine.step_arguments import Leaves
from rpac.engine.watchdog import Watchdog

StepRun = Callable[[Sequence[jax.Array], Sequence[Any]], Sequence[jax.Array]]
"""The parameters' leaves, then the caches, the batch and the rest -> the caches, then the outputs."""


def batch_arrays(limits: Limits, tokens: int, placement: Placement) -> tuple[StepArray, ...]:
    """What a step takes of a batch, of all devices: the tokens, their positions and the metadata."""
    own = (*(ArrayDims(name, (tokens,), "int32") for name in TOKEN_ARRAYS), *metadata_specs(limits))
    return tuple(StepArray.of(dims, placement.mesh) for dims in own)


class StepSlot(Prepared[StepRun]):
    """A step, which is loaded once.

    `arguments` are the arrays that it takes after the parameters: the caches, and `rest`, which is the batch and then `extra`.
    """

    def __init__(
        self,
        program: StepProgram,
        params: Sequence[StepArray],
        caches: Sequence[StepArray],
        limits: Limits,
        blobs: Mapping[str, bytes],
        placement: Placement,
        use_executable: bool,
        recorder: Recorder,
        watchdog: Watchdog | None = None,
    ) -> None:
        super().__init__(program.variant, f"step {program.variant}", placement, recorder)
        self.program = program
        batch = batch_arrays(limits, program.variant.tokens, placement)
        self.arguments = (*caches, *batch, *program.signature.extra)
        self.extra = Leaves("extra", program.signature.extra, placement)
        self.rest = Leaves("batch", (*batch, *program.signature.extra), placement)
        self.outputs = builder(program.signature.outputs_tree)
        self._params = params
        self._caches = caches
        self._results = (*caches, *program.signature.outputs)
        self._watchdog = watchdog
        self._exported = blobs[program.exported.sha256]
        self._executable = blobs[program.executable.sha256] if use_executable and program.executable else None

    def portable(self) -> StepRun:
        """What runs the step's portable export, compiled here. Raises BundleError or TargetError for one that is of no use."""
        exported = read_export(self._exported, self.what)
        arrays = (*self._params, *self.arguments, *self._results)
        check_signature(self.what, exported, [(one.dtype, one.shape) for one in arrays])
        refuse_custom_calls(self.what, exported, COMPILED_AWAY)
        taken, made = (
            [self._placement.cut(one.cuts) for one in part]
            for part in ((*self._params, *self.arguments), self._results)
        )
        first = len(self._params)
        donated = range(first, first + len(self._caches))
        compiled = compile_export(self.what, exported, taken, made, donated, self._placement)
        rest_taken = taken[first:]
        if all(sharding.is_fully_addressable for sharding in rest_taken):
            return lambda params, rest: list(compiled(*params, *rest))

        def run(params: Sequence[jax.Array], rest: Sequence[Any]) -> list[jax.Array]:
            # For devices of several processes a compiled program takes no arrays of the host.
            placed = (
                one if isinstance(one, jax.Array) else put(one, to) for one, to in zip(rest, rest_taken, strict=True)
            )
            return list(compiled(*params, *placed))

        return run

    def _load(self) -> tuple[StepRun, ProgramReady]:
        start = time.perf_counter()
        data = self._exported if self._executable is None else self._executable
        tier: Tier = "portable" if self._executable is None else "executable"
        run = self.portable() if self._executable is None else self._native(data)
        if self._watchdog is not None:
            run = self._watchdog.watched(
                self.program.variant, run, which=-1
            )  # the first ones are caches, which are donated
        self._executable = None  # tens of megabytes, which the runtime has now
        return run, ProgramReady(self.program.variant, tier, len(data), time.perf_counter() - start)

    def _native(self, data: bytes) -> StepRun:
        """Hands the executable's bytes to the client of the devices; nothing is traced or compiled."""
        loaded = deserialized(data, self.what, self._placement)
        shardings = [self._placement.cut(one.cuts) for one in self.arguments]
        joiners = [self._placement.joiner_of(one.shape, one.cuts) for one in self._results]

        def run(params: Sequence[jax.Array], rest: Sequence[Any]) -> list[jax.Array]:
            results = loaded.execute_sharded([*params, *on_devices(rest, shardings)])
            parts = results.disassemble_into_single_device_arrays()
            return [join(part) for join, part in zip(joiners, parts, strict=True)]

        return run
