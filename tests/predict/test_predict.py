"""A prediction holds what it promises, and rests on nothing but the files that `emit` leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command import TINY

from rpac.errors import BundleError, OutputError, ScheduleError, TargetError
from rpac.files.store import Store
from rpac.oracle.canary import spread_batch
from rpac.predict import (
    Programs,
    Workload,
    check_emit,
    emit,
    parse_decode,
    parse_prefill,
    predict,
    predict_on,
    programs_of,
)
from rpac.predict.run import OPERANDS
from rpac.schedule import model_of, parse_schedule, walk
from rpac.spec import load_spec

Built = Callable[[str], Programs]
Bundled = Callable[..., Path]
DECODE = parse_decode("4x100")
BATCHES = [DECODE, parse_prefill("2x16/100"), Workload("some of each", (1, 16, 7), (300, 16, 40))]


@pytest.mark.compile
@pytest.mark.parametrize("workload", BATCHES, ids=["decode", "prefill", "mixed"])
def test_the_emitted_files_alone_give_the_same_times(programs: Built, tmp_path: Path, workload: Workload) -> None:
    found = predict(programs("tpu7x"), workload)
    files = emit(programs("tpu7x"), workload, tmp_path / "out")
    assert sorted(files) == sorted(path.name for path in (tmp_path / "out").iterdir())
    replayed = replay(tmp_path / "out", "tpu7x")
    assert replayed == pytest.approx({f"{kernel.name}.txt": kernel.seconds for kernel in found.report.kernels})
    assert sum(replayed.values()) == pytest.approx(found.report.kernel_seconds)


def replay(folder: Path, target: str) -> dict[str, float]:
    """Seconds of each kernel, with the walker of this package; with another, they would be another's."""
    model = model_of(target)
    seconds = {}
    for name, operands in json.loads((folder / OPERANDS).read_text()).items():
        schedule = parse_schedule((folder / name).read_text(), target, name)
        scalars = {op.index for op in schedule.operands if op.dtype == "s32"}
        assert {int(index) for index in operands} == scalars, "every scalar operand is there"
        done = walk(schedule, {int(index): values for index, values in operands.items()}, model)
        seconds[name] = done.cycles / model.clock_hz
    return seconds


@pytest.mark.compile
def test_a_program_can_be_named_and_where_its_pages_lie_changes_nothing(programs: Built) -> None:
    found = predict(programs("tpu7x"), DECODE)
    context = [kv_len - q_len for q_len, kv_len in zip(DECODE.q_lens, DECODE.kv_lens, strict=True)]
    spread_out, pages = spread_batch("decode", programs("tpu7x").limits, DECODE.q_lens, context)
    assert pages.tolist() != list(range(len(pages)))
    assert predict_on(programs("tpu7x"), found.variant, spread_out, DECODE) == found


@pytest.mark.compile
def test_the_emitted_schedule_is_the_compilers_to_the_byte(programs: Built, tmp_path: Path) -> None:
    emit(programs("tpu7x"), DECODE, tmp_path / "out")
    call = programs("tpu7x").call(predict(programs("tpu7x"), DECODE).variant)
    for kernel in call.kernels:
        text = (tmp_path / "out" / f"{kernel.name}.txt").read_bytes()
        assert text == call.dump.schedules[kernel.name].encode()
        assert text.startswith(b"= control target key start\n")
    emit(programs("tpu7x"), DECODE, tmp_path / "out")  # over its own earlier output


