"""Opens a bundle in the one safe order: size limits, manifest, hash of the very bytes that are used.

A bundle is given by its path, by a URL that fsspec opens, or as `package:NAME` where it is installed; all are read in this
order. Nothing is deserialized here. A bundle that is replaced while it is read is read again: all that a caller gets comes
from one bundle.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rpac.bundle.manifest import MANIFEST, SPEC, Manifest, Target, as_data, digest, render
from rpac.bundle.storage import REBUILD, Place, Storage, blob_name, open_bundle
from rpac.contract.step import Steps
from rpac.errors import BundleError

if TYPE_CHECKING:
    from rpac.spec import Spec

T = TypeVar("T")

Approve = Callable[[str, Manifest, bytes | None], object]
"""Is asked about a bundle's place, its manifest and the file of attestations beside it, if there is one, before any other byte of
the bundle is used. Raises what refuses it.
"""

_REPLACED_TRIES = 10


@dataclass(frozen=True)
class LoadedTarget:
    """One target of a bundle with its blobs' bytes by hash, each checked against it."""

    manifest: Manifest
    target: Target
    blobs: Mapping[str, bytes]


@dataclass(frozen=True)
class LoadedSteps:
    """The steps of one target of a bundle with their blobs' bytes by hash, each checked against it."""

    manifest: Manifest
    target: Target
    steps: Steps
    blobs: Mapping[str, bytes]


@dataclass(frozen=True)
class Texts:
    """What a bundle was built from: its spec, and its kernels by their path under `source/`."""

    manifest: Manifest
    spec: Spec
    sources: Mapping[str, str]


def read_manifest(path: Place, timeout_s: float | None = None) -> Manifest:
    """What the bundle at `path` says of itself. Raises BundleError, also where that takes longer than `timeout_s`."""
    return _in_time(path, timeout_s, lambda: _read(path, lambda storage: storage.manifest()))


def read_target(
    path: Place,
    choose: Callable[[Manifest], Target],
    timeout_s: float | None = None,
    approve: Approve | None = None,
) -> LoadedTarget:
    """The bytes of the target that `choose` picks. Raises BundleError, also where that takes longer than `timeout_s`, and
    what `choose` and `approve` raise.
    """

    def read(storage: Storage) -> LoadedTarget:
        manifest = _approved(storage, approve)
        target = choose(manifest)
        return LoadedTarget(manifest, target, {blob.sha256: storage.blob(blob) for blob in target.blobs})

    return _in_time(path, timeout_s, lambda: _read(path, read))


def read_steps(
    path: Place,
    choose: Callable[[Manifest], Target],
    timeout_s: float | None = None,
    approve: Approve | None = None,
) -> LoadedSteps:
    """As `read_target`, the bytes of the target's steps in place of its programs'. Raises BundleError where it has none."""

    def read(storage: Storage) -> LoadedSteps:
        manifest = _approved(storage, approve)
        target = choose(manifest)
        steps = manifest.steps.get(target.name)
        if steps is None:
            has = f"steps of {', '.join(manifest.steps)} alone" if manifest.steps else "no steps"
            raise BundleError(
                f"{storage.place}: has {has}; must have those of {target.name}; build it with "
                "`rpac build SPEC --step package.module:function`"
            )
        return LoadedSteps(manifest, target, steps, {blob.sha256: storage.blob(blob) for blob in steps.blobs})

    return _in_time(path, timeout_s, lambda: _read(path, read))


def verify_bundle(path: Place, timeout_s: float | None = None, approve: Approve | None = None) -> Manifest:
    """Reads and hashes everything in the bundle at `path`. Raises BundleError, also for anything beside the
    files that the manifest lists: another file, a folder, or a link in the place of one; and what `approve` raises.
    """

    return _in_time(path, timeout_s, lambda: _read(path, lambda storage: _verify(storage, approve=approve)))


def describe(path: Place, manifest: Manifest | None = None) -> dict[str, Any]:
    """What `rpac inspect` shows, as plain data: the manifest, its digest, the bundle's path and its size in bytes.

    `manifest`: of the bundle at `path`, where the caller has read it.
    """
    manifest = manifest or read_manifest(path)
    size = len(render(manifest)) + sum(content.size for content in (*manifest.blobs, *manifest.files.values()))
    return {"path": os.fspath(path), "size": size, "digest": digest(manifest), **as_data(manifest)}


