"""What a check found: one row for each run of a source in a mode on a batch, and one for each target compiled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rpac.errors import CheckError


@dataclass(frozen=True)
class Result:
    """One run. `error` is the largest relative error of any token's head, infinite where the output is no number."""

    source: str
    kind: str
    targets: tuple[str, ...]
    mode: str
    batch: str
    tokens: int
    error: float
    tolerance: float
    cache_ok: bool
    races: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance and self.cache_ok and not self.races and not self.notes


@dataclass(frozen=True)
class CompileResult:
    """One target: how many programs the compiler took, or what it said."""

    target: str
    programs: int
    message: str
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.message


@dataclass(frozen=True)
class CheckReport:
    """A whole check; the same `spec_hash` and `seed` give the same batches. `sources`: sha256 of each source by its path."""

    spec: str
    spec_hash: str
    seed: int
    results: tuple[Result, ...]
    compiled: tuple[CompileResult, ...]
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[Result | CompileResult, ...]:
        """The rows that are not ok."""
        return (*(row for row in self.results if not row.ok), *(row for row in self.compiled if not row.ok))

    def table(self) -> str:
        """Every row as text, failures explained under the table."""
        rows = [_cells(result) for result in self.results] + [_compile_cells(result) for result in self.compiled]
        lines = _aligned([("source", "for", "mode", "batch", "error", "cache", "races", "s", ""), *rows])
        lines += [f"{name}: {note}" for name, notes in map(_explained, self.failed) for note in notes]
        lines.append(self.summary())
        return "\n".join(lines)

    def summary(self) -> str:
        """One line: how much ran, how much of it failed, and the seed."""
        count = len(self.results) + len(self.compiled)
        verdict = f"{len(self.failed)} failed" if self.failed else "all ok"
        return f"{self.spec}: {count} checks, {verdict} (seed {self.seed})"

    def to_json(self) -> str:
        """The report as JSON text; an infinite error is null."""
        return json.dumps({**_plain(asdict(self)), "ok": not self.failed}, indent=1, allow_nan=False)

    def raise_if_failed(self) -> None:
        """Raises CheckError with every failure and how to see it again."""
        if self.failed:
            lines = [f"{name}: {note}" for name, notes in map(_explained, self.failed) for note in notes]
            raise CheckError("\n".join([*lines, self.summary()]))


def _cells(result: Result) -> tuple[str, ...]:
    error = f"{result.error:.1e}" if math.isfinite(result.error) else "none" if result.notes else "nan"
    cache = "ok" if result.cache_ok else "DIFFERS"
    races = str(len(result.races))
    where = "+".join(result.targets)
    verdict = "ok" if result.ok else "FAILED"
    return (result.source, where, result.mode, result.batch, error, cache, races, f"{result.seconds:.1f}", verdict)


def _compile_cells(result: CompileResult) -> tuple[str, ...]:
    verdict = "ok" if result.ok else "FAILED"
    programs = f"{result.programs} programs"
    return ("compile", result.target, "", programs, "", "", "", f"{result.seconds:.1f}", verdict)


def _explained(row: Result | CompileResult) -> tuple[str, Sequence[str]]:
    if isinstance(row, CompileResult):
        return f"compile {row.target}", [row.message]
    notes = [*row.notes, *(f"race: {race}" for race in row.races)]
    return f"{row.source}, {row.mode}, batch {row.batch!r} in {row.tokens} tokens", notes


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
