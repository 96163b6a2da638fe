"""Content-addressed cache of lowered variants.

Invariant: an entry is whole or absent, and its bytes are hashed again when read; what fails that is dropped and made
anew. Nothing is ever updated in place, so any number of builds may share one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpac.lower.lowered import Lowered, Task

META = "meta.json"
BLOBS = ("exported", "executable")


def default_cache_dir() -> Path:
    """`$RPAC_CACHE`, or `rpac` in the user's cache folder."""
    given = os.environ.get("RPAC_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpac"


class Cache:
    """A folder of entries, `KEY[:2]/KEY/`; `None` for no cache at all."""

    def __init__(self, root: Path | None) -> None:
        self._root = root

    def get(self, task: Task, toolchain: Mapping[str, str]) -> Lowered | None:
        """The stored result of a task, or None. Never raises for a bad entry: it is removed."""
        if self._root is None:
            return None
        folder = self._folder(task.key(toolchain))
        try:
            meta = json.loads((folder / META).read_text())
            blobs = {name: self._blob(folder / name, meta["sha256"][name]) for name in BLOBS}
            return _lowered(task, meta["facts"], blobs)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def put(self, task: Task, toolchain: Mapping[str, str], lowered: Lowered) -> None:
        """Stores a result. A cache that cannot be written is no reason to fail a build: then nothing is stored."""
        if self._root is None:
            return
        folder = self._folder(task.key(toolchain))
        stage = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stage = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".stage-"))
            digests: dict[str, str | None] = dict.fromkeys(BLOBS)
            for name in BLOBS:
                data = getattr(lowered, name)
                if data is not None:
                    (stage / name).write_bytes(data)
                    digests[name] = hashlib.sha256(data).hexdigest()
            (stage / META).write_text(json.dumps({"sha256": digests, "facts": facts_of(lowered)}, sort_keys=True))
            stage.rename(folder)
        except OSError:
            if stage is not None:
                shutil.rmtree(stage, ignore_errors=True)

    def _folder(self, key: str) -> Path:
        assert self._root is not None
        return self._root / key[:2] / key

    @staticmethod
    def _blob(path: Path, sha256: str | None) -> bytes | None:
        if sha256 is None:
            return None
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"{path}: not the bytes that were stored")
        return data


def facts_of(lowered: Lowered) -> dict[str, Any]:
    """What is stored beside the blobs; the rest of a `Lowered` is in its task."""
    names = ("device_kind", "topology", "toolchain", "flags", "aliases", "memory")
    return {name: getattr(lowered, name) for name in names}


def _lowered(task: Task, facts: Mapping[str, Any], blobs: Mapping[str, bytes | None]) -> Lowered:
    exported = blobs["exported"]
    if exported is None:
        raise ValueError("an entry without an export")
    return Lowered(task.target, task.kind, task.tokens, task.source, task.plan, exported, blobs["executable"], **facts)
