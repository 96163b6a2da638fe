"""`serve_check` for a bundle that may not be what it seems: in a process of its own, which it can end and not own.

The caller reads and hashes the bundle, holds it against a trust policy, and gives the process a copy. The process loads and runs
it, and reports line by line. Nothing that it writes is trusted to be well formed. That a report is true is another matter: a
program that was forged could write one. What shows who made a bundle is a signature, or its digest.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from rpac.bundle import Manifest, Place, digest
from rpac.bundle.read import read_files
from rpac.check.deployment import ServeReport, Step, verified_detail
from rpac.check.process import Ended, ProcessLimits, run_apart
from rpac.errors import CheckError, RpacError

MODULE: Final = "rpac.check.inside"
DONE: Final = "done"
STARTED: Final = "start"
_EXIT_CODES: Final = range(1, 7)
_LONGEST_NAME: Final = 200
_LONGEST_DETAIL: Final = 20_000


def isolated_serve_check(
    bundle: Place,
    target: str | None = None,
    *,
    seed: int,
    batches: int = 1,
    allow_compile: bool = False,
    trust: str | os.PathLike[str] | None = None,
    limits: ProcessLimits | None = None,
    progress: Callable[[Step], None] = lambda step: None,
) -> ServeReport:
    """As `rpac.check.deployment.serve_check`, in a process of its own with `limits`, by default those of `ProcessLimits()`.

    A process that crashes, hangs or takes too much is a failed step, named after what ran, with exit code 1. A server calls this
    before it loads the bundle, and on a TPU before anything in this process uses the TPU, which belongs to one process at a time.
    Raises TargetError for limits that are none.
    """
    limits = limits or ProcessLimits()
    place = os.fspath(bundle)
    steps: list[Step] = []

    def done(step: Step) -> None:
        steps.append(step)
        progress(step)

    with tempfile.TemporaryDirectory(prefix="rpac-serve-check-") as folder:
        copy = Path(folder) / "bundle.rpac"
        start = time.perf_counter()
        try:
            manifest = _copied(bundle, copy, trust)
        except RpacError as error:
            done(Step("verify", False, str(error), time.perf_counter() - start, error.exit_code))
            return ServeReport(place, seed, tuple(steps))
        done(Step("verify", True, verified_detail(manifest), time.perf_counter() - start))
        scratch = Path(folder) / "scratch"
        scratch.mkdir(mode=0o700)
        request = {
            "bundle": str(copy), "target": target, "seed": seed, "batches": batches, "allow_compile": allow_compile,
            "expect_digest": digest(manifest), "seconds": limits.seconds, "memory": limits.memory,
        }  # fmt: skip
        report = _Report(lambda text: text.replace(str(copy), place), done)
        more = {"JAX_PLATFORMS": "cpu"} if target == "cpu" and "JAX_PLATFORMS" not in os.environ else {}
        ended = run_apart(MODULE, json.dumps(request).encode(), scratch, limits, report.line, more)
    if ended.how or not report.complete:
        done(_failed(ended, report, limits))
    return ServeReport(place, seed, tuple(steps))


def _copied(bundle: Place, to: Path, trust: str | os.PathLike[str] | None) -> Manifest:
    """Verifies a bundle, and writes the very bytes that were verified."""
    approve = None
    if trust is not None:
        from rpac.trust import approved, load_policy

        approve = partial(approved, load_policy(trust))
    found = read_files(bundle, approve)
    for name, data in found.files.items():
        path = to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return found.manifest


class _Report:
    """The lines of the process as steps. What is no line of a report ends it: everything after that is ignored."""

    def __init__(self, here: Callable[[str], str], done: Callable[[Step], None]) -> None:
        self.running = "start"  # of the process itself
        self.complete = False
        self.wrong = ""
        self._here = here
        self._done = done

    def line(self, line: bytes) -> None:
        if self.complete or self.wrong:
            return
        try:
            self._read(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self.wrong = f"{type(error).__name__}: {self._text(str(error), _LONGEST_NAME)}"

    def _read(self, data: Mapping[str, Any]) -> None:
        if data == {DONE: True}:
            self.complete = True
        elif STARTED in data:
            self.running = self._text(data[STARTED], _LONGEST_NAME)
        else:
            name, detail = self._text(data["name"], _LONGEST_NAME), self._text(data["detail"], _LONGEST_DETAIL)
            seconds, exit_code = float(data["seconds"]), data["exit_code"]
            if not (math.isfinite(seconds) and seconds >= 0) or (exit_code != 0 and exit_code not in _EXIT_CODES):
                raise ValueError("a number that no step has")
            self._done(Step(name, exit_code == 0, detail, seconds, int(exit_code)))

    def _text(self, text: Any, longest: int) -> str:
        """Text that a terminal only shows."""
        if not isinstance(text, str):
            raise TypeError("no text")
        return "".join(one if one.isprintable() or one == "\n" else "?" for one in self._here(text)[:longest])


def _failed(ended: Ended, report: _Report, limits: ProcessLimits) -> Step:
    what = ended.how or "ended without the end of its report"
    if report.wrong:
        what += f" after a line that is no report ({report.wrong})"
    words = "".join(one if one.isprintable() else " " for one in ended.words[-500:]).strip()
    last = f"; its last words: {words}" if words else ""
    return Step(
        report.running,
        False,
        f"the process that ran it {what}; must end by itself, within {limits.seconds:g} s and {limits.memory / 2**30:.1f} GiB of "
        f"memory; do not serve with this bundle here{last}",
        0.0,
        CheckError.exit_code,
    )
