"""The search: from the rules' plan along one axis after another, each time to the best, and the oracle at the end.

What it finds depends on the results of its jobs alone, not on when or where they ran.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from rpac.devices.toolchain import toolchain
from rpac.errors import TargetError
from rpac.files.store import Store
from rpac.kernels import render
from rpac.lower import tasks_of
from rpac.plan import KernelPlan
from rpac.plan.kernel_plan import RULE
from rpac.predict import Workload
from rpac.spec import Spec
from rpac.tune.batches import batches_of, limits_of
from rpac.tune.candidates import AXES, Axis, variants
from rpac.tune.executors import Evaluate, Pool
from rpac.tune.jobs import Check, Job, Measure, Result, read_result, run_job, write_result

PASSES: Final = 3  # over all axes; most searches change nothing in the second
MARGIN: Final = 0.002  # of the time: what a change must win, because the walker does not resolve less

Progress: TypeAlias = Callable[[Job, Result, bool], None]
Steps: TypeAlias = Generator[list[Job], list[Result | None], "Outcome"]


@dataclass(frozen=True)
class Tried:
    """A candidate and its predicted seconds a batch."""

    label: str
    plan: KernelPlan
    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The geometric mean of its seconds."""
        return math.exp(math.fsum(map(math.log, self.seconds)) / len(self.seconds))


@dataclass(frozen=True)
class Outcome:
    """What a search found for one case. `chosen` None: nothing was timed, or nothing passed the oracle.

    tried: from the fastest. rejected: reasons by label. complete: False where the time ran out.
    """

    spec: Spec
    rule: KernelPlan
    seed: int
    batches: tuple[Workload, ...]
    chosen: Tried | None
    tried: tuple[Tried, ...]
    rejected: dict[str, str]
    complete: bool

    def score(self, one: Tried) -> float | None:
        """The geometric mean over the batches of its time relative to the rules' plan; None where that has none."""
        rule = next((tried for tried in self.tried if tried.label == RULE), None)
        return None if rule is None else one.mean / rule.mean


@dataclass
class Climb:
    """The search of one case: `steps` yields jobs and takes their results, None for one that was not run."""

    spec: Spec
    rule: KernelPlan
    seed: int
    axes: Sequence[Axis] = AXES
    _tried: dict[KernelPlan, Tried] = field(default_factory=dict)
    _rejected: dict[KernelPlan, tuple[str, str]] = field(default_factory=dict)
    _complete: bool = True

    def steps(self) -> Steps:
        batches = batches_of(self.spec, self.rule, self.seed)
        best = self.rule
        if batches:
            yield from self._measure([(RULE, self.rule)], batches)
            for _ in range(PASSES):
                start = best
                for axis in self.axes:
                    yield from self._measure(variants(self.spec, self.rule, best, axis), batches)
                    best = self._best(best)
                if best == start:
                    break
        chosen = yield from self._checked(best)
        tried = tuple(sorted(self._tried.values(), key=lambda one: (one.mean, one.label)))
        rejected = dict(sorted(self._rejected.values()))
        return Outcome(self.spec, self.rule, self.seed, batches, chosen, tried, rejected, self._complete)

    def _measure(
        self, candidates: Iterable[tuple[str, KernelPlan]], batches: tuple[Workload, ...]
    ) -> Generator[list[Job], list[Result | None], None]:
        new = [(label, plan) for label, plan in candidates if plan not in self._tried and plan not in self._rejected]
        if not new:
            return
        results = yield [self._job(label, plan, batches) for label, plan in new]
        for (label, plan), result in zip(new, results, strict=True):
            if result is None:
                self._complete = False
            elif result.reason:
                self._rejected[plan] = (label, result.reason)
            else:
                self._tried[plan] = Tried(label, plan, result.seconds)

    def _best(self, current: KernelPlan) -> KernelPlan:
        if not self._tried:
            return current
        best = min(self._tried.values(), key=lambda one: (one.mean, one.label))
        if current in self._tried and best.mean > (1 - MARGIN) * self._tried[current].mean:
            return current
        return best.plan

    def _checked(self, best: KernelPlan) -> Generator[list[Job], list[Result | None], Tried | None]:
        """The best that passes the oracle; those that do not go to the rejected ones."""
        for one in sorted(self._tried.values(), key=lambda one: (one.plan != best, one.mean, one.label)):
            source = render(self.spec, one.plan)
            job = Check(self._case, one.label, self.spec, one.plan, source.sha256, self.seed, toolchain())
            (result,) = yield [job]
            assert result is not None
            if not result.reason:
                return one
            self._rejected[one.plan] = (one.label, result.reason)
            del self._tried[one.plan]
        return None

    def _job(self, label: str, plan: KernelPlan, batches: tuple[Workload, ...]) -> Job:
        tasks = tasks_of(self.spec, [(plan, render(self.spec, plan))])
        task = next(task for task in tasks if task.tokens == plan.tokens[-1])
        limits = limits_of(self.spec, plan)
        return Measure(self._case, label, task, self.spec.model, limits, batches, toolchain())

    @property
    def _case(self) -> str:
        return self.rule.path.removesuffix(".py")


