"""Results are signed for the bundle that they are of, and for no other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpac.bench.result import FORMAT
from rpac.bundle import digest, read_manifest
from rpac.bundle.manifest import Manifest
from rpac.check.report import CheckReport, CompileResult, Result
from rpac.contract.program import Source, Variant
from rpac.devices.toolchain import toolchain
from rpac.errors import TrustError
from rpac.predict import Prediction, Workload
from rpac.schedule import CallReport, model_of
from rpac.trust import evidence
from rpac.trust.predicates import TESTS, TYPES, failure
from rpac.trust.provenance import own_files

SOURCE = "tpu7x/decode.py"
ROW = Result(SOURCE, "decode", ("tpu7x",), "eager", "one", 8, 1e-3, 4e-3, True, (), (), 1.0)


@pytest.fixture
def manifest(bundled: Callable[..., Path]) -> Manifest:
    return read_manifest(bundled())


def put(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "results.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def source(manifest: Manifest) -> Source:
    """The kernel of the bundle; its hash is all that counts of it."""
    made = Source(SOURCE, "")
    made.__dict__["sha256"] = manifest.files[f"source/{SOURCE}"].sha256
    return made


def check(manifest: Manifest, *rows: Result, message: str = "") -> Any:
    sources = {SOURCE: source(manifest).sha256, "v6e/decode.py": "of another target"}
    compiled = (CompileResult("tpu7x", 5, message, 1.0),)
    return json.loads(CheckReport("tiny", manifest.spec_hash, 7, rows or (ROW,), compiled, sources).to_json())


def prediction(manifest: Manifest, compiler: str = "") -> Any:
    report = CallReport(
        target="tpu7x", compiler=compiler or toolchain()["libtpu"], compiler_verified=True, seconds=1e-3, kernel_seconds=9e-4,
        mbu=0.6, mfu=0.1, kernel_mbu=0.6, kernel_mfu=0.1, needed_bytes=1, needed_flops=1, moved_bytes=1, kernels=(), xla=(),
        model=model_of("tpu7x"),
    )  # fmt: skip
    made = Prediction(
        "tiny", Workload("2x40", (1, 1), (40, 40)), Variant("decode", 8), report, source(manifest), {"rpa": "ab"}
    )
    return {"predictions": [made.to_json()]}


def benched(manifest: Manifest, **more: Any) -> Any:
    return {
        "format": FORMAT,
        "bundle": {"digest": digest(manifest)},
        "complete": True,
        "cases": 1,
        "entries": [{}],
        **more,
    }


def test_a_check_says_what_ran_and_the_worst_of_it(tmp_path: Path, manifest: Manifest) -> None:
    found = evidence.tests(put(tmp_path, check(manifest, ROW, replace(ROW, batch="two", error=2e-3))), manifest)
    assert (found["result"], found["rpac_runs"], found["rpac_seed"]) == ("PASSED", 2, 7)
    assert found["rpac_worstErrors"] == {SOURCE: 2e-3}
    assert found["rpac_tolerances"] == {SOURCE: 4e-3}
    assert found["rpac_batches"] == ["one", "two"]
    assert found["rpac_compiled"] == {"tpu7x": 5}
    assert found["rpac_unchecked"] == ["tpu7x/mixed_t32.py", "tpu7x/mixed_t8.py", "tpu7x/prefill.py"]
    assert found["rpac_mutations"] is None
    assert [one["name"] for one in found["configuration"]] == ["spec.yaml", f"source/{SOURCE}"]


def test_a_check_of_some_kernels_does_not_pass(tmp_path: Path, manifest: Manifest) -> None:
    found = evidence.tests(put(tmp_path, check(manifest)), manifest)
    assert failure(TYPES[TESTS], found).startswith("it leaves out tpu7x/mixed_t32.py, ")
    assert failure(TYPES[TESTS], {**found, "rpac_unchecked": []}) == ""


def test_a_check_that_failed_is_signed_as_one(tmp_path: Path, manifest: Manifest) -> None:
    rows = (ROW, replace(ROW, batch="two", error=math.inf), replace(ROW, batch="three", cache_ok=False))
    found = evidence.tests(put(tmp_path, check(manifest, *rows, message="no tile fits")), manifest)
    assert found["result"] == "FAILED"
    assert found["failedTests"] == [f"{SOURCE} eager two", f"{SOURCE} eager three", "compile tpu7x"]
    assert found["rpac_worstErrors"] == {SOURCE: None}


def test_a_prediction_says_its_times_schedules_and_constants(tmp_path: Path, manifest: Manifest) -> None:
    found = evidence.predictions(put(tmp_path, prediction(manifest)), manifest)
    (one,) = found["predictions"]
    assert (one["seconds"], one["program"], one["schedules"]) == (1e-3, "decode/8", {"rpa": {"sha256": "ab"}})
    assert found["constants"]["tpu7x"]["values"]["clock_hz"] == model_of("tpu7x").clock_hz
    assert len(found["constants"]["tpu7x"]["digest"]["sha256"]) == 64


def test_a_bench_is_signed_whole(tmp_path: Path, manifest: Manifest) -> None:
    data = benched(manifest)
    assert evidence.bench(put(tmp_path, data), manifest) == {"results": data}


def demonstrated(manifest: Manifest, **changes: Any) -> Any:
    return {"format": "rpac demo", "bundle": {"digest": digest(manifest)}, "seconds": 41.5, "from": "build", **changes}


def planted(*missed: str, **changes: Any) -> Any:
    bugs = [{"name": name, "caught": name not in missed} for name in ("a", "b", "c")]
    return {"format": "rpac mutations", "files": own_files(), "bugs": bugs, **changes}


def test_a_demo_says_how_long_it_took(tmp_path: Path, manifest: Manifest) -> None:
    data = demonstrated(manifest)
    assert evidence.demo(put(tmp_path, data), manifest) == {"results": data}


def test_planted_bugs_are_part_of_a_test_result(tmp_path: Path, manifest: Manifest) -> None:
    found = evidence.mutations(put(tmp_path, planted("b")))
    assert (found["caught"], found["of"], found["missed"]) == (2, 3, ["b"])
    made = evidence.tests(put(tmp_path, check(manifest)), manifest, found)
    assert made["rpac_mutations"] == found


REFUSED: dict[str, tuple[Callable[[Path, Manifest], object], Callable[[Manifest], Any], str]] = {
    "check: no file": (evidence.tests, lambda m: None, r"no JSON that can be read .*; make it with `rpac check SPEC --json`"),
    "check: no JSON": (evidence.tests, lambda m: "{", r"no JSON that can be read"),
    "check: other fields": (evidence.tests, lambda m: {"a": 1}, r"other fields \(KeyError: 'spec_hash'\); must be what"),
    "check: a list": (evidence.tests, lambda m: [1], r"other fields \(TypeError"),
    "check: another spec": (evidence.tests, lambda m: {**check(m), "spec_hash": "ab"}, "spec_hash: found 'ab'; must be"),
    "check: another kernel": (
        evidence.tests, lambda m: {**check(m), "sources": {SOURCE: "ab"}}, rf"sources\.{SOURCE}: found 'ab'; must be",
    ),
    "check: no kernel of it": (
        evidence.tests, lambda m: {**check(m), "sources": {"v6e/decode.py": "ab"}}, "found checks of no kernel of the bundle",
    ),
    "prediction: none": (evidence.predictions, lambda m: {"predictions": []}, "found no predictions"),
    "prediction: another compiler": (
        evidence.predictions, lambda m: prediction(m, "0.0.1"), r"predictions\[0\]\.compiler: found '0\.0\.1'; must be",
    ),
    "bench: another bundle": (
        evidence.bench, lambda m: benched(m, bundle={"digest": "ab"}), r"bundle\.digest: found 'ab'; .* as the bundle has it",
    ),
    "bench: another file": (evidence.bench, lambda m: benched(m, format="x"), "format: found 'x'; must be 'rpac bench'"),
    "demo: another bundle": (
        evidence.demo, lambda m: demonstrated(m, bundle={"digest": "ab"}), r"bundle\.digest: found 'ab'; .* as the bundle has it",
    ),
    "demo: no time": (evidence.demo, lambda m: demonstrated(m, seconds=True), "found seconds True; must be a time above 0"),
    "mutations: of another rpac": (
        lambda path, m: evidence.mutations(path), lambda m: planted(files={"rpac": "ab"}), r"rpac: found 'ab'; .* of this rpac",
    ),
    "mutations: none": (lambda path, m: evidence.mutations(path), lambda m: planted(bugs=[]), "found no bugs; must have one"),
    "bench: cut short": (evidence.bench, lambda m: benched(m, complete=False), "found 1 of 1 results; must be complete"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_results_that_are_refused(tmp_path: Path, manifest: Manifest, case: str) -> None:
    read, make, message = REFUSED[case]
    data = make(manifest)
    path = tmp_path / "absent.json" if data is None else put(tmp_path, data)
    with pytest.raises(TrustError, match=message) as raised:
        read(path, manifest)
    assert str(path) in str(raised.value)
