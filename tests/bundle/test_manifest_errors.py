"""A manifest that is damaged, of another schema, or that breaks its schema."""

# ruff: noqa: E501  (a row a case)

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from damaged import SEED, Edit, refused, reseal

from rpac.bundle.manifest import _seal, parse
from rpac.errors import BundleError


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[]", b'"text"', b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"1" * 5000, b"{}"],
    ids=lambda data: repr(data[:8]),
)
def test_a_manifest_that_is_none(bundle: Path, data: bytes) -> None:
    (bundle / "manifest.json").write_bytes(data)
    text = refused(bundle)
    assert "manifest.json: " in text
    assert "no JSON" in text or "must be an object" in text


def test_a_manifest_cut_short(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes()[:-200])
    assert "the file is damaged or cut short" in refused(bundle)


def test_a_manifest_too_large(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 1 << 40)  # sparse: it must be refused before it is read
    assert f"found {1 << 40} bytes; must be at most {16 << 20}" in refused(bundle)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (1, "found schema 1, older than this rpac reads; must be schema 2; build the bundle again"),
        (3, "found schema 3, newer than this rpac reads; must be schema 2; use a newer rpac"),
    ],
)
def test_another_schema(bundle: Path, schema: int, text: str) -> None:
    def edit(data: dict[str, Any]) -> None:
        for key in list(data):
            del data[key]
        data.update(schema=schema, everything="else may differ")

    reseal(bundle, edit)
    assert text in refused(bundle)


