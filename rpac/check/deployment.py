"""What a deployment runs before traffic: every byte, every canary, and random batches through the engine's own call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from rpac.batch import Limits
from rpac.bundle import Manifest, Place, read_manifest, verify_bundle
from rpac.contract.arrays import cdiv
from rpac.contract.program import Variant
from rpac.devices.backends import skip_absent_tpu
from rpac.devices.client import build_string
from rpac.engine import CanaryRun, Engine, Event, ProgramReady, StepEngine, load_layers, load_steps
from rpac.engine.probe import probe
from rpac.engine.runtime import Results
from rpac.errors import CheckError, RpacError
from rpac.oracle.canary import answer, make_call
from rpac.oracle.expected import expected

MAX_ROWS = 6
MAX_LEN = 1024  # tokens of a row, for the oracle's sake
MAX_NEW = 256  # new tokens of a batch, unless one prefill chunk has more


@dataclass(frozen=True)
class Step:
    """One row of the report; `detail` says what was found, or what is wrong and what to do. `exit_code` is 0 where it is ok."""

    name: str
    ok: bool
    detail: str
    seconds: float
    exit_code: int = 0


@dataclass(frozen=True)
class ServeReport:
    """What was found of a bundle, in order."""

    bundle: str
    seed: int
    steps: tuple[Step, ...]

    @property
    def exit_code(self) -> int:
        """0, or that of the first error."""
        return next((step.exit_code for step in self.steps if not step.ok), 0)


class _Steps:
    """Runs steps one by one; what a step raises is its row."""

    def __init__(self, progress: Callable[[Step], None], starting: Callable[[str], None]) -> None:
        self.done: list[Step] = []
        self.layer = ""  # what the steps are of, where a model has several kinds of layers
        self._progress = progress
        self._starting = starting

    def run(self, name: str, what: Callable[[], str]) -> bool:
        name = f"{self.layer} {name}".strip()
        self._starting(name)
        start, exit_code = time.perf_counter(), 0
        try:
            detail = what()
        except RpacError as error:
            detail, exit_code = str(error), error.exit_code
        except Exception as error:  # whatever the runtime does with a program, the report must come
            detail, exit_code = f"raised {type(error).__name__}: {error}", CheckError.exit_code
        self.done.append(Step(name, not exit_code, detail, time.perf_counter() - start, exit_code))
        self._progress(self.done[-1])
        return not exit_code


def serve_check(
    bundle: Place,
    target: str | None = None,
    *,
    seed: int,
    batches: int = 1,
    allow_compile: bool = False,
    trust: str | os.PathLike[str] | None = None,
    progress: Callable[[Step], None] = lambda step: None,
    starting: Callable[[str], None] = lambda name: None,
) -> ServeReport:
    """Checks that a bundle, a path or a URL, serves on this process's first device (`target="cpu"`: its CPU). In each of
    several processes of `jax.distributed`, with one `seed`: on all of their devices, and each judges its own.

    `batches` random batches are drawn from `seed` for each program. `trust`: the file of a trust policy, which must hold before
    anything is loaded. `starting` is called with the name of each step, `progress` with what came of it. Takes the device memory
    of one cache. Never raises for a bundle that does not serve: the report says why, and a step that others need ends it.

    It runs the bundle's programs in this process. For a bundle that may end the process, see `rpac.check.isolated`.
    """
    steps = _Steps(progress, starting)
    if steps.run("verify", lambda: verified_detail(verify_bundle(bundle))):
        _check(steps, bundle, target, seed, batches, {"allow_compile": allow_compile, "trust": trust})
    return ServeReport(os.fspath(bundle), seed, tuple(steps.done))


def serve_check_verified(
    bundle: Place,
    target: str | None,
    *,
    seed: int,
    batches: int,
    allow_compile: bool,
    expect_digest: str,
    progress: Callable[[Step], None],
    starting: Callable[[str], None],
) -> ServeReport:
    """As `serve_check`, of a bundle that was verified elsewhere and must have this digest: without that step."""
    steps = _Steps(progress, starting)
    _check(steps, bundle, target, seed, batches, {"allow_compile": allow_compile, "expect_digest": expect_digest})
    return ServeReport(os.fspath(bundle), seed, tuple(steps.done))


def verified_detail(manifest: Manifest) -> str:
    """What the step says that read and hashed every file."""
    files = len(manifest.blobs) + len(manifest.files)
    return f"{manifest.name}, spec {manifest.spec_hash[:16]}: {files} files hashed"


def _check(
    steps: _Steps, bundle: Place, target: str | None, seed: int, batches: int, options: Mapping[str, Any]
) -> None:
    """All steps from the load on; `options` are those of `rpac.load`."""
    engines: dict[str, Engine] = {}
    events: list[Event] = []

    def given() -> dict[str, Any]:
        return {"devices": _devices(bundle), "observer": events.append, **options}

    def opened() -> str:
        engines.update(load_layers(bundle, target, **given()))
        engine, *_ = engines.values()
        device = engine.device
        return f"target {engine.target} on {device} ({device.device_kind}; {build_string(device.client)})"

    if not steps.run("load", opened):
        return
    rng = np.random.default_rng(seed)
    for layer, engine in engines.items():
        steps.layer = layer
        if steps.run("warm", lambda: _warmed(engine, events)):  # noqa: B023  (runs now)
            _run_programs(steps, engine, events, rng, batches)
    steps.layer = ""
    if next(iter(engines.values())).target in read_manifest(bundle).steps:
        steps.run("steps", lambda: _steps_warmed(load_steps(bundle, target, **given()), events))


def _devices(bundle: Place) -> list[jax.Device] | None:
    """Those of all processes, for a mesh that one of several has too few for; else what `load` takes by itself."""
    count = read_manifest(bundle).mesh.devices
    if count == 1:
        return None
    skip_absent_tpu()
    if jax.process_count() == 1:
        return None
    return list(jax.devices()[:count])


def _warmed(engine: Engine, events: Sequence[Event]) -> str:
    engine.warm()
    tiers = sorted({event.tier for event in events if isinstance(event, ProgramReady)})
    return f"{len(engine.ready)} programs ready, from the {' and '.join(tiers)} tier"


def _steps_warmed(engine: StepEngine, events: list[Event]) -> str:
    """Loads the steps. They are not run: their parameters are the server's."""
    events.clear()
    engine.warm()
    tiers = sorted({event.tier for event in events if isinstance(event, ProgramReady)})
    return f"{len(engine.ready)} steps of {engine.function} ready, from the {' and '.join(tiers)} tier"


