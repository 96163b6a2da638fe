"""Every error that rpac raises on purpose, one class for each thing that a user can fix.

    RpacError               the base; catch it to catch them all
    ├── CheckError       1  a generated kernel differs from the oracle
    ├── SpecError        2  the spec file breaks its rules; carries every problem found
    │   ├── ModelError   2  a model's config that no spec can be made of
    │   └── TrustError   2  a key, a trust policy or a file of results that nothing can be signed or verified with
    ├── BatchError       2  metadata or arrays break the batch contract
    ├── SelectionError   2  a sound batch outside what was built; names the spec lines that would add it
    ├── PageError        2  pages of the cache that are not the caller's to use
    │   └── OutOfPagesError 2  the pool has too few free pages; nothing was taken
    ├── PlanError        2  no tile fits VMEM or SMEM
    ├── TargetError      3  target or toolchain is not compatible
    ├── CompileError     3  the compiler refused a kernel
    ├── BundleError      4  bundle is corrupt, truncated, untrusted or of an unknown schema
    ├── OutputError      5  output cannot be written; nothing was published
    └── ScheduleError    6  a schedule dump cannot be read or walked

The number is the process's exit code. `str(error)` is the whole report: the place, the value found, what is
allowed, and the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a file. `line` and `column` count from 1; both are None where the file as a whole is wrong."""

    file: str
    line: int | None
    column: int | None
    where: str
    found: str
    allowed: str
    fix: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"
        where = f" {self.where}:" if self.where else ""
        return f"{place}:{where} found {self.found}; {self.allowed}; {self.fix}"


class RpacError(Exception):
    """Base of every error of rpac; `exit_code` is what the command line exits with."""

    exit_code: ClassVar[int] = 2


class CheckError(RpacError):
    """A generated kernel differs from the oracle."""

    exit_code = 1


class SpecError(RpacError):
    """A spec breaks its rules. `problems` holds every problem of the file, in the file's order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type[SpecError], tuple[tuple[Problem, ...]]]:
        # The default would rebuild it from the message; builds raise it across processes.
        return type(self), (self.problems,)


class ModelError(SpecError):
    """A model's config, or what a server would do with it, that no spec can be made of."""


class TrustError(SpecError):
    """A key or a trust policy that nothing can be verified with, or results that cannot be signed for a bundle."""


class BatchError(RpacError):
    """Metadata or arrays break the batch contract (docs/batch-contract.md)."""


class SelectionError(RpacError):
    """A sound batch outside what was built; the message holds the spec lines that would add it."""


class PageError(RpacError):
    """Pages, or a sequence of them, that are not the caller's to use: unknown, or given back already."""


class OutOfPagesError(PageError):
    """The pool has too few free pages. Nothing was taken: give pages back and ask again."""


class PlanError(RpacError):
    """No tile fits; the message names the tile, what it needs and the limit."""


class TargetError(RpacError):
    """A target or toolchain that is not compatible with what was asked."""

    exit_code = 3


class CompileError(RpacError):
    """The compiler refused a kernel."""

    exit_code = 3


class BundleError(RpacError):
    """A bundle that is corrupt, truncated, untrusted or of an unknown schema."""

    exit_code = 4


class OutputError(RpacError):
    """The output cannot be written; nothing was published."""

    exit_code = 5


class ScheduleError(RpacError):
    """A schedule dump that cannot be read or walked."""

    exit_code = 6
