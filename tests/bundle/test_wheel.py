"""A bundle travels as a wheel: the same bytes each time, installed by pip, loaded by its name, and verified as any bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import TINY, rpac

from rpac.bundle import describe, read_manifest, verify_bundle
from rpac.bundle.installed import distribution_of, is_name
from rpac.bundle.wheel import wheel_of
from rpac.engine import load
from rpac.errors import BundleError, TargetError

Install = Callable[..., Path]


def install(wheel: Path, site: Path) -> None:
    """As a serving image installs it; `--no-compile` is left out on purpose."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run([*command, "--target", str(site), str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def write(bundle: Path, folder: Path, **named: str) -> Path:
    wheel = wheel_of(bundle, **named)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.file
    path.write_bytes(wheel.data)
    return path


def unpack(wheel: Path, site: Path) -> None:
    """What pip does with a wheel of data, without the second that pip takes."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that Python finds first."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_a_wheel_that_pip_installed_is_loaded_and_verified(bundle: Path, tmp_path: Path, site: Path) -> None:
    install(write(bundle, tmp_path / "dist"), site)
    assert list(site.rglob("__pycache__")), "pip compiled the kernels' sources"
    assert verify_bundle("package:tiny") == verify_bundle(bundle)
    engine, direct = load("package:tiny", target="cpu"), load(bundle, target="cpu")
    assert engine.limits == direct.limits
    assert np.array_equal(np.asarray(engine.new_cache()), np.asarray(direct.new_cache()))
    shown = describe("package:tiny")
    assert {**shown, "path": ""} == {**describe(bundle), "path": ""}


def test_every_file_is_hashed_as_it_is_read(bundle: Path, tmp_path: Path, site: Path) -> None:
    unpack(write(bundle, tmp_path / "dist"), site)
    blob = max(site.rglob("blobs/*"))
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="it was changed or damaged"):
        load("package:tiny", target="cpu")
    (site / "rpac_bundle_tiny" / "bundle.rpac" / "more.txt").write_text("")
    with pytest.raises(BundleError, match="it was changed or damaged"):
        verify_bundle("package:tiny")


def test_the_same_bundle_makes_the_same_wheel(bundle: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(bundle, tmp_path / "elsewhere" / "other.rpac")
    os.utime(elsewhere / "spec.yaml", (1, 1))
    first, second = wheel_of(bundle), wheel_of(elsewhere)
    assert first == second
    assert first.file == f"rpac_bundle_tiny-{first.version}-py3-none-any.whl"
    assert first.version.startswith("0.0.0+")


def test_another_bundle_has_another_version(bundle: Path, native_bundle: Path) -> None:
    assert wheel_of(bundle).version != wheel_of(native_bundle).version


def test_the_record_has_the_hash_of_every_file(bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(write(bundle, tmp_path)) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("RECORD"))
        lines = archive.read(record).decode().splitlines()
        assert {line.split(",")[0] for line in lines} == set(archive.namelist())
        assert all(line.split(",")[1].startswith("sha256=") for line in lines if not line.startswith(record))
        assert archive.namelist()[-1] == record


def test_a_name_and_a_version_can_be_given(bundle: Path, tmp_path: Path, site: Path) -> None:
    wheel = write(bundle, tmp_path / "dist", name="Llama3.v6e", version="1.2.0rc1")
    assert wheel.name == "rpac_bundle_llama3_v6e-1.2.0rc1-py3-none-any.whl"
    unpack(wheel, site)
    for spelled in ("Llama3.v6e", "llama3-v6e", "llama3_v6e"):
        assert read_manifest(f"package:{spelled}") == read_manifest(bundle)


@pytest.mark.parametrize("name", ["-a", "a-", "a b", ".", "a/b", "a\n", "ä"])
def test_what_cannot_be_a_name_is_refused(bundle: Path, name: str) -> None:
    assert not is_name(name)
    with pytest.raises(TargetError, match=r"cannot be part of a package's name; .* give another one with --name"):
        wheel_of(bundle, name=name)
    with pytest.raises(BundleError, match="must be a bundle's name"):
        read_manifest(f"package:{name}")


@pytest.mark.parametrize("version", ["1.0-beta", "v1", "1..0", "01", "1.0+", "1.0\n"])
def test_what_is_no_version_is_refused(bundle: Path, version: str) -> None:
    with pytest.raises(TargetError, match="must be a version as PEP 440 spells it"):
        wheel_of(bundle, version=version)


def test_a_bundle_that_is_not_installed_is_named_with_those_that_are(bundle: Path, tmp_path: Path, site: Path) -> None:
    with pytest.raises(BundleError, match="found no installed package rpac-bundle-tiny; no bundle is installed"):
        load("package:tiny", target="cpu")
    unpack(write(bundle, tmp_path / "dist", name="other"), site)
    with pytest.raises(BundleError, match="those installed are other; install the wheel that `rpac pack` made"):
        load("package:tiny", target="cpu")


@pytest.mark.parametrize("apart", [False, True], ids=["in one folder", "in two folders"])
def test_two_versions_are_refused(bundle: Path, tmp_path: Path, site: Path, apart: bool) -> None:
    unpack(write(bundle, tmp_path / "dist", version="1.0"), site)
    other = tmp_path / "other" if apart else site
    unpack(write(bundle, tmp_path / "dist", version="2.0"), other)
    if apart:
        sys.path.append(str(other))  # undone by `site`
    with pytest.raises(
        BundleError, match=r"found 2 versions: 1\.0 in .*, 2\.0 in .*; must be one; uninstall the others"
    ):
        read_manifest("package:tiny")


def test_one_version_that_python_finds_twice_is_one(
    bundle: Path, tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(write(bundle, tmp_path / "dist"), site)
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    assert read_manifest("package:tiny") == read_manifest(bundle)


def test_a_wheel_that_python_imports_from_as_an_archive_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(write(bundle, tmp_path / "dist")))
    with pytest.raises(BundleError, match=r"found it inside the archive .*; install the wheel with pip"):
        read_manifest("package:tiny")


def test_a_package_without_its_files_is_refused(bundle: Path, tmp_path: Path, site: Path) -> None:
    unpack(write(bundle, tmp_path / "dist"), site)
    shutil.rmtree(site / "rpac_bundle_tiny")
    with pytest.raises(BundleError, match=r"found no folder .*; install the wheel again"):
        read_manifest("package:tiny")


def test_the_names_of_a_distribution() -> None:
    assert distribution_of("Llama3..8B_x") == "rpac-bundle-llama3-8b-x"
    assert is_name("a") and is_name("llama3-8b") and is_name("A_b.c")


def test_the_command_makes_the_wheel_and_replaces_its_own_alone(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    done = rpac("pack", bundle, "-o", out, "--version", "1.0", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.iterdir()
    assert done.stdout.startswith(f"{wheel}: ")
    assert wheel.read_bytes() == wheel_of(bundle, version="1.0").data
    wheel.write_text("mine")
    done = rpac("pack", bundle, "-o", out, "--version", "1.0", cache=tmp_path)
    assert done.returncode == 5
    assert wheel.read_text() == "mine"
    done = rpac("pack", TINY.parent, "-o", out, cache=tmp_path)
    assert done.returncode == 4
