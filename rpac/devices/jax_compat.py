"""What differs between the versions of JAX that are supported (0.10.1 to 0.12), and what JAX keeps private."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax._src import dispatch, source_info_util
from jax._src.mesh import AbstractDevice
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret import race_detection_state
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType
from numpy.typing import NDArray


def target_mesh(device_kind: str) -> AbstractContextManager[object]:
    """Within it, Pallas lowers for TensorCores of `device_kind`, although no such device is there."""
    # v6e's lowering refuses other axis types.
    device = AbstractDevice(device_kind=device_kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    context: AbstractContextManager[object] = jax.sharding.use_abstract_mesh(mesh)
    return context


def place_of_equation(equation: Any) -> str:
    """The file, line and function of the user's code that an equation of a jaxpr comes from."""
    return str(source_info_util.summarize(equation.source_info))


def interpret_params() -> pltpu.InterpretParams:
    """How kernels are checked: memory nobody wrote is NaN, reads out of bounds raise, races are looked for."""
    known = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    # JAX gives each DMA one of this many clocks by chance; two DMAs that share one are taken to be ordered.
    # From 0.11 a race raises, unless told to warn, which ends the run before its results can be compared.
    wanted = {"vector_clock_size": 16, "on_race": "warn"}
    return pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        **{name: value for name, value in wanted.items() if name in known},
    )


def set_dma_mode(params: pltpu.InterpretParams, mode: str) -> None:
    """Makes kernels already compiled with `params` run DMAs in another mode ("eager" or "on_wait").

    JAX reads the mode when a kernel starts, not when it is traced: one compile, which takes longer than a run, does for both.
    """
    object.__setattr__(params, "dma_execution_mode", mode)


def reset_interpreter() -> None:
    """Makes the interpreter fit to run again after a kernel raised in it."""
    pltpu.reset_tpu_interpret_mode_state()
    dispatch.runtime_tokens.clear()  # of effects in order: with the failed one left there, every later run fails with it


@contextlib.contextmanager
def race_reports() -> Iterator[list[str]]:
    """The races that the interpreter finds in kernels which start within it, one text each; empty where there is none."""
    reports: list[str] = []
    original = interpreter.RaceDetectionState
    interpreter.RaceDetectionState = functools.partial(_Races, reports)
    try:
        yield reports
    finally:
        interpreter.RaceDetectionState = original


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fails the kernel that the interpreter runs within it after `seconds`: a wait for a DMA never started has no end."""

    def give_up() -> None:
        memory = interpreter._shared_memory
        if memory is not None:
            # Not as the top level: that would clean up what the kernel still needs in order to fail with this message.
            message = f"did not end within {seconds:g} s: does it wait for a DMA never started?"
            memory.set_failed(TimeoutError(message), top_level=False)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Races:
    """Stands in for the interpreter's own state of one kernel, which keeps a race to itself when the next kernel starts.

    Two accesses race if they overlap, one of them is a write, and by their vector clocks neither happened before the
    other. JAX compares the clocks one by one in Python: at the accesses of a real kernel that took most of a check.
    """

    def __init__(self, reports: list[str], **_: Any) -> None:
        self._reports = reports
        self._reads: defaultdict[Hashable, _Accesses] = defaultdict(_Accesses)
        self._writes: defaultdict[Hashable, _Accesses] = defaultdict(_Accesses)
        self._lock = threading.Lock()

    def check_read(self, *access: Any, source_info: Any = None) -> None:
        self._check("read", access, source_info)

    def check_write(self, *access: Any, source_info: Any = None) -> None:
        self._check("write", access, source_info)

    def _check(self, what: str, access: tuple[Any, ...], source_info: Any) -> None:
        *_, clock, buffer, where = access  # before them who it is: two arguments in JAX 0.10, one in 0.12
        ticks = getattr(clock, "clock", clock)
        place = "the call" if source_info is None else source_info_util.summarize(source_info)
        with self._lock:
            against = [("write", self._writes[buffer])]
            if what == "write":
                against.append(("read", self._reads[buffer]))
            for earlier, accesses in against:
                other = accesses.racing(ticks, where)
                if other is not None:
                    report = f"{what} at {place} and {earlier} at {other}, of one {buffer[0]} buffer"
                    if report not in self._reports:  # once, however often the loop around it turns
                        self._reports.append(report)
            (self._reads if what == "read" else self._writes)[buffer].add(ticks, where, place)


class _Accesses:
    """The reads or the writes of one buffer so far."""

    def __init__(self) -> None:
        self._clocks = np.zeros((0, 0), np.int32)
        self._places: list[tuple[Any, str]] = []

    def add(self, ticks: NDArray[np.int32], where: Any, place: str) -> None:
        count = len(self._places)
        if count == len(self._clocks):
            more = np.zeros((max(64, count), len(ticks)), np.int32)
            self._clocks = np.concatenate([self._clocks, more]) if count else more
        self._clocks[count] = ticks
        self._places.append((where, place))

    def racing(self, ticks: NDArray[np.int32], where: Any) -> str | None:
        """The place of an access to an overlapping range that is unordered with one at `ticks`."""
        clocks = self._clocks[: len(self._places)]
        if not len(clocks):
            return None
        # One happened before the other if all of its ticks are at most the other's; equal clocks are not ordered.
        ordered = (clocks <= ticks).all(axis=1) != (clocks >= ticks).all(axis=1)
        for index in np.flatnonzero(~ordered):
            other, place = self._places[index]
            if race_detection_state._ranges_overlap(where, other):
                return place
        return None
