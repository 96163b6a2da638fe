"""A bundle is what its own spec makes, or the first place where it is not is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google.protobuf.json_format as protobuf
import pytest
from command import rpac
from in_toto_attestation.predicates.vsa.v1.vsa_pb2 import VerificationSummary

from rpac.bundle import read_manifest, write_bundle
from rpac.bundle.manifest import MANIFEST, render
from rpac.bundle.read import read_files
from rpac.contract.program import Content
from rpac.errors import TargetError
from rpac.rebuild import first_difference, rebuild
from rpac.spec import Spec
from rpac.trust.keys import generate


def test_the_bundle_of_tiny_is_made_again_byte_for_byte(built: Callable[[str], Path], tmp_path: Path) -> None:
    """Its spec has more targets than it was built for."""
    bundle = shutil.copytree(built("cpu"), tmp_path / "tiny.rpac")
    generate(tmp_path / "ci")
    done = rpac("rebuild", bundle, "--key", tmp_path / "ci.key", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{bundle}: the same bytes, ")
    assert "cached" not in done.stderr
    (tmp_path / "policy.yaml").write_text(
        f"keys: {{ci: {{public: {key_line(tmp_path)}}}}}\nrequire: {{verification-summary: {{}}}}"
    )
    done = rpac("verify", bundle, "--policy", tmp_path / "policy.yaml", "--json", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(done.stdout)["attestations"]
    # The published schema is that of SLSA 1.0, with one text in place of the list, and without the verifier's version.
    assert one["predicate"].pop("verifiedLevels")[0] == "RPAC_REBUILT_BYTE_FOR_BYTE"
    message = protobuf.ParseDict(one["predicate"], VerificationSummary(), ignore_unknown_fields=True)
    assert message.verification_result == "PASSED"
    assert message.time_verified.seconds > 0
    assert message.resource_uri == "urn:rpac:bundle:tiny"


def key_line(folder: Path) -> str:
    return (folder / "ci.pub").read_text().splitlines()[1]


def test_another_kernel_is_told_with_its_line_and_nothing_is_signed(small: Path, tmp_path: Path) -> None:
    """A bundle that verifies: its kernel was changed, and the manifest made anew."""
    bundle = forged(small, tmp_path)
    generate(tmp_path / "ci")
    done = rpac("rebuild", bundle, "--key", tmp_path / "ci.key", "--json", cache=tmp_path / "cache")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert (found["same"], found["summary"], found["file"]) == (False, None, None)
    assert found["difference"].startswith("source/cpu/decode.py: byte 0, line 1 of ")
    assert "is not what its spec makes here: source/cpu/decode.py" in done.stderr
    assert not bundle.with_name("small.rpac.intoto.jsonl").exists()


def forged(bundle: Path, folder: Path) -> Path:
    path = shutil.copytree(bundle, folder / bundle.name)
    kernel = path / "source" / "cpu" / "decode.py"
    kernel.write_text("#" + kernel.read_text())
    manifest = read_manifest(path)
    files = {**manifest.files, "source/cpu/decode.py": Content.of(kernel.read_bytes())}
    (path / MANIFEST).write_bytes(render(replace(manifest, files=files)))
    return path


def variant(program: Any, **changed: Any) -> Any:
    return replace(program, **changed)


DIFFERENCES: dict[str, tuple[Callable[[list[Any]], list[Any]], str]] = {
    "nothing": (lambda programs: programs, ""),
    "a program": (
        lambda programs: [variant(programs[0], exported=programs[0].exported[:-2] + b"??"), *programs[1:]],
        r"target cpu, program decode/8, exported: byte [\d,]+ of [\d,]+ bytes here, [\d,]+ in the rebuild: 0x.. here, 0x3f in",
    ),
    "a longer program": (
        lambda programs: [variant(programs[0], exported=programs[0].exported + b"?"), *programs[1:]],
        r"target cpu, program decode/8, exported: one is the beginning of the other, of [\d,]+ bytes here",
    ),
    "an executable": (
        lambda programs: [variant(programs[0], executable=b"machine code"), *programs[1:]],
        "target cpu, program decode/8, executable is in the rebuild alone",
    ),
    "a program too few": (lambda programs: programs[1:], "target cpu, program decode/8 is in this bundle alone"),
    "a tile": (
        lambda programs: [variant(programs[0], plan={"tile": [8, 256]}), *programs[1:]],
        r"manifest.json, targets\.cpu\.programs\.0\.plan\.tile\.1: 128 here, 256 in the rebuild",
    ),
    "a flag": (
        lambda programs: [variant(programs[0], flags={"xla_tpu": "1"}), *programs[1:]],
        r"manifest.json, targets\.cpu\.programs\.0\.flags\.xla_tpu: nothing here, '1' in the rebuild",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENCES)
def test_the_first_difference(bundle: Path, tmp_path: Path, tiny: Spec, programs: list[Any], case: str) -> None:
    change, text = DIFFERENCES[case]
    write_bundle(tmp_path / "again.rpac", tiny, change(list(programs)))
    found = first_difference(read_files(bundle), read_files(tmp_path / "again.rpac"))
    assert re.match(text, found) if text else found == ""


def test_what_cannot_be_built_again_here(bundle: Path, native_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="target cpu was built with python None; here is"):
        rebuild(bundle)
    monkeypatch.setattr("rpac.rebuild.require_toolchain", lambda place, manifest: None)
    with pytest.raises(TargetError, match=r"found executables of `rpac build --this-cpu`; must have none"):
        rebuild(native_bundle)
