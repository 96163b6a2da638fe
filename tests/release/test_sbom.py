"""The SBOM of the wheel is valid, names the wheel by its hash, and has every dependency."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow


def run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sbom_has_the_wheel_and_what_it_needs(tmp_path: Path) -> None:
    """Of the environment of these tests, which has more than a release's; the packages come from an index, with hashes."""
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "sbom")
    python = tmp_path / "sbom" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--require-hashes", "-r", ROOT / "requirements-release.txt")
    (wheel,) = tmp_path.glob("*.whl")
    out = tmp_path / "rpac.cdx.json"
    run(python, ROOT / "release" / "sbom.py", wheel, sys.executable, out)
    first = out.read_bytes()
    run(python, ROOT / "release" / "sbom.py", wheel, sys.executable, out)
    assert out.read_bytes() == first

    data = json.loads(first)
    root = data["metadata"]["component"]
    assert root["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}]
    assert root["purl"] == f"pkg:pypi/rpac@{root['version']}"
    assert wheel.name.startswith(f"rpac-{root['version']}-")
    names = {canonicalize_name(one["name"]) for one in data["components"]}
    wanted = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    assert {canonicalize_name(one.name) for one in wanted} | {"libtpu", "jaxlib"} <= names
    assert str(ROOT) not in first.decode()
