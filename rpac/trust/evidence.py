"""Predicates from the files of other commands: checks, predictions, benches and demos, each held against the bundle."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rpac.bundle.manifest import SPEC, Manifest, digest
from rpac.errors import Problem, TrustError
from rpac.trust.predicates import MUTATIONS, PASSED, UNCHECKED
from rpac.trust.provenance import own_files

MAX_EVIDENCE_BYTES: Final = 32 << 20
_SOURCE: Final = "source/"


def tests(path: Path, manifest: Manifest, planted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The predicate of what `rpac check --json` wrote: an in-toto test result, which fails where a check failed. `planted`: what
    `mutations` makes of a file, where there is one.

    Raises TrustError where the file is none, or where it checked other kernels than the bundle holds.
    """
    command = "`rpac check SPEC --json`"
    data = _document(path, command)
    with _Reading(path, command):
        _same(path, "spec_hash", data["spec_hash"], manifest.spec_hash, command)
        checked: Mapping[str, str] = data["sources"]
        ours = _sources(manifest)
        for name in sorted(ours.keys() & checked.keys()):
            _same(path, f"sources.{name}", checked[name], ours[name], command)
        covered = sorted(ours.keys() & checked.keys())
        if not covered:
            raise _refusal(path, "checks of no kernel of the bundle", f"must check {', '.join(sorted(ours))}", command)
        rows: Sequence[Mapping[str, Any]] = data["results"]
        return {
            "result": PASSED if data["ok"] else "FAILED",
            "configuration": [
                {"name": SPEC, "digest": {"sha256": manifest.files[SPEC].sha256}},
                *({"name": f"{_SOURCE}{name}", "digest": {"sha256": ours[name]}} for name in covered),
            ],
            "failedTests": [_name(row) for row in rows if not _passed(row)]
            + [f"compile {row['target']}" for row in data["compiled"] if row["message"]],
            "rpac_runs": len(rows),
            "rpac_seed": data["seed"],
            "rpac_batches": sorted({row["batch"] for row in rows}),
            "rpac_tolerances": {row["source"]: row["tolerance"] for row in rows},
            "rpac_worstErrors": _worst(rows),
            "rpac_compiled": {row["target"]: row["programs"] for row in data["compiled"]},
            UNCHECKED: sorted(ours.keys() - checked.keys()),
            MUTATIONS: planted,  # `rpac check` plants no bugs: without a file it is missing, and says so
        }


def mutations(path: Path) -> dict[str, Any]:
    """What `make mutations` found: how many planted bugs the check of this rpac caught, of how many.

    Raises TrustError where the file is none, or is of another rpac: other kernels may have other bugs that go unseen.
    """
    command = "`make mutations`"
    data = _document(path, command)
    with _Reading(path, command):
        _same(path, "format", data["format"], "rpac mutations", command)
        for name, now in own_files().items():
            _same(path, f"files.{name}", data["files"][name], now, command, "of this rpac")
        bugs: Sequence[Mapping[str, Any]] = data["bugs"]
        if not bugs:
            raise _refusal(path, "no bugs", "must have one or more", command)
        missed = sorted(str(one["name"]) for one in bugs if one["caught"] is not True)
        return {"caught": len(bugs) - len(missed), "of": len(bugs), "missed": missed, "files": own_files()}


def demo(path: Path, manifest: Manifest) -> dict[str, Any]:
    """The predicate of what `make demo` wrote: seconds until a bundle's output was seen to be right, from the start of its build.

    Raises TrustError where the file is none, or is of another bundle.
    """
    command = "`make demo`"
    data = _document(path, command)
    with _Reading(path, command):
        _same(path, "format", data["format"], "rpac demo", command)
        _same(path, "bundle.digest", data["bundle"]["digest"], digest(manifest), command)
        if not is_seconds(data["seconds"]):
            raise _refusal(path, f"seconds {data['seconds']!r}", "must be a time above 0", command)
        return {"results": data}


