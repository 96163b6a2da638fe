"""Publishes output whole: the one place that puts a folder, or a file that stands alone, where others read it.

Invariant: whoever opens `FINAL` finds all of the old output or all of the new one, whatever happens to the writer.

- Beside FINAL lie, while someone writes, `.NAME.lock` (flock: one writer at a time, and the kernel lets go of it when
  its owner dies), `.NAME.stage` (the new folder) and, where the file system cannot exchange two folders in one step,
  for a moment `.NAME.old` (the old one).
- Everything in the stage is flushed to disk before it is renamed.
- Whoever holds the lock may remove a stage that it finds: its owner is dead.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rpac.errors import OutputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_POLL_S = 0.05
_MOST_LISTED = 3
_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
}


class Stage:
    """The folder being written; nobody else sees it until it is published."""

    def __init__(self, path: Path, final: Path) -> None:
        self.path = path
        self._final = final

    def write(self, name: str, data: bytes) -> None:
        """Writes one file durably; `name` is relative, with forward slashes. Raises OutputError."""
        target = self.path / name
        with _reported(self._final / name):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())


@contextmanager
def publish(final: str | os.PathLike[str], owned: Callable[[Path], bool], wait_s: float = 0.0) -> Iterator[Stage]:
    """A stage that becomes the folder `final` when the block ends without an exception, and vanishes otherwise.

    A folder at `final` is replaced if it is empty or `owned` says that it is ours to replace. `wait_s` is how long to
    wait, in seconds, for another writer of the same folder. Raises OutputError, and then `final` is as it was.
    """
    final = Path(os.path.realpath(final))
    with _reported(final):
        final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(final, wait_s):
        stage = Stage(_beside(final, "stage"), final)
        with _reported(final):
            _recover(final, stage.path)
            refuse_foreign(final, owned)
            stage.path.mkdir()
        try:
            yield stage
            with _reported(final):
                refuse_foreign(final, owned)
                _sync_folders(stage.path)
                _swap_in(stage.path, final)
        finally:
            with _reported(final):
                _recover(final, stage.path)


def publish_file(
    final: str | os.PathLike[str], data: bytes, owned: Callable[[Path], bool], wait_s: float = 0.0
) -> None:
    """Makes `data` the content of the file `final`. A file there is replaced if `owned` says that it is ours to replace.

    `wait_s` is how long to wait, in seconds, for another writer. Raises OutputError, and then `final` is as it was.
    """
    final = Path(os.path.realpath(final))
    with _reported(final):
        final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(final, wait_s):
        stage = _beside(final, "stage")
        refuse_foreign_file(final, owned)
        try:
            with _reported(final):
                with stage.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                stage.replace(final)
                _sync(final.parent)
        finally:
            stage.unlink(missing_ok=True)


def _beside(final: Path, role: str) -> Path:
    return final.with_name(f".{final.name}.{role}")


@contextmanager
def _reported(place: Path) -> Iterator[None]:
    """Turns what the operating system says about `place` into an OutputError."""
    try:
        yield
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "check the path and its permissions, or choose another folder")
        raise OutputError(f"{place}: cannot be written ({error.strerror}); nothing was published; {fix}") from error


@contextmanager
def _locked(final: Path, wait_s: float) -> Iterator[None]:
    """Holds the lock of `final`. The file is removed before the lock is let go, so that it is nobody else's."""
    path = _beside(final, "lock")
    with _reported(final):
        lock = _lock(path, final, time.monotonic() + wait_s)
    try:
        with _reported(final):
            os.truncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _lock(path: Path, final: Path, deadline: float) -> int:
    """A descriptor that holds the lock. Raises OutputError where another process has it at the deadline."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        except BaseException:
            os.close(lock)
            raise
        else:
            if _is_at(lock, path):
                return lock
            os.close(lock)
            continue
        if time.monotonic() >= deadline:
            raise OutputError(
                f"{final}: another process{_owner(path)} is writing this folder; nothing was published; "
                "wait until it is done, or choose another folder"
            )
        time.sleep(_POLL_S)


def _is_at(lock: int, path: Path) -> bool:
    """Whether a lock file is still the one at its path: its last owner may have removed it since it was opened."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        pid = path.read_text()
    except OSError:
        return ""
    return f" ({pid})" if pid.isdigit() else ""


def _recover(final: Path, stage: Path) -> None:
    """Puts back what was moved aside and removes the rest, whether this process left it or one that was killed."""
    old = _beside(final, "old")
    if old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(stage, ignore_errors=True)


def refuse_foreign(final: Path, owned: Callable[[Path], bool]) -> None:
    """Raises OutputError where `publish` would not replace what is at `final`: for commands that work long before it."""
    if not final.exists() or (final.is_dir() and (not any(final.iterdir()) or owned(final))):
        return
    if final.is_dir():
        found = f"a folder that this command did not make, with {listing([path.name for path in final.iterdir()])}"
    else:
        found = "a file that this command did not make"
    raise OutputError(
        f"{final}: found {found}; must be absent, empty or an earlier output; nothing was published; remove it or choose "
        "another folder"
    )


def refuse_foreign_file(final: Path, owned: Callable[[Path], bool]) -> None:
    """Raises OutputError where `publish_file` would not replace what is at `final`: for commands that work long before it."""
    if not final.exists() or (final.is_file() and owned(final)):
        return
    found = "a folder" if final.is_dir() else "a file that this command did not make"
    raise OutputError(
        f"{final}: found {found}; must be absent or an earlier output; nothing was published; remove it or choose another "
        "name"
    )


def listing(names: Iterable[str]) -> str:
    """The first few names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _MOST_LISTED
    return ", ".join(ordered[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _sync(Path(folder))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(stage: Path, final: Path) -> None:
    """Puts the stage at `final`; what was there ends up at the stage's path or at `.old`."""
    if not final.exists():
        stage.rename(final)
    elif not _exchange(stage, final):
        # Between these two renames `final` is absent: a reader then sees no folder, never half of one, and a writer
        # killed here leaves `.old`, which the next one puts back.
        old = _beside(final, "old")
        final.rename(old)
        stage.rename(final)
    _sync(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step (Linux's renameat2); False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))
