"""Runs lowerings in parallel processes, the cache in front of them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process, resource_tracker

from rpac.errors import CompileError
from rpac.lower.cache import Cache
from rpac.lower.lowered import Lowered, Task
from rpac.toolchain import prepare, toolchain

Progress = Callable[[Task, str], None]


def lower_all(
    tasks: Sequence[Task], cache: Cache, jobs: int | None = None, progress: Progress = lambda task, what: None
) -> list[Lowered]:
    """Every task's result, in the order of `tasks`; `progress(task, "cached" | "compiled")` as each is there.

    Raises the CompileError of the first task that fails; what was finished by then stays in the cache.
    """
    tools = toolchain()
    done: dict[int, Lowered] = {}
    for index, task in enumerate(tasks):
        found = cache.get(task, tools)
        if found is not None:
            done[index] = found
            progress(task, "cached")
    todo = [index for index in range(len(tasks)) if index not in done]
    if todo:
        workers = min(jobs or os.cpu_count() or 1, len(todo))
        resource_tracker.ensure_running()  # here: when a worker's start starts it, it lets interrupts through again
        with ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(_run_alone, tasks[index], tools): index for index in todo}
            try:
                for future in as_completed(futures):
                    index = futures[future]
                    done[index] = _result(future, tasks[index])
                    cache.put(tasks[index], tools, done[index])
                    progress(tasks[index], "compiled")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [done[index] for index in range(len(tasks))]


def _run_alone(task: Task, tools: Mapping[str, str]) -> Lowered:
    """Lowers one task in a process of its own: libtpu numbers what it compiles through the life of a process, and since
    0.0.50 these numbers are in the executable.
    """
    # Spawned, not forked: JAX and libtpu hold threads and locks, and read their environment when first loaded.
    with ProcessPoolExecutor(1, get_context("spawn"), _start) as process:
        with interrupts_held_back():
            lowered = process.submit(_run, task, tools)
        return lowered.result()


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


def _result(future: Future[Lowered], task: Task) -> Lowered:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise CompileError(
            f"{task.label}: a compiling process died; it may have run out of memory: build with fewer --jobs"
        ) from error


def _run(task: Task, tools: Mapping[str, str]) -> Lowered:
    from rpac.lower.worker import lower  # JAX is for the worker alone

    return lower(task, tools)
