"""What the comparison keeps between runs: results in the repository, and schedules in a folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kept import Results, write

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


class Store:
    """A file of results by name (who ran what where), and a folder of gzipped dumps, which are never changed."""

    def __init__(self, results: Path, folder: Path) -> None:
        self.results = Results(results, Result)
        self._folder = folder

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
            write(path, gzip.compress(json.dumps(found).encode(), 5, mtime=0))
        kept = json.loads(gzip.decompress(path.read_bytes()))
        if "error" in kept:
            raise ScheduleError(kept["error"])
        return Dump(**kept)
