"""Where jobs run: in processes of this machine, or on a Dask cluster. To a search they are the same."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process, resource_tracker
from typing import Any, Final, Protocol

from rpac.devices.toolchain import prepare, toolchain
from rpac.errors import TargetError
from rpac.lower.pool import interrupts_held_back
from rpac.tune.jobs import Job, Result

Evaluate = Callable[[Job], Result]

TRIES: Final = 2
CLEAN_UP_S: Final = 5.0
CONNECT_S: Final = 15


class Pool(Protocol):
    """Runs jobs in other processes; one that dies takes nothing with it but its job, which is tried again."""

    @property
    def died(self) -> tuple[type[BaseException], ...]:
        """What a future raises once every process that tried its job has died."""

    def width(self) -> int:
        """How many jobs can run at once, at present."""

    def submit(self, evaluate: Evaluate, job: Job) -> Future[Result]:
        """Starts a job, or has it wait for a process."""


@contextmanager
def local_processes(jobs: int) -> Iterator[Pool]:
    """A pool of `jobs` processes; after an exception they are stopped, and remove their temporary files."""
    resource_tracker.ensure_running()  # here: when a worker's start starts it, it lets interrupts through again
    pool = _Local(jobs)
    try:
        yield pool
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.close()


class _Local:
    """A thread a process: the pool of the standard library gives up its other jobs, too, when one process dies."""

    died = (BrokenProcessPool,)

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._threads = ThreadPoolExecutor(jobs)
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._processes: set[_Process] = set()
        self._stopped = False
        for _ in range(jobs):
            self._idle.put(None)  # started when first needed

    def width(self) -> int:
        return self._jobs

    def submit(self, evaluate: Evaluate, job: Job) -> Future[Result]:
        return self._threads.submit(self._run, evaluate, job)

    def stop(self) -> None:
        """Ends what runs."""
        self._stopped = True
        for process in list(self._processes):
            process.stop()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in list(self._processes):
            process.close()

    def _run(self, evaluate: Evaluate, job: Job) -> Result:
        for left in reversed(range(TRIES)):
            process = self._idle.get()
            try:
                if process is None:
                    process = _Process()
                    self._processes.add(process)
                if self._stopped:
                    raise BrokenProcessPool("stopped")
                result = process.run(evaluate, job)
            except BrokenProcessPool:
                if process is not None:
                    self._processes.discard(process)
                    process.close()
                self._idle.put(None)
                if not left or self._stopped:
                    raise
            except BaseException:
                self._idle.put(process)
                raise
            else:
                self._idle.put(process)
                return result
        raise AssertionError


class _Process:
    """One process that runs job after job."""

    def __init__(self) -> None:
        # Spawned, not forked: JAX holds threads and locks, and reads its environment when first loaded.
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _start)
        with interrupts_held_back():
            pid = self._pool.submit(os.getpid)
        self._pid = pid.result()

    def run(self, evaluate: Evaluate, job: Job) -> Result:
        return self._pool.submit(evaluate, job).result()

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _start() -> None:
    """In a worker: it is stopped by its parent alone, in a way that lets it remove its temporary files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    prepare()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(1)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(CLEAN_UP_S)
    os._exit(1)


@contextmanager
def on_cluster(address: str) -> Iterator[Pool]:
    """The workers of the Dask cluster whose scheduler is at `address`; they must have this rpac and its toolchain.

    A job whose worker dies is run by another one. Raises TargetError where the cluster cannot be used.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise TargetError("--scheduler needs the package dask[distributed]; install rpac[tune]") from error
    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise TargetError(
            f"--scheduler: no Dask scheduler answers at {address!r} ({error}); give the address that `dask scheduler` "
            "prints, such as tcp://10.0.0.1:8786"
        ) from error
    with client:
        _check_workers(client)
        pool = _Cluster(client)
        try:
            yield pool
        finally:
            pool.close()


def _check_workers(client: Any) -> None:
    here = toolchain()
    try:
        found = client.run(toolchain)
    except Exception as error:
        raise TargetError(
            f"--scheduler: a worker cannot run rpac ({error}); install this rpac and its toolchain on every worker"
        ) from error
    for worker, tools in found.items():
        other = [f"{name} {tools.get(name)} (here {here[name]})" for name in here if tools.get(name) != here[name]]
        if other:
            raise TargetError(f"--scheduler: the worker {worker} has {', '.join(other)}; install the same on both")


class _Cluster:
    def __init__(self, client: Any) -> None:
        from distributed.scheduler import KilledWorker

        self.died = (KilledWorker,)
        self._client = client
        self._executor = client.get_executor(pure=False)

    def width(self) -> int:
        # At least one: it waits for a worker where there is none at present.
        try:
            threads: int = sum(self._client.nthreads().values())
        except OSError as error:
            raise TargetError(f"the scheduler is gone ({error}); what was timed is kept: run again") from error
        return max(threads, 1)

    def submit(self, evaluate: Evaluate, job: Job) -> Future[Result]:
        future: Future[Result] = self._executor.submit(evaluate, job)
        return future

    def close(self) -> None:
        self._executor.shutdown(wait=False)
