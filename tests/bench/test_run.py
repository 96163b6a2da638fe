"""A run from the bundle to the file: what stops it, and what is kept where it stops.

The stand-in programs compute no attention: they are what a wrong program is, and what is timed where no output is checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import rpac.bench.run as module
from rpac.bench.profile import DeviceTimes, NoDeviceTime
from rpac.bench.result import Bench, Timing, read
from rpac.bench.run import Options, bench
from rpac.bench.verify import Checked
from rpac.bundle import digest, read_manifest, write_bundle
from rpac.cli import main
from rpac.errors import BatchError, CheckError, ScheduleError, TargetError
from rpac.files.store import Store
from rpac.predict import Asked
from rpac.schedule import model_of
from rpac.spec import Spec

UNCHECKED = Options(calls=2, check=False)
MODEL = model_of("tpu7x")
FIXED = Timing("fences", (2e-6, 1e-6, 3e-6), 4, "no profiler")


@pytest.fixture(autouse=True)
def no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "stream_bandwidth", lambda device: 1e10)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "timed", lambda *_: FIXED)


def run(bundle: Path, options: Options = UNCHECKED, **more: Any) -> Bench:
    return bench(bundle, options, Store(None), **more)


def test_every_program_is_timed_and_the_file_says_on_what(bundle: Path) -> None:
    found = run(bundle, replace(UNCHECKED, calls=1))
    assert found.complete
    assert {(one.kind, one.tokens) for one in found.entries} == {
        ("decode", 8), ("decode", 32), ("prefill", 32), ("mixed", 8), ("mixed", 32)
    }  # fmt: skip
    assert found.cases == len(found.entries) == 10
    assert found.bundle["digest"] == json.loads((bundle / "manifest.json").read_text())["digest"]
    assert found.bundle["digest"] == digest(read_manifest(bundle))
    assert found.bundle["target"] == found.machine["platform"] == "cpu"
    assert found.machine["packages"]["jax"]
    for one in found.entries:
        assert one.timing.method == "fences"
        assert all(seconds > 0 for seconds in one.timing.seconds)
        assert one.check is None
        assert one.predicted is None
        assert one.not_predicted == "the target cpu has no schedule to predict from"


def test_outputs_are_held_against_the_oracle(small: Path, fixed: None) -> None:
    (one,) = run(small, Options(calls=1, kinds=("decode",))).entries
    assert one.check is not None
    assert one.check["error"] <= one.check["tolerance"] == 2.0**-15
    assert one.check["rows"] == (0, 1, 2, 3)


def test_a_wrong_program_ends_the_run_before_anything_is_timed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: object) -> Timing:
        raise AssertionError("a program was timed")

    monkeypatch.setattr(module, "timed", timed)
    kept: list[Bench] = []
    with pytest.raises(CheckError, match=r"program decode/8, decode 4x40 on .*, rows 0 1 2 3: attention of query head"):
        run(bundle, Options(calls=1), keep=kept.append)
    assert kept == []


def test_the_last_program_is_checked_before_the_first_is_timed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def refuses_the_last(engine: Any, case: Any, inputs: Any) -> Any:
        looked.append(str(case))
        if len(looked) == 10:
            raise CheckError("wrong")
        return Checked(0.0, 1.0, (0,))

    monkeypatch.setattr(module, "verify", refuses_the_last)
    monkeypatch.setattr(module, "timed", lambda *_: pytest.fail("a program was timed"))
    with pytest.raises(CheckError, match="wrong"):
        run(bundle, Options(calls=1))
    assert len(set(looked)) == 10


def test_the_bundle_of_another_device_is_refused(
    tmp_path: Path, tiny: Spec, programs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = [replace(one, target="tpu7x", device_kind="TPU7x") for one in programs]
    write_bundle(tmp_path / "tiny.rpac", replace(tiny, targets=("tpu7x",)), elsewhere)
    with pytest.raises(
        TargetError, match=r"found device .* of kind 'cpu'; the bundle has tpu7x \(TPU7x\); load a target"
    ):
        run(tmp_path / "tiny.rpac")
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(tmp_path / "tiny.rpac"), "-o", str(tmp_path / "bench.json")])
    assert ended.value.code == 3
    assert "of kind 'cpu'; the bundle has tpu7x (TPU7x)" in capsys.readouterr().err
    assert not (tmp_path / "bench.json").exists()


def test_kinds_choose_programs_and_batches_choose_theirs(bundle: Path, fixed: None) -> None:
    found = run(bundle, replace(UNCHECKED, kinds=("prefill",)))
    assert {one.kind for one in found.entries} == {"prefill"}
    asked = Asked.of(["3x50"], ["1x16/32"], None)
    found = run(bundle, replace(UNCHECKED, asked=asked))
    assert [(one.program, one.label) for one in found.entries] == [
        ("decode/8", "decode 3x50"), ("prefill/32", "prefill 1x16/32")
    ]  # fmt: skip
    with pytest.raises(
        BatchError, match="found no batch of mixed; the batches are of decode, prefill; leave --kind out"
    ):
        run(bundle, replace(UNCHECKED, asked=asked, kinds=("mixed",)))


def test_what_was_timed_is_kept_where_a_run_is_interrupted(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([FIXED, FIXED])

    def timed(*_: object) -> Timing:
        try:
            return next(times)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(module, "timed", timed)
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(bundle), "--no-check", "--no-cache", "-o", str(out)])
    assert ended.value.code == 130
    assert f"{out}: holds 2 of 10 results\nrpac: interrupted\n" in capsys.readouterr().err
    found = read(out)
    assert (len(found.entries), found.cases, found.complete) == (2, 10, False)
    assert found.entries[0].not_predicted == module.YET


def test_a_table_says_what_was_timed_and_where_it_is(
    bundle: Path, tmp_path: Path, fixed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    main(["bench", str(bundle), "--decode", "2x20", "--no-check", "--no-cache", "-o", str(out)], standalone_mode=False)
    header, _, row, *_, last = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == (
        "program batch us p10 p90 times by GB/s of stream predicted us measured / predicted"
    )
    assert " ".join(row.split()) == "decode/8 decode 2x20 2.0 1.2 2.8 3x4 fences 23.55 2.36 - -"
    assert last.startswith(f"{out}: 1 results in ")


def test_a_file_of_a_run_without_checks_says_so(
    bundle: Path, tmp_path: Path, fixed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    main(["bench", str(bundle), "--kind", "prefill", "--no-check", "-o", str(out), "--no-cache"], standalone_mode=False)
    assert "; no output was checked.\n" in capsys.readouterr().out
    assert [one.check for one in read(out).entries] == [None, None]


def test_what_the_runtime_says_of_a_program_is_reported_and_what_was_timed_is_kept(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([FIXED])

    def timed(*_: object) -> Timing:
        try:
            return next(times)
        except StopIteration:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED") from None

    monkeypatch.setattr(module, "timed", timed)
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(bundle), "--no-check", "--no-cache", "-o", str(out)])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "rpac: CheckError: program decode/8, decode 4x100 on cpu:0: the runtime raised RESOURCE_EXHAUSTED; " in said
    assert len(read(out).entries) == 1


def on_tpu(monkeypatch: pytest.MonkeyPatch, predict_on: Callable[..., Any]) -> None:
    """Makes the CPU a TPU, whose programs' schedules are `predict_on`'s affair."""
    monkeypatch.setattr(module, "is_tpu", lambda target: True)
    monkeypatch.setattr(module, "programs_of", lambda path, target, store, progress, **_: (path, target))
    monkeypatch.setattr(module, "predict_on", predict_on)


@pytest.mark.usefixtures("fixed")
def test_each_batch_has_the_prediction_of_its_program_beside_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def predict_on(programs: Any, variant: Any, batch: Any, workload: Any) -> Any:
        assert programs == (bundle, "cpu")
        assert batch.kind == variant.kind
        assert sorted(batch.kv_lens[: len(batch)].tolist()) == sorted(workload.kv_lens)
        seconds = 1e-6 * variant.tokens
        kernels = (SimpleNamespace(name="rpa.1", seconds=seconds / 2),)
        report = SimpleNamespace(
            seconds=seconds, kernel_seconds=seconds / 2, kernels=kernels, compiler="0.0.1", model=MODEL
        )
        return SimpleNamespace(report=report)

    on_tpu(monkeypatch, predict_on)
    for one in run(bundle).entries:
        assert one.predicted is not None
        assert one.predicted.seconds == 1e-6 * one.tokens
        assert one.predicted.kernels == {"rpa.1": one.predicted.kernel_seconds}
        assert one.predicted.model == asdict(MODEL)
        assert one.not_predicted == ""


@pytest.mark.usefixtures("fixed")
def test_a_program_that_cannot_be_predicted_is_timed_and_the_reason_stated(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict_on(*_: object) -> Any:
        raise ScheduleError(f"{bundle}: an instruction that nobody knows")

    on_tpu(monkeypatch, predict_on)
    found = run(bundle)
    assert found.complete
    assert {one.not_predicted for one in found.entries} == {"an instruction that nobody knows"}
    assert all(one.timing == FIXED for one in found.entries)


class Instant:
    """Calls that take no time."""

    def __init__(self) -> None:
        self.started = 0

    def __call__(self) -> None:
        self.started += 1

    def wait(self) -> None:
        pass


def test_the_profiler_is_asked_first_and_the_clock_where_it_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def profiled(calls: object, count: int) -> DeviceTimes:
        counts.append(count)
        return DeviceTimes((1e-6,) * count, {"rpa_decode.1": 9e-7})

    monkeypatch.setattr(module, "profiled", profiled)
    found = module.timed(Instant(), 2.0, 30, True)
    assert (found.method, found.spread.count, found.operations) == ("profiler", 30, {"rpa_decode.1": 9e-7})
    module.timed(Instant(), 2.0, None, True)
    assert counts == [30, module.MOST_PROFILED]

    def nothing(calls: object, count: int) -> DeviceTimes:
        raise NoDeviceTime("no plane")

    monkeypatch.setattr(module, "profiled", nothing)
    found = module.timed(Instant(), 2.0, 30, True)
    assert (found.method, found.why, found.spread.count * found.calls_each) == ("fences", "no plane", 30)


def test_the_profiler_is_not_asked_about_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "profiled", lambda *_: pytest.fail("asked"))
    assert module.timed(Instant(), 2.0, 5, False).why == "the profiler reports no device time of a CPU"
