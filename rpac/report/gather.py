"""Gathers a report: plans, memory and predictions of each spec or bundle on each target, with what others have found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from rpac.bundle import digest, read_manifest
from rpac.contract.kind import KINDS
from rpac.contract.mesh import Mesh
from rpac.devices.chip import TPU_TARGETS, chip, is_tpu
from rpac.devices.toolchain import toolchain
from rpac.errors import CompileError, PlanError, RpacError, ScheduleError, SpecError, TargetError
from rpac.files.store import Store
from rpac.plan import KernelPlan
from rpac.plan.cache_memory import CacheMemory
from rpac.plan.tuned import Tuned, TunedTiles
from rpac.plan.words import decisions, tiles_in_words
from rpac.predict import Asked, Prediction, Programs, Workload, predict, programs_of
from rpac.report.batches import report_batches
from rpac.report.bound import bound_of
from rpac.report.checks import Check
from rpac.report.facts import Kernel, Layer, Memory, Option, Report, Step, Subject, Timing
from rpac.report.peers import peer_versions, peers_of
from rpac.spec import Spec, load_spec

Predict = Callable[[Programs, Workload], Prediction]
SECONDS_AN_HOUR = 3600.0
NOT_HERE = (PlanError, TargetError, ScheduleError, CompileError)  # of one target; the others may be fine


@dataclass(frozen=True)
class Request:
    """What a report is asked for. `targets`: all that each spec or bundle has, where empty. `layers`: how many layers of each
    kind the model has, by the kind's name, which is empty where there is one kind. `prices`: dollars an hour for one chip.
    """

    targets: tuple[str, ...] = ()
    asked: Asked = field(default_factory=Asked)
    quick: bool = False
    layers: Mapping[str, int] = field(default_factory=dict)
    prices: Mapping[str, float] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    any_compiler: bool = False
    jobs: int = 1
    tuned: Tuned = TunedTiles.of
    command: str = ""


class Observer:
    """Told of the progress of `gather`, from any thread. Does nothing; override what matters."""

    def planned(self, count: int) -> None:
        """There are so many batches to predict."""

    def working(self, what: str) -> None:
        """Something that takes long begins."""

    def done(self, what: str) -> None:
        """One of the batches is done."""


@dataclass(frozen=True)
class _Given:
    """A path with the spec that it is, or that its bundle was built from."""

    path: Path
    name: str
    spec: Spec
    spec_hash: str
    digest: str | None
    targets: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """One kind of layer on one target: its programs, or why there are none, and the batches to predict."""

    given: _Given
    target: str
    part: Spec
    programs: Programs | None
    workloads: tuple[Workload, ...] = ()
    refused: RpacError | None = None


def gather(
    paths: Sequence[Path],
    request: Request,
    store: Store,
    observer: Observer | None = None,
    predict_one: Predict = predict,
) -> Report:
    """The report of specs and bundles (folders).

    A target or a batch that cannot be predicted is named under `missing`. Raises the error of the first of them where
    nothing can be; SpecError or BundleError for what cannot be read; TargetError where there is no TPU target; SpecError for
    a count of layers, a price or a check that is of nothing here.
    """
    observer = observer or Observer()
    givens = _named_apart([_given(path, request) for path in paths])
    _check_request(givens, request)
    jobs = [
        _job(given, target, part, request, store, observer)
        for given in givens
        for target in given.targets
        for part in given.spec.parts
    ]
    observer.planned(sum(len(job.workloads) for job in jobs))
    with ThreadPoolExecutor(max(1, request.jobs)) as pool:
        results = list(pool.map(lambda job: _predicted(job, predict_one, observer), jobs))
    missing = _missing(givens, request)
    options, timed, errors = [], False, []
    for given in givens:
        for target in given.targets:
            mine = [
                pair for pair in zip(jobs, results, strict=True) if (pair[0].given, pair[0].target) == (given, target)
            ]
            for job, (_, refused) in mine:
                errors += [error for _, error in refused]
                missing += [
                    f"{_where(job)}{label and ', '}{label}: {str(error).removeprefix(f'{label}: ')}"
                    for label, error in refused
                ]
            if any(found for _, (found, _) in mine):
                options.append(_option(given, target, mine, request))
                timed = True
    if not timed:
        raise errors[0]
    batches = dict.fromkeys(step.batch for option in options for step in option.steps)
    versions = {name: value for name, value in toolchain().items() if not name.endswith("_files")}
    versions |= {"peers": ", ".join(peer_versions())}
    subjects = tuple(_subject(given, request.checks) for given in givens)
    return Report(subjects, tuple(options), tuple(batches), tuple(missing), versions, request.command)


def _given(path: Path, request: Request) -> _Given:
    if path.is_dir():
        manifest = read_manifest(path)
        spec = load_spec(path / "spec.yaml")
        names = tuple(dict.fromkeys(one.name for one in manifest.targets.values()))
        found = digest(manifest)
        name, spec_hash = manifest.name, manifest.spec_hash
    else:
        spec, found = load_spec(path), None
        name, spec_hash, names = spec.name, spec.hash, spec.targets
    targets = request.targets or tuple(filter(is_tpu, names))
    if not targets:
        raise TargetError(
            f"{path}: found no TPU target, only {', '.join(names)}; must have one of {', '.join(TPU_TARGETS)}, because only "
            "they have schedules to predict from; name one with --target, or add it to the spec's targets"
        )
    return _Given(path, name, spec, spec_hash, found, targets)


def _named_apart(givens: Sequence[_Given]) -> list[_Given]:
    """Adds the path to each name that occurs twice, because two bundles of one spec can be compared too."""
    names = [one.name for one in givens]
    return [replace(one, name=f"{one.name} ({one.path})") if names.count(one.name) > 1 else one for one in givens]


def _check_request(givens: Sequence[_Given], request: Request) -> None:
    """Raises for what is said of nothing in the report: a slip of the pen must not vanish in it."""
    kinds = {part.layer for given in givens for part in given.spec.parts}
    for name in request.layers:
        if name not in kinds:
            named = ", ".join(f"{one}=N" for one in sorted(kinds - {""})) or "N"
            raise TargetError(
                f"--layers: found {name or 'a number alone'!r}; must be {named}, as the spec has its layers"
            )
    targets = dict.fromkeys(target for given in givens for target in given.targets)
    for name in request.prices:
        if name not in targets:
            raise TargetError(f"--price {name}: must be of a target of this report: {', '.join(targets)}")
    hashes = {given.spec_hash: given.name for given in givens}
    for check in request.checks:
        if check.spec_hash not in hashes:
            known = ", ".join(f"{one[:12]} ({name})" for one, name in hashes.items())
            raise TargetError(
                f"--check {check.file}: found a check of the spec with hash {check.spec_hash[:12]}; must be of {known}; run "
                "`rpac check` on this spec again"
            )


def _job(given: _Given, target: str, part: Spec, request: Request, store: Store, observer: Observer) -> _Job:
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
        return _Job(given, target, part, None, refused=error)
    asked = request.asked.workloads(programs.limits.decode_len)
    workloads = tuple(asked or report_batches(programs.limits, programs.context_lens, request.quick))
    return _Job(given, target, part, programs, workloads)


Refusals = list[tuple[str, RpacError]]


def _predicted(job: _Job, predict_one: Predict, observer: Observer) -> tuple[list[Prediction], Refusals]:
    """The predictions of one kind of layer on one target, and the batches without one; of no label where all are."""
    if job.programs is None:
        assert job.refused is not None
        return [], [("", job.refused)]
    found, refused = [], []
    for workload in job.workloads:
        try:
            found.append(predict_one(job.programs, workload))
            observer.done(f"{_where(job)}, {workload.label}: {1e6 * found[-1].report.seconds:.1f} us")
        except SpecError:
            raise
        except RpacError as error:
            refused.append((workload.label, error))
            observer.done(f"{_where(job)}, {workload.label}: not predicted")
    return found, refused


def _where(job: _Job) -> str:
    layer = f", {job.part.layer} layers" if job.part.layer else ""
    return f"{job.given.name} on {job.target}{layer}"


def _option(
    given: _Given, target: str, mine: Sequence[tuple[_Job, tuple[list[Prediction], Refusals]]], request: Request
) -> Option:
    layers = tuple(_layer(job, found, request) for job, (found, _) in mine if job.programs is not None)
    first = next(one for _, (found, _) in mine for one in found).report
    devices = given.spec.mesh.devices // given.spec.mesh.data
    chips = devices / chip(target).devices_per_chip
    price = request.prices.get(target)
    complete = len(layers) == len(given.spec.parts)
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


def _layer(job: _Job, found: Sequence[Prediction], request: Request) -> Layer:
    assert job.programs is not None
    memory = CacheMemory.of(job.part, job.target)
    plans = {task.source.path: KernelPlan.from_dict(task.plan) for task in job.programs.tasks.values()}
    timings = tuple(_timing(one, job.programs) for one in found)
    return Layer(
        job.part.layer,
        request.layers.get(job.part.layer),
        Memory(
            memory.page_bytes,
            memory.padding_bytes,
            memory.num_pages,
            memory.cache_bytes,
            chip(job.target).usable_hbm_bytes,
        ),
        tuple(_kernel(plan) for plan in sorted(plans.values(), key=lambda plan: (KINDS.index(plan.kind), plan.tokens))),
        timings,
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


def _missing(givens: Sequence[_Given], request: Request) -> list[str]:
    """What nobody said or measured."""
    found = ["Nothing here was measured on a TPU: all times are predicted from the compiler's schedules."]
    checked = {check.spec_hash for check in request.checks}
    found += [
        f"{given.name}: not checked. Run `rpac check SPEC --json > check.json`, then give `--check check.json`."
        for given in givens
        if given.spec_hash not in checked
    ]
    kinds = dict.fromkeys(part.layer for given in givens for part in given.spec.parts)
    unknown = [name for name in kinds if name not in request.layers]
    if unknown:
        named = " ".join(f"`--layers {name and name + '='}N`" for name in unknown)
        found.append(f"Times of all layers: a spec does not say how many layers the model has. Give {named}.")
    without = [t for t in dict.fromkeys(t for given in givens for t in given.targets) if t not in request.prices]
    if without:
        named = " ".join(f"`--price {target}=DOLLARS`" for target in without)
        found.append(f"Cost on {', '.join(without)}: no price was given. Give {named}, an hour for one chip.")
    return found


def _subject(given: _Given, checks: Sequence[Check]) -> Subject:
    model, mesh = given.spec.model, given.spec.mesh
    return Subject(
        given.name,
        str(given.path),
        "spec" if given.digest is None else "bundle",
        given.spec_hash,
        given.digest,
        f"{model.q_heads} query heads, {model.kv_heads} KV heads of {model.head_dim} on a device, {model.kv_dtype} cache "
        f"({given.spec.serving.kv_layout}), pages of {given.spec.serving.page_size}{_spread(mesh)}",
        next((check for check in checks if check.spec_hash == given.spec_hash), None),
    )


def _spread(mesh: Mesh) -> str:
    return f", {mesh.devices} devices" if mesh.devices > 1 else ""
