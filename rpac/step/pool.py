"""Lowers the steps of a build in parallel processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from rpac.contract.step import LoweredStep
from rpac.devices.toolchain import toolchain
from rpac.files.store import Store
from rpac.lower.pool import COMPILING, run_all
from rpac.step.task import StepTask

Progress = Callable[[StepTask, str], None]


def wanted_steps(tasks: Sequence[StepTask]) -> list[StepTask]:
    """Those of `tasks` that the user's function describes. Raises SpecError or CompileError where it cannot be used."""
    found: list[bool] = []
    run_all(
        {0: partial(_check, list(tasks))}, lambda index: tasks[0].label, 1, lambda index, flags: found.extend(flags)
    )
    return [task for task, wanted in zip(tasks, found, strict=True) if wanted]


def lower_steps(
    tasks: Sequence[StepTask],
    store: Store,
    jobs: int | None = None,
    progress: Progress = lambda task, what: None,
    this_cpu: bool = False,
) -> list[LoweredStep]:
    """Every step, lowered, in the order of `tasks`; `progress` is told when one begins, and when it is done.

    Each is traced and lowered; what was made before of the same lowered text is taken from the store. Raises the error of the
    first that fails; what was finished by then stays in the store.
    """
    tools, done = toolchain(), dict[int, LoweredStep]()

    def keep(index: int, made: tuple[LoweredStep, bool]) -> None:
        done[index], cached = made
        progress(tasks[index], "cached" if cached else "compiled")

    calls = {index: partial(_lower, task, tools, store, this_cpu) for index, task in enumerate(tasks)}
    run_all(calls, lambda index: tasks[index].label, jobs, keep, lambda index: progress(tasks[index], COMPILING))
    return [done[index] for index in range(len(tasks))]


def _check(tasks: list[StepTask]) -> list[bool]:
    from rpac.step.worker import checked_functions  # JAX is for the worker alone

    return checked_functions(tasks)


def _lower(task: StepTask, tools: dict[str, str], store: Store, this_cpu: bool) -> tuple[LoweredStep, bool]:
    from rpac.step.worker import lower_step

    return lower_step(task, tools, store, this_cpu)
