"""Dumps are made in a process of their own, and its failures are reported, not swallowed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from rpac.errors import ScheduleError
from rpac.schedule import Call, collect, dump_command, dump_export
from rpac.schedule.dump import TOP, dump_step

FAKE = r"""
import os, pathlib, re, sys, time
print("libtpu 1.2.3", flush=True)
out = pathlib.Path(re.search(r"dump_to=(\S+)", os.environ["LIBTPU_INIT_ARGS"])[1])
(out / "7-TLP-hlo.txt").write_text("hlo")
(out / "7-my.kernel-1-00-schedule-analysis_packed-bundles-post-ra.txt").write_text("no schedule")
(out / "7-my.kernel-1-01-packed-bundles-post-ra.txt").write_text("schedule")
(out / "7-TLP-01-packed-bundles-post-ra.txt").write_text("not an operation")
(out / "7-TLP-02-pre-delay_hlo-static-per-bundle-utilization.txt").write_text("")
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_dump_is_collected_by_operation_and_its_folder_removed() -> None:
    before = set(Path(tempfile.gettempdir()).glob("rpac-dump-*"))
    found = dump_command(python(FAKE + "time.sleep(60)"), "tpu7x", timeout=30)
    assert (found.compiler, found.hlo, found.schedules) == ("1.2.3", "hlo", {"my.kernel-1": "schedule"})
    assert set(Path(tempfile.gettempdir()).glob("rpac-dump-*")) <= before


def test_the_dump_of_a_step_has_the_schedule_of_the_module_itself() -> None:
    found = dump_step(python(FAKE + "time.sleep(60)"), "tpu7x", timeout=30)
    assert found is not None
    assert found.schedules == {"my.kernel-1": "schedule", TOP: "not an operation"}
    assert dump_step(python("print('libtpu 1.2.3')"), "tpu7x", timeout=30) is None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no such tile')", r"failed \(1\):\nno such tile"),
        ("import time; time.sleep(60)", "took over 1 s"),
        ("print('libtpu 1.2.3')", "found 0 HLO modules and 0 schedules"),
        ("pass", "did not say which libtpu"),
    ],
)
def test_a_compile_that_leaves_no_dump_says_why(code: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        dump_command(python(code), "tpu7x", timeout=1 if "sleep" in code else 30)


def test_a_folder_with_two_modules_is_refused(tmp_path: Path) -> None:
    for stamp in (1, 2):
        (tmp_path / f"{stamp}-TLP-hlo.txt").write_text("")
        (tmp_path / f"{stamp}-k-01-packed-bundles-post-ra.txt").write_text("")
    with pytest.raises(ScheduleError, match="found 2 HLO modules and 1 schedules"):
        collect(tmp_path, "tpu7x", "1")


@pytest.mark.compile
def test_an_export_compiles_here_to_schedules_that_walk() -> None:
    from .gather import PAGE_BYTES, PAGES, SEQS, export
    from .test_fixtures import LENS, TABLE

    call = Call(dump_export(export(), "tpu7x"))
    report = call.predict({LENS: [1] * SEQS, TABLE: list(range(PAGES))})
    assert report.kernels[0].written_bytes == SEQS * PAGE_BYTES
