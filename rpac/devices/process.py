"""The process that JAX's runtime belongs to: a fork of it has the runtime's memory, but none of its threads."""

from __future__ import annotations

import os

from rpac.errors import TargetError

_owner: int | None = None


def own_runtime() -> None:
    """Says that this process uses JAX's runtime from here on. Raises as `require_runtime` does."""
    global _owner
    require_runtime()
    _owner = os.getpid()


def require_runtime() -> None:
    """Raises TargetError in a process that was forked from one that used the runtime: a call would wait there for ever."""
    if _owner is not None and _owner != os.getpid():
        raise TargetError(
            f"process {os.getpid()} was forked from process {_owner}, which had loaded an engine; must load its own in a fresh "
            "process, because JAX's threads do not survive a fork; start it with the multiprocessing context 'spawn', or "
            "fork before the first rpac.load"
        )
