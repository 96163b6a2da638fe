"""`rpac serve-check`: says whether a bundle serves here, and ends with the code of what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import rpac as command

import rpac.check.deployment as module
from rpac.bundle import write_bundle
from rpac.check.deployment import serve_check
from rpac.contract.program import Variant
from rpac.files.store import Store
from rpac.oracle.expected import canary_answers
from rpac.spec import Spec


def test_a_sound_bundle_serves(small: Path, tmp_path: Path) -> None:
    done = command("serve-check", small, "--target", "cpu", "--seed", 7, cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["step", "result", "s", "found"]
    steps = [line.split("  ")[0] for line in lines[2:-1]]
    programs = ["decode/8", "prefill/8", "mixed/8"]
    assert steps == ["verify", "load", "warm", *(f"{what} {one}" for one in programs for what in ("canary", "batch"))]
    assert lines[-1] == f"{small}: serves here; seed 7"


def test_json_is_all_that_stdout_holds(small: Path, tmp_path: Path) -> None:
    done = command("serve-check", f"file://{small}", "--target", "cpu", "--batches", 0, "--json", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["exit_code"] == 0
    assert [step["ok"] for step in report["steps"]] == [True] * 6


def test_another_target_ends_with_3(small: Path, tmp_path: Path) -> None:
    env = {"JAX_PLATFORMS": "cpu"}
    done = command("serve-check", small, "--target", "tpu7x", cache=tmp_path, env=env)
    assert done.returncode == 3
    assert "load: " in done.stdout
    assert "the bundle has cpu (cpu); load a target of this device's kind" in done.stdout


def test_a_damaged_bundle_ends_with_4_before_anything_is_loaded(small: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(small, tmp_path / "small.rpac"))
    blob = max((path / "blobs").iterdir())
    blob.write_bytes(blob.read_bytes()[:-1])
    done = command("serve-check", path, "--target", "cpu", cache=tmp_path)
    assert done.returncode == 4
    assert "verify  FAILED" in done.stdout
    assert "it is cut short; copy or build the bundle again" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{path}: 1 failed; seed ")


def test_a_missing_bundle_ends_with_4_and_a_missing_argument_with_2(tmp_path: Path) -> None:
    assert command("serve-check", tmp_path / "none.rpac", "--target", "cpu", cache=tmp_path).returncode == 4
    assert command("serve-check", cache=tmp_path).returncode == 2


def test_wrong_programs_are_all_named(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    """The stand-ins compute no attention; their canaries fail, and no batch is run on them."""
    variants = [Variant(one.kind, one.tokens) for one in programs]
    write_bundle(tmp_path / "tiny.rpac", tiny, programs, canaries=canary_answers(tiny, variants, Store(None)))
    report = serve_check(tmp_path / "tiny.rpac", "cpu", seed=1)
    assert report.exit_code == 1
    failed = [step.name for step in report.steps if not step.ok]
    assert sorted(failed) == sorted(f"canary {variant}" for variant in variants)
    assert [step.name for step in report.steps if step.ok] == ["verify", "load", "warm"]


def test_a_random_batch_that_goes_wrong_is_found(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program right for its canary and wrong for other batches; here the oracle is, which is the same."""
    expected = module.expected

    def off(*args: Any) -> Any:
        out, pages, lse = expected(*args)
        return out * 1.05, pages, lse

    monkeypatch.setattr(module, "expected", off)
    report = serve_check(small, "cpu", seed=3)
    assert report.exit_code == 1
    failed = [step for step in report.steps if not step.ok]
    assert {step.name.split()[0] for step in failed} == {"batch"}
    assert "is off by 0.0" in failed[0].detail
