"""Runs lowerings in parallel processes, the cache in front of them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context, parent_process, resource_tracker
from typing import TypeVar

from rpac.contract.program import Lowered
from rpac.devices.toolchain import prepare, toolchain
from rpac.errors import CompileError
from rpac.lower.cache import Cache
from rpac.lower.task import Task

COMPILING = "compiling"
Progress = Callable[[Task, str], None]
Result = TypeVar("Result")


def lower_all(
    tasks: Sequence[Task], cache: Cache, jobs: int | None = None, progress: Progress = lambda task, what: None
) -> list[Lowered]:
    """Every task's result, in the order of `tasks`; `progress(task, "cached" | "compiled")` as each is there.

    Before "compiled" it is called with COMPILING when that begins, from another thread.
    Raises the CompileError of the first task that fails; what was finished by then stays in the cache.
    """
    tools = toolchain()
    done: dict[int, Lowered] = {}
    for index, task in enumerate(tasks):
        found = cache.get(task, tools)
        if found is not None:
            done[index] = found
            progress(task, "cached")

    def keep(index: int, lowered: Lowered) -> None:
        done[index] = lowered
        cache.put(tasks[index], tools, lowered)
        progress(tasks[index], "compiled")

    calls = {index: partial(_lower, task, tools) for index, task in enumerate(tasks) if index not in done}
    run_all(calls, lambda index: tasks[index].label, jobs, keep, lambda index: progress(tasks[index], COMPILING))
    return [done[index] for index in range(len(tasks))]


def add_cpu_executables(
    tasks: Sequence[Task],
    lowered: Sequence[Lowered],
    jobs: int | None = None,
    progress: Callable[[str], None] = lambda label: None,
) -> list[Lowered]:
    """What these tasks became, those of the cpu target with an executable for the CPU of this machine; `progress(label)` at each.

    Nothing of it is cached: an entry could be another machine's. Raises CompileError.
    """
    done = dict(enumerate(lowered))

    def keep(index: int, made: tuple[bytes, str]) -> None:
        executable, build = made
        one = done[index]
        done[index] = replace(one, executable=executable, toolchain={**one.toolchain, "cpu_build": build})
        progress(tasks[index].label)

    calls = {
        index: partial(_compile_for_cpu, task, done[index].exported)
        for index, task in enumerate(tasks)
        if task.target == "cpu"
    }
    run_all(calls, lambda index: tasks[index].label, jobs, keep)
    return list(done.values())


def run_all(
    calls: Mapping[int, Callable[[], Result]],
    label: Callable[[int], str],
    jobs: int | None,
    keep: Callable[[int, Result], None],
    begin: Callable[[int], None] = lambda index: None,
) -> None:
    """Makes every call in a process of its own, `jobs` at once, and hands each result to `keep` as it comes.

    `begin` is called in another thread as each call begins.

    Raises what the first call that fails did, or CompileError with its label where its process died.
    """
    if not calls:
        return

    def run(index: int) -> Result:
        begin(index)
        return _run_alone(calls[index])

    workers = min(jobs or os.cpu_count() or 1, len(calls))
    resource_tracker.ensure_running()  # here: when a worker's start starts it, it lets interrupts through again
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(run, index): index for index in calls}
        try:
            for future in as_completed(futures):
                index = futures[future]
                keep(index, _result(future, label(index)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_alone(call: Callable[[], Result]) -> Result:
    """Makes one call in a process of its own: libtpu numbers what it compiles through the life of a process, and since
    0.0.50 these numbers are in the executable.
    """
    # Spawned, not forked: JAX and libtpu hold threads and locks, and read their environment when first loaded.
    with ProcessPoolExecutor(1, get_context("spawn"), _start) as process:
        with interrupts_held_back():
            result = process.submit(call)
        return result.result()


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """From this thread and what it starts: an interrupted Python that still imports would print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is where a shell started the build with `&`
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends a worker in silence; the build says what there is to say
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    prepare()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without it the workers of a killed build would wait for ever for work that nobody can send."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _result(future: Future[Result], label: str) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise CompileError(
            f"{label}: a compiling process died; it may have run out of memory: build with fewer --jobs"
        ) from error


def _lower(task: Task, tools: Mapping[str, str]) -> Lowered:
    from rpac.lower.worker import lower  # JAX is for the worker alone

    return lower(task, tools)


def _compile_for_cpu(task: Task, exported: bytes) -> tuple[bytes, str]:
    from rpac.lower.worker import compile_for_cpu

    return compile_for_cpu(task, exported)
