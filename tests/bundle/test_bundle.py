"""A bundle is the same bytes wherever it is built, and is read back as it was written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpac.bundle import describe, is_bundle, read_manifest, read_target, verify_bundle, write_bundle
from rpac.bundle.manifest import ARGS, RESULTS, parse, render
from rpac.bundle.storage import Storage
from rpac.contract import arrays as layout
from rpac.contract.program import Content, Variant
from rpac.errors import OutputError
from rpac.files.publish import Stage
from rpac.spec import Spec

Tree = Callable[[Path], dict[str, bytes]]


def test_two_builds_in_two_folders_are_byte_identical(
    tmp_path: Path, tiny: Spec, programs: list[Any], tree: Tree
) -> None:
    write_bundle(tmp_path / "a" / "tiny.rpac", tiny, programs)
    write_bundle(tmp_path / "elsewhere" / "b.rpac", tiny, reversed(programs))
    assert tree(tmp_path / "a" / "tiny.rpac") == tree(tmp_path / "elsewhere" / "b.rpac")


def test_the_layout_is_as_documented(bundle: Path, tiny: Spec, programs: list[Any], tree: Tree) -> None:
    files = tree(bundle)
    assert files.pop("spec.yaml").decode() == tiny.source
    manifest = files.pop("manifest.json")
    assert {name.split("/", 1)[1] for name in files if name.startswith("source/")} == {
        program.source.path for program in programs
    }
    blobs = {name.removeprefix("blobs/"): data for name, data in files.items() if name.startswith("blobs/")}
    assert blobs == {hashlib.sha256(program.exported).hexdigest(): program.exported for program in programs}
    assert str(bundle.parent).encode() not in manifest


def test_the_manifest_is_written_last(
    tmp_path: Path, tiny: Spec, programs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(Stage, "write", lambda self, name, data: names.append(name))
    write_bundle(tmp_path / "tiny.rpac", tiny, programs)
    assert names.index("manifest.json") == len(names) - 1


def test_the_manifest_is_read_back_as_written(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    checked = dataclasses.replace(programs[0], topology="v6e:2x2")
    rest = [dataclasses.replace(program, topology="v6e:2x2") for program in programs[1:]]
    checks = {("cpu", checked.kind, checked.tokens): {"tolerance": 0.02, "largest": 0.001, "batches": 7}}
    written = write_bundle(tmp_path / "tiny.rpac", tiny, [checked, *rest], checks)
    read = read_manifest(tmp_path / "tiny.rpac")
    assert read == written
    assert render(read) == render(written) == (tmp_path / "tiny.rpac" / "manifest.json").read_bytes()
    assert (read.name, read.spec_hash, read.limits.token_buckets) == ("tiny", tiny.hash, (8, 32))
    assert dataclasses.asdict(read.model) == dataclasses.asdict(tiny.model)
    assert read.kv_layout == tiny.serving.kv_layout
    assert read.targets["cpu"].programs[0].check == {"tolerance": 0.02, "largest": 0.001, "batches": 7}
    assert read.targets["cpu"].programs[1].check is None


def test_programs_carry_the_shapes_of_the_contract(bundle: Path, tiny: Spec) -> None:
    for program in read_manifest(bundle).targets["cpu"].programs:
        assert program.args == layout.arg_specs(tiny, program.variant.tokens)
        assert program.results == layout.result_specs(tiny, program.variant.tokens)
        assert tuple(dims.name for dims in program.args) == ARGS
        assert tuple(dims.name for dims in program.results) == RESULTS


def test_a_spec_of_any_line_ends_is_kept_as_given(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    source = tiny.source.replace("\n", "\r\n") + "# größer\r\n"
    write_bundle(tmp_path / "tiny.rpac", dataclasses.replace(tiny, source=source), programs)
    assert (tmp_path / "tiny.rpac" / "spec.yaml").read_bytes() == source.encode()
    verify_bundle(tmp_path / "tiny.rpac")


def test_a_copied_bundle_is_whole(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    assert verify_bundle(copy) == verify_bundle(bundle)


def test_only_the_bytes_of_the_chosen_target_are_read(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    other = dataclasses.replace(programs[0], target="v6e", device_kind="TPU v6 lite", exported=b"x", executable=b"yy")
    write_bundle(tmp_path / "tiny.rpac", tiny, [*programs, other])
    loaded = read_target(tmp_path / "tiny.rpac", lambda manifest: manifest.targets["v6e"])
    assert loaded.target.programs[0].variant == Variant("decode", 8)
    assert sorted(loaded.blobs.values()) == [b"x", b"yy"]


def test_describe_is_plain_data_with_sizes(bundle: Path, tree: Tree) -> None:
    described = json.loads(json.dumps(describe(bundle)))
    assert described["path"] == str(bundle)
    assert described["size"] == sum(map(len, tree(bundle).values()))
    assert described["targets"]["cpu"]["programs"][0]["kind"] == "decode"


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "url"])
def test_a_reader_gets_one_bundle_while_builds_replace_it(
    tmp_path: Path, tiny: Spec, programs: list[Any], scheme: str
) -> None:
    path = tmp_path / "tiny.rpac"
    versions = [
        [dataclasses.replace(program, exported=program.exported + suffix) for program in programs]
        for suffix in (b"", b"another build")
    ]
    manifests = [write_bundle(path, tiny, version) for version in versions]
    done = threading.Event()

    def replace() -> None:
        for count in range(20):
            write_bundle(path, tiny, versions[count % 2])
        done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    while not done.is_set():
        assert verify_bundle(f"{scheme}{path}") in manifests
    thread.join()


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "url"])
def test_a_bundle_replaced_between_manifest_and_blobs_is_read_again(
    tmp_path: Path, tiny: Spec, programs: list[Any], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    path = tmp_path / "tiny.rpac"
    write_bundle(path, tiny, programs)
    replacing = [[dataclasses.replace(program, exported=b"another build") for program in programs]]
    blob = Storage.blob

    def replace_before(storage: Storage, content: Content) -> bytes:
        if replacing:
            write_bundle(path, tiny, replacing.pop())
        return blob(storage, content)

    monkeypatch.setattr(Storage, "blob", replace_before)
    loaded = read_target(f"{scheme}{path}", lambda manifest: manifest.targets["cpu"])
    assert set(loaded.blobs.values()) == {b"another build"}


def test_only_a_bundle_is_replaced(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    path = tmp_path / "home"
    path.mkdir()
    (path / "thesis.txt").touch()
    with pytest.raises(OutputError, match="found a folder that this command did not make"):
        write_bundle(path, tiny, programs)
    assert not is_bundle(path)
    assert [file.name for file in path.iterdir()] == ["thesis.txt"]


def test_programs_of_one_target_share_their_toolchain(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    odd = dataclasses.replace(programs[0], toolchain={"jax": "another"})
    with pytest.raises(ValueError, match="programs of target cpu differ"):
        write_bundle(tmp_path / "tiny.rpac", tiny, [odd, *programs[1:]])
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_could_not_be_read_is_not_published(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    bad = dataclasses.replace(programs[0].source, path="../../escape.py")
    with pytest.raises(Exception, match="plain path"):
        write_bundle(tmp_path / "tiny.rpac", tiny, [dataclasses.replace(programs[0], source=bad)])
    assert list(tmp_path.iterdir()) == []


def test_parse_takes_what_render_makes(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert parse(render(manifest), "manifest.json") == manifest
