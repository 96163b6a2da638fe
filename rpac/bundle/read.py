"""Opens a bundle in the one safe order: size limits, manifest, hash of the very bytes that are used.

Nothing is deserialized here. A bundle that is replaced while it is read is read again: all that a caller gets comes
from one bundle.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rpac.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES, Content, Manifest, Target, as_data, parse, render
from rpac.errors import BundleError

T = TypeVar("T")

_REPLACED_TRIES = 10
_REBUILD = "copy or build the bundle again"


@dataclass(frozen=True)
class LoadedTarget:
    """One target of a bundle with its blobs' bytes by hash, each checked against it."""

    manifest: Manifest
    target: Target
    blobs: Mapping[str, bytes]


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """What the bundle at `path` says of itself. Raises BundleError."""
    return _read(path, lambda folder: folder.manifest())


def read_target(path: str | os.PathLike[str], choose: Callable[[Manifest], Target]) -> LoadedTarget:
    """The bytes of the target that `choose` picks. Raises BundleError, and what `choose` raises."""

    def read(folder: _Folder) -> LoadedTarget:
        manifest = folder.manifest()
        target = choose(manifest)
        return LoadedTarget(manifest, target, {blob.sha256: folder.blob(blob) for blob in target.blobs})

    return _read(path, read)


def verify_bundle(path: str | os.PathLike[str]) -> Manifest:
    """Reads and hashes everything in the bundle at `path`. Raises BundleError, also for a file too many."""
    return _read(path, _verify)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `rpac inspect` shows, as plain data: the manifest, the bundle's path and its size in bytes."""
    manifest = read_manifest(path)
    size = len(render(manifest)) + sum(content.size for content in (*manifest.blobs, *manifest.files.values()))
    return {"path": os.fspath(path), "size": size, **as_data(manifest)}


def _verify(folder: _Folder) -> Manifest:
    manifest = folder.manifest()
    expected = {MANIFEST}
    for blob in sorted(manifest.blobs):
        folder.blob(blob)
        expected.add(_blob_name(blob))
    for name, content in sorted(manifest.files.items()):
        folder.read(name, content)
        expected.add(name)
    extra = sorted(folder.names() - expected)
    if extra:
        raise BundleError(
            f"{folder.path}: found {', '.join(extra[:5])}; must hold only what {MANIFEST} lists; "
            f"remove it, or {_REBUILD}"
        )
    return manifest


def _read(path: str | os.PathLike[str], use: Callable[[_Folder], T]) -> T:
    """What `use` makes of the bundle; once more from the start where a build replaced it meanwhile."""
    for _ in range(_REPLACED_TRIES):
        with _Folder(os.fspath(path)) as folder:
            try:
                return use(folder)
            except BundleError:
                if not folder.is_replaced():
                    raise
    raise BundleError(f"{os.fspath(path)}: was replaced {_REPLACED_TRIES} times while it was read; stop its builds")


def _blob_name(blob: Content) -> str:
    return f"blobs/{blob.sha256}"


class _Folder:
    """An open bundle. All reads stay in the folder that was opened, even where another one takes its path."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> _Folder:
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise BundleError(
                f"{self.path}: found no folder that can be read ({error.strerror}); must be a bundle; "
                "check the path, or make it with `rpac build`"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def is_replaced(self) -> bool:
        """Whether the path leads to another folder by now."""
        try:
            return not os.path.samestat(os.fstat(self._descriptor), Path(self.path).stat())
        except FileNotFoundError:
            return False

    def manifest(self) -> Manifest:
        file = f"{self.path}/{MANIFEST}"
        return parse(self._bytes(MANIFEST, MAX_MANIFEST_BYTES), file)

    def blob(self, blob: Content) -> bytes:
        return self.read(_blob_name(blob), blob)

    def read(self, name: str, content: Content) -> bytes:
        """The bytes of a file that must have this content."""
        data = self._bytes(name, content.size)
        found = Content.of(data)
        if found.size != content.size:
            raise BundleError(
                f"{self.path}/{name}: found {found.size} bytes; must be {content.size}; it is cut short; {_REBUILD}"
            )
        if found.sha256 != content.sha256:
            raise BundleError(
                f"{self.path}/{name}: found sha256 {found.sha256}; must be {content.sha256}; "
                f"it was changed or damaged; {_REBUILD}"
            )
        return data

    def names(self) -> set[str]:
        """Every file, by its path in the bundle."""
        names: set[str] = set()
        for root, _, files, _ in os.fwalk(".", dir_fd=self._descriptor):
            names.update((Path(root) / file).as_posix() for file in files)
        return names

    def _bytes(self, name: str, limit: int) -> bytes:
        """A regular file of at most `limit` bytes, whole."""
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for somebody to write into it.
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._descriptor)
            with os.fdopen(descriptor, "rb") as file:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise BundleError(f"{self.path}/{name}: found no regular file; {_REBUILD}")
                if found.st_size > limit:
                    raise BundleError(
                        f"{self.path}/{name}: found {found.st_size} bytes; must be at most {limit}; {_REBUILD}"
                    )
                return file.read(limit + 1)
        except OSError as error:
            missing = f"; without {MANIFEST} its build did not finish, or it is no bundle" * (name == MANIFEST)
            raise BundleError(f"{self.path}/{name}: cannot be read ({error.strerror}){missing}; {_REBUILD}") from error
