"""What `rpac check --json` wrote, summed up for each target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpac.errors import Problem, SpecError


@dataclass(frozen=True)
class TargetCheck:
    """The runs of one target's kernels. `worst_error`: the largest relative error of a head; None where nothing ran.

    `compiled`: programs that the compiler took; None where they were not compiled, or refused, and then `message` says why.
    """

    target: str
    runs: int
    failed: int
    worst_error: float | None
    tolerance: float | None
    compiled: int | None
    message: str


@dataclass(frozen=True)
class Check:
    """A whole check of the spec with `spec_hash`."""

    file: str
    spec_hash: str
    seed: int
    ok: bool
    targets: tuple[TargetCheck, ...]


def read_check(path: Path) -> Check:
    """Raises SpecError for a file that `rpac check --json` did not write."""
    try:
        data = json.loads(path.read_bytes())
        return _check(path, data)
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        allowed, fix = "must be what `rpac check --json` wrote", f"run `rpac check SPEC --json > {path}`"
        raise SpecError([Problem(str(path), None, None, "", str(reason), allowed, fix)]) from error


def _check(path: Path, data: Mapping[str, Any]) -> Check:
    runs, compiled = data["results"], data["compiled"]
    names = dict.fromkeys([*(name for run in runs for name in run["targets"]), *(one["target"] for one in compiled)])
    targets = tuple(
        _of_target(
            name, [run for run in runs if name in run["targets"]], [one for one in compiled if one["target"] == name]
        )
        for name in names
    )
    return Check(str(path), str(data["spec_hash"]), int(data["seed"]), data["ok"] is True, targets)


def _of_target(name: str, runs: Sequence[Mapping[str, Any]], compiled: Sequence[Mapping[str, Any]]) -> TargetCheck:
    errors = [run["error"] for run in runs if run["error"] is not None]
    return TargetCheck(
        name,
        len(runs),
        sum(not _passed(run) for run in runs),
        max(errors, default=None),
        max((float(run["tolerance"]) for run in runs), default=None),
        sum(int(one["programs"]) for one in compiled)
        if compiled and not any(one["message"] for one in compiled)
        else None,
        "; ".join(str(one["message"]) for one in compiled if one["message"]),
    )


def _passed(run: Mapping[str, Any]) -> bool:
    """As `rpac.check.report.Result.ok`; an error that is no number was written as null."""
    error = run["error"]
    return error is not None and error <= run["tolerance"] and run["cache_ok"] and not run["races"] and not run["notes"]
