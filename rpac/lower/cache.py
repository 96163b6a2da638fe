"""The lowered variants that were made before, by everything that went into them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpac.contract.program import Lowered
from rpac.files.store import Store
from rpac.lower.task import Task

FACTS = "facts.json"
TIERS = ("exported", "executable")
_OBJECTS = ("toolchain", "flags", "aliases", "memory")


class Cache:
    """A store of `Lowered` by task and toolchain, given as a store or as its folder; None for no cache at all."""

    def __init__(self, root: Path | Store | None) -> None:
        self.store = root if isinstance(root, Store) else Store(root)

    def get(self, task: Task, toolchain: Mapping[str, str]) -> Lowered | None:
        """The stored result of a task, or None. Never raises for a bad entry: it is removed."""
        key = task.key(toolchain)
        files = self.store.read(key)
        if files is None:
            return None
        try:
            return _lowered(task, files)
        except (ValueError, KeyError, TypeError, RecursionError):
            self.store.drop(key)
            return None

    def put(self, task: Task, toolchain: Mapping[str, str], lowered: Lowered) -> None:
        """Stores a result, where that can be done."""
        blobs = {name: getattr(lowered, name) for name in TIERS}
        files = {name: data for name, data in blobs.items() if data is not None}
        files[FACTS] = json.dumps(facts_of(lowered), sort_keys=True).encode()
        self.store.write(task.key(toolchain), files)


def facts_of(lowered: Lowered) -> dict[str, Any]:
    """What is stored beside the blobs; the rest of a `Lowered` is in its task."""
    return {name: getattr(lowered, name) for name in ("device_kind", "topology", *_OBJECTS)}


def _lowered(task: Task, files: Mapping[str, bytes]) -> Lowered:
    facts = json.loads(files[FACTS])
    if not all(isinstance(facts[name], dict) for name in _OBJECTS) or not isinstance(facts["device_kind"], str):
        raise ValueError("facts of another form")
    return Lowered(
        task.target,
        task.kind,
        task.tokens,
        task.source,
        task.plan,
        files["exported"],
        files.get("executable"),
        layer=task.layer,
        **facts,
    )
