"""Builds a bundle again from its own spec, and says whether the same bytes come out, or where they first differ."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpac.build import Observer, build, sources_of
from rpac.bundle.manifest import SPEC, Manifest, as_data, digest
from rpac.bundle.read import BundleFiles, read_files
from rpac.bundle.storage import blob_name
from rpac.contract.program import Content, Program
from rpac.contract.step import StepProgram
from rpac.devices.servers import server
from rpac.errors import TargetError
from rpac.lower import Cache
from rpac.plan.tuned import Tuned, TunedTiles
from rpac.spec import Spec, load_spec
from rpac.trust.provenance import require_toolchain

TIERS = ("exported", "executable", "canary")


@dataclass(frozen=True)
class Rebuilt:
    """A bundle and what became of it. `difference` is the first place where the bytes differ, empty where they are the same."""

    found: BundleFiles
    difference: str

    @property
    def digest(self) -> str:
        return digest(self.found.manifest)


def rebuild(
    bundle: str | os.PathLike[str],
    jobs: int | None = None,
    observer: Observer | None = None,
    tuned: Tuned = TunedTiles.of,
    step: str = "",
) -> Rebuilt:
    """Builds the bundle at a path or URL again, in an empty folder, with nothing from a cache, and compares every byte.

    A bundle with whole steps needs the user's function, which is run: `step` names it, as the bundle does, so that no bundle
    says by itself what is imported here. Raises BundleError for one that is damaged; SpecError where there is no such function;
    TargetError where `step` is not the bundle's, where this environment is not the one that the manifest names, or where the
    bundle has executables for one CPU, which XLA makes anew each time; and what a build raises.
    """
    found = read_files(bundle)
    place, manifest = os.fspath(bundle), found.manifest
    require_toolchain(place, manifest)
    for target in manifest.targets.values():
        if target.name == "cpu" and any(one.executable is not None for one in target.programs):
            raise TargetError(
                f"{place}: found executables of `rpac build --this-cpu`; must have none, because XLA orders the objects in them "
                "anew in each compile; rebuild a bundle without them"
            )
    with tempfile.TemporaryDirectory(prefix="rpac-rebuild-") as folder:
        spec_file = Path(folder, SPEC)
        spec_file.write_bytes(found.files[SPEC])
        spec = load_spec(spec_file)
        _require_step(place, step, {spec.step, *(one.function for one in manifest.steps.values())} - {""})
        held = {name: found.files[name] for name in manifest.files if name != SPEC}
        other_kernel = next(_of_files(held, kernels_of(spec, manifest, tuned)), "")
        if other_kernel:
            return Rebuilt(found, other_kernel)  # what follows from it need not be compiled
        targets, for_server = targets_of(manifest), server(manifest.server) if manifest.server else None
        built = build(
            spec, targets, Path(folder), Cache(None), jobs, observer, tuned=tuned, server=for_server, step=step
        )
        return Rebuilt(found, first_difference(found, read_files(built.path)))


def _require_step(place: str, step: str, named: set[str]) -> None:
    """Raises TargetError unless the caller names the function that a bundle's steps are of."""
    if named != {step} - {""}:
        found = " and ".join(sorted(named)) or "none"
        given = f"--step {step}" if step else "no --step"
        raise TargetError(
            f"{place}: found {given}; must name the function of the bundle's steps, {found}, because a rebuild runs its code; "
            + (f"pass --step {found} in the folder that has its module" if named else "leave --step out")
        )


def require_same_kernels(bundle: Path, manifest: Manifest, tuned: Tuned = TunedTiles.of) -> None:
    """Raises TargetError unless this rpac generates, from the bundle's own spec, the very kernels that the bundle holds."""
    made = {name: Content.of(data) for name, data in kernels_of(load_spec(bundle / SPEC), manifest, tuned).items()}
    held = {name: content for name, content in manifest.files.items() if name != SPEC}
    for name in sorted(made.keys() | held.keys()):
        if made.get(name) != held.get(name):
            raise TargetError(
                f"{bundle}: this rpac does not generate its {name} from its {SPEC}; must be the same, because its provenance "
                "would name other templates or tuned tiles; use the rpac and the --tuned folder that built it, or leave the "
                "provenance out with --no-provenance"
            )


def kernels_of(spec: Spec, manifest: Manifest, tuned: Tuned) -> dict[str, bytes]:
    """The kernels that this rpac generates for a bundle's targets, by their names in a bundle."""
    return {
        f"source/{source.path}": source.text.encode()
        for part in spec.parts
        for _, source in sources_of(part, targets_of(manifest), tuned)
    }


def targets_of(manifest: Manifest) -> tuple[str, ...]:
    """The targets that a bundle was built for, which may be fewer than its spec has."""
    return tuple(dict.fromkeys(one.name for one in manifest.targets.values()))


def first_difference(before: BundleFiles, after: BundleFiles) -> str:
    """The first place where two bundles differ, in the order in which one thing follows from another: the spec and the kernels,
    the programs made of them, and what the manifest says of these. Empty where all bytes are the same.
    """
    return next(_differences(before, after), "")


def _differences(before: BundleFiles, after: BundleFiles) -> Iterator[str]:
    yield from _of_files(*({name: one.files[name] for name in one.manifest.files} for one in (before, after)))
    programs, again = (dict(_programs(one.manifest)) for one in (before, after))
    for label in dict.fromkeys((*programs, *again)):
        if label not in programs or label not in again:
            yield f"{label} is in {'this bundle' if label in programs else 'the rebuild'} alone"
            continue
        for tier in TIERS:
            blobs = [
                _blob(one.files, getattr(of[label], tier, None)) for one, of in ((before, programs), (after, again))
            ]
            yield from _of_bytes(f"{label}, {tier}", *blobs)
    facts, others = (dict(_flat(as_data(one.manifest))) for one in (before, after))
    for name in dict.fromkeys((*facts, *others)):
        if facts.get(name) != others.get(name):
            yield f"manifest.json, {name}: {facts.get(name, 'nothing')} here, {others.get(name, 'nothing')} in the rebuild"


def _of_files(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys(), key=lambda name: (name != SPEC, name)):
        yield from _of_bytes(name, before.get(name), after.get(name))


def _programs(manifest: Manifest) -> Iterator[tuple[str, Program | StepProgram]]:
    for target in manifest.targets.values():
        for program in target.programs:
            yield f"target {target.key}, program {program.variant}", program
    for name, steps in manifest.steps.items():
        for step in steps.programs:
            yield f"target {name}, step {step.variant}", step


def _blob(files: Mapping[str, bytes], blob: Content | None) -> bytes | None:
    return None if blob is None else files[blob_name(blob)]


def _of_bytes(name: str, before: bytes | None, after: bytes | None) -> Iterator[str]:
    if before == after:
        return
    if before is None or after is None:
        yield f"{name} is in {'the rebuild' if before is None else 'this bundle'} alone"
        return
    at = next((i for i, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), None)
    sizes = f"of {len(before):,} bytes here, {len(after):,} in the rebuild"
    if at is None:
        yield f"{name}: one is the beginning of the other, {sizes}"
        return
    line = f", line {before[:at].count(10) + 1}" if name == SPEC or name.startswith("source/") else ""
    yield f"{name}: byte {at:,}{line} {sizes}: {before[at]:#04x} here, {after[at]:#04x} in the rebuild"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every value of plain data, by its path."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield name, repr(value)
        return
    yield from itertools.chain.from_iterable(
        _flat(inner, f"{name}.{key}" if name else str(key)) for key, inner in pairs
    )
