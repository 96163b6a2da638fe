"""Bundles that were installed as Python packages: their names, and where their files lie. `rpac.bundle.wheel` makes them.

The bundle NAME is the distribution `rpac-bundle-NAME`, and its files lie in `rpac_bundle_NAME/bundle.rpac` beside other
packages. Nothing of it is imported.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rpac.errors import BundleError

SCHEME: Final = "package:"
FOLDER: Final = "bundle.rpac"
COMPILED: Final = "__pycache__"
"""What an installer adds to a folder of Python files, such as the sources of a bundle's kernels. Nothing here reads it."""

_PREFIX: Final = "rpac-bundle-"
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.ASCII | re.IGNORECASE)


def normalized(name: str) -> str:
    """The one spelling of a distribution's name: lower case, with single hyphens (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_name(name: str) -> bool:
    """Whether `name` can be a part of a distribution's name, in any spelling."""
    return _NAME.fullmatch(name) is not None


def distribution_of(name: str) -> str:
    """The distribution of the bundle `name`."""
    return _PREFIX + normalized(name)


def package_of(name: str) -> str:
    """The package that holds the bundle `name`, as it is spelled in file names."""
    return distribution_of(name).replace("-", "_")


def installed_bundle(name: str) -> Path:
    """The folder of the bundle that is installed as `name`.

    Raises BundleError where none is, or several are, or where its files are no files: in an archive that Python imports from.
    """
    place = f"{SCHEME}{name}"
    if not is_name(name):
        raise BundleError(f"{place}: found {name!r}; must be a bundle's name, such as package:llama3-8b")
    distributions = _places(list(importlib.metadata.distributions(name=distribution_of(name))))
    if not distributions:
        others = sorted({_name_of(one).removeprefix(_PREFIX) for one in importlib.metadata.distributions()} - {""})
        has = f"those installed are {', '.join(others)}" if others else "no bundle is installed"
        raise BundleError(
            f"{place}: found no installed package {distribution_of(name)}; {has}; install the wheel that `rpac pack` made"
        )
    if len(distributions) > 1:
        found = ", ".join(f"{version} in {where}" for version, where in sorted(distributions))
        raise BundleError(f"{place}: found {len(distributions)} versions: {found}; must be one; uninstall the others")
    (one,) = distributions.values()
    folder = one.locate_file(f"{package_of(name)}/{FOLDER}")
    if not isinstance(folder, Path):
        raise BundleError(
            f"{place}: found it inside the archive {folder}; must be files, which are opened and hashed; install the wheel "
            "with pip"
        )
    if not folder.is_dir():
        raise BundleError(f"{place}: found no folder {folder} of version {one.version}; install the wheel again")
    return folder


def _places(found: Sequence[importlib.metadata.Distribution]) -> dict[tuple[str, str], importlib.metadata.Distribution]:
    """The distributions by version and place: a folder that is on Python's path twice has them once."""
    return {(one.version, str(one.locate_file(""))): one for one in reversed(found)}


def _name_of(one: importlib.metadata.Distribution) -> str:
    """The distribution's name if it is a bundle's, else nothing. One that is damaged has no name."""
    name = normalized(one.metadata["Name"]) if "Name" in one.metadata else ""
    return name if name.startswith(_PREFIX) else ""
