"""Whatever is wrong with a bundle, the error is rpac's own, says what and where, and exits as documented."""

# ruff: noqa: E501  (a row a case)

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import rpac
from rpac.bundle import verify_bundle, write_bundle
from rpac.bundle.manifest import _seal, parse
from rpac.devices.client import build_string
from rpac.engine import load
from rpac.errors import BundleError, RpacError, TargetError
from rpac.spec import Spec

SEED = random.SystemRandom().randrange(2**32)
Edit = Callable[[dict[str, Any]], Any]


def refused(path: Path) -> str:
    """What `load` and `verify_bundle` both say of a bundle."""
    with pytest.raises(BundleError) as loaded:
        load(path, target="cpu")
    with pytest.raises(BundleError) as verified:
        verify_bundle(path)
    assert loaded.value.exit_code == 4
    assert str(loaded.value) == str(verified.value)
    return str(loaded.value)


def a_blob(bundle: Path) -> Path:
    return sorted((bundle / "blobs").iterdir())[0]


def reseal(bundle: Path, edit: Edit) -> None:
    """Edits the manifest and gives it a digest that matches, as a wrong writer would."""
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    del data["digest"]
    edit(data)
    path.write_bytes(_seal(data))


def test_no_path(tmp_path: Path) -> None:
    assert "found no folder that can be read (No such file or directory); must be a bundle" in refused(tmp_path / "no")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "found no folder that can be read (Not a directory)" in refused(tmp_path / "file")


def test_an_unfinished_build(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    text = refused(bundle)
    assert "manifest.json: cannot be read (No such file or directory)" in text
    assert "its build did not finish, or it is no bundle; copy or build the bundle again" in text


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


def test_a_flipped_byte_of_any_other_file(bundle: Path) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    for path in bundle.rglob("*"):
        if not path.is_file() or path.name == "manifest.json":
            continue
        data = bytearray(path.read_bytes())
        for at in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(10))}:
            flip = rng.randrange(1, 256)
            data[at] ^= flip
            path.write_bytes(data)
            with pytest.raises(
                BundleError, match=f"{path.name}: found sha256 .*; must be .*; it was changed or damaged"
            ):
                verify_bundle(bundle)
            if path.parent.name == "blobs":
                with pytest.raises(BundleError, match="it was changed or damaged"):
                    load(bundle, target="cpu")
            data[at] ^= flip
        path.write_bytes(data)
    verify_bundle(bundle)


def test_a_missing_blob(bundle: Path) -> None:
    a_blob(bundle).unlink()
    assert "cannot be read (No such file or directory); copy or build the bundle again" in refused(bundle)


def test_a_blob_cut_short(bundle: Path) -> None:
    blob = a_blob(bundle)
    size = blob.stat().st_size
    os.truncate(blob, size - 1)
    assert f"{blob.name}: found {size - 1} bytes; must be {size}; it is cut short" in refused(bundle)


def test_a_blob_with_more_behind_it(bundle: Path) -> None:
    blob = a_blob(bundle)
    size = blob.stat().st_size
    os.truncate(blob, 1 << 40)  # sparse: it must be refused before it is read
    assert f"{blob.name}: found {1 << 40} bytes; must be at most {size}" in refused(bundle)


def test_a_blob_that_is_a_pipe(bundle: Path) -> None:
    blob = a_blob(bundle)
    blob.unlink()
    os.mkfifo(blob)
    assert "found no regular file" in refused(bundle)


def test_a_blob_that_is_a_folder(bundle: Path) -> None:
    blob = a_blob(bundle)
    blob.unlink()
    blob.mkdir()
    assert "blobs/" in refused(bundle)


def test_a_file_that_the_manifest_does_not_list(bundle: Path) -> None:
    (bundle / "source" / "extra.py").touch()
    with pytest.raises(BundleError, match=r"found source/extra.py; must hold only what manifest.json lists"):
        verify_bundle(bundle)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / f"real-{path.name}")
    path.symlink_to(path.parent.parent / f"real-{path.name}")


def nested(path: Path, depth: int = 1500) -> None:
    """Folders in folders, made step by step, because such a path is longer than one may be."""
    here = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("deeper", dir_fd=here)
        here, above = os.open("deeper", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)


EXTRAS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder": (lambda bundle: (bundle / "empty").mkdir(), "found empty;"),
    "an empty folder among blobs": (lambda bundle: (bundle / "blobs" / "empty").mkdir(), "found blobs/empty;"),
    "folders without end": (lambda bundle: nested(bundle), "found deeper;"),
    "a link to a folder": (lambda bundle: (bundle / "more").symlink_to("blobs"), "found more;"),
    "a link to nothing": (lambda bundle: (bundle / "more").symlink_to("nothing"), "found more;"),
    "a folder that is a link": (lambda bundle: linked(bundle / "blobs"), "found blobs;"),
    "a file that is a link": (lambda bundle: linked(bundle / "spec.yaml"), "found spec.yaml;"),
    "a pipe": (lambda bundle: os.mkfifo(bundle / "pipe"), "found pipe;"),
    "seven": (lambda bundle: [(bundle / f"x{n}").touch() for n in range(7)], "found x0, x1, x2, x3, x4 and 2 more;"),
}