@pytest.mark.compile
def test_an_earlier_output_is_not_replaced_with_a_file_of_somebody_else_in_it(programs: Built, tmp_path: Path) -> None:
    emit(programs("tpu7x"), DECODE, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("the only copy")
    with pytest.raises(OutputError, match=r"found other files there: notes\.txt; "):
        check_emit(tmp_path / "out")
    with pytest.raises(OutputError, match="did not make"):
        emit(programs("tpu7x"), DECODE, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "the only copy"


@pytest.mark.compile
def test_a_report_adds_up(programs: Built) -> None:
    one = predict(programs("tpu7x"), BATCHES[2])
    report = one.report
    assert [kernel.name for kernel in report.kernels] == ["rpa_decode.1", "rpa_mixed.1"]
    assert report.seconds == pytest.approx(report.kernel_seconds + sum(x.seconds for x in report.xla))
    assert 0 < (report.mbu or 0) <= (report.kernel_mbu or 0) < 1
    assert report.moved_bytes >= sum(k.read_bytes + k.written_bytes for k in report.kernels)
    for kernel in report.kernels:
        assert kernel.seconds == pytest.approx(kernel.compute_seconds + kernel.stall_seconds)
        assert sum(wait.stall_seconds for wait in kernel.waits) == pytest.approx(kernel.stall_seconds)
        loops = {loop.first_instruction for loop in kernel.loops}
        assert {wait.loop for wait in kernel.waits} <= {None, *loops}
        assert any(wait.loop is not None for wait in kernel.waits)
        assert all(loop.utilization is not None for loop in kernel.loops if loop.iterations)
    assert all(x.timed_by == "schedule" or x.reason for x in report.xla)


@pytest.mark.compile
def test_json_has_what_is_looked_for_at_the_top(programs: Built) -> None:
    data = json.loads(json.dumps(predict(programs("tpu7x"), DECODE).to_json()))
    assert {"seconds", "kernel_seconds", "mbu", "mfu", "kernels", "xla", "needed_bytes", "moved_bytes"} <= data.keys()
    assert (data["name"], data["program"], data["target"]) == ("tiny", "decode/8", "tpu7x")
    assert data["batch"] == {"label": "decode 4x100", "q_lens": [1] * 4, "kv_lens": [100] * 4}
    assert set(data["definitions"]) <= data.keys() | data["kernels"][0].keys() | {"utilization"}


@pytest.mark.compile
def test_longer_contexts_take_longer_and_more_bytes(programs: Built) -> None:
    reports = [
        predict(programs("tpu7x"), parse_decode(f"4x{length}")).report for length in (128, 256, 384, 512)
    ]  # whole tiles
    assert sorted(report.seconds for report in reports) == [report.seconds for report in reports]
    assert sorted(report.moved_bytes for report in reports) == [report.moved_bytes for report in reports]


@pytest.mark.compile
def test_a_bundle_is_predicted_as_its_spec(programs: Built, bundled: Bundled, dumps: Path) -> None:
    compiled: list[str] = []
    by_spec = predict(programs("tpu7x"), DECODE)
    by_bundle = predict(programs_of(bundled(), "tpu7x", Store(dumps), compiled.append), DECODE)
    assert by_bundle == by_spec
    assert compiled == []  # the schedules are the same, and were kept


@pytest.mark.compile
def test_what_a_user_set_for_jax_or_the_compiler_does_not_reach_the_schedule(
    programs: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it in a build, so a prediction would be of what nobody ships."""
    before = predict(programs("tpu7x"), DECODE)
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=8192")
    assert os.environ["LIBTPU_INIT_ARGS"]
    fresh = programs_of(TINY, "tpu7x", Store(None))
    assert predict(fresh, DECODE) == before


def test_a_bundle_of_other_compilers_is_refused(bundled: Bundled, dumps: Path) -> None:
    for package in ("jax", "libtpu"):
        with pytest.raises(TargetError, match=rf"built with {package} 9\.9; this one is .*build again"):
            programs_of(bundled(package, **{package: "9.9"}), "tpu7x", Store(dumps))


def test_a_bundle_without_the_target_or_with_a_changed_byte_is_refused(bundled: Bundled, dumps: Path) -> None:
    path = bundled()
    with pytest.raises(TargetError, match="holds no programs for v6e; it has tpu7x"):
        programs_of(path, "v6e", Store(dumps))
    source = next((path / "source").rglob("decode.py"))
    source.write_text(source.read_text().replace("SCORE_SCALE = 0.1", "SCORE_SCALE = 0.2"))
    with pytest.raises(BundleError, match=r"decode\.py"):
        programs_of(path, "tpu7x", Store(dumps))


def test_a_target_without_a_schedule_is_refused(dumps: Path) -> None:
    with pytest.raises(TargetError, match="'cpu' has no schedule to predict from; must be one of tpu7x"):
        programs_of(TINY, "cpu", Store(dumps))


def test_a_compiler_that_is_not_verified_is_refused_before_anything_is_compiled(
    dumps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpac.schedule.compilers.VERIFIED", {"0.0.1": "0.1"})
    with pytest.raises(ScheduleError, match=r"is of libtpu .*; its reading is verified for 0\.0\.1: .*--any-compiler"):
        programs_of(TINY, "tpu7x", Store(dumps))


@pytest.mark.compile
def test_a_program_that_does_not_compile_says_why_and_shows_no_traceback(tmp_path: Path) -> None:
    programs = programs_of(TINY, "tpu7x", Store(None))
    tasks = {
        variant: dataclasses.replace(
            task,
            source=dataclasses.replace(
                task.source, text=re.sub(r"VMEM_LIMIT = \d+", "VMEM_LIMIT = 4096", task.source.text)
            ),
        )
        for variant, task in programs.tasks.items()
    }
    with pytest.raises(ScheduleError, match="tpu7x decode t8: the compiler ran out of VMEM") as raised:
        predict(dataclasses.replace(programs, tasks=tasks), DECODE)
    assert "Traceback" not in str(raised.value)


def test_context_lens_of_a_spec_are_what_is_expected_of_it(dumps: Path) -> None:
    assert programs_of(TINY, "v5e", Store(dumps)).context_lens == load_spec(TINY).serving.context_lens