def predictions(path: Path, manifest: Manifest) -> dict[str, Any]:
    """The predicate of what `rpac predict --json` wrote: times, the hashes of the schedules, and the walker's constants.

    Raises TrustError where the file is none, or predicts other kernels or another compiler than the bundle's.
    """
    command = "`rpac predict BUNDLE --target TARGET --json`"
    data = _document(path, command)
    ours = _sources(manifest)
    with _Reading(path, command):
        if not data["predictions"]:
            raise _refusal(path, "no predictions", "must have one or more", command)
        for index, one in enumerate(data["predictions"]):
            where, source = f"predictions[{index}]", one["source"]
            _same(path, f"{where}.source.sha256", source["sha256"], ours.get(source["path"]), command)
            built = {
                target.toolchain.get("libtpu") for target in manifest.targets.values() if target.name == one["target"]
            }
            _same(path, f"{where}.compiler", one["compiler"], next(iter(built), None), command)
        return {
            "constants": {
                one["target"]: {"digest": {"sha256": _hash(one["model"])}, "values": one["model"]}
                for one in data["predictions"]
            },
            "predictions": [
                {
                    **{key: one[key] for key in ("target", "program", "batch", "compiler", "compiler_verified")},
                    **{key: one[key] for key in ("seconds", "kernel_seconds", "mbu", "mfu")},
                    "source": one["source"],
                    "schedules": {name: {"sha256": sha256} for name, sha256 in one["schedules"].items()},
                }
                for one in data["predictions"]
            ],
        }


def bench(path: Path, manifest: Manifest) -> dict[str, Any]:
    """The predicate of what `rpac bench` wrote, which is the whole file. Raises TrustError where it is none, or is of
    another bundle.
    """
    command = "`rpac bench BUNDLE`"
    data = _document(path, command)
    with _Reading(path, command):
        _same(path, "format", data["format"], "rpac bench", command)
        _same(path, "bundle.digest", data["bundle"]["digest"], digest(manifest), command)
        if not data["complete"]:
            raise _refusal(path, f"{len(data['entries'])} of {data['cases']} results", "must be complete", command)
        return {"results": data}


def is_seconds(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0  # type: ignore[arg-type,operator]


class _Reading:
    """Turns what a file lacks, while it is read, into a TrustError."""

    def __init__(self, path: Path, command: str) -> None:
        self._path, self._command = path, command

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (KeyError, TypeError, AttributeError)):
            raise _refusal(
                self._path,
                f"other fields ({type(error).__name__}: {error})",
                f"must be what {self._command} wrote",
                self._command,
            ) from error


def _document(path: Path, command: str) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_EVIDENCE_BYTES + 1)
        if len(data) > MAX_EVIDENCE_BYTES:
            raise _refusal(path, f"more than {MAX_EVIDENCE_BYTES} bytes", f"must be what {command} wrote", command)
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path, f"no JSON that can be read ({error})", f"must be what {command} wrote", command) from error


def _sources(manifest: Manifest) -> dict[str, str]:
    """The sha256 of every kernel's source, by its path below `source/`."""
    return {
        name.removeprefix(_SOURCE): content.sha256
        for name, content in manifest.files.items()
        if name.startswith(_SOURCE)
    }


def _worst(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The largest error of each source; None where an output was no number."""
    worst: dict[str, float | None] = {}
    for row in rows:
        before, error = worst.get(row["source"], 0.0), row["error"]
        worst[row["source"]] = None if before is None or error is None else max(before, error)
    return worst


def _passed(row: Mapping[str, Any]) -> bool:
    within = row["error"] is not None and row["error"] <= row["tolerance"]
    return bool(within and row["cache_ok"] and not row["races"] and not row["notes"])


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['source']} {row['mode']} {row['batch']}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _same(
    path: Path, where: str, found: object, wanted: object, command: str, whose: str = "as the bundle has it"
) -> None:
    if found != wanted:
        raise TrustError(
            [
                Problem(
                    str(path), None, None, where, repr(found), f"must be {wanted!r}, {whose}", f"make it again with {command}",
                )
            ]
        )  # fmt: skip


def _refusal(path: Path, found: str, allowed: str, command: str) -> TrustError:
    return TrustError([Problem(str(path), None, None, "", found, allowed, f"make it with {command}")])