@pytest.mark.parametrize(("add", "said"), EXTRAS.values(), ids=EXTRAS)
def test_what_is_no_file_of_the_manifest_is_refused(bundle: Path, add: Callable[[Path], object], said: str) -> None:
    add(bundle)
    with pytest.raises(BundleError, match=rf"{said} must hold only what manifest\.json lists, and no links"):
        verify_bundle(bundle)
    if "deeper" in said:  # pytest's own clean-up would not come to its end
        subprocess.run(["rm", "-rf", bundle / "deeper"], check=True)


def test_a_damaged_source_is_found_though_loading_never_reads_it(bundle: Path) -> None:
    (bundle / "source" / "cpu" / "mixed.py").write_text("")
    with pytest.raises(BundleError, match=r"source/cpu/mixed.py: found 0 bytes"):
        verify_bundle(bundle)
    load(bundle, target="cpu")


def test_an_export_of_other_shapes_than_the_manifest_says(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    swapped = [dataclasses.replace(program, exported=programs[1].exported) for program in programs]
    write_bundle(tmp_path / "tiny.rpac", tiny, swapped)
    with pytest.raises(BundleError, match=r"program decode/8: its export takes and returns bfloat16\[32, 4, 128\]"):
        load(tmp_path / "tiny.rpac", target="cpu").warm()


def future(exported: Any) -> Any:
    return dataclasses.replace(exported, calling_convention_version=10_000)


def for_tpu(exported: Any) -> Any:
    return dataclasses.replace(exported, platforms=("tpu",))


@pytest.mark.parametrize(
    ("change", "text"),
    [(future, "found calling convention 10000; must be"), (for_tpu, "exported for platforms")],
)
def test_an_export_that_jax_cannot_use(
    tmp_path: Path, tiny: Spec, programs: list[Any], change: Callable[[Any], Any], text: str
) -> None:
    from jax import export

    changed = bytes(change(export.deserialize(bytearray(programs[0].exported))).serialize(vjp_order=0))
    write_bundle(tmp_path / "tiny.rpac", tiny, [dataclasses.replace(programs[0], exported=changed)])
    with pytest.raises(
        TargetError, match=rf"program decode/8: jax {jax.__version__} cannot (read|compile) its export .*{text}"
    ) as raised:
        load(tmp_path / "tiny.rpac", target="cpu").warm()
    assert raised.value.exit_code == 3


def test_a_bundle_of_another_target(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    write_bundle(path, tiny, [dataclasses.replace(one, target="v6e", device_kind="TPU v6 lite") for one in programs])
    for target in (None, "cpu"):
        with pytest.raises(TargetError, match=r"the bundle has v6e \(TPU v6 lite\)") as raised:
            load(path, target=target)
        assert raised.value.exit_code == 3
        assert "of kind 'cpu'" in str(raised.value)


def test_a_target_that_this_device_is_not(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    tpu = [dataclasses.replace(one, target="v6e", device_kind="TPU v6 lite") for one in programs]
    write_bundle(path, tiny, [*programs, *tpu])
    with pytest.raises(
        TargetError, match=r"found target 'v6e' and device .* of kind 'cpu'; the bundle has cpu \(cpu\), v6e"
    ):
        load(path, target="v6e")


def test_a_target_is_refused_before_its_blobs_are_read(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    write_bundle(path, tiny, [dataclasses.replace(one, target="v6e", device_kind="TPU v6 lite") for one in programs])
    shutil.rmtree(path / "blobs")
    with pytest.raises(TargetError):
        load(path)


def test_an_executable_for_another_cpu(tmp_path: Path, tiny: Spec, native_programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    toolchain = {"cpu_build": "jaxlib 0.10.2 on another"}
    write_bundle(path, tiny, [dataclasses.replace(one, toolchain=toolchain) for one in native_programs])
    with pytest.raises(TargetError) as raised:
        load(path, target="cpu")
    assert str(raised.value) == (
        f"{path}: target cpu was compiled for 'jaxlib 0.10.2 on another'; this process has "
        f"{build_string(jax.devices()[0].client)!r}; must be the same; build the bundle on this machine, "
        "or compile its portable programs here with allow_compile=True"
    )
    assert raised.value.exit_code == 3


def test_an_executable_that_the_runtime_does_not_take(tmp_path: Path, tiny: Spec, native_programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    write_bundle(path, tiny, [dataclasses.replace(one, executable=b"of another runtime") for one in native_programs])
    with pytest.raises(TargetError, match=r"program decode/8: the runtime of .* does not take its executable"):
        load(path, target="cpu").warm([rpac.Variant("decode", 8)])  # all at once refuse in any order


def test_every_error_is_one_of_ours() -> None:
    for name in rpac.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(rpac, name), RpacError)
