"""A policy's file, and keys' files: every mistake is told with its place."""

from __future__ import annotations

import stat
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest
from command import ROOT
from signing import PolicyFile, Sign, judge

from rpac.bundle import read_manifest
from rpac.errors import OutputError, TargetError, TrustError
from rpac.trust import Policy, load_policy
from rpac.trust.keys import body, generate, pem, policy_lines, read_private, read_public
from rpac.trust.sign import sign


def policy_of(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return load_policy(path)


def test_what_keygen_prints_is_a_policy(keys: Path, tmp_path: Path) -> None:
    key = read_public(keys / "old.pub")
    policy = policy_of(tmp_path, policy_lines("ci-2026", key))
    assert [(one.name, one.key.keyid) for one in policy.keys] == [("ci-2026", key.keyid)]
    assert (keys / "old.pub").read_text() == pem(key)


def test_the_policy_of_the_docs_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "trust.md").read_text()
    (text,) = (block for block in page.split("```yaml\n") if "ci-2027" in block)
    policy = policy_of(tmp_path, text.split("```")[0])
    assert [one.name for one in policy.keys] == ["ci-2026", "ci-2027"]
    assert policy.require.keys() == {"provenance", "test-result"}


def test_days_and_ages(keys: Path, tmp_path: Path) -> None:
    lines = policy_lines("ci", read_public(keys / "old.pub"))
    policy = policy_of(
        tmp_path,
        f"{lines}    not_before: 2026-01-01\n    not_after: '2026-12-31'\n"
        "require:\n  provenance: {}\n  test-result:\n    max_age_days: 30\n",
    )
    assert (policy.keys[0].not_before, policy.keys[0].not_after) == (date(2026, 1, 1), date(2026, 12, 31))
    assert policy.require == {"provenance": None, "test-result": timedelta(days=30)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty file; must be a trust policy"),
        ("[]", "1:1: found a list; must be a mapping"),
        ("require: {bench: {}}", "keys: found no such key; must have the keys that may sign"),
        ("keys: {}", "must be a mapping of names to mappings"),
        ("keys: {a: {}}", "keys.a.public: found no such key; must be a public key"),
        ("keys: {a: {public: MCow}}", r"public: found no public key \(.*\); must be an ed25519 key in PEM; make one with"),
        ("keys: {a: {public: KEY, id: 0abc}}", r"keys\.a\.id: found 0abc; must be [0-9a-f]{64}, the id of this public key"),
        ("keys: {a: {public: KEY, not_after: 2026-13-01}}", "not_after: found 2026-13-01.*; must be a day, as year-month-day"),
        ("keys: {a: {public: KEY, not_after: soon}}", "not_after: found .*soon.*; must be a day"),
        ("keys: {a: {public: KEY, not_before: 2026-02-01, not_after: 2026-01-01}}", "not be before not_before, 2026-02-01"),
        ("keys: {a: {public: KEY}, b: {public: KEY}}", r"keys\.a\.public: found the key of two names"),
        ("keys: {a: {public: KEY}}\nrequire: {provenence: {}}", "provenence: found .*; must be one of provenance, test-result"),
        ("keys: {a: {public: KEY}}\nrequire: {bench: {max_age_days: 0}}", "max_age_days: found 0; must be an integer from 1"),
        ("keys: {a: {public: KEY}}\nrequired: {}", "required: found an unknown key; must be one of keys, require; write require"),
    ],
)  # fmt: skip
def test_what_is_no_policy(keys: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TrustError, match=message) as raised:
        policy_of(tmp_path, text.replace("KEY", body(read_public(keys / "old.pub"))))
    assert raised.value.exit_code == 2
    assert str(tmp_path / "policy.yaml") in str(raised.value)


def test_a_policy_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"found no file that can be read \(No such file or directory\)"):
        load_policy(tmp_path / "policy.yaml")


def test_only_its_owner_reads_a_private_key_and_no_key_is_replaced(keys: Path, tmp_path: Path) -> None:
    generate(tmp_path / "ci")
    assert stat.S_IMODE((tmp_path / "ci.key").stat().st_mode) == 0o600
    before = (tmp_path / "ci.key").read_bytes()
    with pytest.raises(OutputError, match=r"ci\.key: found a file; must be absent"):
        generate(tmp_path / "ci")
    assert (tmp_path / "ci.key").read_bytes() == before


def test_what_is_no_key(keys: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    other = generate_private_key(SECP256R1())
    (tmp_path / "ec.key").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "ec.pub").write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(
        TrustError, match=r"ec\.key: found a private key for ecdsa-sha2-nistp256; must be an ed25519 key"
    ):
        read_private(tmp_path / "ec.key")
    with pytest.raises(
        TrustError, match=r"ec\.pub: found a public key for ecdsa-sha2-nistp256; must be an ed25519 key"
    ):
        read_public(tmp_path / "ec.pub")
    with pytest.raises(TrustError, match=r"old\.pub: found not a private key that can be read"):
        read_private(keys / "old.pub")
    with pytest.raises(TrustError, match=r"none: found no file that can be read"):
        read_public(tmp_path / "none")


def test_keys_rotate(bundle: Path, keys: Path, signed: Sign, policy_file: PolicyFile) -> None:
    """The new key signs what the old one has signed, and then the old one may expire."""
    signed(bundle)
    expired = load_policy(policy_file("test-result: {}", old="not_after: 2026-05-01"))
    old = read_public(keys / "old.pub")
    sign(bundle, read_manifest(bundle), {}, read_private(keys / "new.key"), countersign=[old])
    (found,) = judge(expired, bundle).trusted
    assert found.keys == ("old", "new")


def test_without_the_packages_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['securesystemslib'] = None\n"
        "import rpac.cli; from rpac.trust import load_policy; load_policy(sys.argv[1])"
    )
    (tmp_path / "policy.yaml").write_text("keys: {a: {public: MCow}}")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "policy.yaml")], capture_output=True, text=True, timeout=60
    )
    assert TargetError.__name__ in done.stderr
    assert "install rpac[trust]" in done.stderr
