"""Checks the sources of a spec: every batch, in every mode, against the oracle; and compiles every target."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from queue import Queue

import numpy as np
from numpy.typing import NDArray

from rpac.check.arrays import Arguments, Array, make_arguments
from rpac.check.bad_rows import contained, draw_wrong, with_wrong
from rpac.check.batches import CheckBatch, batches_of, neighbors_of
from rpac.check.compare import Difference, compare, lse_notes
from rpac.check.execute import TIME_LIMIT, Outcome, Run, modes_of, prepare_run
from rpac.check.poison import Poisons, poisoned, poisons_at_once, reach
from rpac.check.report import CheckReport, CompileResult, Result
from rpac.contract.program import Source
from rpac.devices.toolchain import prepare
from rpac.errors import CheckError, CompileError
from rpac.kernels import render
from rpac.lower import Task, tasks_of
from rpac.oracle.expected import oracle
from rpac.oracle.tolerance import TOLERANCE
from rpac.plan import KernelPlan, plan_spec
from rpac.plan.tuned import Tuned, TunedTiles
from rpac.spec import Spec

RANDOM_BATCHES = 2
WRONG_BATCHES = 3  # of each source
SPARE_PAGES = 2  # of no sequence

Expected = tuple[NDArray[np.float32], Array, NDArray[np.float32] | None]  # out, cache and lse, where there is one
Compile = Callable[[Sequence[Task]], object]
Progress = Callable[[Result | CompileResult], None]


@dataclass(frozen=True)
class Unit:
    """One source to check, for all the targets whose plans make the same code."""

    spec: Spec
    plan: KernelPlan
    source: Source
    targets: tuple[str, ...]


def check_spec(
    spec: Spec,
    *,
    targets: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    seed: int | None = None,
    random_batches: int = RANDOM_BATCHES,
    jobs: int = 1,
    compile: Compile | None = None,
    progress: Progress = lambda row: None,
    tuned: Tuned = TunedTiles.of,
) -> CheckReport:
    """Checks every source of a spec, or those of some targets and kinds, and compiles what it checked.

    `seed` decides the data and the random batches; None draws one, which the report holds. `jobs` processes run sources
    side by side, with the same report; with one, this process does it all. `compile` takes the tasks of one target, is
    called once a target and raises CompileError; None compiles nothing. `progress` is called with each row as soon as it
    is known. Never raises for a kernel that fails: see the report's `failed`.
    """
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    planned = [
        (part, plan, render(part, plan))
        for part in spec.parts
        for target in targets or spec.targets
        for plan in plan_spec(part, target, tuned=tuned(target))
        if kinds is None or plan.kind in kinds
    ]
    units = _units(planned)
    results = []
    for result in _run_units(units, seed, random_batches, jobs):
        progress(result)
        results.append(result)
    order = [unit.source.path for unit in units]
    results.sort(key=lambda result: order.index(result.source))
    compiled = []
    if compile is not None:
        for target in dict.fromkeys(plan.target for _, plan, _ in planned):
            tasks = [
                task
                for part, plan, source in planned
                if plan.target == target
                for task in tasks_of(part, [(plan, source)])
            ]
            compiled.append(_compile(compile, target, tasks))
            progress(compiled[-1])
    sources = {source.path: source.sha256 for _, _, source in planned}
    return CheckReport(spec.name, spec.hash, seed, tuple(results), tuple(compiled), sources)


def check_source(
    spec: Spec,
    plan: KernelPlan,
    source: Source,
    *,
    targets: Sequence[str] = (),
    batches: Sequence[CheckBatch] | None = None,
    modes: Sequence[str] | None = None,
    seed: int = 0,
    random_batches: int = RANDOM_BATCHES,
    time_limit: float = TIME_LIMIT,
) -> Iterator[Result]:
    """Runs one source on its batches, or on those given, in every mode that its target has; yields each result at once.

    Where no batches are given, some rows of one more batch hold poison, as `check_neighbors` says. `targets` is what the
    results say they are for: the plan's own target if empty. A run in the interpreter that takes longer than `time_limit`
    seconds fails.
    """
    neighbors = None
    if batches is None:
        batches = batches_of(spec, plan, np.random.default_rng(seed), random_batches)
        neighbors = neighbors_of(spec, plan)
    prepared = _Prepared.of(
        spec, plan, source, [*batches, *([neighbors] if neighbors else [])], targets, seed, time_limit
    )
    modes = modes or modes_of(plan)
    for batch in batches:
        args = prepared.arguments(batch)
        wanted = prepared.expected(args)
        for mode in modes:
            yield prepared.held_against_oracle(batch, args, wanted, mode)[0]
    if neighbors is not None:
        yield from _check_neighbors(prepared, neighbors, modes[0], None)
        if spec.serving.bounds_checks:
            yield from _check_bad_rows(prepared, neighbors, modes[0], WRONG_BATCHES)


def check_neighbors(
    spec: Spec, plan: KernelPlan, source: Source, *, poisons: Sequence[Poisons] | None = None, seed: int = 0
) -> Iterator[Result]:
    """Runs a batch of several rows against the oracle, then with poison in live rows, once for each of `poisons`: no bit of
    another row may change.

    Without `poisons` it is one run with several at once, drawn for each source. All are in one mode, the first, because what
    a row's numbers reach does not depend on when a copy is made. Yields nothing where a batch has room for one row only.
    """
    batch = neighbors_of(spec, plan)
    if batch is not None:
        prepared = _Prepared.of(spec, plan, source, [batch], (), seed, TIME_LIMIT)
        yield from _check_neighbors(prepared, batch, modes_of(plan)[0], poisons)


def _check_neighbors(
    prepared: _Prepared, batch: CheckBatch, mode: str, poisons: Sequence[Poisons] | None
) -> Iterator[Result]:
    spec = prepared.spec
    args = prepared.arguments(batch)
    result, clean = prepared.held_against_oracle(batch, args, prepared.expected(args), mode)
    yield result
    if poisons is None:
        poisons = [poisons_at_once(spec, batch, prepared.drawn(prepared.source.path))]
    for together in poisons:
        dirty = poisoned(spec, args, together)
        outcome, seconds = prepared.timed(dirty, mode)
        found = reach(spec, args, clean, dirty, [poison.row for poison in together], outcome)
        name = f"{batch.name}, {', '.join(map(str, together))}"
        yield prepared.result(replace(batch, name=name), mode, found, outcome, seconds)


def check_bad_rows(
    spec: Spec,
    plan: KernelPlan,
    source: Source,
    *,
    count: int = WRONG_BATCHES,
    mode: str = "",
    seed: int = 0,
    time_limit: float = TIME_LIMIT,
) -> Iterator[Result]:
    """Runs a batch of several rows against the oracle, then `count` times with wrong numbers in its metadata, drawn for each
    source: no bit of another row may change, nor a page that is not of a row with a wrong number.

    Yields nothing where a batch has room for one row only.
    """
    batch = neighbors_of(spec, plan)
    if batch is not None:
        prepared = _Prepared.of(spec, plan, source, [batch], (), seed, time_limit)
        yield from _check_bad_rows(prepared, batch, mode or modes_of(plan)[0], count)


def _check_bad_rows(prepared: _Prepared, batch: CheckBatch, mode: str, count: int) -> Iterator[Result]:
    spec, kind = prepared.spec, prepared.plan.kind
    args = prepared.arguments(batch)
    result, clean = prepared.held_against_oracle(batch, args, prepared.expected(args), mode)
    yield result
    rng = prepared.drawn(f"wrong numbers, {prepared.source.path}")
    for _ in range(count):
        wrong = draw_wrong(spec, kind, args, rng)
        spoiled = with_wrong(args, wrong)
        outcome, seconds = prepared.timed(spoiled, mode)
        found = contained(spec, kind, args, clean, spoiled, outcome)
        yield prepared.result(replace(batch, name=", ".join(map(str, wrong))), mode, found, outcome, seconds)


@dataclass(frozen=True)
class _Prepared:
    """A source that is ready to run, on caches of one number of pages, because each is another program to compile."""

    spec: Spec
    plan: KernelPlan
    source: Source
    targets: tuple[str, ...]
    seed: int
    run: Run
    pages: int

    @classmethod
    def of(
        cls,
        spec: Spec,
        plan: KernelPlan,
        source: Source,
        batches: Sequence[CheckBatch],
        targets: Sequence[str],
        seed: int,
        time_limit: float,
    ) -> _Prepared:
        """`batches` are all that it will run."""
        pages = max(batch.pages(spec.serving.page_size) for batch in batches) + SPARE_PAGES
        run = prepare_run(plan, source, time_limit)
        return cls(spec, plan, source, tuple(targets) or (plan.target,), seed, run, pages)

    def drawn(self, name: str) -> np.random.Generator:
        """What the seed draws for a batch or a source of that name."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def bucket(self, batch: CheckBatch) -> int:
        return next(bucket for bucket in self.plan.tokens if bucket >= batch.new_tokens)

    def arguments(self, batch: CheckBatch) -> Arguments:
        return make_arguments(self.spec, batch, self.bucket(batch), self.pages, self.drawn(batch.name))

    def expected(self, args: Arguments) -> Expected:
        out, kv_cache, lse = oracle(self.spec.model, self.spec.serving.kv_layout, args.of_batch, args.extra)
        return out, kv_cache, lse if self.spec.serving.log_sum_exp else None

    def timed(self, args: Arguments, mode: str) -> tuple[Outcome, float]:
        start = time.perf_counter()
        outcome = self.run(args, mode)
        return outcome, time.perf_counter() - start

    def held_against_oracle(
        self, batch: CheckBatch, args: Arguments, expected: Expected, mode: str
    ) -> tuple[Result, Outcome]:
        outcome, seconds = self.timed(args, mode)
        found = _judged(args, outcome, *expected, self.spec.serving.kv_layout)
        return self.result(batch, mode, found, outcome, seconds), outcome

    def result(self, batch: CheckBatch, mode: str, found: Difference, outcome: Outcome, seconds: float) -> Result:
        return Result(
            source=self.source.path,
            kind=self.plan.kind,
            targets=self.targets,
            mode=mode,
            batch=batch.name,
            tokens=self.bucket(batch),
            error=found.error,
            tolerance=found.tolerance,
            cache_ok=found.cache_ok,
            races=outcome.races,
            notes=found.notes,
            seconds=seconds,
        )


