"""What the server raises on purpose, beside the errors of rpac."""

from __future__ import annotations

from pathlib import Path

from rpac.errors import Problem


class CheckpointError(Exception):
    """A folder that cannot be served: the file, the place in it, the value found, what is allowed, and the next step."""

    def __init__(self, file: Path | str, where: str, found: str, allowed: str, fix: str) -> None:
        super().__init__(str(Problem(str(file), None, None, where, found, allowed, fix)))
