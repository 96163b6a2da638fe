"""Results that a benchmark keeps between runs in a file of the repository, each under a hash of all that it follows from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import rpac.schedule

R = TypeVar("R")
"""The dataclass of a result, with a field `earlier: bool = False` that says it is of an earlier kernel, compiler or walker."""


def digest(*parts: object) -> str:
    """A key that changes with any of its parts, which must be plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def walker_digest() -> str:
    """Changes with the walker, so that a better one makes all results anew."""
    sources = sorted(Path(rpac.schedule.__file__).parent.glob("*.py"))
    return digest(*(path.read_text() for path in sources))


def write(path: Path, data: bytes) -> None:
    """Writes a file whole, or leaves the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_suffix(".part")
    stage.write_bytes(data)
    stage.rename(path)


class Results(Generic[R]):
    """A file of results by name. With another key than it is asked for, a result is an earlier one."""

    def __init__(self, path: Path, make: Callable[..., R]) -> None:
        self._path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        self._results = {name: (fields.pop("key"), make(**fields)) for name, fields in kept.items()}
        self._asked: set[str] = set()

    def get(self, name: str, key: str) -> R | None:
        """What is kept under a name, if anything; `earlier` where it has another key."""
        self._asked.add(name)
        if name not in self._results:
            return None
        kept, result = self._results[name]
        changed: Any = result
        return replace(changed, earlier=kept != key)

    def keep(self, name: str, key: str, result: R) -> None:
        self._results[name] = (key, result)
        self._write()

    def drop_unasked(self) -> None:
        """Drops the results that nobody has asked for: of what is not compared any more."""
        self._results = {name: kept for name, kept in self._results.items() if name in self._asked}
        self._write()

    def _write(self) -> None:
        lines = []
        for name, (key, result) in sorted(self._results.items()):
            plain: Any = result
            fields = {"key": key, **asdict(plain)}
            del fields["earlier"]
            lines.append(f"{json.dumps(name)}: {json.dumps(fields)}")
        write(self._path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