def read_texts(path: Place) -> Texts:
    """The spec and the kernels of the bundle at `path`, each checked against its hash. Programs are not read.

    Raises BundleError, and SpecError where this version of rpac does not take the spec.
    """
    from rpac.spec import parse_spec  # which needs yaml: a server that only loads bundles does without

    def read(storage: Storage) -> tuple[Manifest, dict[str, bytes]]:
        manifest = storage.manifest()
        return manifest, {name: storage.read(name, content) for name, content in manifest.files.items()}

    manifest, files = _read(path, read)
    texts = {name: data.decode("utf-8", "replace") for name, data in files.items()}
    spec = parse_spec(texts.pop(SPEC), f"{os.fspath(path)}/{SPEC}")
    return Texts(manifest, spec, {name.removeprefix("source/"): text for name, text in texts.items()})


@dataclass(frozen=True)
class BundleFiles:
    """Every file of a bundle by its name, each checked against its hash; and the file beside it, unverified, if there is one."""

    manifest: Manifest
    files: Mapping[str, bytes]
    attestations: bytes | None


def read_files(path: Place, approve: Approve | None = None) -> BundleFiles:
    """All files of the bundle at `path`. Raises as `verify_bundle` does."""

    def read(storage: Storage) -> BundleFiles:
        files: dict[str, bytes] = {}
        manifest = _verify(storage, files.__setitem__, approve)
        return BundleFiles(manifest, {MANIFEST: render(manifest), **files}, storage.attestations())

    return _read(path, read)


def _verify(
    storage: Storage, keep: Callable[[str, bytes], None] = lambda name, data: None, approve: Approve | None = None
) -> Manifest:
    """Reads and hashes every file, once `approve` has nothing against it, and calls `keep` with its name and its bytes."""
    manifest = _approved(storage, approve)
    for blob in sorted(manifest.blobs):
        keep(blob_name(blob), storage.blob(blob))
    for name, content in sorted(manifest.files.items()):
        keep(name, storage.read(name, content))
    extra = storage.extra({MANIFEST, *map(blob_name, manifest.blobs), *manifest.files})
    if extra:
        more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
        raise BundleError(
            f"{storage.place}: found {', '.join(extra[:5])}{more}; must hold only what {MANIFEST} lists, and no links; "
            f"remove it, or {REBUILD}"
        )
    return manifest


def _approved(storage: Storage, approve: Approve | None) -> Manifest:
    """The manifest, which `approve` has nothing against. It is read once: a store could answer the second time otherwise."""
    manifest = storage.manifest()
    if approve is not None:
        approve(storage.place, manifest, storage.attestations())
    return manifest


def _read(place: Place, use: Callable[[Storage], T]) -> T:
    """What `use` makes of the bundle; once more from the start where a build replaced it meanwhile."""
    for _ in range(_REPLACED_TRIES):
        with open_bundle(place) as storage:
            try:
                return use(storage)
            except BundleError:
                if not storage.is_replaced():
                    raise
    raise BundleError(f"{os.fspath(place)}: was replaced {_REPLACED_TRIES} times while it was read; stop its builds")


def _in_time(place: Place, timeout_s: float | None, read: Callable[[], T]) -> T:
    """What `read` returns. Raises BundleError where it takes longer than `timeout_s` seconds."""
    if timeout_s is None:
        return read()
    if not timeout_s > 0:
        raise BundleError(f"{os.fspath(place)}: timeout_s is {timeout_s}; must be above 0 seconds, or None")
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(read())
        except BaseException as error:
            done.set_exception(error)

    # A daemon: nothing can end a read that a store holds, and the process need not wait for it.
    threading.Thread(target=work, name="rpac-read", daemon=True).start()
    try:
        return done.result(timeout_s)
    except TimeoutError as error:
        if done.done():
            raise  # the store's own
        raise BundleError(
            f"{os.fspath(place)}: was not read within {timeout_s:g} s; check the store and the network, or give more time"
        ) from error
