"""Gathers a report: plans, memory and predictions of each spec or bundle on each target, with what others have found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from rpac.bundle import Place
from rpac.contract.kind import KINDS
from rpac.devices.chip import chip
from rpac.devices.toolchain import toolchain
from rpac.files.store import Store
from rpac.plan import KernelPlan
from rpac.plan.cache_memory import CacheMemory
from rpac.plan.words import decisions, tiles_in_words
from rpac.predict import Prediction, Programs, predict
from rpac.report.bound import bound_of
from rpac.report.facts import Kernel, Layer, Memory, Option, Report, Step, Timing
from rpac.report.peers import peer_versions, peers_of
from rpac.report.predictions import Observer, Predict, Predicted, predict_all
from rpac.report.request import Request, givens_of, missing_of, subject_of
from rpac.report.whole_steps import whole_steps

SECONDS_AN_HOUR = 3600.0


def gather(
    paths: Sequence[Place],
    request: Request,
    store: Store,
    observer: Observer | None = None,
    predict_one: Predict = predict,
) -> Report:
    """The report of specs and bundles (folders).

    A target or a batch that cannot be predicted is named under `missing`. Raises the error of the first of them where
    nothing can be, and as `givens_of`.
    """
    givens = givens_of(paths, request)
    predicted = predict_all(givens, request, store, observer or Observer(), predict_one)
    if not any(one.found for one in predicted):
        raise next(error for one in predicted for _, error in one.refused)
    options, without_steps = [], list[str]()
    for given in givens:
        for target in given.targets:
            mine = [one for one in predicted if (one.given, one.target) == (given, target)]
            if any(one.found for one in mine):
                workloads = list(dict.fromkeys(prediction.workload for one in mine for prediction in one.found))
                working = (observer or Observer()).working
                steps, missing = whole_steps(given, target, workloads, request, store, working)
                options.append(replace(_option(mine, request), whole_steps=steps))
                without_steps += missing
    versions = {name: value for name, value in toolchain().items() if not name.endswith("_files")}
    return Report(
        tuple(subject_of(given, request) for given in givens),
        tuple(options),
        tuple(dict.fromkeys(step.batch for option in options for step in option.steps)),
        (
            *missing_of(givens, request),
            *dict.fromkeys(note for one in predicted for note in one.crowded()),  # the same on every target
            *(reason for one in predicted for reason in one.reasons()),
            *without_steps,
        ),
        {**versions, "peers": ", ".join(peer_versions())},
        request.command,
    )


def _option(mine: Sequence[Predicted], request: Request) -> Option:
    """One spec or bundle on one target; `mine` has all its kinds of layers."""
    given, target = mine[0].given, mine[0].target
    layers = tuple(_layer(one, one.programs, request) for one in mine if one.programs is not None)
    first = next(prediction for one in mine for prediction in one.found).report
    devices = given.spec.mesh.devices // given.spec.mesh.data
    chips = devices / chip(target).devices_per_chip
    price = request.prices.get(target)
    complete = len(layers) == len(mine)
    caches = [layer.count and layer.count * layer.memory.cache_bytes for layer in layers]
    constants = tuple(f"{name} {getattr(first.model, name):g} ({source})" for name, source in first.model.sources)
    return Option(
        given.name,
        target,
        devices,
        chips,
        price,
        layers,
        _steps(layers, complete, None if price is None else price * chips),
        sum(filter(None, caches)) if complete and all(caches) else None,
        first.compiler,
        first.compiler_verified,
        constants,
    )


def _layer(one: Predicted, programs: Programs, request: Request) -> Layer:
    memory = CacheMemory.of(one.part, one.target)
    plans = {task.source.path: KernelPlan.from_dict(task.plan) for task in programs.tasks.values()}
    return Layer(
        one.part.layer,
        one.given.layers(one.part.layer, request),
        Memory(
            memory.page_bytes,
            memory.padding_bytes,
            memory.num_pages,
            memory.cache_bytes,
            chip(one.target).usable_hbm_bytes,
        ),
        tuple(_kernel(plan) for plan in sorted(plans.values(), key=lambda plan: (KINDS.index(plan.kind), plan.tokens))),
        tuple(_timing(prediction, programs) for prediction in one.found),
    )


def _kernel(plan: KernelPlan) -> Kernel:
    return Kernel(
        plan.path,
        plan.tokens,
        tiles_in_words(plan.decode),
        tiles_in_words(plan.block),
        plan.origin,
        plan.vmem_need,
        plan.vmem_bytes,
        tuple(map(str, decisions(plan.recipe, plan.kind))),
    )


def _timing(one: Prediction, programs: Programs) -> Timing:
    report, workload = one.report, one.workload
    return Timing(
        workload.label,
        one.variant.kind,
        len(workload.q_lens),
        sum(workload.q_lens),
        workload.context,
        str(one.variant),
        report.seconds,
        report.kernel_seconds,
        report.mbu or 0.0,
        report.mfu or 0.0,
        report.moved_bytes,
        bound_of(report),
        peers_of(programs.model, programs.limits.page_size, report.target, workload),
    )


def _steps(layers: Sequence[Layer], complete: bool, dollars_an_hour: float | None) -> tuple[Step, ...]:
    """Each batch through all layers; `complete` says whether every kind of layer is here."""
    first = {timing.batch: timing for layer in layers for timing in layer.timings}
    steps = []
    for label, timing in first.items():
        of_layers = [(layer.count, _seconds(layer, label)) for layer in layers]
        total = (
            math.fsum(count * seconds for count, seconds in of_layers if count and seconds)
            if complete and all(count and seconds for count, seconds in of_layers)
            else None
        )
        dollars = None if total is None or dollars_an_hour is None else dollars_an_hour / SECONDS_AN_HOUR * total
        steps.append(
            Step(
                label,
                timing.kind,
                timing.new_tokens,
                total,
                None if total is None else timing.new_tokens / total,
                None if dollars is None else 1e6 * dollars / timing.new_tokens,
            )
        )
    return tuple(steps)


def _seconds(layer: Layer, label: str) -> float | None:
    return next((timing.seconds for timing in layer.timings if timing.batch == label), None)
