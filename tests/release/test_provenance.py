"""The provenance of a release names the commit and every file, and holds for no other files and by no other key."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import ROOT
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance

from rpac.errors import BundleError
from rpac.trust.envelope import parse_lines
from rpac.trust.keys import generate

IDENTITY = ("-c", "user.name=x", "-c", "user.email=x@example.org")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """release/provenance.py, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "release"))
    import provenance  # type: ignore[import-not-found]

    yield provenance
    del sys.modules["provenance"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("requirements-dev.txt", "requirements-release.txt"):
        (folder / name).write_text("a==1\n")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "x")):
        subprocess.run(["git", "-C", folder, *IDENTITY, *command], check=True)
    return folder


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in ("rpac-0.1.0-py3-none-any.whl", "rpac-0.1.0.tar.gz", "rpac.cdx.json"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def key(tmp_path: Path) -> Path:
    generate(tmp_path / "release")
    return tmp_path / "release.key"


def test_it_names_the_commit_and_every_file(script: Any, checkout: Path, release: Path, key: Path) -> None:
    path = script.sign(release, key, "urn:x:builder", checkout)
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert script.verify(release, key.with_suffix(".pub")) == commit
    (envelope,) = parse_lines(path.read_bytes(), "file")
    said = json.loads(envelope.payload)
    assert [one["name"] for one in said["subject"]] == [
        "rpac-0.1.0-py3-none-any.whl", "rpac-0.1.0.tar.gz", "rpac.cdx.json",
    ]  # fmt: skip
    assert said["predicateType"] == "https://slsa.dev/provenance/v1"
    del said["predicate"]["rpac_signedOn"]
    ParseDict(said["predicate"], Provenance())  # raises for a field that SLSA does not have


def test_files_that_are_not_those_of_the_release_are_refused(
    script: Any, checkout: Path, release: Path, key: Path
) -> None:
    script.sign(release, key, "urn:x:builder", checkout)
    public = key.with_suffix(".pub")
    wheel = release / "rpac-0.1.0-py3-none-any.whl"
    wheel.write_text("another")
    with pytest.raises(BundleError, match=r"found rpac-0\.1\.0-py3-none-any\.whl other than signed"):
        script.verify(release, public)
    wheel.unlink()
    with pytest.raises(BundleError, match=r"found rpac-0\.1\.0-py3-none-any\.whl other than signed"):
        script.verify(release, public)
    wheel.write_text(wheel.name)
    (release / "more.whl").write_text("x")
    with pytest.raises(BundleError, match=r"found more\.whl other than signed"):
        script.verify(release, public)


def test_another_key_and_a_changed_statement_are_refused(
    script: Any, checkout: Path, release: Path, key: Path, tmp_path: Path
) -> None:
    path = script.sign(release, key, "urn:x:builder", checkout)
    generate(tmp_path / "other")
    with pytest.raises(BundleError, match="found no signature of"):
        script.verify(release, tmp_path / "other.pub")
    data = json.loads(path.read_text())
    data["payload"] = data["payload"][:-8] + "AAAA" + data["payload"][-4:]
    path.write_text(json.dumps(data) + "\n")
    with pytest.raises(BundleError):
        script.verify(release, key.with_suffix(".pub"))


def test_a_checkout_that_is_not_its_commit_is_refused(script: Any, checkout: Path, release: Path, key: Path) -> None:
    (checkout / "new.py").write_text("x")
    with pytest.raises(BundleError, match=r"found 1 changed files, such as new\.py; must be what its commit has"):
        script.sign(release, key, "urn:x:builder", checkout)
    assert not (release / script.NAME).exists()


def test_the_command_says_what_is_wrong_and_ends_with_its_code(release: Path, key: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "release" / "provenance.py", "verify", release, "--key", key.with_suffix(".pub")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert "found no such file; must be what `release/provenance.py sign` wrote" in done.stderr
