"""The programs of a spec or a bundle on one target, each with its schedule, dumped once and then cached."""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rpac.batch import Limits
from rpac.build import chosen_targets, sources_of
from rpac.bundle import Place, names_bundle, read_manifest, read_texts
from rpac.contract.attention import Attention
from rpac.contract.program import Source, Variant
from rpac.devices.chip import TPU_TARGETS, is_tpu
from rpac.devices.toolchain import toolchain
from rpac.errors import TargetError
from rpac.files.store import Store
from rpac.lower import Task, tasks_of
from rpac.plan.tuned import Tuned, TunedTiles
from rpac.schedule import Call, Dump, check_compiler, dump_command
from rpac.spec import load_spec

Progress = Callable[[str], None]
DUMP = "dump.json.gz"
COMPILERS = ("jax", "jaxlib", "libtpu")  # all three decide a schedule: Pallas lowers, XLA and Mosaic compile


@dataclass(frozen=True)
class Programs:
    """Every program of one target, by variant; a schedule is dumped when first asked for."""

    name: str
    target: str
    model: Attention
    limits: Limits
    context_lens: tuple[int, ...]
    tasks: Mapping[Variant, Task]
    store: Store
    progress: Progress
    any_compiler: bool = False
    _calls: dict[Variant, Call] = field(default_factory=dict)

    def call(self, variant: Variant) -> Call:
        """The schedule of a program, ready to walk. Raises ScheduleError where it cannot be compiled or read."""
        if variant not in self._calls:
            self._calls[variant] = Call(self._dump(self.tasks[variant]), any_compiler=self.any_compiler)
        return self._calls[variant]

    def _dump(self, task: Task) -> Dump:
        key = task.key(toolchain(), "dump")
        stored = self.store.read(key)
        if stored is not None:
            return Dump(**json.loads(gzip.decompress(stored[DUMP])))
        self.progress(f"compiling {task.label} for its schedule")
        with tempfile.TemporaryDirectory(prefix="rpac-task-") as folder:
            path = Path(folder, "task.json")
            path.write_text(task.to_json())
            dump = dump_command([sys.executable, "-m", "rpac.predict.dump_task", str(path)], task.target)
        self.store.write(key, {DUMP: gzip.compress(json.dumps(asdict(dump)).encode(), 6, mtime=0)})
        return dump


def programs_of(
    path: Place,
    target: str,
    store: Store,
    progress: Progress = lambda line: None,
    *,
    any_compiler: bool = False,
    layer: str = "",
    tuned: Tuned = TunedTiles.of,
) -> Programs:
    """The programs that a spec would build for a TPU target with `tuned` tiles, or that a bundle holds for it; of one kind of
    `layer` where the model has several.

    Raises SpecError, BundleError, PlanError; TargetError where there is nothing for that target, or where a bundle was
    built with other compilers than are here; ScheduleError where those are not verified, unless `any_compiler`.
    """
    if not is_tpu(target):
        raise TargetError(f"target {target!r} has no schedule to predict from; must be one of {', '.join(TPU_TARGETS)}")
    if not any_compiler:
        check_compiler(toolchain()["libtpu"])
    if names_bundle(path):
        found = _of_bundle(path, target, layer, store, progress)
    else:
        found = _of_spec(path, target, layer, store, progress, tuned)
    return replace(found, any_compiler=any_compiler)


def names_apart(names: Sequence[str], paths: Sequence[Place]) -> list[str]:
    """Names, with the path behind each that occurs twice, because two bundles of one spec can be compared too."""
    return [f"{name} ({path})" if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]


def layers_in(path: Place) -> list[str]:
    """The kinds of layers of a spec or a bundle, by name; the empty name where there is one kind."""
    if names_bundle(path):
        return list(dict.fromkeys(one.layer for one in read_manifest(path).targets.values()))
    return [part.layer for part in load_spec(path).parts]


def _of_spec(path: Place, target: str, layer: str, store: Store, progress: Progress, tuned: Tuned) -> Programs:
    spec = load_spec(path).part(layer)
    chosen_targets(spec, [target])
    tasks = tasks_of(spec, sources_of(spec, [target], tuned))
    return Programs(
        _name(spec.name, layer),
        target,
        spec.model,
        Limits.of(spec),
        spec.serving.context_lens,
        _by_variant(tasks),
        store,
        progress,
    )


def _of_bundle(path: Place, target: str, layer: str, store: Store, progress: Progress) -> Programs:
    texts = read_texts(path)
    manifest = texts.manifest
    key = f"{target}.{layer}" if layer else target
    if key not in manifest.targets:
        raise TargetError(f"{path}: holds no programs for {key}; it has {', '.join(manifest.targets)}")
    found = manifest.targets[key]
    for package in COMPILERS:
        built = found.toolchain.get(package)
        if built != toolchain()[package]:
            raise TargetError(
                f"{path}: built with {package} {built}; this one is {toolchain()[package]} and would schedule it "
                f"otherwise; install the {package} of the build, or build again"
            )
    tasks = []
    for program in found.programs:
        variant = program.variant
        tasks.append(
            Task(
                target,
                variant.kind,
                variant.tokens,
                Source(program.source, texts.sources[program.source]),
                program.plan,
                program.args,
                manifest.mesh,
                layer,
                program.results,
            )
        )
    model = found.model or manifest.model
    return Programs(
        _name(manifest.name, layer),
        target,
        model,
        manifest.limits,
        texts.spec.serving.context_lens,
        _by_variant(tasks),
        store,
        progress,
    )


def _name(name: str, layer: str) -> str:
    return f"{name} {layer}" if layer else name


def _by_variant(tasks: list[Task]) -> dict[Variant, Task]:
    return {Variant(task.kind, task.tokens): task for task in tasks}  # type: ignore[arg-type]