def _judged(
    args: Arguments,
    outcome: Outcome,
    want_out: NDArray[np.float32],
    want_cache: Array,
    want_lse: NDArray[np.float32] | None,
    kv_layout: str,
) -> Difference:
    if outcome.out is None or outcome.kv_cache is None:
        return Difference(math.inf, TOLERANCE[args.queries.dtype.name], False, outcome.notes)
    found = compare(args, outcome.out, outcome.kv_cache, want_out, want_cache, kv_layout=kv_layout)
    more = () if want_lse is None else lse_notes(args, outcome.lse, want_lse)
    return replace(found, notes=(*found.notes, *more, *outcome.notes))


def _units(planned: Sequence[tuple[Spec, KernelPlan, Source]]) -> list[Unit]:
    """Sources with one body are one unit: targets differ in what their headers say."""
    same: dict[tuple[str, str], list[tuple[Spec, KernelPlan, Source]]] = {}
    for part, plan, source in planned:
        same.setdefault((part.layer, source.body), []).append((part, plan, source))
    return [Unit(*group[0], tuple(plan.target for _, plan, _ in group)) for group in same.values()]


def _check_unit(unit: Unit, seed: int, random_batches: int, found: Queue[Result | None]) -> None:
    """For a process of its own, which hands back each result as it comes."""
    for result in _results(unit, seed, random_batches):
        found.put(result)


