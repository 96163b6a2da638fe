"""The locks have every package that pyproject.toml asks for, in a release that it allows, with hashes, for each Python."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = [ROOT / "requirements-dev.txt", ROOT / "requirements-release.txt"]
PYTHONS = ["3.11.7", "3.12.1", "3.13.0", "3.14.0"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(path: Path) -> Iterator[tuple[Requirement, list[str]]]:
    """The requirements of a lock, each with its hashes."""
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("#"))
    for line in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = line.split("--hash=")
        yield Requirement(requirement.strip()), [one.strip() for one in hashes]


def asked(extra: str) -> list[Requirement]:
    """What an extra asks for, and what rpac asks for itself; extras of rpac in it are followed."""
    found = [Requirement(one) for one in PROJECT["dependencies"]]
    for one in map(Requirement, PROJECT["optional-dependencies"][extra]):
        found += [more for name in sorted(one.extras) for more in asked(name)] if one.name == "rpac" else [one]
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_what_development_needs(python: str) -> None:
    environment = {**default_environment(), "python_version": python.rpartition(".")[0], "python_full_version": python}
    of_python: dict[str, list[str]] = {}
    for one, _ in locked(LOCKS[0]):
        if one.marker is None or one.marker.evaluate(environment):
            (version,) = one.specifier
            assert version.operator == "=="
            of_python.setdefault(canonicalize_name(one.name), []).append(version.version)
    assert all(len(versions) == 1 for versions in of_python.values())
    for one in asked("dev"):
        (version,) = of_python[canonicalize_name(one.name)]
        assert one.specifier.contains(version, prereleases=True), f"{one} is locked at {version}; run `make lock`"


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_each_package_has_hashes_and_no_place(path: Path) -> None:
    for one, hashes in locked(path):
        assert one.url is None
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", found) for found in hashes)
    assert "://" not in path.read_text()


def test_each_dependency_has_a_lower_bound() -> None:
    for extra in (None, "plot", "tune", "remote", "metrics", "trust"):
        listed = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
        for one in map(Requirement, listed):
            assert any(bound.operator == ">=" for bound in one.specifier), one
