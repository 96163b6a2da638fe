"""The cache of lowered variants: what makes a key, and that an entry is whole or not there."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpac.build import sources_of
from rpac.contract.arrays import ArrayDims, arg_specs
from rpac.contract.mesh import Mesh
from rpac.contract.program import Lowered, Source
from rpac.files import store
from rpac.files.store import default_cache_dir
from rpac.lower import Cache, Task, tasks_of
from rpac.spec import Spec, parse_spec

Tree = Callable[[Path], dict[str, bytes]]
TOOLS = {"jax": "1.0", "libtpu": "2.0", "libtpu_files": "abc", "rpac": "0"}


@pytest.fixture
def task(tiny: Spec) -> Task:
    plan = {"vmem_limit": 1, "decode": {"block": 2}}
    return Task("v6e", "decode", 8, Source("v6e/decode.py", "text"), plan, arg_specs(tiny, 8))


@pytest.fixture
def lowered(task: Task) -> Lowered:
    return Lowered(
        task.target, task.kind, task.tokens, task.source, task.plan,
        exported=b"portable", executable=b"native", device_kind="TPU v6 lite", topology="v6e:2x2",
        toolchain={**TOOLS, "libtpu_build": "cl/1"}, flags={"a": "b"}, aliases={"kv_cache": 1}, memory={"temp": 0},
    )  # fmt: skip


def test_what_was_put_comes_back(tmp_path: Path, task: Task, lowered: Lowered) -> None:
    assert Cache(tmp_path).get(task, TOOLS) is None
    Cache(tmp_path).put(task, TOOLS, lowered)
    assert Cache(tmp_path).get(task, TOOLS) == lowered


def test_a_variant_without_an_executable_stays_so(tmp_path: Path, task: Task, lowered: Lowered) -> None:
    portable = dataclasses.replace(lowered, executable=None)
    Cache(tmp_path).put(task, TOOLS, portable)
    assert Cache(tmp_path).get(task, TOOLS) == portable


CHANGES: dict[str, dict[str, Any]] = {
    "target": {"target": "v5e"},
    "kind": {"kind": "mixed"},
    "tokens": {"tokens": 32},
    "source text": {"source": Source("v6e/decode.py", "text ")},
    "source path": {"source": Source("v6e/decode_t8.py", "text")},
    "plan": {"plan": {"vmem_limit": 2, "decode": {"block": 2}}},
    "plan's tiles": {"plan": {"vmem_limit": 1, "decode": {"block": 4}}},
    "arguments": {"args": ()},
    "mesh": {"mesh": Mesh(data=2)},
    "layer": {"layer": "local"},
    "results": {"results": (ArrayDims("out", (1,), "float32"),)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_whatever_goes_into_a_variant_changes_its_key(task: Task, change: dict[str, Any]) -> None:
    assert set(change) <= {field.name for field in dataclasses.fields(Task)}
    assert dataclasses.replace(task, **change).key(TOOLS) != task.key(TOOLS)


def test_every_field_of_a_task_is_in_its_key() -> None:
    """So that a field added later is not forgotten above."""
    assert {field.name for field in dataclasses.fields(Task)} == {
        name for change in CHANGES.values() for name in change
    }


@pytest.mark.parametrize("name", TOOLS)
def test_every_part_of_the_toolchain_changes_the_key(task: Task, name: str) -> None:
    assert task.key({**TOOLS, name: "other"}) != task.key(TOOLS)
    assert task.key({key: value for key, value in TOOLS.items() if key != name}) != task.key(TOOLS)


def test_the_order_of_mappings_does_not_change_the_key(task: Task) -> None:
    turned = dataclasses.replace(task, plan=dict(reversed(task.plan.items())))
    assert turned.key(dict(reversed(TOOLS.items()))) == task.key(TOOLS)


def test_a_change_of_the_spec_is_a_change_of_every_key_and_a_comment_of_none(tiny: Spec) -> None:
    def keys(spec: Spec) -> set[str]:
        return {task.key(TOOLS) for task in tasks_of(spec, sources_of(spec, ["cpu"]))}

    changed = tiny.source.replace("max_num_seqs: 4", "max_num_seqs: 5")
    assert changed != tiny.source
    assert keys(parse_spec(changed, tiny.file)).isdisjoint(keys(tiny))
    assert keys(parse_spec(f"{tiny.source}\n# more\n", tiny.file)) == keys(tiny)


def test_no_flipped_byte_is_ever_served(tmp_path: Path, task: Task, lowered: Lowered) -> None:
    cache = Cache(tmp_path)
    cache.put(task, TOOLS, lowered)
    for file in files_of(tmp_path):
        for index in range(file.stat().st_size):
            data = bytearray(file.read_bytes())
            data[index] ^= 1 << index % 8
            file.write_bytes(data)
            found = cache.get(task, TOOLS)
            assert found in (None, lowered), f"byte {index} of {file.name}"
            if found is None:
                assert files_of(tmp_path) == []
                cache.put(task, TOOLS, lowered)
            else:
                data[index] ^= 1 << index % 8
                file.write_bytes(data)
    assert cache.get(task, TOOLS) == lowered


def folder_in_place_of(file: Path) -> None:
    file.unlink()
    file.mkdir()


def linked(file: Path) -> None:
    file.rename(file.with_name("other"))
    file.symlink_to("other")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda file: os.truncate(file, 0),
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b" x"),
    "missing": lambda file: file.unlink(),
    "a folder": folder_in_place_of,
    "other JSON": lambda file: file.write_text("[1, 2]"),
    "deep JSON": lambda file: file.write_text("[" * 100_000),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a link": lambda file: linked(file),
    "no text": lambda file: file.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
@pytest.mark.parametrize("index", range(4))
def test_a_damaged_entry_is_absent_and_makes_room(
    tmp_path: Path, task: Task, lowered: Lowered, index: int, damage: Callable[[Path], object]
) -> None:
    cache = Cache(tmp_path)
    cache.put(task, TOOLS, lowered)
    files = files_of(tmp_path)
    assert len(files) == 4
    damage(files[index])
    assert cache.get(task, TOOLS) is None
    cache.put(task, TOOLS, lowered)
    assert cache.get(task, TOOLS) == lowered


def test_an_entry_that_is_swapped_with_another_is_not_served(tmp_path: Path, task: Task, lowered: Lowered) -> None:
    """Both are whole, and of one shape; each names the key that it was stored under."""
    cache = Cache(tmp_path)
    other = dataclasses.replace(task, kind="mixed")
    cache.put(task, TOOLS, lowered)
    cache.put(other, TOOLS, dataclasses.replace(lowered, kind="mixed", exported=b"other"))
    here, there = (tmp_path / key[:2] / key for key in (task.key(TOOLS), other.key(TOOLS)))
    here.rename(tmp_path / "apart")
    there.rename(here)
    there.parent.mkdir(exist_ok=True)
    (tmp_path / "apart").rename(there)
    assert cache.get(task, TOOLS) is None
    assert cache.get(other, TOOLS) is None


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path, task: Task, lowered: Lowered, mode: int) -> None:
    root = tmp_path / "cache"
    Cache(root).put(task, TOOLS, lowered)
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(mode)
    assert "others can write to it" in str(store.Store(root).problem)
    assert Cache(root).get(task, TOOLS) is None
    root.chmod(0o755)
    assert Cache(root).get(task, TOOLS) == lowered


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert "belongs to another user" in str(store.Store(tmp_path).problem)


def test_a_folder_that_cannot_be_used_says_why_and_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert (
        store.Store(file).problem == f"{file}: found a file; must be a folder; set RPAC_CACHE to a folder of your own"
    )
    assert "cannot be read (Not a directory)" in str(store.Store(file / "below").problem)
    assert store.Store(tmp_path / "new").problem is None


def test_two_builds_may_store_the_same_entry(tmp_path: Path, task: Task, lowered: Lowered, tree: Tree) -> None:
    Cache(tmp_path).put(task, TOOLS, lowered)
    first = tree(tmp_path)
    Cache(tmp_path).put(task, TOOLS, lowered)
    assert tree(tmp_path) == first
    assert Cache(tmp_path).get(task, TOOLS) == lowered


def test_a_folder_that_cannot_be_made_keeps_nothing_and_raises_nothing(
    tmp_path: Path, task: Task, lowered: Lowered
) -> None:
    file = tmp_path / "file"
    file.touch()
    for root in (file, file / "below", None):
        Cache(root).put(task, TOOLS, lowered)
        assert Cache(root).get(task, TOOLS) is None
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_that_fills_up_leaves_no_part_of_an_entry(
    tmp_path: Path, task: Task, lowered: Lowered, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        Cache(tmp_path).put(task, TOOLS, lowered)
    assert tree(tmp_path) == {}
    assert Cache(tmp_path).get(task, TOOLS) is None


def test_an_entry_is_not_there_before_it_is_whole(
    tmp_path: Path, task: Task, lowered: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed at any of its writes leaves nothing that another one takes for an entry."""

    class Killed(BaseException):
        pass

    writes = 0
    real = store.Path.open

    def killed(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        nonlocal writes
        if "w" in mode:
            writes += 1
            if writes > allowed:
                raise Killed
        return real(path, mode, *args, **options)

    allowed = 0
    while True:
        writes = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", killed)
            try:
                Cache(tmp_path).put(task, TOOLS, lowered)
                break
            except Killed:
                pass
        assert Cache(tmp_path).get(task, TOOLS) is None
        allowed += 1
    assert allowed == 4
    assert Cache(tmp_path).get(task, TOOLS) == lowered


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("RPAC_CACHE", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "rpac"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/rpac")
    monkeypatch.setenv("RPAC_CACHE", "/given")
    assert default_cache_dir() == Path("/given")


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("RPAC_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert default_cache_dir() is None


def files_of(root: Path) -> list[Path]:
    """The files of all entries, the same order every time."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_a_cache_may_be_removed_at_any_time(tmp_path: Path, task: Task, lowered: Lowered) -> None:
    cache = Cache(tmp_path / "cache")
    cache.put(task, TOOLS, lowered)
    shutil.rmtree(tmp_path / "cache")
    assert cache.get(task, TOOLS) is None
    cache.put(task, TOOLS, lowered)
    assert cache.get(task, TOOLS) == lowered