def _run_programs(steps: _Steps, engine: Engine, events: list[Event], rng: np.random.Generator, batches: int) -> None:
    for variant in engine.programs:

        def canary(variant: Variant = variant) -> str:
            engine.warm([variant], canary=True)
            return f"error {next(_canary_errors(events)):.2g}"

        if not steps.run(f"canary {variant}", canary):
            continue
        for _ in range(batches):
            rows = random_rows(variant, engine.limits, rng)
            seed = int(rng.integers(1 << 20))
            steps.run(f"batch {variant}", lambda: _run_batch(engine, variant, rows, seed))  # noqa: B023  (runs now)


def _canary_errors(events: Sequence[Event]) -> Iterator[float]:
    """Of the canaries that ran, the last one first."""
    return (event.error for event in reversed(events) if isinstance(event, CanaryRun))


def _run_batch(engine: Engine, variant: Variant, rows: Sequence[tuple[int, int]], seed: int) -> str:
    program = engine.programs[variant]
    q_lens, context_lens = [q_len for q_len, _ in rows], [context for _, context in rows]
    call = make_call(variant.kind, program.args, engine.limits, engine.kv_layout, q_lens, context_lens, seed)
    log_sum_exp = any(dims.name == "lse" for dims in program.results)
    wanted = answer(call, *expected(call, engine.model, engine.kv_layout, log_sum_exp))

    def run(args: Sequence[Any]) -> Results:
        taken = len(args) - len(call.extra)
        return engine(*args[:taken], **dict(zip(call.extra, args[taken:], strict=True)))

    found = probe(run, call, program, engine.placement).against(wanted)
    named = " ".join(f"{q_len}+{context}" for q_len, context in rows)
    if found.notes:
        raise CheckError(
            f"new tokens + context {named}: {'; '.join(found.notes)}; must be the oracle's; do not serve with it"
        )
    return f"new tokens + context {named}: error {found.error:.2g}"


def random_rows(variant: Variant, limits: Limits, rng: np.random.Generator) -> list[tuple[int, int]]:
    """New tokens and context of the rows of a batch that fits a program and the cache; none where no row does."""
    kind, tokens = variant
    chunk, full = limits.prefill_chunk, min(limits.max_kv_len, MAX_LEN)
    room, pages = min(tokens, max(MAX_NEW, chunk)), limits.num_pages
    rows: list[tuple[int, int]] = []
    for row in range(int(rng.integers(1, min(limits.max_num_seqs, MAX_ROWS) + 1))):
        if kind == "prefill":
            q_len = chunk
        elif kind == "decode" or (row and rng.random() < 0.5):
            q_len = limits.decode_len
        else:
            q_len = int(rng.integers(1, min(room, full) + 1))
        context = int(rng.integers(0, max(full - q_len, 0) + 1))
        need = cdiv(q_len + context, limits.page_size)
        if q_len <= room and need <= pages:
            rows.append((q_len, context))
            room, pages = room - q_len, pages - need
        if not room:
            break
    return rows
