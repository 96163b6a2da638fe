"""The whole steps of a report: the batches of an option through all of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rpac.errors import RpacError
from rpac.files.store import Store
from rpac.predict import Workload
from rpac.predict.steps import StepPrediction, Steps, predict_step, steps_to_predict
from rpac.report.facts import WholeStep
from rpac.report.request import Given, Request

PredictStep = Callable[[Steps, Workload], StepPrediction]


def whole_steps(
    given: Given,
    target: str,
    workloads: Sequence[Workload],
    request: Request,
    store: Store,
    working: Callable[[str], None],
    predict_one: PredictStep = predict_step,
) -> tuple[tuple[WholeStep, ...], tuple[str, ...]]:
    """The batches of one spec or bundle on one target, and what is missing of them, each with the reason."""
    where = f"{given.name} on {target}, whole step"
    if request.step is None:
        return (), ()
    try:
        steps = steps_to_predict(
            given.path,
            target,
            request.step,
            Path.cwd(),
            store,
            working,
            any_compiler=request.any_compiler,
            tuned=request.tuned,
        )
    except RpacError as error:
        return (), (f"{where}: {error}",)
    found: list[WholeStep] = []
    refused: dict[str, str] = {}
    for workload in workloads:
        try:
            found.append(_whole_step(predict_one(steps, workload)))
        except RpacError as error:
            refused.setdefault(
                str(error), f"{where}, {workload.label}: {error}"
            )  # one reason may be that of all batches
    return tuple(found), tuple(refused.values())


def _whole_step(one: StepPrediction) -> WholeStep:
    report = one.report
    return WholeStep(
        one.workload.label,
        str(one.variant),
        one.function,
        report.seconds,
        report.tokens_per_second_per_chip,
        report.mbu,
        report.mfu,
        {part.category: part.share for part in report.parts},
        report.by_bytes_seconds / report.seconds,
    )
