"""`rpac keygen`, `rpac sign` and `rpac verify`, and that other tools for in-toto read what they write."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import google.protobuf.json_format as protobuf
import pytest
from click.testing import CliRunner, Result
from command import TINY, rpac
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as Message
from signing import TESTED, PolicyFile, Sign

from rpac.bundle import read_manifest, verify_bundle
from rpac.bundle.storage import attestation_path
from rpac.cli import main
from rpac.devices.toolchain import PACKAGES, toolchain
from rpac.errors import TargetError
from rpac.rebuild import require_same_kernels
from rpac.trust.predicates import TYPES
from rpac.trust.statement import subjects_of


@pytest.fixture
def mine(small: Path, tmp_path: Path) -> Path:
    """A copy of a bundle that was really built."""
    return shutil.copytree(small, tmp_path / "small.rpac")


def run(*arguments: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def statements(path: Path) -> list[Any]:
    return [json.loads(base64.b64decode(json.loads(line)["payload"])) for line in path.read_text().splitlines()]


def test_from_a_key_to_a_verified_bundle(mine: Path, tmp_path: Path) -> None:
    made = rpac("keygen", "-o", tmp_path / "ci", cache=tmp_path)
    assert made.returncode == 0, made.stderr
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"{made.stdout}require:\n  provenance: {{max_age_days: 1}}\n")
    done = rpac("verify", mine, "--policy", policy, cache=tmp_path)
    assert (done.returncode, "found no such file" in done.stderr) == (4, True)

    done = rpac("sign", mine, "--key", tmp_path / "ci.key", "--builder", "https://ci.example/7", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 attestations of" in done.stdout
    verify_bundle(mine)  # nothing was put into it

    done = rpac("verify", mine, "--policy", policy, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].split()[:2] == ["provenance", "ci"]
    done = rpac("verify", mine, "--key", tmp_path / "ci.pub", "--json", cache=tmp_path)
    (one,) = json.loads(done.stdout)["attestations"]
    assert (one["kind"], one["untrusted"]) == ("provenance", "")

    definition = one["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["targets"] == ["cpu"]
    assert one["predicate"]["runDetails"]["builder"]["id"] == "https://ci.example/7"
    packages = {dep["name"]: dep for dep in definition["resolvedDependencies"]}
    tools = toolchain()
    for name in PACKAGES:
        assert packages[name]["uri"] == f"pkg:pypi/{name}@{tools[name]}"
        assert packages[name]["digest"]["rpacFiles"].startswith(tools[f"{name}_files"])
    assert {"rpac", "templates", "tuned tiles of the package"} <= packages.keys()

    # As the published schemas have it.
    (statement,) = statements(attestation_path(mine))
    message = protobuf.ParseDict(statement, Message())
    Statement.copy_from_pb(message).validate()
    assert {subject.name: subject.digest["sha256"] for subject in message.subject} == subjects_of(read_manifest(mine))
    assert message.predicate_type == TYPES["provenance"]
    known = {key: value for key, value in one["predicate"].items() if not key.startswith("rpac_")}
    protobuf.ParseDict(known, Provenance())  # raises for a field that SLSA does not have


def test_provenance_is_refused_where_it_would_not_be_true(bundle: Path, keys: Path, tmp_path: Path) -> None:
    """Of programs that another toolchain made, and of kernels that this rpac does not generate."""
    found = run("sign", bundle, "--key", keys / "old.key")
    assert (found.exit_code, "was built with python None; here is" in found.stderr) == (3, True)
    with pytest.raises(TargetError, match=r"this rpac does not generate its source/cpu/decode\.py from its spec\.yaml"):
        require_same_kernels(bundle, read_manifest(bundle))
    assert not attestation_path(bundle).exists()


def test_results_are_signed_without_provenance(bundle: Path, keys: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    check = tmp_path / "check.json"
    sources = {path.removeprefix("source/"): one.sha256 for path, one in manifest.files.items() if path != "spec.yaml"}
    found = {"spec_hash": manifest.spec_hash, "sources": sources, "results": [], "compiled": [], "ok": True, "seed": 1}
    check.write_text(json.dumps(found))
    sign = ("sign", bundle, "--no-provenance")
    done = run(*sign, "--key", keys / "old.key", "--check", check)
    assert done.exit_code == 0, done.stderr
    done = run(*sign, "--key", keys / "new.key", "--countersign", keys / "old.pub")
    assert (done.exit_code, "kept: test-result" in done.stdout) == (0, True), done.stderr
    done = run("verify", bundle, "--key", keys / "new.pub")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("sign", "BUNDLE", "--key", "KEY", "--no-provenance"), 2, "found nothing to sign"),
        (("sign", "BUNDLE"), 2, "Missing option '--key'"),
        (("sign", "BUNDLE", "--key", "absent"), 2, "TrustError: absent: found no file that can be read"),
        (("sign", "memory://x", "--key", "KEY"), 5, "must be a bundle's folder, because the attestations are written beside it"),
        (("verify", "BUNDLE"), 2, "found neither --key nor --policy"),
        (("verify", "BUNDLE", "--key", "STRANGER"), 4, "the policy has no key with the id"),
        (("verify", "BUNDLE", "--policy", str(TINY)), 2, "name: found an unknown key; must be one of keys, require"),
        (("keygen", "-o", "OLD"), 5, "must be absent, because a key that is lost cannot be made again"),
    ],
)  # fmt: skip
def test_what_the_commands_refuse(
    bundle: Path, keys: Path, signed: Sign, arguments: tuple[str, ...], code: int, text: str
) -> None:
    signed(bundle, test_result=TESTED)
    names = {"BUNDLE": bundle, "KEY": keys / "old.key", "STRANGER": keys / "stranger.pub", "OLD": keys / "old"}
    done = run(*(names.get(one, one) for one in arguments))
    assert (done.exit_code, text in done.stderr) == (code, True), done.stderr
    assert not done.stdout


def test_a_key_and_a_policy_together(bundle: Path, keys: Path, signed: Sign, policy_file: PolicyFile) -> None:
    signed(bundle, key="stranger")
    policy = policy_file("test-result: {}")
    assert run("verify", bundle, "--policy", policy).exit_code == 4
    assert run("verify", bundle, "--policy", policy, "--key", keys / "stranger.pub").exit_code == 0
