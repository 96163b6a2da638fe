"""What JAX compiles meanwhile, and fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


@contextmanager
def compiles() -> Iterator[list[str]]:
    """What JAX traces, lowers or compiles meanwhile."""
    seen: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def python(code: str, *args: str, **env: str) -> Any:
    """The JSON that a fresh process prints last."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
