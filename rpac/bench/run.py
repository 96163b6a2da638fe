"""Times a bundle: opens it, checks every program on its batch, times each, and predicts each where there is a schedule."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import jax

from rpac._version import __version__
from rpac.bench.batches import Case, batch_of, cases_asked, cases_of_programs
from rpac.bench.inputs import Calls, make_inputs
from rpac.bench.machine import machine
from rpac.bench.profile import NoDeviceTime, profiled
from rpac.bench.result import Bench, Entry, Predicted, Timing
from rpac.bench.stream import stream_bandwidth
from rpac.bench.time import Timed, between_fences, estimate, plan
from rpac.bench.verify import Checked, verify
from rpac.bundle import Manifest, Place, digest, read_texts, verify_bundle
from rpac.devices.chip import is_tpu
from rpac.engine import Engine, load_layers
from rpac.errors import BatchError, CheckError, RpacError, TargetError
from rpac.files.store import Store
from rpac.predict import Asked, Programs, needed_work, predict_on, programs_of

Progress = Callable[[str], None]

YET = "the run ended before it was predicted"
MOST_PROFILED = 200  # calls of one trace, whose buffer on the device has an end


@dataclass(frozen=True)
class Options:
    """What a run is to time. `seconds` of timing for each program and batch, or `calls`; `seed` is that of all inputs."""

    target: str | None = None
    kinds: tuple[str, ...] = ()
    asked: Asked = field(default_factory=Asked)
    seed: int = 0
    seconds: float = 2.0
    calls: int | None = None
    check: bool = True
    allow_compile: bool = False
    any_compiler: bool = False


def bench(
    path: Place,
    options: Options,
    store: Store,
    progress: Progress = lambda line: None,
    keep: Callable[[Bench], None] = lambda bench: None,
) -> Bench:
    """Times the programs of the bundle at `path` on this process's first device, or on the devices of its mesh.

    `keep` is called with all that is known after each time and each prediction, so that nothing is lost where the run ends
    early. Schedules are cached in `store`. Raises BundleError; TargetError where the bundle has nothing for this device;
    BatchError or SelectionError for a batch that the bundle does not take; before anything is timed, CheckError where a
    program's output is not the oracle's; and CheckError where the runtime fails on a program.
    """
    manifest = verify_bundle(path)
    engines = _opened(path, options)
    cases = _cases(path, engines, options)
    first, *_ = engines.values()
    for layer, engine in engines.items():
        variants = {case.variant for case in cases if case.layer == layer}
        progress(f"making {len(variants)} programs ready on {engine.placement}")
        engine.warm(variants)
    checked = [_checked(engines[case.layer], case, options, progress) for case in cases]
    found = Bench(
        rpac=__version__,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        bundle=_bundle(manifest, first.target),
        machine=machine(first.device, len(first.placement.devices)),
        stream_bandwidth=stream_bandwidth(first.device),
        cases=len(cases),
        complete=False,
    )
    for case, check in zip(cases, checked, strict=True):
        entry = _timed(engines[case.layer], case, check, options)
        progress(f"{case}: {1e6 * entry.timing.spread.median:.1f} us, by {entry.timing.method}")
        found = replace(found, entries=(*found.entries, entry))
        keep(found)
    programs = cache(
        lambda layer: programs_of(path, first.target, store, progress, any_compiler=options.any_compiler, layer=layer)
    )
    for index, case in enumerate(cases):
        entry = _with_prediction(path, engines[case.layer], found.entries[index], programs)
        found = replace(found, entries=(*found.entries[:index], entry, *found.entries[index + 1 :]))
        keep(found)
    found = replace(found, complete=True)
    keep(found)
    return found


def _bundle(manifest: Manifest, target: str) -> dict[str, object]:
    built = next(one for one in manifest.targets.values() if one.name == target)
    return {
        "name": manifest.name,
        "digest": digest(manifest),
        "spec_hash": manifest.spec_hash,
        "target": target,
        "toolchain": dict(built.toolchain),
    }


def _opened(path: Place, options: Options) -> dict[str, Engine]:
    engines = load_layers(path, options.target, allow_compile=options.allow_compile)
    if jax.process_count() > 1:
        raise TargetError(
            f"{path}: found {jax.process_count()} processes; `rpac bench` runs in one; time the bundle on one host"
        )
    return engines


def _cases(path: Place, engines: Mapping[str, Engine], options: Options) -> list[Case]:
    """Programs and batches in the order in which they are timed. Raises BatchError where nothing is left."""
    context_lens = read_texts(path).spec.serving.context_lens
    cases: list[Case] = []
    for layer, engine in engines.items():
        asked = options.asked.workloads(engine.limits.decode_len)
        if asked:
            cases += cases_asked(layer, engine.programs, engine.limits, asked)
        else:
            cases += cases_of_programs(layer, engine.programs, engine.limits, context_lens)
    chosen = [case for case in cases if not options.kinds or case.variant.kind in options.kinds]
    if not chosen:
        kinds = ", ".join(dict.fromkeys(case.variant.kind for case in cases)) or "none"
        raise BatchError(
            f"{path}: found no batch of {', '.join(options.kinds)}; the batches are of {kinds}; leave --kind out, or name a "
            "batch with --decode, --prefill or --mixed"
        )
    return chosen


def _checked(engine: Engine, case: Case, options: Options, progress: Progress) -> Checked | None:
    if not options.check:
        return None
    with _of_runtime(engine, case):
        found = verify(engine, case, make_inputs(engine, case, options.seed))
    progress(f"{case}: {len(found.rows)} rows are the oracle's, error {found.error:.2g} of {found.tolerance:.2g}")
    return found


def _timed(engine: Engine, case: Case, checked: Checked | None, options: Options) -> Entry:
    workload, variant = case.workload, case.variant
    needed = needed_work(engine.model, workload)
    with _of_runtime(engine, case):
        calls = Calls(engine, case, make_inputs(engine, case, options.seed))
        timing = timed(calls, options.seconds, options.calls, engine.device.platform != "cpu")
    return Entry(
        layer=case.layer,
        kind=variant.kind,
        tokens=variant.tokens,
        label=workload.label,
        q_lens=workload.q_lens,
        kv_lens=workload.kv_lens,
        seed=options.seed,
        tier=engine.totals.ready[variant].tier,
        needed_bytes=needed.bytes,
        needed_flops=needed.flops,
        check=None if checked is None else asdict(checked),
        timing=timing,
        not_predicted=YET,
    )


@contextmanager
def _of_runtime(engine: Engine, case: Case) -> Iterator[None]:
    """Turns what the runtime says of a program, such as that its memory does not hold the cache, into a CheckError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise CheckError(
            f"program {case} on {engine.placement}: the runtime raised {error}; must run; leave it out with --kind, name a "
            "smaller batch, or build with a smaller `num_pages` if the device's memory does not hold the cache"
        ) from error


