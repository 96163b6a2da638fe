"""SLSA provenance v1 of a bundle: what it was built from, with what, and by whom. A claim of whoever signs it.

What is hashed of a package is the list of its installed files and their hashes (RECORD, without byte-compiled files and notes of
the installer), of which the manifest keeps the first 16 digits. The hash of the wheel itself is there where pip kept it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from rpac.bundle.manifest import SPEC, Manifest
from rpac.devices.toolchain import PACKAGES, record_hash, toolchain
from rpac.errors import TargetError
from rpac.kernels.slots import templates_dir
from rpac.plan.tuned import FOLDER

BUILD_TYPE: Final = "urn:rpac:build:v1"
LOCAL_BUILDER: Final = "urn:rpac:builder:local"
FILES: Final = "rpacFiles"  # the name of a hash over a list of files and their hashes
_COMPILED: Final = ("__pycache__", ".pyc")


def provenance(place: str, manifest: Manifest, builder: str, tuned: Path | None) -> dict[str, Any]:
    """The predicate. `builder`: a URI that names the machine or service that built. `tuned`: a folder of tuned tiles that the
    build had beside those of the package.

    Raises TargetError where what is installed is not what the manifest says the bundle was built with.
    """
    require_toolchain(place, manifest)
    programs = {
        f"{target.key}/{program.variant}": dict(program.flags)
        for target in manifest.targets.values()
        for program in target.programs
    }
    cpu = [target for target in manifest.targets.values() if target.name == "cpu"]
    tools = toolchain()
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "spec": {"name": SPEC, "digest": {"sha256": manifest.files[SPEC].sha256}},
                "specHash": manifest.spec_hash,
                "targets": list(dict.fromkeys(one.name for one in manifest.targets.values())),
                "thisCpu": any(one.executable is not None for target in cpu for one in target.programs),
                "server": manifest.server,
                **({"step": next(iter(manifest.steps.values())).function} if manifest.steps else {}),
            },
            "internalParameters": {"flags": programs},
            "resolvedDependencies": [
                *(_package(name, tools) for name in PACKAGES),
                {"name": "rpac", "uri": f"pkg:pypi/rpac@{tools['rpac']}", "digest": {FILES: own_files()["rpac"]}},
                {"name": "templates", "digest": {FILES: own_files()["templates"]}},
                {"name": "tuned tiles of the package", "digest": {FILES: _tree(FOLDER)}},
                *([] if tuned is None else [{"name": "tuned tiles of the user", "digest": {FILES: _tree(tuned)}}]),
            ],
        },
        "runDetails": {"builder": {"id": builder, "version": {name: tools[name] for name in ("rpac", "python")}}},
    }  # fmt: skip


def own_files() -> dict[str, str]:
    """Hashes over the files of this rpac, and over those of its templates."""
    return {"rpac": _tree(FOLDER.parent), "templates": _tree(templates_dir())}


def require_toolchain(place: str, manifest: Manifest) -> None:
    """Raises TargetError where this environment is not the one that the manifest says the bundle was built in."""
    here = toolchain()
    for target in manifest.targets.values():
        for name, now in here.items():
            built = target.toolchain.get(name)
            if built != now:
                raise TargetError(
                    f"{place}: target {target.key} was built with {name} {built}; here is {now}; must be the same; use the "
                    "environment that built it"
                )


def _package(name: str, tools: Mapping[str, str]) -> dict[str, Any]:
    found = importlib.metadata.distribution(name)
    return {
        "name": name,
        "uri": f"pkg:pypi/{name}@{tools[name]}",
        "digest": {FILES: record_hash(found), **_wheel_hash(found)},
    }


def _wheel_hash(found: importlib.metadata.Distribution) -> dict[str, str]:
    """The sha256 of the wheel, which pip keeps of one that was not from an index."""
    try:
        sha256 = json.loads(found.read_text("direct_url.json") or "{}")["archive_info"]["hashes"]["sha256"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {"sha256": str(sha256)}


def _tree(folder: Path) -> str:
    """A hash over the names and hashes of all files below a folder, byte-compiled ones apart."""
    return hashlib.sha256("\n".join(sorted(_lines(folder))).encode()).hexdigest()


def _lines(folder: Path) -> Iterable[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(mark in name for mark in _COMPILED):
            yield f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
