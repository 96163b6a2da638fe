"""The peers' own environments: a jax, and their packages without dependencies.

`COMPILER` is the jax that RPA v3 was measured with, `PINNED` the one that tpu-inference asks for, and tokamax for its
benchmarks: their kernels of the design of batched_rpa use internals of jax and compile with no other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

COMPILER = ("jax==0.11.0", "jaxlib==0.11.0", "libtpu==0.0.44")
PINNED = ("jax==0.11.2", "jaxlib==0.11.2", "libtpu==0.0.48")
PEERS = ("tpu-inference==0.32.0", "flywheel-tpu==0.3.0")
EARLY = ("tpu-inference==0.11.1",)
"""RPA v3 as it was when SGLang-JAX took it over."""
TOKAMAX = ("tokamax==0.0.17",)

Environment = Literal["measured", "pinned", "tokamax"]
ENVIRONMENTS: dict[Environment, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "measured": (COMPILER, PEERS),
    "pinned": (PINNED, PEERS),
    "tokamax": (PINNED, TOKAMAX),
}
"""The compiler and the packages of each."""


def ensure(folder: Path, compiler: Sequence[str] = COMPILER, peers: Sequence[str] = PEERS) -> str:
    """The interpreter of the environment in `folder`, made where it is not there. Needs Python 3.12 or later.

    `compiler` comes with its dependencies, `peers` without: theirs are a server's.
    """
    python = folder / "bin" / "python"
    ready = folder / "ready"  # written last, so that half an environment is made again
    wanted = json.dumps([*compiler, *peers])
    if not ready.exists() or ready.read_text() != wanted:
        subprocess.run([_interpreter(), "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *compiler], check=True)
        subprocess.run([*pip, "--no-deps", *peers], check=True)
        ready.write_text(wanted)
    return str(python)


def _interpreter() -> str:
    named = [os.environ["NEWEST_PYTHON"]] if "NEWEST_PYTHON" in os.environ else []
    for name in (*named, "python3.14", "python3.13", "python3.12"):
        found = shutil.which(name)
        if found and subprocess.run([found, "-c", ""], check=False, capture_output=True).returncode == 0:
            return found
    versions = sorted(Path.home().glob(".pyenv/versions/3.1[2-9].*/bin/python"))
    if versions:
        return str(versions[-1])
    raise SystemExit("the peers need Python 3.12 or later: install one, or name it in NEWEST_PYTHON")