class _Run:
    """A climb under way: the jobs that it waits for, and the results so far."""

    def __init__(self, climb: Climb) -> None:
        self._steps = climb.steps()
        self.outcome: Outcome | None = None
        self.jobs: list[Job] = []
        self._results: dict[int, Result | None] = {}
        self._advance(None)

    def answer(self, index: int, result: Result | None) -> bool:
        """Takes the result of one job; True where that made it ask for others."""
        self._results[index] = result
        if len(self._results) < len(self.jobs):
            return False
        self._advance([self._results[index] for index in range(len(self.jobs))])
        return True

    def _advance(self, results: list[Result | None] | None) -> None:
        self._results = {}
        try:
            self.jobs = next(self._steps) if results is None else self._steps.send(results)
        except StopIteration as done:
            self.jobs, self.outcome = [], done.value


def search(
    climbs: Sequence[Climb],
    pool: Pool,
    store: Store,
    *,
    evaluate: Evaluate = run_job,
    out_of_time: Callable[[], bool] = lambda: False,
    progress: Progress = lambda job, result, stored: None,
) -> list[Outcome]:
    """Runs several searches side by side, and returns their outcomes in the order of `climbs`.

    Results are kept in `store` as they come, and taken from there. Once `out_of_time`, no further candidate is started;
    those under way are waited for, and the best so far still meets the oracle. `progress` says of each result whether it
    was stored. What a job raises ends the search.
    """
    runs = [_Run(climb) for climb in climbs]
    waiting = deque((run, index) for run in runs for index in range(len(run.jobs)))
    flying: dict[Future[Result], tuple[_Run, int]] = {}

    def answer(run: _Run, index: int, result: Result | None) -> None:
        if run.answer(index, result):
            waiting.extend((run, index) for index in range(len(run.jobs)))

    while waiting or flying:
        room = pool.width() if waiting else 0
        while waiting and len(flying) < room:
            run, index = waiting.popleft()
            job = run.jobs[index]
            stored = read_result(store, job)
            if stored is not None:
                progress(job, stored, True)
                answer(run, index, stored)
            elif isinstance(job, Measure) and out_of_time():
                answer(run, index, None)
            else:
                flying[pool.submit(evaluate, job)] = run, index
        for future in wait(flying, return_when=FIRST_COMPLETED).done if flying else ():
            run, index = flying.pop(future)
            job = run.jobs[index]
            result = _result(future, pool)
            write_result(store, job, result)
            progress(job, result, False)
            answer(run, index, result)
    return [run.outcome for run in runs if run.outcome is not None]


def _result(future: Future[Result], pool: Pool) -> Result:
    try:
        return future.result()
    except CancelledError as error:
        raise TargetError(
            "the cluster cancelled a job, its scheduler may be gone; what was timed is kept: run again"
        ) from error
    except pool.died:
        return Result(reason="every process that tried it died; it may have run out of memory", final=False)
