"""A landscape of times in place of compiles and walks: the same for the same candidate, wherever it is asked for."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rpac.plan import KernelPlan, plan_spec
from rpac.plan.tuned import TunedTiles
from rpac.spec import Spec
from rpac.tune import Check, Job, Measure, Result


def timed(job: Job) -> Result:
    """Seconds that follow from the candidate's name; every check passes."""
    if isinstance(job, Check):
        return Result()
    return Result(tuple(1e-6 * (index + height(job.label)) for index, _ in enumerate(job.batches, 1)))


def height(label: str) -> float:
    """From 0 to 1, any; the rules' tiles are on the top."""
    return 1.0 if label == "rule" else int(hashlib.sha256(label.encode()).hexdigest()[:8], 16) / 2**32


def slowly(job: Job) -> Result:
    """As `timed`, after a while that is another one each time."""
    time.sleep(random.Random().uniform(0.01, 0.1))
    return timed(job)


def deadly_once(job: Job) -> Result:
    """As `timed`, but the first process that tries half of the candidates dies. Marks lie in a folder that all share."""
    if isinstance(job, Measure) and height(job.label) < 1 / 2:
        mark = Path(os.environ["STANDIN_MARKS"], hashlib.sha256(job.label.encode()).hexdigest())
        if not mark.exists():
            mark.touch()
            os._exit(9)
    return timed(job)


def deadly(job: Job) -> Result:
    """As `timed`, but no process that tries the rule's tiles lives."""
    if isinstance(job, Measure) and job.label == "rule":
        os._exit(9)
    return timed(job)


def waiting(job: Job) -> Result:
    """Says by a file that it runs, and then takes for ever, unless it is stopped: then it removes the file."""
    mark = Path(os.environ["STANDIN_MARKS"], str(os.getpid()))
    try:
        mark.touch()
        time.sleep(600)
    finally:
        mark.unlink()
    return timed(job)


class Here:
    """A pool that runs jobs in threads of this process, and counts them."""

    died = (ChildProcessError,)

    def __init__(self, width: int = 1) -> None:
        self._threads = ThreadPoolExecutor(width)
        self._width = width
        self.ran: list[Job] = []

    def width(self) -> int:
        return self._width

    def submit(self, evaluate: Callable[[Job], Result], job: Job) -> Future[Result]:
        self.ran.append(job)
        return self._threads.submit(evaluate, job)


def rule_of(spec: Spec, kind: str, target: str = "tpu7x") -> KernelPlan:
    """The rules' plan of a kind for the largest bucket."""
    return next(plan for plan in reversed(plan_spec(spec, target, tuned=TunedTiles())) if plan.kind == kind)
