"""Writes a bundle: blobs by their hash, sources, the spec as given, and last the manifest, the commit mark.

Nothing of the machine goes in: no time, no path. Two builds of one spec in two folders are byte-identical.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rpac.batch import Limits
from rpac.bundle.manifest import MANIFEST, SPEC, Manifest, Target, parse, render
from rpac.contract import arrays as layout
from rpac.contract.kind import KINDS, Kind
from rpac.contract.program import Content, Program, Variant
from rpac.contract.step import StepProgram, Steps
from rpac.files.publish import Stage, publish

if TYPE_CHECKING:
    from rpac.contract.program import Lowered
    from rpac.contract.step import LoweredStep
    from rpac.spec import Spec

Checks = Mapping[tuple[str, str, int], Mapping[str, Any]]
Canaries = Mapping[tuple[str, str, int], bytes]


def write_bundle(
    path: str | os.PathLike[str],
    spec: Spec,
    lowered: Iterable[Lowered],
    checks: Checks | None = None,
    wait_s: float = 0,
    canaries: Canaries | None = None,
    steps: Iterable[LoweredStep] = (),
) -> Manifest:
    """Publishes the bundle of `spec` at `path`, whole or not at all.

    `checks` maps (target, kind, tokens) to tolerances and results, where a variant was checked; `canaries` maps
    (layer, kind, tokens) to the oracle's answers, as `rpac.oracle.canary` stores them. `steps` are around the programs of
    `lowered`. `wait_s`: seconds to
    wait for another build into the same folder. Raises OutputError, and then what was at `path` is as it was.
    """
    with publish(path, is_bundle, wait_s) as stage:
        return stage_bundle(stage, spec, lowered, checks, canaries, steps=steps)


def stage_bundle(
    stage: Stage,
    spec: Spec,
    lowered: Iterable[Lowered],
    checks: Checks | None = None,
    canaries: Canaries | None = None,
    server: str = "",
    steps: Iterable[LoweredStep] = (),
) -> Manifest:
    """`write_bundle` into a stage that the caller holds, so that a long build owns its folder from its start. `server`
    names the server whose toolchain it was built with."""
    lowered = sorted(lowered, key=_order)
    built = {(one.layer, one.kind, one.tokens) for one in lowered}
    steps = sorted(steps, key=_order)
    answers = {variant: data for variant, data in (canaries or {}).items() if variant in built}
    tiers = [data for one in lowered for data in (one.exported, one.executable) if data is not None]
    tiers += [data for step in steps for data in (step.exported, step.executable) if data is not None]
    blobs = {Content.of(data): data for data in (*tiers, *answers.values())}
    files = {f"source/{one.source.path}": one.source.text.encode() for one in lowered}
    files[SPEC] = spec.source.encode()
    targets = _targets(spec, lowered, checks or {}, answers)
    manifest = Manifest(
        name=spec.name,
        spec_hash=spec.hash,
        model=spec.model,
        kv_layout=spec.serving.kv_layout,
        limits=Limits.of(spec),
        targets=targets,
        files={name: Content.of(data) for name, data in files.items()},
        mesh=spec.mesh,
        server=server,
        steps=_steps(steps, targets.values()),
    )
    data = render(manifest)
    parse(data, MANIFEST)  # what cannot be read back is never published
    for blob, content in blobs.items():
        stage.write(f"blobs/{blob.sha256}", content)
    for name, content in files.items():
        stage.write(name, content)
    stage.write(MANIFEST, data)
    return manifest


def is_bundle(path: Path) -> bool:
    """Whether a build may replace the folder at `path`."""
    return (path / MANIFEST).is_file()


def _targets(spec: Spec, lowered: list[Lowered], checks: Checks, canaries: Canaries) -> dict[str, Target]:
    targets: dict[str, Target] = {}
    for name, layer in dict.fromkeys((program.target, program.layer) for program in lowered):
        programs = [program for program in lowered if (program.target, program.layer) == (name, layer)]
        first, part = programs[0], spec.part(layer)
        shared = {(one.device_kind, one.topology, tuple(sorted(one.toolchain.items()))) for one in programs}
        if len(shared) > 1:
            raise ValueError(f"programs of target {name} differ in device kind, topology or toolchain: {shared}")
        target = Target(
            name=name,
            device_kind=first.device_kind,
            topology=first.topology,
            toolchain=first.toolchain,
            programs=tuple(
                _program(
                    part, one, checks.get((name, one.kind, one.tokens)), canaries.get((layer, one.kind, one.tokens))
                )
                for one in programs
            ),
            layer=layer,
            model=part.model if layer else None,
        )
        targets[target.key] = target
    return targets


def _order(one: Lowered | LoweredStep) -> tuple[str, int, int]:
    return one.target, KINDS.index(cast(Kind, one.kind)), one.tokens


def _steps(lowered: list[LoweredStep], targets: Iterable[Target]) -> dict[str, Steps]:
    """The steps of each target, whose device kind, topology and toolchain are those of its programs."""
    steps: dict[str, Steps] = {}
    of_target = {target.name: (target.device_kind, target.topology, dict(target.toolchain)) for target in targets}
    for name in dict.fromkeys(one.target for one in lowered):
        mine = [one for one in lowered if one.target == name]
        for one in mine:
            found = (one.device_kind, one.topology, dict(one.toolchain))
            if found != of_target[name] or (one.function, one.model) != (mine[0].function, mine[0].model):
                raise ValueError(f"steps of target {name} differ from each other or its programs: {found}")
        steps[name] = Steps(mine[0].function, mine[0].model, tuple(map(_step, mine)))
    return steps


def _step(one: LoweredStep) -> StepProgram:
    return StepProgram(
        variant=Variant(cast(Kind, one.kind), one.tokens),
        signature=one.signature,
        exported=Content.of(one.exported),
        executable=None if one.executable is None else Content.of(one.executable),
        lowered_sha256=one.lowered_sha256,
        memory=one.memory,
    )


def _program(spec: Spec, lowered: Lowered, check: Mapping[str, Any] | None, canary: bytes | None) -> Program:
    return Program(
        variant=Variant(cast(Kind, lowered.kind), lowered.tokens),
        source=lowered.source.path,
        plan=lowered.plan,
        args=layout.arg_specs(spec, lowered.tokens),
        results=layout.result_specs(spec, lowered.tokens),
        exported=Content.of(lowered.exported),
        executable=None if lowered.executable is None else Content.of(lowered.executable),
        canary=None if canary is None else Content.of(canary),
        flags=lowered.flags,
        aliases=lowered.aliases,
        memory=lowered.memory,
        check=check,
    )