def _results(unit: Unit, seed: int, random_batches: int) -> Iterator[Result]:
    return check_source(
        unit.spec, unit.plan, unit.source, targets=unit.targets, seed=seed, random_batches=random_batches
    )


def _run_units(units: Sequence[Unit], seed: int, random_batches: int, jobs: int) -> Iterator[Result]:
    if jobs == 1:
        for unit in units:
            yield from _results(unit, seed, random_batches)
        return
    # Spawned: JAX holds threads and locks. The interpreter keeps one kernel's state a process. Results come through a
    # manager's queue, because a process that is killed may leave one of pipes and locks unusable.
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(min(jobs, len(units)), context, prepare) as pool:
        found: Queue[Result | None] = manager.Queue()
        futures = [pool.submit(_check_unit, unit, seed, random_batches, found) for unit in units]
        for future in futures:
            future.add_done_callback(lambda _: found.put(None))  # after the last result of its unit
        running = len(futures)
        try:
            while running:
                result = found.get()
                if result is not None:
                    yield result
                    continue
                running -= 1
                for future in futures:
                    if future.done():
                        future.result()
        except BrokenProcessPool as error:
            raise CheckError(
                "a checking process died; it may have run out of memory: check with fewer --jobs"
            ) from error


def _compile(compile: Compile, target: str, tasks: Sequence[Task]) -> CompileResult:
    start = time.perf_counter()
    message = ""
    try:
        compile(tasks)
    except CompileError as error:
        message = str(error)
    return CompileResult(target, len(tasks), message, time.perf_counter() - start)
