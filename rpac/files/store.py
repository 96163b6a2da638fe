"""A content-addressed folder of small sets of files.

Invariant: an entry is whole or absent, it names the key that it was stored under, and its bytes are hashed again when
read; what fails that is dropped and made anew. Nothing is ever updated in place, so any number of processes may share one
folder. Programs are read from it and run, so a folder that another user owns or can write is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGESTS = "sha256.json"
MAX_DIGESTS_BYTES = 1 << 16
MAX_FILE_BYTES = 1 << 30
_FIX = "set RPAC_CACHE to a folder of your own"


def default_cache_dir() -> Path | None:
    """`$RPAC_CACHE`, or `rpac` in the user's cache folder; None for a user who has no home."""
    given = os.environ.get("RPAC_CACHE")
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpac"
    except RuntimeError:
        return None


class Store:
    """Entries `KEY[:2]/KEY/` under a folder; None for a store that keeps nothing.

    `problem` says why a folder cannot be used, and what to do about it; then nothing is read from it or kept in it. It is
    None where there is no problem, or no folder.
    """

    def __init__(self, root: Path | None) -> None:
        self.problem = None if root is None else _problem(root)
        self._root = None if self.problem else root

    @property
    def root(self) -> Path | None:
        """The folder; None where nothing is kept."""
        return self._root

    def read(self, key: str) -> dict[str, bytes] | None:
        """The files of an entry, or None. Never raises for a bad entry: it is removed."""
        if self._root is None:
            return None
        folder = self._folder(self._root, key)
        try:
            stored: Any = json.loads(_contents(folder / DIGESTS, MAX_DIGESTS_BYTES))
            if stored["key"] != key:
                raise ValueError(f"{folder}: the entry of another key")
            return {name: _hashed(folder / name, digest) for name, digest in stored["files"].items()}
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            self.drop(key)  # also where only a part is missing: what is left would keep a new entry from its place
            return None

    def write(self, key: str, files: Mapping[str, bytes]) -> None:
        """Stores an entry. A store that cannot be written is no reason to fail: then nothing is kept."""
        if self._root is None:
            return
        folder = self._folder(self._root, key)
        stage = None
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.parent.mkdir(exist_ok=True, mode=0o700)
            stage = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".stage-"))
            for name, data in files.items():
                (stage / name).write_bytes(data)
            digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
            (stage / DIGESTS).write_text(json.dumps({"key": key, "files": digests}, sort_keys=True))
            stage.rename(folder)
        except OSError:
            if stage is not None:
                shutil.rmtree(stage, ignore_errors=True)

    def drop(self, key: str) -> None:
        """Removes an entry, if there is one."""
        if self._root is not None:
            shutil.rmtree(self._folder(self._root, key), ignore_errors=True)

    @staticmethod
    def _folder(root: Path, key: str) -> Path:
        return root / key[:2] / key


def _problem(root: Path) -> str | None:
    """Why a folder cannot hold a cache that is safe to read from."""
    try:
        found = root.stat()
    except FileNotFoundError:
        return _missing_problem(root)
    except OSError as error:
        return f"{root}: cannot be read ({error.strerror}); {_FIX}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{root}: found a file; must be a folder; {_FIX}"
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        return f"{root}: belongs to another user; must be yours, because programs are read from it and run; {_FIX}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{root}: others can write to it; programs are read from it and run; `chmod go-w` it, or {_FIX}"
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        return f"{root}: cannot be written; {_FIX}"
    return None


def _missing_problem(root: Path) -> str | None:
    """Why a folder that does not exist cannot be made."""
    above = next(path for path in root.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        return f"{root}: cannot be made, because {above} is not a folder; {_FIX}"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"{root}: cannot be made, because {above} cannot be written; {_FIX}"
    return None


def _contents(path: Path, limit: int) -> bytes:
    """The bytes of a plain file. Raises OSError or ValueError for anything else, without waiting for it."""
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(opened, "rb") as file:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            raise ValueError(f"{path}: not a file of at most {limit} bytes")
        return file.read(limit)


def _hashed(path: Path, sha256: str) -> bytes:
    data = _contents(path, MAX_FILE_BYTES)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path}: not the bytes that were stored")
    return data
