"""Packs a bundle into a wheel: data alone, the same bytes from the same bundle, for an image that serves it."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rpac._version import __version__
from rpac.bundle.installed import FOLDER, distribution_of, is_name, package_of
from rpac.bundle.manifest import MANIFEST, Manifest, digest
from rpac.bundle.read import read_files
from rpac.bundle.storage import ATTESTATIONS, Place
from rpac.errors import TargetError

_TIME: Final = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can tell
_MODE: Final = 0o100644 << 16
_VERSION: Final = re.compile(
    r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+(\.[a-z0-9]+)*)?", re.ASCII
)
"""Versions as PEP 440 has them, in their one spelling."""


@dataclass(frozen=True)
class Wheel:
    """A wheel in memory. `name` is what `package:NAME` says, `file` the name that installers ask of the file."""

    name: str
    distribution: str
    version: str
    file: str
    data: bytes


def wheel_of(bundle: Place, name: str = "", version: str = "") -> Wheel:
    """The wheel of a bundle, a path or a URL, each file of which is hashed on its way.

    `name` is by default the bundle's own; `version` is by default 0.0.0 and the first 12 digits of the manifest's digest, so
    that other programs have another version. Attestations beside the bundle go with it as they are. Raises BundleError, or
    TargetError for what cannot be a name or a version.
    """
    found = read_files(bundle)
    manifest, beside = found.manifest, found.attestations
    name = name or manifest.name
    version = version or f"0.0.0+{digest(manifest)[:12]}"
    if not is_name(name):
        raise TargetError(
            f"{os.fspath(bundle)}: the name {name!r} cannot be part of a package's name; must have letters, digits, dots and "
            "hyphens, with a letter or digit at both ends; give another one with --name"
        )
    if not _VERSION.fullmatch(version):
        raise TargetError(
            f"--version: found {version!r}; must be a version as PEP 440 spells it, such as 1.2.0 or 1.2.0rc1"
        )
    package = package_of(name)
    info = f"{package}-{version}.dist-info"
    entries = {f"{package}/{FOLDER}/{path}": data for path, data in sorted(found.files.items())}
    if beside is not None:
        entries[f"{package}/{FOLDER}{ATTESTATIONS}"] = beside
    entries |= {f"{info}/METADATA": _metadata(manifest, name, version), f"{info}/WHEEL": _wheel_facts()}
    entries[f"{info}/RECORD"] = _record(entries, f"{info}/RECORD")
    return Wheel(name, distribution_of(name), version, f"{package}-{version}-py3-none-any.whl", _zipped(entries))


def is_wheel(path: Path) -> bool:
    """Whether a file is a wheel of a bundle."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/{FOLDER}/{MANIFEST}") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _metadata(manifest: Manifest, name: str, version: str) -> bytes:
    # No Requires-Dist: rpac is installed already where a bundle is served, and an index may have another package of its name.
    targets = ", ".join(f"{one.key} ({_compiler(one.toolchain)})" for one in manifest.targets.values())
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {distribution_of(name)}",
        f"Version: {version}",
        f"Summary: Ragged paged attention programs of {manifest.name}, built by rpac {__version__}",
        "Keywords: rpac-bundle",
        "",
        f'Use it with `rpac.load("package:{name}")`. Programs for {targets}. Spec hash {manifest.spec_hash}.',
        "",
    ]
    return "\n".join(lines).encode()


def _compiler(toolchain: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {toolchain[name]}" for name in ("jax", "libtpu") if name in toolchain)


def _wheel_facts() -> bytes:
    return f"Wheel-Version: 1.0\nGenerator: rpac {__version__}\nRoot-Is-Purelib: true\nTag: py3-none-any\n".encode()


def _record(entries: Mapping[str, bytes], own: str) -> bytes:
    """Each file with its hash and size; the record itself has none."""
    lines = []
    for path, data in sorted(entries.items()):
        sha256 = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={sha256},{len(data)}")
    return "\n".join([*lines, f"{own},,", ""]).encode()


def _zipped(entries: Mapping[str, bytes]) -> bytes:
    """The archive, in this order. Nothing is compressed: builds of zlib differ in their bytes, and images are compressed."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for path, data in entries.items():
            entry = zipfile.ZipInfo(path, _TIME)
            entry.create_system, entry.external_attr = 3, _MODE  # as made on Unix, wherever it is made
            archive.writestr(entry, data)
    return made.getvalue()
