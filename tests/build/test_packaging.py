"""The wheel is enough: installed on its own, away from the checkout, it plans and builds a spec."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, TINY

Tree = Callable[[Path], dict[str, bytes]]
Built = Callable[[str], Path]


def python(*args: object, **options: Any) -> str:
    """What a process prints that must succeed."""
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel made from it, by what is installed here alone."""
    out = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return out


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    (wheel,) = archives.glob("rpac-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed and nothing else."""
    target = tmp_path_factory.mktemp("site")
    python("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel)
    return target


def away(installed: Path, folder: Path) -> dict[str, Any]:
    """Options of a process that finds rpac in `installed` and runs in `folder`."""
    env = {**os.environ, "PYTHONPATH": str(installed), "RPAC_CACHE": str(folder / "cache")}
    return {"cwd": folder, "env": env}


def test_the_wheel_holds_the_package_its_data_the_templates_and_the_specs_alone(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rpac").rglob("*.py")}
    templates = {f"rpac/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "templates").rglob("*.jinja")}
    tuned = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rpac" / "tuned").glob("*.json")}
    specs = {f"rpac/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "specs").glob("*.yaml")}
    assert templates
    report = {f"rpac/report/{name}" for name in ("page.html.jinja", "page.css", "peers.json")}
    assert names == sources | templates | tuned | specs | report | {"rpac/py.typed", "rpac/trust/receipt.schema.json"}


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        (metadata,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        text = opened.read(metadata).decode()
        (license_file,) = [name for name in opened.namelist() if name.endswith("/LICENSE")]
        assert opened.read(license_file) == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0\n" in text
    assert "Classifier: Typing :: Typed\n" in text


def test_an_installed_wheel_lists_its_specs(installed: Path, tmp_path: Path) -> None:
    options = away(installed, tmp_path)
    python("-m", "rpac.cli", "specs", "llama3-8b", **options)
    assert (tmp_path / "llama3-8b.yaml").read_bytes() == (ROOT / "specs" / "llama3-8b.yaml").read_bytes()


def test_the_source_archive_makes_the_wheel(archives: Path) -> None:
    (archive,) = archives.glob("rpac-*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "specs/tiny.yaml", "templates/xla/skeletons/decode.py.jinja"} <= names
    assert not [name for name in names if name.startswith((".venv", "build/", "generated/"))]


def test_an_installed_wheel_uses_its_own_files(installed: Path, tmp_path: Path) -> None:
    code = "import rpac, rpac.kernels; print(rpac.__file__, rpac.kernels.templates_dir(), sep='\\n')"
    places = python("-c", code, **away(installed, tmp_path)).splitlines()
    assert places == [str(installed / "rpac" / "__init__.py"), str(installed / "rpac" / "templates")]


def test_an_installed_wheel_plans_and_builds_what_the_checkout_does(
    installed: Path, tmp_path: Path, built: Built, tree: Tree
) -> None:
    shutil.copy(TINY, tmp_path / "tiny.yaml")
    options = away(installed, tmp_path)
    plans = json.loads(python("-m", "rpac.cli", "plan", "tiny.yaml", "--target", "cpu", "--json", **options))
    assert len(plans["plans"]) == 3
    python("-m", "rpac.cli", "build", "tiny.yaml", "--target", "cpu", "-o", "out", **options)
    assert tree(tmp_path / "out" / "tiny.rpac") == tree(built("cpu"))


def test_the_command_is_installed_under_its_name(installed: Path, tmp_path: Path) -> None:
    assert python(installed / "bin" / "rpac", "--version", **away(installed, tmp_path)).startswith("rpac, version ")


def described(home: str) -> tuple[dict[str, Any], str]:
    """What the build backend says of the package where the repository is at `home`, and what it prints."""
    env = {**os.environ, "RPAC_HOME": home}
    command = [sys.executable, "-m", "hatchling", "metadata"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_links_of_the_description_are_absolute_where_the_address_is_known() -> None:
    home = "https://example.org/owner/rpac"
    found, _ = described(f"{home}/")
    text, tag = found["readme"]["text"], f"v{found['version']}"
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert f"![The stages of rpac, from the spec to the engine]({home}/raw/{tag}/docs/img/pipeline.svg)" in text
    assert f"]({home}/blob/{tag}/docs/getting-started.md)" in text
    assert found["urls"]["Source"] == home
    for url in found["urls"].values():
        assert (ROOT / url.removeprefix(home).removeprefix(f"/blob/{tag}").lstrip("/")).exists(), url


def test_without_an_address_the_description_is_the_readme_and_the_build_says_so() -> None:
    found, said = described("")
    assert found["readme"]["text"] == (ROOT / "README.md").read_text()
    assert "urls" not in found
    assert "RPAC_HOME is not set: the links of the package's description stay relative" in said
