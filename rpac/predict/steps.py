"""Predicts the whole step of a model: the user's function around the programs of a spec, compiled for a target."""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from rpac.batch import Batch, Limits
from rpac.batch.select import select
from rpac.bundle import Place, names_bundle, read_manifest
from rpac.contract.attention import Attention
from rpac.contract.program import Variant
from rpac.contract.step import TOKEN_ARRAYS
from rpac.errors import BundleError, Problem, SpecError
from rpac.files.store import Store
from rpac.plan.tuned import Tuned, TunedTiles
from rpac.predict.dump_step import to_json
from rpac.predict.programs import DUMP, Progress, layers_in, programs_of
from rpac.predict.run import needed_work
from rpac.schedule import Dump, Work
from rpac.schedule.dump import dump_step
from rpac.schedule.memory import Words, words_of
from rpac.schedule.step import StepCall, Timed
from rpac.schedule.step_report import StepReport, step_report
from rpac.schedule.traffic import looked_up_bytes
from rpac.spec import load_spec
from rpac.step import StepTask
from rpac.traffic.trace import Workload

TIMEOUT_S: Final = 3600.0
_METADATA: Final = ("kv_lens", "page_indices", "cu_q_lens", "distribution")


@dataclass(frozen=True)
class StepSchedules:
    """The schedules of one step, and what it takes: `arguments` as (name, shape of one device's part, dtype), the first
    `parameters` of which are the model's. `cache_layers`: of each cache, its kind of layer.
    """

    call: StepCall
    arguments: tuple[tuple[str, tuple[int, ...], str], ...]
    parameters: int
    cache_layers: tuple[str, ...]


@dataclass(frozen=True)
class Steps:
    """The steps of one spec or bundle and target, by variant; one is compiled when first asked for.

    `built`: of a bundle's steps, the hash of what each was lowered to.
    """

    name: str
    target: str
    models: Mapping[str, Attention]
    limits: Limits
    context_lens: tuple[int, ...]
    tasks: Mapping[Variant, StepTask]
    built: Mapping[Variant, str]
    store: Store
    progress: Progress
    any_compiler: bool = False
    _found: dict[Variant, StepSchedules] = field(default_factory=dict)

    def schedules(self, variant: Variant) -> StepSchedules:
        """Raises ScheduleError where the step cannot be compiled or read."""
        if variant not in self._found:
            dump, facts = self._dumped(self.tasks[variant], self.built.get(variant, ""))
            arguments = tuple((name, tuple(shape), dtype) for name, shape, dtype in facts["arguments"])
            self._found[variant] = StepSchedules(
                StepCall(dump, any_compiler=self.any_compiler),
                arguments,
                facts["parameters"],
                tuple(facts["cache_layers"]),
            )
        return self._found[variant]

    def _dumped(self, task: StepTask, built: str) -> tuple[Dump, dict[str, Any]]:
        self.progress(f"lowering {task.label}, and compiling it where its schedules are not known yet")
        with tempfile.TemporaryDirectory(prefix="rpac-step-") as folder:
            path, facts = Path(folder, "task.json"), Path(folder, "facts.json")
            path.write_text(to_json(task))
            arguments = [str(path), str(facts), str(self.store.root or ""), built]
            dump = dump_step(
                [sys.executable, "-m", "rpac.predict.dump_step", *arguments], task.target, timeout=TIMEOUT_S
            )
            found = json.loads(facts.read_text())
        if dump is None:
            stored = self.store.read(found["key"])
            assert stored is not None  # the child process has read it
            return Dump(**json.loads(gzip.decompress(stored[DUMP]))), found
        self.store.write(found["key"], {DUMP: gzip.compress(json.dumps(asdict(dump)).encode(), 6, mtime=0)})
        return dump, found


@dataclass(frozen=True)
class StepPrediction:
    """One batch on the step that it selects."""

    name: str
    function: str
    workload: Workload
    variant: Variant
    report: StepReport

    def to_json(self) -> dict[str, Any]:
        """The report's fields at the top, as those of a program's prediction are."""
        batch = {
            "label": self.workload.label,
            "q_lens": list(self.workload.q_lens),
            "kv_lens": list(self.workload.kv_lens),
        }
        of_step = {"name": self.name, "step": self.function, "program": str(self.variant), "batch": batch}
        return {**of_step, **self.report.to_json()}


