"""What a check says: a table, JSON, and an error where anything failed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from command import TINY

from rpac.check import CheckReport, CompileResult, Result, check_spec
from rpac.errors import CheckError, CompileError
from rpac.lower import Task
from rpac.spec import load_spec

RESULT = Result("tpu7x/decode.py", "decode", ("tpu7x",), "eager", "empty", 8, 0.0, 2.0**-7, True, (), (), 0.5)


def report(*results: Result, compiled: Sequence[CompileResult] = ()) -> CheckReport:
    return CheckReport("tiny", "ab" * 32, 7, results, tuple(compiled))


@pytest.mark.parametrize(
    "bad",
    [
        replace(RESULT, error=0.01),
        replace(RESULT, error=math.nan),
        replace(RESULT, error=math.inf),
        replace(RESULT, cache_ok=False),
        replace(RESULT, races=("write and read",)),
        replace(RESULT, notes=("raised it",)),
    ],
)
def test_one_bad_row_fails_the_report(bad: Result) -> None:
    found = report(RESULT, bad)
    assert found.failed == (bad,)
    assert "FAILED" in found.table()
    assert "2 checks, 1 failed (seed 7)" in found.table()
    with pytest.raises(CheckError) as caught:
        found.raise_if_failed()
    assert caught.value.exit_code == 1


def test_a_good_report_is_a_table_and_json() -> None:
    found = report(RESULT, compiled=[CompileResult("v6e", 5, "", 1.0)])
    found.raise_if_failed()
    lines = found.table().splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["tpu7x/decode.py", "tpu7x", "eager", "empty", "0.0e+00", "ok", "0", "0.5", "ok"]
    assert lines[-1] == "tiny: 2 checks, all ok (seed 7)"
    data = json.loads(found.to_json())
    assert data["ok"] is True
    assert data["results"][0]["targets"] == ["tpu7x"]


def test_json_has_no_infinity() -> None:
    data = json.loads(report(replace(RESULT, error=math.inf)).to_json())
    assert data["results"][0]["error"] is None
    assert data["ok"] is False


def test_a_target_that_does_not_compile_fails_the_report_and_the_others_are_still_compiled() -> None:
    asked: list[tuple[str, int]] = []

    def compile_tasks(tasks: Sequence[Task]) -> None:
        asked.append((tasks[0].target, len(tasks)))
        if tasks[0].target == "v6e":
            raise CompileError("no VMEM left")

    found = check_spec(
        load_spec(TINY),
        targets=["v6e", "cpu"],
        kinds=["prefill"],
        random_batches=0,
        compile=compile_tasks,
        progress=lambda row: None,
    )
    assert asked == [("v6e", 1), ("cpu", 1)]
    assert [(row.target, row.message) for row in found.compiled] == [("v6e", "no VMEM left"), ("cpu", "")]
    assert found.failed == (found.compiled[0],)
    assert "compile v6e: no VMEM left" in found.table()
