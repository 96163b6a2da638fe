"""Dumps of schedules that the calibration keeps, each in a file by what was asked for."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from kept import write

from rpac.schedule.dump import Dump


def kept(folder: Path, name: str, request: str, make: Callable[[], Dump]) -> Dump:
    """The dump of a request: what `folder` has under `name` and a hash of it, or what `make` gives, which is then kept."""
    path = folder / f"{name}-{hashlib.sha256(request.encode()).hexdigest()[:16]}.json.gz"
    if path.exists():
        return Dump(**json.loads(gzip.decompress(path.read_bytes())))
    found = make()
    write(path, gzip.compress(json.dumps(asdict(found)).encode(), 5, mtime=0))
    return found
