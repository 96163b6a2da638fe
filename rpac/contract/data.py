"""Where the files are that come with rpac and are no Python."""

from __future__ import annotations

from pathlib import Path


def data_dir(name: str) -> Path:
    """The folder `name`: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