def steps_to_predict(
    path: Place,
    target: str,
    function: str,
    folder: Path,
    store: Store,
    progress: Progress,
    *,
    any_compiler: bool = False,
    tuned: Tuned = TunedTiles.of,
) -> Steps:
    """The steps that a spec would build for a TPU target, or that a bundle holds for it, around `function`.

    `function` is `package.module:name`, looked for in `folder` first; where it is empty, the one that the spec or the bundle
    names. Raises as `programs_of`; SpecError or BundleError where none is named; ScheduleError later, where the function is not
    the one that a bundle was built with.
    """
    layers = layers_in(path)
    parts = [
        programs_of(path, target, store, progress, any_compiler=any_compiler, layer=layer, tuned=tuned)
        for layer in layers
    ]
    if names_bundle(path):
        manifest = read_manifest(path)
        built = manifest.steps.get(target)
        if built is None and not function:
            raise BundleError(f"{path}: has no steps for {target}; name a function with --step package.module:function")
        name, limits = manifest.name, manifest.limits
        own = function or (built.function if built else "")
        hashes = {} if built is None or function else {one.variant: one.lowered_sha256 for one in built.programs}
    else:
        spec = load_spec(path)
        name, limits, hashes, own = spec.name, Limits.of(spec), {}, function or spec.step
        if not own:
            allowed = "must name your function where --step does not"
            raise SpecError(
                [Problem(spec.file, None, None, "step", "no such key", allowed, "add package.module:function")]
            )
    tasks = {
        variant: StepTask(
            own,
            str(folder),
            str(path),
            limits,
            {layer: part.tasks[variant] for layer, part in zip(layers, parts, strict=True)},
        )
        for variant in parts[0].tasks
    }
    return Steps(
        name,
        target,
        {layer: part.model for layer, part in zip(layers, parts, strict=True)},
        limits,
        parts[0].context_lens,
        tasks,
        hashes,
        store,
        progress,
        any_compiler,
    )


def predict_step(steps: Steps, workload: Workload) -> StepPrediction:
    """Raises BatchError or SelectionError for a batch that the steps do not take, ScheduleError as `Steps.schedules`."""
    batch = workload.batch(steps.limits)
    variant = select(steps.tasks, steps.limits, batch.tokens, batch.distribution)
    task, found = steps.tasks[variant], steps.schedules(variant)
    timed = found.call.time(_scalars(found, batch))
    report = step_report(
        found.call,
        timed,
        _needed(steps, found, timed, workload),
        batch.num_tokens,
        task.mesh.devices,
        task.mesh.data,
    )
    return StepPrediction(steps.name, task.function, workload, variant, report)


def _scalars(found: StepSchedules, batch: Batch) -> dict[int, Words]:
    """What a step is given of a batch, by parameter number. Token ids are 0: what they are changes no time."""
    token_ids, positions = TOKEN_ARRAYS
    first = np.repeat(batch.kv_lens - np.diff(batch.cu_q_lens), np.diff(batch.cu_q_lens))
    at = np.zeros(batch.tokens, np.int32)
    starts = np.repeat(batch.cu_q_lens[:-1], np.diff(batch.cu_q_lens))
    at[: len(first)] = first + np.arange(len(first)) - starts
    given = {
        token_ids: np.zeros(batch.tokens, np.int32),
        positions: at,
        **{name: getattr(batch, name) for name in _METADATA},
    }
    names = [name for name, _, _ in found.arguments]
    return {names.index(name): words_of(values) for name, values in given.items()}


def _needed(steps: Steps, found: StepSchedules, timed: Timed, workload: Workload) -> Work:
    """Bytes and flops of one device that the step cannot do without."""
    parameters = looked_up_bytes(found.call.module, range(found.parameters))
    attention = [(calls, needed_work(steps.models[layer], workload)) for layer, calls in _calls(found, timed).items()]
    matmuls = sum(event.flops for event in timed.events)
    return Work(
        sum(parameters.values()) + sum(calls * work.bytes for calls, work in attention),
        matmuls + sum(calls * work.flops for calls, work in attention),
    )


def _calls(found: StepSchedules, timed: Timed) -> dict[str, int]:
    """How often the program of each kind of layer runs: once for each cache, or as often as its kernels did in a scan."""
    layers = list(dict.fromkeys(found.cache_layers))
    if len(layers) > 1:
        return {layer: found.cache_layers.count(layer) for layer in layers}
    names = [event.name.partition(".")[0] for event in timed.events if event.category == "attention"]
    return {layers[0]: len(names) // max(1, len(set(names)))}
