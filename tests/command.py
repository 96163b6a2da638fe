"""Runs the command line as a user does: in a process of its own, with a cache that the test names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TINY = ROOT / "specs" / "tiny.yaml"
RPAC = [sys.executable, "-m", "rpac.cli"]


def rpac(
    *args: object, cache: Path, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """The finished command, with its output."""
    return subprocess.run(
        [*RPAC, *map(str, args)], capture_output=True, text=True, timeout=300, env=environment(cache, env), **options
    )


def start(*args: object, cache: Path, env: dict[str, str] | None = None, interrupts: str = "") -> subprocess.Popen[str]:
    """The running command, in a process group of its own.

    interrupts: `SIG_DFL` or `SIG_IGN`, what it finds SIGINT set to; else as here, which is SIG_IGN where a shell started
    the tests with `&`.
    """
    command = [*RPAC, *map(str, args)]
    if interrupts:
        code = f"import os, signal, sys; signal.signal(signal.SIGINT, signal.{interrupts}); os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", code, *command]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cache, env),
        start_new_session=True,
    )


def environment(cache: Path, more: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "RPAC_CACHE": str(cache), "RPAC_TUNED": "none", **(more or {})}
