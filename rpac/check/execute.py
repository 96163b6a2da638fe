"""Runs a generated program: in the TPU interpreter, or compiled where its target is this CPU."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from rpac.check.arrays import Arguments, Array
from rpac.contract.program import Source
from rpac.devices.chip import is_tpu
from rpac.devices.jax_compat import interpret_params, race_reports, reset_interpreter, set_dma_mode, time_limit
from rpac.lower.worker import load_program
from rpac.plan import KernelPlan

DMA_MODES = ("eager", "on_wait")
COMPILED = "compiled"
TIME_LIMIT = 300.0  # seconds: a run that takes longer waits for something that will not happen


@dataclass(frozen=True)
class Outcome:
    """What a run left: its results, unless it raised; the races in it; and what else the interpreter had to say."""

    out: Array | None
    kv_cache: Array | None
    lse: Array | None = None
    races: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


Run = Callable[[Arguments, str], Outcome]


def modes_of(plan: KernelPlan) -> tuple[str, ...]:
    """The ways in which a plan's program can be run here."""
    return DMA_MODES if is_tpu(plan.target) else (COMPILED,)


def prepare_run(plan: KernelPlan, source: Source, seconds: float = TIME_LIMIT) -> Run:
    """A function that runs the program of a source on a call's arguments in a mode; it never raises for the program.

    Each shape of arguments is compiled once, however many modes and calls there are. A run in the interpreter that
    takes longer than `seconds` fails.
    """
    program: Callable[..., Any] | None = None
    compiled: dict[tuple[tuple[int, ...], ...], Any] = {}
    params = interpret_params()

    def run(args: Arguments, mode: str) -> Outcome:
        nonlocal program
        shapes = tuple(array.shape for array in args.in_order)
        try:
            with _quiet():
                program = program or load_program(source)
                if shapes not in compiled:
                    # As it is served. The interpreter copies what it is given.
                    donated = () if is_tpu(plan.target) else len(args.by_token)  # the cache
                    with pltpu.force_tpu_interpret_mode(params):
                        compiled[shapes] = jax.jit(program, donate_argnums=donated).lower(*args.in_order).compile()
                if mode == COMPILED:
                    results = compiled[shapes](*args._replace(kv_cache=jnp.array(args.kv_cache)).in_order)
                    return Outcome(*_as_numpy(results))
                set_dma_mode(params, mode)
                printed = io.StringIO()  # where it says which semaphores a kernel left with bytes not waited for
                with contextlib.redirect_stdout(printed), race_reports() as races, time_limit(seconds):
                    results = jax.block_until_ready(compiled[shapes](*args.in_order))
                notes = tuple(printed.getvalue().splitlines())
                return Outcome(*_as_numpy(results), races=tuple(races), notes=notes)
        except Exception as error:  # whatever a kernel under check does, the report must come
            reset_interpreter()
            return Outcome(None, None, notes=(f"raised {_summary(error)}",))

    return run


def _as_numpy(results: Sequence[Any]) -> tuple[Array, Array, Array | None]:
    out, kv_cache, *lse = map(np.asarray, results)
    return out, kv_cache, lse[0] if lse else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without JAX's own report of what a callback raised: it is in the outcome."""
    logger = logging.getLogger("jax")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _summary(error: Exception) -> str:
    """The last line says what was raised in the kernel; those before are the way there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
