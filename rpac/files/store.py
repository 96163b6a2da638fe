"""A content-addressed folder of small sets of files.

Invariant: an entry is whole or absent, and its bytes are hashed again when read; what fails that is dropped and made
anew. Nothing is ever updated in place, so any number of processes may share one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

DIGESTS = "sha256.json"


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
    """Entries `KEY[:2]/KEY/` under a folder; None for a store that keeps nothing."""

    def __init__(self, root: Path | None) -> None:
        self._root = root

    def read(self, key: str) -> dict[str, bytes] | None:
        """The files of an entry, or None. Never raises for a bad entry: it is removed."""
        if self._root is None:
            return None
        folder = self._folder(self._root, key)
        try:
            digests = json.loads((folder / DIGESTS).read_text())
            return {name: _hashed(folder / name, digest) for name, digest in digests.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            self.drop(key)  # also where only a part is missing: what is left would keep a new entry from its place
            return None

    def write(self, key: str, files: Mapping[str, bytes]) -> None:
        """Stores an entry. A store that cannot be written is no reason to fail: then nothing is kept."""
        if self._root is None:
            return
        folder = self._folder(self._root, key)
        stage = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stage = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".stage-"))
            for name, data in files.items():
                (stage / name).write_bytes(data)
            digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
            (stage / DIGESTS).write_text(json.dumps(digests, sort_keys=True))
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


def _hashed(path: Path, sha256: str) -> bytes:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path}: not the bytes that were stored")
    return data
