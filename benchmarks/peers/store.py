"""What a comparison keeps between runs: schedules and results, each under a hash of all that it follows from."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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

    `choice` names what was compiled: tiles, or a program.
    """

    choice: str
    seconds: float = 0.0
    kernel_seconds: float = 0.0
    mbu: float = 0.0
    mfu: float = 0.0
    error: str = ""


def digest(*parts: object) -> str:
    """A key that changes with any of its parts, which must be plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def walker_digest() -> str:
    """Changes with the walker, so that a better one makes all results anew."""
    sources = sorted(Path(rpac.schedule.__file__).parent.glob("*.py"))
    return digest(*(path.read_text() for path in sources))


class Store:
    """A folder of results and of gzipped dumps. Entries are written whole and never changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def result(self, key: str) -> Result | None:
        path = self._folder / "results" / f"{key}.json"
        return Result(**json.loads(path.read_text())) if path.exists() else None

    def keep_result(self, key: str, result: Result) -> None:
        self._write(f"results/{key}.json", json.dumps(asdict(result)).encode())

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
            self._write(f"dumps/{key}.json.gz", gzip.compress(json.dumps(found).encode(), 5, mtime=0))
        kept = json.loads(gzip.decompress(path.read_bytes()))
        if "error" in kept:
            raise ScheduleError(kept["error"])
        return Dump(**kept)

    def _write(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = path.with_suffix(".part")
        stage.write_bytes(data)
        stage.rename(path)