def timed(calls: Timed, seconds: float, count: int | None, profile: bool) -> Timing:
    """Times calls by the profiler where `profile` says that there may be one for the device, else between fences."""
    estimated = estimate(calls)
    fenced = plan(estimated, seconds, count)
    why = "the profiler reports no device time of a CPU"
    if profile:
        try:
            found = profiled(calls, min(count or fenced.times * fenced.calls_each, MOST_PROFILED))
        except NoDeviceTime as error:
            why = str(error)
        else:
            return Timing("profiler", found.calls, operations=found.operations)
    return Timing("fences", between_fences(calls, fenced), fenced.calls_each, why)


def _with_prediction(path: Place, engine: Engine, entry: Entry, programs: Callable[[str], Programs]) -> Entry:
    """The entry with the prediction of its batch, or with the reason why there is none."""
    if not is_tpu(engine.target):
        return replace(entry, not_predicted=f"the target {engine.target} has no schedule to predict from")
    case = entry.case
    try:
        batch, _ = batch_of(engine.limits, case)
        report = predict_on(programs(case.layer), case.variant, batch, case.workload).report
    except RpacError as error:  # whatever is wrong with a prediction, what was measured stands
        # Without the path: the file is sent to others.
        return replace(entry, not_predicted=str(error).removeprefix(f"{path}: "))
    kernels = {kernel.name: kernel.seconds for kernel in report.kernels}
    predicted = Predicted(report.seconds, report.kernel_seconds, kernels, report.compiler, asdict(report.model))
    return replace(entry, predicted=predicted, not_predicted="")
