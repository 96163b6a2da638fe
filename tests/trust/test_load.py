"""With a policy nothing of a bundle is deserialized before it holds, wherever the bundle lies."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from signing import TESTED, PolicyFile, Sign

import rpac
from rpac.bundle.storage import ATTESTATIONS, attestation_path
from rpac.bundle.wheel import wheel_of
from rpac.check.deployment import serve_check
from rpac.engine import load, load_layers, loading
from rpac.errors import BundleError
from rpac.trust import load_policy


def test_a_bundle_that_holds_is_loaded(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    signed(bundle)
    policy = policy_file("test-result: {}")
    assert load(bundle, target="cpu", trust=policy).name == "tiny"
    assert load(bundle, target="cpu", trust=load_policy(policy)).name == "tiny"
    assert load_layers(bundle, "cpu", trust=policy).keys() == {""}


def test_nothing_is_read_of_one_that_does_not(
    bundle: Path, signed: Sign, policy_file: PolicyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed(bundle, key="stranger")
    shutil.rmtree(bundle / "blobs")  # reading one would be another error
    monkeypatch.setattr("jax.export.deserialize", lambda data: pytest.fail("a program was deserialized"))
    with pytest.raises(BundleError, match="the policy has no key with the id") as raised:
        load(bundle, target="cpu", trust=policy_file())
    assert raised.value.exit_code == 4


def test_beside_the_folder_that_a_link_leads_to(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    signed(bundle)
    link = bundle.parent / "current"
    link.symlink_to(bundle)
    assert load(link, target="cpu", trust=policy_file()).name == "tiny"
    assert load(f"{bundle}/", target="cpu", trust=policy_file()).name == "tiny"


def test_at_a_url(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(bundle), "/signed/tiny.rpac", recursive=True)
    try:
        with pytest.raises(BundleError, match=r"signed/tiny\.rpac\.intoto\.jsonl: found no such file"):
            load("memory://signed/tiny.rpac", target="cpu", trust=policy_file())
        files.put(str(signed(bundle)), f"/signed/tiny.rpac{ATTESTATIONS}")
        assert load("memory://signed/tiny.rpac", target="cpu", trust=policy_file()).name == "tiny"
        files.pipe(f"/signed/tiny.rpac{ATTESTATIONS}", b"{")
        with pytest.raises(BundleError, match="found no DSSE envelope"):
            load("memory://signed/tiny.rpac", target="cpu", trust=policy_file())
    finally:
        files.rm("/signed", recursive=True)


def test_as_an_installed_package(
    bundle: Path, signed: Sign, policy_file: PolicyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsigned = wheel_of(bundle)
    signed(bundle)
    wheel = wheel_of(bundle)
    assert wheel.version == unsigned.version  # the same programs
    assert wheel_of(bundle) == wheel
    (tmp_path / wheel.file).write_bytes(wheel.data)
    with zipfile.ZipFile(tmp_path / wheel.file) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert load("package:tiny", target="cpu", trust=policy_file("test-result: {}")).name == "tiny"


def test_a_file_of_attestations_that_is_too_large_is_not_read(
    bundle: Path, signed: Sign, policy_file: PolicyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed(bundle)
    monkeypatch.setattr("rpac.bundle.storage.MAX_ATTESTATIONS_BYTES", 100)
    with pytest.raises(BundleError, match=r"tiny\.rpac\.intoto\.jsonl: found \d+ bytes; must be at most 100"):
        load(bundle, target="cpu", trust=policy_file())


def test_a_folder_in_its_place_is_refused(bundle: Path, policy_file: PolicyFile) -> None:
    attestation_path(bundle).mkdir()
    with pytest.raises(BundleError, match=r"intoto\.jsonl: cannot be read \(Is a directory\)"):
        load(bundle, target="cpu", trust=policy_file())


def test_a_check_before_traffic_holds_the_policy_too(bundle: Path, policy_file: PolicyFile) -> None:
    report = serve_check(bundle, "cpu", seed=1, trust=policy_file())
    assert [(step.name, step.ok) for step in report.steps] == [("verify", True), ("load", False)]
    assert "found no such file; must hold the bundle's attestations" in report.steps[1].detail
    assert report.exit_code == 4


def test_without_a_policy_the_log_says_so_once(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    loading._say_once_that_nothing_is_trusted.cache_clear()
    caplog.set_level("INFO", "rpac")
    known = rpac.bundle.describe(bundle)["digest"]
    load(bundle, target="cpu", expect_digest=known)
    assert "trust policy" not in caplog.text
    for _ in range(2):
        load(bundle, target="cpu")
    assert caplog.text.count("bundles are loaded without a trust policy") == 1


def test_signing_again_replaces_the_same_kind_by_the_same_key_alone(
    bundle: Path, tiny: Any, programs: list[Any], signed: Sign
) -> None:
    from rpac.bundle import write_bundle

    path = signed(bundle, test_result=TESTED, bench={"results": {}})
    signed(bundle, test_result=TESTED)
    signed(bundle, key="new", test_result=TESTED)
    assert len(path.read_text().splitlines()) == 3
    write_bundle(bundle, tiny, programs[:2])
    signed(bundle, test_result=TESTED)  # of another bundle now: the others are dropped
    assert len(path.read_text().splitlines()) == 1
