"""A published folder is whole or absent, whoever writes, dies or reads at the time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rpac.errors import OutputError
from rpac.files import publish as publishing
from rpac.files.publish import Stage, publish, publish_file

# Publishes one file of argv[2] at argv[1]; runs argv[3] in the middle of it.
WRITER = """
import os, signal, sys, time
from pathlib import Path
from rpac.files import publish as publishing
final, text, middle = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with publishing.publish(final, lambda path: True) as stage:
    stage.write("text", text.encode())
    exec(middle)
    stage.write("more", text.encode())
"""
WAIT = "print('waiting', flush=True); time.sleep(60)"
DIE_BETWEEN_RENAMES = """
publishing._exchange = lambda *_: False
rename = os.rename
def first_only(source, target):
    rename(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = first_only
"""


def ours(_: Path) -> bool:
    return True


def put(final: Path, text: str, wait_s: float = 0) -> None:
    with publish(final, ours, wait_s) as stage:
        stage.write("text", text.encode())
        stage.write("more", text.encode())


def texts(final: Path) -> set[str]:
    """What the two files hold: one text where the folder is whole."""
    return {(final / name).read_text() for name in ("text", "more")}


def read_at(folder: int, name: str) -> bytes:
    with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as file:
        return file.read()


def writer(final: Path, text: str, middle: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(final), text, middle]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def waiting_writer(final: Path, text: str) -> subprocess.Popen[str]:
    process = writer(final, text, WAIT)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture(params=["exchange", "two renames"])
def final(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where to publish, on a file system that can exchange two folders and on one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    return tmp_path / "deep" / "out"


def test_a_folder_appears_whole_and_alone(final: Path) -> None:
    put(final, "new")
    assert texts(final) == {"new"}
    assert list(final.parent.iterdir()) == [final]


def test_a_folder_is_replaced_whole_and_nothing_is_left_of_the_old_one(final: Path) -> None:
    with publish(final, ours) as stage:
        stage.write("gone/old", b"old")
    put(final, "new")
    assert sorted(path.name for path in final.iterdir()) == ["more", "text"]
    assert list(final.parent.iterdir()) == [final]


def test_an_exception_in_the_block_publishes_nothing(final: Path) -> None:
    put(final, "old")
    with pytest.raises(KeyboardInterrupt), publish(final, ours) as stage:
        stage.write("text", b"new")
        raise KeyboardInterrupt
    assert texts(final) == {"old"}
    assert list(final.parent.iterdir()) == [final]


def test_this_file_system_exchanges_folders_in_one_step(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (other / "inner").mkdir(parents=True)
    assert publishing._exchange(one, other)
    assert (one / "inner").is_dir()


def test_a_reader_finds_a_whole_folder_at_every_moment(tmp_path: Path) -> None:
    final = tmp_path / "out"
    put(final, "0")
    done = threading.Event()

    def replace() -> None:
        for count in range(30):
            put(final, str(count))
        done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    reads = 0
    while not done.is_set():
        folder = os.open(final, os.O_RDONLY)  # raises if the path is empty for a moment
        try:
            assert read_at(folder, "text") == read_at(folder, "more")
            reads += 1
        except FileNotFoundError:
            assert not os.path.samestat(os.fstat(folder), final.stat())  # replaced: a reader starts again
        finally:
            os.close(folder)
    thread.join()
    assert reads


def test_a_writer_killed_half_way_changes_nothing_and_the_next_one_cleans_up(final: Path) -> None:
    put(final, "old")
    kill(waiting_writer(final, "killed"))
    assert texts(final) == {"old"}
    assert (final.parent / ".out.stage").is_dir()
    put(final, "new")
    assert texts(final) == {"new"}
    assert list(final.parent.iterdir()) == [final]


def test_a_writer_killed_between_two_renames_loses_no_folder(final: Path) -> None:
    put(final, "old")
    process = writer(final, "killed", DIE_BETWEEN_RENAMES)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not final.exists()
    with pytest.raises(RuntimeError), publish(final, ours):
        raise RuntimeError("this build fails, and still puts the folder back")
    assert texts(final) == {"old"}
    assert list(final.parent.iterdir()) == [final]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "out"
    put(final, "old")
    monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    rename = os.rename

    def refuse_stage(source: Path, target: Path) -> None:
        if source.name == ".out.stage":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_stage)
    with pytest.raises(OutputError, match="No space left"):
        put(final, "new")
    assert texts(final) == {"old"}
    assert list(tmp_path.iterdir()) == [final]


def test_two_writers_of_one_folder_do_not_mix(final: Path) -> None:
    put(final, "old")
    process = waiting_writer(final, "other")
    with pytest.raises(OutputError, match=rf"another process \({process.pid}\) is writing this folder") as raised:
        put(final, "new")
    assert raised.value.exit_code == 5
    assert texts(final) == {"old"}
    kill(process)


def test_a_writer_may_wait_for_the_other(final: Path) -> None:
    process = waiting_writer(final, "other")
    threading.Timer(0.3, process.kill).start()
    put(final, "new", wait_s=30)
    assert texts(final) == {"new"}
    process.communicate()


def test_of_many_writers_at_once_each_publishes_whole_or_is_told(tmp_path: Path) -> None:
    final = tmp_path / "out"
    processes = [writer(final, str(index), "time.sleep(0.1)") for index in range(6)]
    reports = [process.communicate()[1] for process in processes]
    won = {str(index) for index, process in enumerate(processes) if process.returncode == 0}
    assert won
    assert texts(final) <= won
    assert len(texts(final)) == 1
    assert all("is writing this folder" in report for report in reports if report)
    assert sum(1 for report in reports if report) == len(processes) - len(won)


def test_a_full_disk_publishes_nothing(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(final, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"out/text: cannot be written \(No space left.*free some space") as raised:
        put(final, "new")
    assert raised.value.exit_code == 5
    assert texts(final) == {"old"}
    assert list(final.parent.iterdir()) == [final]


def test_a_really_full_disk_publishes_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        final = disk / "out"
        put(final, "old")
        with pytest.raises(OutputError, match="No space left"), publish(final, ours) as stage:
            for index in range(40):
                stage.write(str(index), bytes(4096))
        assert texts(final) == {"old"}
        assert list(disk.iterdir()) == [final]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_somebody_else_made_is_never_replaced(tmp_path: Path, what: str) -> None:
    final = tmp_path / "out"
    if what == "file":
        final.write_text("mine")
    else:
        final.mkdir()
        (final / "mine").touch()
    refused = pytest.raises(OutputError, match=f"found a {what} that this command did not make")
    with refused, publish(final, lambda path: False):
        pass
    assert final.is_file() or (final / "mine").exists()
    assert list(tmp_path.iterdir()) == [final]


def test_an_empty_folder_is_filled(final: Path) -> None:
    final.mkdir(parents=True)
    put(final, "new")
    assert texts(final) == {"new"}


def test_a_link_stays_and_the_folder_behind_it_is_replaced(tmp_path: Path) -> None:
    put(tmp_path / "real", "old")
    link = tmp_path / "out"
    link.symlink_to("real")
    put(link, "new")
    assert link.is_symlink()
    assert texts(tmp_path / "real") == {"new"}


def test_a_path_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written .*; nothing was published; check the path"):
        put(tmp_path / "file" / "out", "new")


def test_a_file_is_written_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, tmp_path)
    stage.write("name", b"one")
    with pytest.raises(OutputError, match="File exists"):
        stage.write("name", b"two")


def test_publishing_waits_no_longer_than_it_is_told(final: Path) -> None:
    process = waiting_writer(final, "other")
    start = time.monotonic()
    with pytest.raises(OutputError):
        put(final, "new", wait_s=0.2)
    assert 0.2 <= time.monotonic() - start < 5
    kill(process)


def file_of(final: Path, text: str) -> None:
    publish_file(final, text.encode(), ours)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    final = tmp_path / "a" / "file"
    for text in ("old", "new"):
        file_of(final, text)
        assert final.read_text() == text
        assert [path.name for path in final.parent.iterdir()] == ["file"]


# Publishes argv[2] in the file argv[1], and dies before it is renamed.
DYING = """
import os, signal, sys
from pathlib import Path
from rpac.files.publish import publish_file
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
publish_file(sys.argv[1], sys.argv[2].encode(), lambda path: True)
"""


def test_a_writer_of_a_file_that_dies_leaves_the_old_one_and_is_in_nobodys_way(tmp_path: Path) -> None:
    final = tmp_path / "file"
    file_of(final, "old")
    done = subprocess.run([sys.executable, "-c", DYING, str(final), "new"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert final.read_text() == "old"
    file_of(final, "newer")
    assert final.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [final]


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "file"
    file_of(final, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"file: cannot be written \(No space left on device\); .* free some space"):
        file_of(final, "new")
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("found", ["a folder", "a file that this command did not make"])
def test_a_file_does_not_replace_what_is_not_ours(tmp_path: Path, found: str) -> None:
    final = tmp_path / "file"
    final.mkdir() if found == "a folder" else final.write_text("notes")
    with pytest.raises(OutputError, match=f"found {found}; must be absent or an earlier output"):
        publish_file(final, b"new", lambda path: False)
    assert final.is_dir() or final.read_text() == "notes"
