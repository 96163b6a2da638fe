"""What a comparison keeps between runs: schedules and results, each under a hash of all that it follows from."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rpac.schedule
from rpac.errors import ScheduleError
from rpac.schedule import Dump, dump_command

HERE = Path(__file__).parent
COMPILE_SECONDS = 1800.0
TOOK_TOO_LONG = "raise the timeout"


@dataclass(frozen=True)
class Result:
    """What became of one batch on one compiled call: its times in seconds, or `error`, why there are none.

    `choice` names what was compiled: tiles, or a program. earlier: of an earlier kernel, compiler or walker.
    """

    choice: str
    seconds: float = 0.0
    kernel_seconds: float = 0.0
    mbu: float = 0.0
    mfu: float = 0.0
    error: str = ""
    earlier: bool = False


def digest(*parts: object) -> str:
    """A key that changes with any of its parts, which must be plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def walker_digest() -> str:
    """Changes with the walker, so that a better one makes all results anew."""
    sources = sorted(Path(rpac.schedule.__file__).parent.glob("*.py"))
    return digest(*(path.read_text() for path in sources))


class Store:
    """A file of results and a folder of gzipped dumps.

    A result is kept under its name (who ran what where) with a key of all that it follows from. With another key it is an
    earlier one. Dumps are never changed.
    """

    def __init__(self, results: Path, folder: Path) -> None:
        self._file = results
        self._folder = folder
        kept = json.loads(results.read_text()) if results.exists() else {}
        self._results = {name: (fields.pop("key"), Result(**fields)) for name, fields in kept.items()}
        self._asked: set[str] = set()

    def result(self, name: str, key: str) -> Result | None:
        """What is kept under a name, if anything; `earlier` where it has another key."""
        self._asked.add(name)
        if name not in self._results:
            return None
        kept, result = self._results[name]
        return replace(result, earlier=kept != key)

    def keep_result(self, name: str, key: str, result: Result) -> None:
        self._results[name] = (key, result)
        self._write_results()

    def drop_unasked(self) -> None:
        """Drops the results that nobody has asked for: of peers, batches or tiles that are not compared any more."""
        self._results = {name: kept for name, kept in self._results.items() if name in self._asked}
        self._write_results()

    def _write_results(self) -> None:
        lines = []
        for name, (key, result) in sorted(self._results.items()):
            fields = {"key": key, **asdict(result)}
            del fields["earlier"]
            lines.append(f"{json.dumps(name)}: {json.dumps(fields)}")
        self._write(self._file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def dump(self, key: str, command: Sequence[str], target: str) -> Dump:
        """The dump of a compile, which runs where it is not kept. Raises ScheduleError, also for a kept refusal.

        A compile that takes too long is no refusal: it says something of this machine only.
        """
        path = self._folder / "dumps" / f"{key}.json.gz"
        if not path.exists():
            found: dict[str, Any]
            try:
                found = asdict(dump_command(command, target, timeout=COMPILE_SECONDS))
            except ScheduleError as error:
                if TOOK_TOO_LONG in str(error):
                    raise
                found = {"error": str(error)}
            self._write(path, gzip.compress(json.dumps(found).encode(), 5, mtime=0))
        kept = json.loads(gzip.decompress(path.read_bytes()))
        if "error" in kept:
            raise ScheduleError(kept["error"])
        return Dump(**kept)

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = path.with_suffix(".part")
        stage.write_bytes(data)
        stage.rename(path)