@pytest.mark.parametrize(
    "text",
    [
        '{"schema":2}',
        '{"schema":2,"schema":2}',
        '{"schema":2,"x":1e999}',
        '{"schema":2,"x":' + "[" * 900 + "]" * 900 + "}",
    ],
    ids=["bare", "duplicate", "infinite", "deep"],
)
def test_a_manifest_without_its_digest(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    assert "its digest does not match its content" in refused(bundle)


def test_a_manifest_written_another_way(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert "its digest does not match its content" in refused(bundle)


def first(data: dict[str, Any]) -> dict[str, Any]:
    program: dict[str, Any] = data["targets"]["cpu"]["programs"][0]
    return program


# What is edited, and what the error must say of it.
EDITS: dict[str, tuple[Edit, str]] = {
    "no key": (lambda data: data.pop("limits"), "manifest: found no 'limits'; must have exactly schema, digest, name"),
    "a key too many": (lambda data: data.update(extra=1), "manifest: found an unknown 'extra'"),
    "misspelled": (lambda data: first(data).update(plans=first(data).pop("plan")), "found no 'plan' and an unknown 'plans'"),
    "name": (lambda data: data.update(name="../x"), "manifest.name: found '../x'; must be a spec's name"),
    "hash": (lambda data: data.update(spec_hash="ab"), "manifest.spec_hash: found 'ab'; must be 64 hex digits"),
    "model": (lambda data: data.update(model=[]), "manifest.model: found []; must be an object"),
    "heads": (lambda data: data["model"].update(q_heads=True), "model.q_heads: found True; must be an integer from 1"),
    "dtype": (lambda data: data["model"].update(kv_dtype="int3"), "model.kv_dtype: found 'int3'; must be one of bfloat16"),
    "scale": (lambda data: data["model"].update(sm_scale="1"), "model.sm_scale: found '1'; must be a number"),
    "layout": (lambda data: data.update(kv_layout="paged"), "manifest.kv_layout: found 'paged'; must be one of interleaved, latent, separate"),
    "limits": (lambda data: data["limits"].update(num_pages=0), "limits.num_pages: found 0; must be an integer above 0"),
    "targets": (lambda data: data.update(targets=3), "manifest.targets: found 3; must be an object"),
    "target name": (lambda data: data["targets"].update(A=data["targets"]["cpu"]), "targets: found 'A'; must be a target's name"),
    "device kind": (lambda data: data["targets"]["cpu"].update(device_kind=""), "device_kind: found ''; must be a device kind"),
    "topology": (lambda data: data["targets"]["cpu"].update(topology=5), "topology: found 5; must be null or a topology's name"),
    "toolchain": (lambda data: data["targets"]["cpu"]["toolchain"].update(jax=1), "toolchain: found {'jax': 1"),
    "no program": (lambda data: data["targets"]["cpu"].update(programs=[]), "programs: found []; must be a list with one program"),
    "a program twice": (lambda data: data["targets"]["cpu"]["programs"].append(first(data)), "each of another kind or token bucket"),
    "kind": (lambda data: first(data).update(kind="encode"), "programs[0].kind: found 'encode'; must be one of decode, mixed, prefill"),
    "kind's type": (lambda data: first(data).update(kind=["decode"]), "programs[0].kind: found ['decode']; must be one of"),
    "bucket": (lambda data: first(data).update(tokens=9), "programs[0].tokens: found 9; must be one of the token buckets [8, 32]"),
    "bucket's type": (lambda data: first(data).update(tokens=8.0), "programs[0].tokens: found 8.0; must be an integer"),
    "plan": (lambda data: first(data).update(plan=None), "programs[0].plan: found None; must be an object"),
    "flags": (lambda data: first(data).update(flags=[]), "programs[0].flags: found []; must be an object"),
    "check": (lambda data: first(data).update(check=0), "programs[0].check: found 0; must be an object"),
    "arguments": (lambda data: first(data)["args"].reverse(), "must be the arrays queries, keys, values, kv_cache, kv_lens"),
    "an argument": (lambda data: first(data)["args"][0].pop(), "args[0]: found ['queries', 'bfloat16']; must be a name, a dtype and a shape"),
    "a shape": (lambda data: first(data)["args"][0][2].append(-1), "args[0][2][3]: found -1; must be an integer from 1"),
    "blob name": (lambda data: first(data)["exported"].update(sha256="../../etc/passwd"), "exported.sha256: found '../../etc/passwd'; must be 64 hex digits"),
    "blob size": (lambda data: first(data)["exported"].update(size=1 << 40), f"exported.size: found {1 << 40}; must be an integer from 1 to {256 << 20}"),
    "executable": (lambda data: first(data).update(executable=""), "executable: found ''; must be an object"),
    "source up": (lambda data: first(data).update(source="../x.py"), "source: found '../x.py'; must be a plain path under source/"),
    "source absolute": (lambda data: first(data).update(source="/x.py"), "source: found '/x.py'; must be a plain path under source/"),
    "source dots": (lambda data: first(data).update(source="a/../x.py"), "source: found 'a/../x.py'; must be a plain path"),
    "source unlisted": (lambda data: first(data).update(source="cpu/x.py"), "must be a list of files with source/cpu/x.py (cpu)"),
    "files": (lambda data: data.update(files=[]), "manifest.files: found []; must be an object"),
    "file up": (lambda data: data["files"].update({"source/../../x": data["files"]["spec.yaml"]}), "files: found 'source/../../x'; must be spec.yaml or a plain path"),
    "file elsewhere": (lambda data: data["files"].update({"blobs/x": data["files"]["spec.yaml"]}), "files: found 'blobs/x'; must be spec.yaml or"),
    "no spec": (lambda data: data["files"].pop("spec.yaml"), "must be a list of files with spec.yaml"),
    "file size": (lambda data: data["files"]["spec.yaml"].update(size=-1), "files.spec.yaml.size: found -1; must be an integer"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "text"), EDITS.values(), ids=EDITS)
def test_a_manifest_that_breaks_its_schema(bundle: Path, edit: Edit, text: str) -> None:
    reseal(bundle, edit)
    assert text in refused(bundle)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def test_whatever_is_in_a_manifest_nothing_but_bundle_errors_comes_out(bundle: Path) -> None:
    """Every value, at any depth, replaced by some others."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    original = json.loads((bundle / "manifest.json").read_text())
    del original["digest"]
    del original["targets"]["cpu"]["programs"][1:]
    refusals = 0
    for place in places(original)[1:]:
        for other in rng.sample([None, True, -1, 1 << 70, 0.5, "", "x/../y", [], [[]], {}, {"a": {}}], 4):
            data = copy.deepcopy(original)
            inner = data
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = other
            try:
                parse(_seal(data), "manifest.json")
            except BundleError as error:
                assert str(error).startswith("manifest.json: ")
                refusals += 1
    assert refusals > 300


def test_every_flipped_byte_of_the_manifest(bundle: Path) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    data = bytearray((bundle / "manifest.json").read_bytes())
    for at in range(len(data)):
        flip = rng.randrange(1, 256)
        data[at] ^= flip
        with pytest.raises(BundleError):
            parse(bytes(data), "manifest.json")
        data[at] ^= flip
    parse(bytes(data), "manifest.json")
