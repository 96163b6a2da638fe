"""The commands of the example workflow do what they say, in a repository with a small spec."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import ROOT, RPAC, TINY, environment, rpac

WORKFLOW = ROOT / "examples" / "ci" / "attention.yml"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one spec and what is generated from it, and a folder of commands: `rpac` and `python` of this test."""
    (tmp_path / "bin").mkdir()
    for name, command in (("rpac", RPAC), ("python", [sys.executable])):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
        script.chmod(0o755)
    (tmp_path / "specs").mkdir()
    shutil.copy(TINY, tmp_path / "specs")
    shutil.copytree(ROOT / "generated" / "tiny", tmp_path / "generated" / "tiny")
    return tmp_path


def workflow() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())
    return found


def steps() -> dict[str, str]:
    """The commands of each step that has some."""
    (job,) = workflow()["jobs"].values()
    return {step["name"]: step["run"] for step in job["steps"] if "run" in step}


def run(name: str, repository: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """One step, by the shell and with the options that GitHub gives it."""
    more = {"GITHUB_OUTPUT": str(repository / "outputs"), "PYTHONPATH": str(ROOT)}
    variables = environment(cache, more)
    variables["PATH"] = f"{repository / 'bin'}:{variables['PATH']}"
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", steps()[name]]
    return subprocess.run(command, cwd=repository, env=variables, capture_output=True, text=True, timeout=1200)


def test_the_cache_is_keyed_by_the_versions_that_decide_what_is_compiled(repository: Path, cache: Path) -> None:
    done = run("versions", repository, cache)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"key=[\w.]+-[\w.]+-[\w.]+\n", (repository / "outputs").read_text())
    (job,) = workflow()["jobs"].values()
    (keyed,) = (step for step in job["steps"] if step.get("uses", "").startswith("actions/cache@"))
    assert "steps.versions.outputs.key" in keyed["with"]["key"]


def test_stale_kernels_fail_the_workflow_with_the_difference(repository: Path, cache: Path) -> None:
    assert run("generated kernels", repository, cache).returncode == 0
    spec = repository / "specs" / "tiny.yaml"
    spec.write_text(spec.read_text().replace("kv_heads: 2", "kv_heads: 1"))
    done = run("generated kernels", repository, cache)
    assert done.returncode == 1
    assert "-KV_HEADS = 2" in done.stdout and "+KV_HEADS = 1" in done.stdout
    assert "run `rpac generate specs/tiny.yaml`" in done.stderr


@pytest.mark.slow
def test_a_spec_is_checked_reported_and_packed(repository: Path, cache: Path) -> None:
    spec = repository / "specs" / "tiny.yaml"
    spec.write_text(spec.read_text().replace("[8, 32]", "[32]").replace("[tpu7x, v6e, v5p, v5e, cpu]", "[tpu7x]"))
    for name in ("check", "report", "package"):
        done = run(name, repository, cache)
        assert done.returncode == 0, f"{name}: {done.stderr}"
    page = (repository / "out" / "report.html").read_text()
    assert "every check passed" in page
    (wheel,) = (repository / "out").glob("*.whl")
    assert wheel.name.startswith("rpac_bundle_tiny-0.0.0+")
    assert rpac("inspect", repository / "build" / "tiny.rpac", cache=cache).returncode == 0
