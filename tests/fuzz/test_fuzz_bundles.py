"""A bundle that was changed anywhere is refused, or is one that rpac could have made; nothing of it is deserialized before."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fuzzing import SECONDS, fuzz, mutate_text, mutate_tree

from rpac.bundle import read_manifest, verify_bundle
from rpac.bundle.manifest import _seal, parse, render
from rpac.bundle.storage import attestation_path
from rpac.engine import load
from rpac.engine import program as engine_program
from rpac.errors import BundleError, RpacError, TrustError
from rpac.trust import load_policy, verdict
from rpac.trust.keys import body, generate, read_private
from rpac.trust.receipt import receipt
from rpac.trust.sign import sign
from rpac.trust.verify import attestations

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.fixture
def signed(bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A signed bundle, and the policy that it holds."""
    key = generate(tmp_path / "key")
    made = {
        "test-result": {"result": "PASSED", "configuration": []},
        "bench": {"results": {"bundle": {"target": "cpu"}}},
    }
    sign(bundle, read_manifest(bundle), made, read_private(tmp_path / "key.key"), NOW)
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"keys:\n  key:\n    public: {body(key)}\nrequire:\n  test-result: {{}}\n")
    verdict(load_policy(policy), str(bundle), read_manifest(bundle), attestation_path(bundle).read_bytes(), NOW)
    return bundle, policy


def test_every_byte_of_a_manifest_counts(bundle: Path) -> None:
    """All of them, one at a time; `make fuzz` in every bit."""
    data = (bundle / "manifest.json").read_bytes()
    rng = random.Random("bytes")
    for at in range(len(data)):
        for bit in range(8) if SECONDS else [rng.randrange(8)]:
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            with pytest.raises(BundleError):
                parse(bytes(changed), "manifest.json")


def test_a_manifest_with_a_digest_of_its_own_is_refused_or_sound(bundle: Path) -> None:
    sound = json.loads((bundle / "manifest.json").read_bytes())
    del sound["digest"]

    def make(rng: random.Random) -> bytes:
        return json.dumps(mutate_tree(rng, sound)).encode("utf-8", "surrogatepass")

    def check(data: bytes) -> None:
        tree = json.loads(data)
        try:
            sealed = _seal(tree) if isinstance(tree, dict) else data
        except (ValueError, RecursionError):  # an infinity, half a surrogate pair
            sealed = data
        try:
            manifest = parse(sealed, "manifest.json")
        except BundleError as error:
            str(error).encode()
            return
        assert render(manifest) == sealed

    fuzz("manifests", 250, make, check)


