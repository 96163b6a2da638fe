"""What a policy refuses: each way to take away, to swap, to replay or to edit what vouches for a bundle."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from signing import NOW, TESTED, PolicyFile, Sign, judge, put

from rpac.bundle import read_manifest, verify_bundle, write_bundle
from rpac.bundle.manifest import MANIFEST, render
from rpac.bundle.storage import attestation_path
from rpac.errors import BundleError
from rpac.spec import Spec
from rpac.trust import approved, load_policy
from rpac.trust.predicates import TYPES
from rpac.trust.statement import render_statement


def edited(path: Path, change: Callable[[dict[str, Any]], None], line: int = 0) -> None:
    """Changes one envelope of an attestation file."""
    lines = path.read_text().splitlines()
    envelope = json.loads(lines[line])
    change(envelope)
    lines[line] = json.dumps(envelope)
    path.write_text("\n".join(lines) + "\n")


def test_a_signed_bundle_holds(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    signed(bundle, test_result=TESTED, bench={"results": {}})
    found = judge(load_policy(policy_file("test-result: {max_age_days: 1}; bench: {}")), bundle)
    assert [(one.kind, one.keys, one.signed, one.untrusted) for one in found.attestations] == [
        ("test-result", ("old",), NOW, ""), ("bench", ("old",), NOW, "")
    ]  # fmt: skip


def test_removed(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    path = signed(bundle, test_result=TESTED, bench={"results": {}})
    policy = load_policy(policy_file("test-result: {}; bench: {}"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0])
    with pytest.raises(
        BundleError, match=r"found no bench by a key of .*policy.yaml, which requires it; add it with `rpac sign`"
    ):
        judge(policy, bundle)
    path.write_text("")
    with pytest.raises(
        BundleError, match=r"found no attestation by a key of .*policy.yaml; sign the bundle with a key"
    ):
        judge(policy, bundle)
    path.unlink()
    with pytest.raises(
        BundleError, match=r"tiny\.rpac\.intoto\.jsonl: found no such file; must hold the bundle's attestations"
    ):
        judge(policy, bundle)


def test_of_another_bundle(
    bundle: Path, tmp_path: Path, tiny: Spec, programs: list[Any], signed: Sign, policy_file: PolicyFile
) -> None:
    other = tmp_path / "other" / "tiny.rpac"
    write_bundle(other, tiny, programs[:2])
    replayed = signed(other).read_bytes()
    path = signed(bundle)
    policy = load_policy(policy_file())
    for data in (replayed, path.read_bytes() + replayed):  # swapped, and added
        path.write_bytes(data)
        with pytest.raises(BundleError, match=r"its test-result is about another bundle: manifest\.json has sha256"):
            judge(policy, bundle)


def test_an_attestation_that_leaves_out_a_blob(bundle: Path, keys: Path, policy_file: PolicyFile) -> None:
    manifest = read_manifest(bundle)
    statement = json.loads(render_statement(manifest, TYPES["test-result"], TESTED))
    left_out = statement["subject"].pop()["name"]
    put(bundle, json.dumps(statement).encode(), keys / "old.key")
    with pytest.raises(BundleError, match=f"another bundle: {left_out} has sha256 nowhere there and"):
        judge(load_policy(policy_file()), bundle)


def test_by_an_unknown_key(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    signed(bundle, key="stranger")
    for require in ("", "test-result: {}"):
        with pytest.raises(
            BundleError, match=r"by a key of .*: the policy has no key with the id [0-9a-f]{64}; sign the bundle"
        ):
            judge(load_policy(policy_file(require)), bundle)
    signed(bundle, key="old", bench={"results": {}})
    found = judge(load_policy(policy_file("bench: {}")), bundle)
    assert [one.kind for one in found.trusted] == ["bench"]
    with pytest.raises(
        BundleError, match=r"found no test-result by a key of .*, which requires it: the policy has no key"
    ):
        judge(load_policy(policy_file("test-result: {}")), bundle)


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ("not_after: 2026-05-31", "the key old expired after 2026-05-31"),
        ("not_before: 2026-06-02", "the key old counts from 2026-06-02 on"),
    ],
)
def test_by_a_key_outside_of_its_days(
    bundle: Path, signed: Sign, policy_file: PolicyFile, limit: str, text: str
) -> None:
    signed(bundle, now=NOW - timedelta(days=30))
    with pytest.raises(BundleError, match=text):
        judge(load_policy(policy_file(old=limit)), bundle)


def test_the_last_day_of_a_key_counts(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    signed(bundle)
    assert judge(load_policy(policy_file(old="not_after: 2026-06-01")), bundle).trusted


def test_a_payload_that_was_edited(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    path = signed(bundle, test_result={"result": "FAILED"})

    def pass_it(envelope: dict[str, Any]) -> None:
        payload = base64.b64decode(envelope["payload"]).replace(b"FAILED", b"PASSED")
        envelope["payload"] = base64.b64encode(payload).decode()

    policy = load_policy(policy_file("test-result: {}"))
    with pytest.raises(
        BundleError, match="found a test-result that does not pass: its result is 'FAILED'; must be PASSED"
    ):
        judge(policy, bundle)
    edited(path, pass_it)
    with pytest.raises(BundleError, match=r"jsonl:1: its signature is not that of the key old, which it names"):
        judge(policy, bundle)


def test_a_signature_under_another_key_s_id(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    wanted = json.loads(signed(bundle, key="old").read_text())["signatures"][0]["keyid"]
    attestation_path(bundle).unlink()
    path = signed(bundle, key="stranger")
    edited(path, lambda envelope: envelope["signatures"][0].update(keyid=wanted))
    with pytest.raises(BundleError, match="its signature is not that of the key old"):
        judge(load_policy(policy_file()), bundle)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'payload'"),
        ('{"payload": "e30=", "payloadType": "text/plain", "signatures": []}', "payloadType is 'text/plain'"),
        ('{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": []}', "no signature"),
        ('{"payload": 1, "payloadType": "application/vnd.in-toto+json", "signatures": [1]}', "Error"),
    ],
)
def test_a_line_that_is_no_envelope(bundle: Path, signed: Sign, policy_file: PolicyFile, line: str, text: str) -> None:
    path = signed(bundle)
    path.write_text(path.read_text() + line)
    with pytest.raises(BundleError, match=rf"jsonl:2: found no DSSE envelope of an in-toto statement \(.*{text}"):
        judge(load_policy(policy_file()), bundle)


@pytest.mark.parametrize("payload", [b"", b"[]", b"{}", b'{"_type": "https://in-toto.io/Statement/v0.1"}'])
def test_a_payload_that_is_no_statement(bundle: Path, keys: Path, policy_file: PolicyFile, payload: bytes) -> None:
    put(bundle, payload, keys / "old.key")
    with pytest.raises(BundleError, match="its payload is no in-toto statement about a bundle"):
        judge(load_policy(policy_file()), bundle)


def test_a_blob_that_was_edited(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    signed(bundle)
    policy = load_policy(policy_file())
    blob = max((bundle / "blobs").iterdir())
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="it was changed or damaged"):
        verify_bundle(bundle, approve=lambda *found: approved(policy, *found))


def test_a_manifest_that_was_made_anew(
    bundle: Path, tiny: Spec, programs: list[Any], signed: Sign, policy_file: PolicyFile
) -> None:
    path = signed(bundle)
    data = path.read_bytes()
    write_bundle(bundle, tiny, [programs[0], *programs[2:]])  # verifies, and is another one
    assert (bundle / MANIFEST).read_bytes() == render(verify_bundle(bundle))
    path.write_bytes(data)
    with pytest.raises(BundleError, match="is about another bundle"):
        judge(load_policy(policy_file()), bundle)


def test_stale(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    policy = load_policy(policy_file("test-result: {max_age_days: 30}"))
    path = signed(bundle)
    assert judge(policy, bundle, NOW + timedelta(days=30)).trusted
    with pytest.raises(
        BundleError, match=r"its test-result was signed on 2026-06-01, 31 days ago; must be at most 30 days old"
    ):
        judge(policy, bundle, NOW + timedelta(days=31))
    signed(bundle, key="new", now=NOW + timedelta(days=20))  # the newest counts, by whichever key
    assert judge(policy, bundle, NOW + timedelta(days=31)).trusted
    assert len(path.read_text().splitlines()) == 2


def test_signed_in_the_future(bundle: Path, signed: Sign, policy_file: PolicyFile) -> None:
    signed(bundle, now=NOW + timedelta(hours=1))
    with pytest.raises(BundleError, match="which is to come; check the clocks"):
        judge(load_policy(policy_file()), bundle)


def test_without_a_time_it_is_not_fresh(bundle: Path, keys: Path, policy_file: PolicyFile) -> None:
    payload = render_statement(read_manifest(bundle), TYPES["test-result"], TESTED)
    put(bundle, payload, keys / "old.key")
    assert judge(load_policy(policy_file("test-result: {}")), bundle).trusted
    with pytest.raises(
        BundleError, match="its test-result does not say when it was signed; must be at most 2 days old"
    ):
        judge(load_policy(policy_file("test-result: {max_age_days: 2}")), bundle)
