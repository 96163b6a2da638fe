"""The peers' own environment: the jax that RPA v3 was measured with, and the package without its dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

COMPILER = ("jax==0.11.0", "jaxlib==0.11.0", "libtpu==0.0.44")
PEERS = ("tpu-inference==0.32.0",)


def ensure(folder: Path) -> str:
    """The interpreter of the environment in `folder`, made where it is not there. Needs Python 3.12 or later."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([_interpreter(), "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *COMPILER], check=True)
        subprocess.run([*pip, "--no-deps", *PEERS], check=True)
        (folder / "ready").touch()
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