def test_a_bundle_that_was_made_anew_is_refused_by_a_policy(
    signed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forger changes what he likes, and gives everything the hash that it has now; the attestations are the old ones."""
    bundle, policy = signed
    original = (bundle / "manifest.json").read_bytes()
    sound = json.loads(original)
    del sound["digest"]
    for name in ("load_portable", "load_native", "load_traceable"):
        monkeypatch.setattr(engine_program, name, lambda *_: pytest.fail("a program was deserialized"))

    def make(rng: random.Random) -> bytes:
        tree = copy.deepcopy(sound)
        if rng.random() < 0.5:
            tree = mutate_tree(rng, tree)
        else:
            programs = tree["targets"]["cpu"]["programs"]
            one = rng.choice(programs)
            if rng.random() < 0.5:
                one["exported"] = copy.deepcopy(rng.choice(programs)["exported"])
            else:
                one["exported"] = {"forged": rng.randbytes(rng.randrange(1, 64)).hex()}
        return json.dumps(tree).encode("utf-8", "surrogatepass")

    def check(data: bytes) -> None:
        tree = json.loads(data)
        for program in _programs(tree):
            forged = program["exported"].get("forged") if isinstance(program.get("exported"), dict) else None
            if isinstance(forged, str):
                blob = bytes.fromhex(forged)
                sha256 = hashlib.sha256(blob).hexdigest()
                (bundle / "blobs" / sha256).write_bytes(blob)
                program["exported"] = {"sha256": sha256, "size": len(blob)}
        try:
            sealed = _seal(tree)
        except (ValueError, TypeError, RecursionError):
            return
        (bundle / "manifest.json").write_bytes(sealed)
        if sealed == original:
            return
        with pytest.raises(BundleError):
            load(bundle, target="cpu", trust=policy)
        try:
            load(bundle, target="cpu")
            verify_bundle(bundle)
        except RpacError as error:
            str(error).encode()

    fuzz("bundles", 60, make, check)


def _programs(tree: Any) -> list[dict[str, Any]]:
    try:
        return [one for one in tree["targets"]["cpu"]["programs"] if isinstance(one, dict)]
    except (KeyError, TypeError, IndexError):
        return []


def test_attestations(signed: tuple[Path, Path]) -> None:
    """A changed file holds only if what counts is what was signed."""
    bundle, policy_file = signed
    manifest, policy = read_manifest(bundle), load_policy(policy_file)
    sound = attestation_path(bundle).read_bytes()
    said = [json.loads(line)["payload"] for line in sound.splitlines()]

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate_text(rng, sound)
        lines = [mutate_tree(rng, json.loads(line)) for line in sound.splitlines()]
        return "\n".join(map(json.dumps, lines)).encode("utf-8", "surrogatepass")

    def check(data: bytes) -> None:
        try:
            found = verdict(policy, str(bundle), manifest, data, NOW)
        except BundleError as error:
            str(error).encode()
        else:
            assert any(payload.encode() in data for payload in said)
            assert all(one.kind in ("test-result", "bench") for one in found.trusted)
        try:
            listed = attestations(policy, "file", manifest, data, NOW)
        except BundleError:
            return
        json.dumps(receipt("place", manifest, listed, "policy", "", NOW, timedelta(days=90)))

    fuzz("attestations", 200, make, check)


def test_what_a_stranger_signs_makes_no_receipt_fail(bundle: Path, tmp_path: Path) -> None:
    """Predicates of any form, by a key that counts: a receipt is issued all the same."""
    generate(tmp_path / "key")
    key = read_private(tmp_path / "key.key")
    manifest = read_manifest(bundle)
    policy_file = tmp_path / "policy.yaml"
    policy_file.write_text(f"keys:\n  key:\n    public: {body(key.public_key)}\n")
    policy = load_policy(policy_file)
    predicates = {
        "provenance": {"runDetails": {"builder": {"id": "x"}}},
        "test-result": {
            "result": "PASSED", "rpac_batches": ["a"], "rpac_worstErrors": {"cpu/decode.py": 0.1}, "rpac_mutations": None,
            "rpac_unchecked": [],
        },
        "prediction": {"predictions": [
            {"target": "cpu", "compiler": "1", "program": "decode/8", "batch": {"label": "x"}, "seconds": 1e-5}
        ]},
        "bench": {"results": {
            "bundle": {"target": "cpu"},
            "entries": [{"kind": "decode", "tokens": 8, "label": "x", "timing": {"spread": {"median": 1e-5}}}],
        }},
        "verification-summary": {"verificationResult": "PASSED", "verifier": {"version": {"jax": "0.1"}}},
    }  # fmt: skip

    def make(rng: random.Random) -> bytes:
        return json.dumps(mutate_tree(rng, predicates, times=4)).encode("utf-8", "surrogatepass")

    def check(data: bytes) -> None:
        tree = json.loads(data)
        made = {kind: tree[kind] for kind in predicates if isinstance(tree, dict) and isinstance(tree.get(kind), dict)}
        attestation_path(bundle).unlink(missing_ok=True)
        try:
            path = sign(bundle, manifest, made, key, NOW).path
        except ValueError:  # a number that JSON does not have
            return
        listed = attestations(policy, "file", manifest, path.read_bytes(), NOW)
        json.dumps(receipt("place", manifest, listed, "policy", "", NOW, timedelta(days=90)))

    fuzz("predicates", 100, make, check)


def test_policies(tmp_path: Path) -> None:
    key = generate(tmp_path / "key")
    path = tmp_path / "policy.yaml"
    sound = (
        f"keys:\n  ci:\n    id: {key.keyid}\n    public: {body(key)}\n    not_before: 2026-01-01\n    not_after: 2026-12-31\n"
        "require:\n  provenance: {}\n  test-result: {max_age_days: 30}\n"
    ).encode()

    def make(rng: random.Random) -> bytes:
        return mutate_text(rng, sound)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            policy = load_policy(path)
        except TrustError as error:
            assert error.problems
            str(error).encode()
        else:
            assert policy.keys

    fuzz("policies", 200, make, check)
