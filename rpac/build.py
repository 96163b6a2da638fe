"""The main job, whole: a spec's plans, their sources, their lowering, and the bundle published at the end."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rpac.bundle.manifest import Manifest
from rpac.bundle.write import is_bundle, stage_bundle
from rpac.contract.program import Lowered, Source
from rpac.contract.step import LoweredStep
from rpac.devices.servers import Server
from rpac.devices.toolchain import toolchain
from rpac.errors import OutputError, TargetError
from rpac.files.publish import publish
from rpac.kernels import render
from rpac.lower import Cache, Task, add_cpu_executables, lower_all, tasks_of
from rpac.oracle.expected import canary_answers
from rpac.plan import KernelPlan, plan_spec
from rpac.plan.tuned import Tuned, TunedTiles
from rpac.spec import Spec
from rpac.step import steps_of
from rpac.step.pool import lower_steps, wanted_steps

GENERATED_MARK = "SPEC_SHA256"


class Observer:
    """Is told how a build goes, from any thread. This one does nothing."""

    def phase(self, what: str) -> None:
        """What the build does from now on."""

    def planned(self, programs: int) -> None:
        """How often `program` will say that one is done."""

    def program(self, label: str, what: str) -> None:
        """`what` happens to a program: COMPILING, and later or instead one of the words for what is done."""


@dataclass(frozen=True)
class Built:
    """A published bundle, and the variants and steps in it."""

    path: Path
    manifest: Manifest
    lowered: tuple[Lowered, ...]
    steps: tuple[LoweredStep, ...] = ()


def chosen_targets(spec: Spec, wanted: Sequence[str]) -> tuple[str, ...]:
    """`wanted`, or all targets of the spec. Raises TargetError for one that the spec does not list."""
    for target in wanted:
        if target not in spec.targets:
            raise TargetError(
                f"{spec.file}: target {target!r} is not in the spec, which has {', '.join(spec.targets)}; "
                f"add it to targets, or leave it out"
            )
    return tuple(dict.fromkeys(wanted)) or spec.targets


def sources_of(spec: Spec, targets: Iterable[str], tuned: Tuned = TunedTiles.of) -> list[tuple[KernelPlan, Source]]:
    """Every plan of these targets with the source that it makes; of a spec with one kind of layer."""
    return [(plan, render(spec, plan)) for target in targets for plan in plan_spec(spec, target, tuned=tuned(target))]


def all_tasks(spec: Spec, targets: Sequence[str], tuned: Tuned = TunedTiles.of) -> list[Task]:
    """What a build lowers: the tasks of every kind of layer."""
    return [task for part in spec.parts for task in tasks_of(part, sources_of(part, targets, tuned))]


def build(
    spec: Spec,
    targets: Sequence[str],
    folder: Path,
    cache: Cache,
    jobs: int | None = None,
    observer: Observer | None = None,
    wait_s: float = 0.0,
    this_cpu: bool = False,
    tuned: Tuned = TunedTiles.of,
    server: Server | None = None,
    step: str = "",
) -> Built:
    """Builds `folder/NAME.rpac`. The folder is held from the start, so that a second build into it fails at once.

    With `this_cpu` the programs of the cpu target get executables for the CPU of this machine. With `server` the
    toolchain must be the one that it pins. `step` names the user's function in place of the spec's own `step`: every kind and
    token bucket that it describes is built as a whole step of the model too. Its module is looked for in the working directory
    first. Raises SpecError, TargetError, PlanError, CompileError or OutputError; then what was there is as it was.
    """
    if server is not None:
        server.require(toolchain())
    observer = observer or Observer()
    observer.phase(f"{spec.name}: planning the kernels for {', '.join(targets)}")
    tasks = all_tasks(spec, targets, tuned)
    on_cpu = sum(task.target == "cpu" for task in tasks) if this_cpu else 0
    steps = steps_of(spec, tasks, step or spec.step, str(Path.cwd())) if step or spec.step else []
    path = folder / f"{spec.name}.rpac"
    with publish(path, is_bundle, wait_s) as stage:
        if steps:
            observer.phase(f"{spec.name}: tracing {steps[0].function}")
            steps = wanted_steps(steps)
        observer.planned(len(tasks) + on_cpu + len(steps))
        lowered = lower_all(tasks, cache, jobs, lambda task, what: observer.program(task.label, what))
        if this_cpu:
            lowered = add_cpu_executables(
                tasks, lowered, jobs, lambda label: observer.program(label, "compiled for this CPU")
            )
        made = lower_steps(steps, cache.store, jobs, lambda one, what: observer.program(one.label, what), this_cpu)
        observer.phase(f"{spec.name}: computing the canaries' expected answers")
        canaries: dict[tuple[str, str, int], bytes] = {}
        for part in spec.parts:
            variants = [(one.kind, one.tokens) for one in lowered if one.layer == part.layer]
            canaries |= canary_answers(part, variants, cache.store)
        observer.phase(f"{path}: writing the bundle")
        manifest = stage_bundle(stage, spec, lowered, canaries=canaries, server=str(server or ""), steps=made)
    return Built(path, manifest, tuple(lowered), tuple(made))


def generate(spec: Spec, folder: Path, tuned: Tuned = TunedTiles.of) -> list[Source]:
    """Writes the sources of every target of a spec to `folder/NAME/`, for people to read and diff."""
    sources = _all_sources(spec, tuned)
    with publish(folder / spec.name, lambda path: (path / GENERATED_MARK).is_file()) as stage:
        for name, text in _generated(spec, sources).items():
            stage.write(name, text.encode())
    return sources


def stale(spec: Spec, folder: Path, tuned: Tuned = TunedTiles.of) -> dict[str, list[str]]:
    """What differs in `folder/NAME/` from what `generate` would write: lines of a unified diff by file, in order.

    A file that is missing differs from an empty one, and so does one that is too many. Nothing is written. Raises OutputError
    for a file that cannot be read.
    """
    root = folder / spec.name
    wanted = _generated(spec, _all_sources(spec, tuned))
    try:
        paths = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
        found = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    except OSError as error:
        raise OutputError(f"{root}: cannot be read ({error.strerror}); check its permissions") from error
    changed = {}
    for name in sorted(found.keys() | wanted.keys()):
        old, new = found.get(name, b"").decode(errors="replace"), wanted.get(name, "")
        if old != new or name not in found or name not in wanted:
            names = (str(root / name), f"{root / name} (generated now)")
            changed[name] = list(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm=""))
    return changed


def _all_sources(spec: Spec, tuned: Tuned) -> list[Source]:
    return [source for part in spec.parts for _, source in sources_of(part, spec.targets, tuned)]


def _generated(spec: Spec, sources: Sequence[Source]) -> dict[str, str]:
    """The files of a generated folder, by name."""
    return {**{source.path: source.text for source in sources}, GENERATED_MARK: f"{spec.hash}\n"}
