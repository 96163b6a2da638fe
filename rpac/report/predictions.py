"""Predicts all batches of a report, several targets and kinds of layers at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rpac.contract.arrays import cdiv
from rpac.errors import CompileError, PlanError, RpacError, ScheduleError, TargetError
from rpac.files.store import Store
from rpac.predict import Prediction, Programs, Workload, programs_of
from rpac.report.batches import report_batches
from rpac.report.request import Given, Request
from rpac.spec import Spec

Predict = Callable[[Programs, Workload], Prediction]
NOT_HERE = (PlanError, TargetError, ScheduleError, CompileError)  # of one target; the others may be fine


class Observer:
    """Told of the progress of `gather`, from any thread. Does nothing; override what matters."""

    def planned(self, count: int) -> None:
        """There are so many batches to predict."""

    def working(self, what: str) -> None:
        """Something that takes long begins."""

    def done(self, what: str) -> None:
        """One of the batches is done."""


@dataclass(frozen=True)
class Predicted:
    """One kind of layer on one target: its programs, the predictions, and the batches without one, each with the reason.

    Without programs there is one reason for all, of no batch.
    """

    given: Given
    target: str
    part: Spec
    programs: Programs | None
    found: tuple[Prediction, ...] = ()
    refused: tuple[tuple[str, RpacError], ...] = ()

    def reasons(self) -> list[str]:
        """What is missing, and why, in a line each."""
        where = _where(self.given, self.target, self.part)
        return [
            f"{where}{label and ', '}{label}: {str(error).removeprefix(f'{label}: ')}" for label, error in self.refused
        ]

    def crowded(self) -> list[str]:
        """The batches that the cache, as the spec has it, has too few pages for; a prediction gives them as many as they need."""
        if self.programs is None or self.part.model.late:  # with a window or chunks, pages are given back
            return []
        limits = self.programs.limits
        needed = {
            one.workload.label: sum(cdiv(n, limits.page_size) for n in one.workload.kv_lens) for one in self.found
        }
        return [
            f"{self.given.name}: {label} needs {count:,} pages, and the cache has {limits.num_pages:,} (`num_pages`). Its time "
            "is that with enough pages."
            for label, count in needed.items()
            if count > limits.num_pages
        ]


@dataclass(frozen=True)
class _Job:
    """What is to be predicted, on which programs."""

    given: Given
    target: str
    part: Spec
    programs: Programs
    workloads: tuple[Workload, ...]


def predict_all(
    givens: Sequence[Given], request: Request, store: Store, observer: Observer, predict_one: Predict
) -> list[Predicted]:
    """Every kind of layer of each spec or bundle on each of its targets, in order. An interrupt ends it with the batches that
    run then.
    """
    wanted = [(given, target, part) for given in givens for target in given.targets for part in given.spec.parts]
    jobs = [_job(*one, request, store, observer) for one in wanted]
    observer.planned(sum(len(job.workloads) for job in jobs if isinstance(job, _Job)))
    stopped = threading.Event()
    with ThreadPoolExecutor(request.jobs) as pool:
        futures = [
            pool.submit(_predicted, job, predict_one, observer, stopped) if isinstance(job, _Job) else job
            for job in jobs
        ]
        try:
            return [one if isinstance(one, Predicted) else one.result() for one in futures]
        except BaseException:
            stopped.set()
            raise


def _job(given: Given, target: str, part: Spec, request: Request, store: Store, observer: Observer) -> _Job | Predicted:
    try:
        programs = programs_of(
            given.path,
            target,
            store,
            observer.working,
            any_compiler=request.any_compiler,
            layer=part.layer,
            tuned=request.tuned,
        )
    except NOT_HERE as error:
        return Predicted(given, target, part, None, refused=(("", error),))
    asked = request.asked.workloads(programs.limits.decode_len)
    workloads = tuple(asked or report_batches(programs.limits, programs.context_lens, request.quick))
    return _Job(given, target, part, programs, workloads)


def _predicted(job: _Job, predict_one: Predict, observer: Observer, stopped: threading.Event) -> Predicted:
    where = _where(job.given, job.target, job.part)
    found: list[Prediction] = []
    refused: list[tuple[str, RpacError]] = []
    for workload in job.workloads:
        if stopped.is_set():
            break
        try:
            found.append(predict_one(job.programs, workload))
            observer.done(f"{where}, {workload.label}: {1e6 * found[-1].report.seconds:.1f} us")
        except RpacError as error:
            refused.append((workload.label, error))
            observer.done(f"{where}, {workload.label}: not predicted")
    return Predicted(job.given, job.target, job.part, job.programs, tuple(found), tuple(refused))


def _where(given: Given, target: str, part: Spec) -> str:
    return f"{given.name} on {target}{part.layer and f', {part.layer} layers'}"
