"""What differs between two specs or bundles: the keys of the spec, the plans, the kernels, and the toolchains."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpac.build import chosen_targets, sources_of
from rpac.bundle import Place, names_bundle, read_texts
from rpac.contract.attention import plain
from rpac.contract.program import Source
from rpac.errors import TargetError
from rpac.plan.tuned import Tuned, TunedTiles
from rpac.spec import Spec, load_spec


@dataclass(frozen=True)
class Side:
    """One of the two. Facts are flat: a name with dots, and a value as text."""

    spec: Mapping[str, str]
    toolchains: Mapping[str, str]
    plans: Mapping[str, Mapping[str, str]]
    sources: Mapping[str, Source]


@dataclass(frozen=True)
class Change:
    """A fact that differs. None where one side has no such fact."""

    where: str
    what: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class KernelChange:
    """A source that differs, header apart, in lines; or that one side alone has."""

    path: str
    added: int
    removed: int
    only: str = ""  # "first" or "second"


@dataclass(frozen=True)
class Difference:
    """All that differs; empty parts are equal. `same_kernels` counts the sources that are alike."""

    spec: tuple[Change, ...]
    toolchains: tuple[Change, ...]
    plans: tuple[Change, ...]
    kernels: tuple[KernelChange, ...]
    same_kernels: int

    def __bool__(self) -> bool:
        return bool(self.spec or self.toolchains or self.plans or self.kernels)


def side_of(path: Place, targets: Sequence[str] = (), tuned: Tuned = TunedTiles.of) -> Side:
    """What a spec would build with `tuned` tiles, or what a bundle holds, for all targets or for those given.

    Raises SpecError, PlanError, BundleError, or TargetError for a target that is not there.
    """
    return _of_bundle(path, targets) if names_bundle(path) else _of_spec(load_spec(path), targets, tuned)


def difference(before: Side, after: Side) -> Difference:
    """What differs between two sides. A plan's fields are compared where both have its source."""
    shared = before.plans.keys() & after.plans.keys()
    plans = [change for path in sorted(shared) for change in _changes(path, before.plans[path], after.plans[path])]
    kernels = list(_kernel_changes(before.sources, after.sources))
    return Difference(
        tuple(_changes("spec", before.spec, after.spec)),
        tuple(_changes("toolchain", before.toolchains, after.toolchains))
        if before.toolchains and after.toolchains
        else (),
        tuple(plans),
        tuple(kernels),
        len(before.sources.keys() & after.sources.keys()) - sum(not one.only for one in kernels),
    )


def _of_spec(spec: Spec, targets: Sequence[str], tuned: Tuned) -> Side:
    made = [pair for part in spec.parts for pair in sources_of(part, chosen_targets(spec, targets), tuned)]
    plans = {source.path: dict(_flat(plan.as_dict())) for plan, source in made}
    return Side(_facts(spec), {}, plans, {source.path: source for _, source in made})


def _of_bundle(path: Place, targets: Sequence[str]) -> Side:
    texts = read_texts(path)
    manifest = texts.manifest
    found = [one for one in manifest.targets.values() if not targets or one.name in targets]
    missing = [name for name in targets if name not in {one.name for one in found}]
    if missing:
        raise TargetError(f"{path}: holds no programs for {missing[0]}; it has {', '.join(manifest.targets)}")
    programs = [program for one in found for program in one.programs]
    return Side(
        _facts(texts.spec),
        dict(_flat({one.key: dict(one.toolchain) for one in found})),
        {program.source: dict(_flat(program.plan)) for program in programs},
        {one.source: Source(one.source, texts.sources[one.source]) for one in programs},
    )


def _facts(spec: Spec) -> dict[str, str]:
    layers = {part.layer: plain(part.model) for part in spec.parts if part.layer}
    whole = {"model": plain(spec.model), "layers": layers, "serving": plain(spec.serving)}
    step = {"step": spec.step} if spec.step else {}
    return dict(_flat({**whole, "parallel": spec.mesh.as_dict(), **step, "targets": list(spec.targets)}))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, " ".join(map(str, value))
    else:
        yield name, str(value)


def _changes(where: str, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Change]:
    for what in dict.fromkeys(itertools.chain(before, after)):
        if before.get(what) != after.get(what):
            yield Change(where, what, before.get(what), after.get(what))


def _kernel_changes(before: Mapping[str, Source], after: Mapping[str, Source]) -> Iterator[KernelChange]:
    for path in sorted(before.keys() | after.keys()):
        if path not in after or path not in before:
            yield KernelChange(path, 0, 0, "first" if path in before else "second")
        elif before[path].body != after[path].body:
            old, new = (one[path].body.splitlines() for one in (before, after))
            _, _, *lines = difflib.unified_diff(old, new, n=0, lineterm="")  # two lines name the files
            signs = [line[0] for line in lines]
            yield KernelChange(path, signs.count("+"), signs.count("-"))
