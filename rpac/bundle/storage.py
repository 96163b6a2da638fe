"""Where a bundle's bytes lie: in a folder of this machine, in an installed package, or at any URL that fsspec opens.

All hand out a file whole or refuse it, and know whether another build took the bundle's place since it was opened.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Set
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from rpac.bundle.installed import COMPILED, SCHEME, installed_bundle
from rpac.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, parse
from rpac.contract.program import Content
from rpac.errors import BundleError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Place: TypeAlias = str | os.PathLike[str]
"""Where a bundle is: a folder, a URL that fsspec opens, or `package:NAME`."""

REBUILD = "copy or build the bundle again"

ATTESTATIONS = ".intoto.jsonl"
"""What the name of the file beside a bundle ends with that holds signed statements about it."""

MAX_ATTESTATIONS_BYTES = 64 << 20

_CHUNK_BYTES = 1 << 20


def is_reference(place: Place) -> bool:
    """Whether `place` is a URL or `package:NAME`, which only bundles have; else it is a path."""
    text = os.fspath(place)
    return text.startswith(SCHEME) or "://" in text


def names_bundle(place: Place) -> bool:
    """Whether a bundle is meant where a spec may stand too: by a URL, by `package:NAME`, or by a folder."""
    return is_reference(place) or Path(place).is_dir()


def open_bundle(place: Place) -> Storage:
    """The bundle at a path or URL, or `package:NAME`, to be used as a context. Raises BundleError where nothing can be opened."""
    text = os.fspath(place)
    if text.startswith(SCHEME):
        return Installed(text.removeprefix(SCHEME))
    return Remote(text) if is_reference(text) else Folder(text)


class Storage(AbstractContextManager["Storage"], ABC):
    """An open bundle; `place` is its path or URL, for messages."""

    place: str

    @abstractmethod
    def is_replaced(self) -> bool:
        """Whether another build has taken the place of what was opened."""

    @abstractmethod
    def extra(self, expected: Set[str]) -> list[str]:
        """What is in the bundle beside the `expected` files and the folders that they lie in: other files, links, folders
        (which are not looked into) and anything else, each by its path, in order.
        """

    @abstractmethod
    def attestations(self) -> bytes | None:
        """The file beside the bundle that ends with `ATTESTATIONS`, unread and unverified; None where there is none."""

    @abstractmethod
    def _open(self, name: str, limit: int) -> IO[bytes]:
        """A file to read from its start; refused where it is known to have more than `limit` bytes."""

    @abstractmethod
    def _reason(self, error: Exception) -> str | None:
        """What the storage says is wrong, or None where `error` is not the storage's."""

    def manifest(self) -> Manifest:
        """The manifest, checked against its own digest."""
        data, _ = self._read(MANIFEST, MAX_MANIFEST_BYTES)
        return parse(data, f"{self.place}/{MANIFEST}")

    def blob(self, blob: Content) -> bytes:
        """The bytes of a blob, by its hash."""
        return self.read(blob_name(blob), blob)

    def read(self, name: str, content: Content) -> bytes:
        """The bytes of a file that must have this content."""
        data, sha256 = self._read(name, content.size)
        if len(data) != content.size:
            raise BundleError(
                f"{self.place}/{name}: found {len(data)} bytes; must be {content.size}; it is cut short; {REBUILD}"
            )
        if sha256 != content.sha256:
            raise BundleError(
                f"{self.place}/{name}: found sha256 {sha256}; must be {content.sha256}; "
                f"it was changed or damaged; {REBUILD}"
            )
        return data

    def _read(self, name: str, limit: int) -> tuple[bytes, str]:
        """A file of at most `limit` bytes with its sha256, taken as the bytes come in."""
        data, digest = bytearray(), hashlib.sha256()
        try:
            with self._open(name, limit) as file:
                while chunk := file.read(_CHUNK_BYTES):
                    data += chunk
                    digest.update(chunk)
                    if len(data) > limit:
                        raise self.too_large(name, f"more than {limit}", limit)
        except BundleError:
            raise
        except Exception as error:
            refused = _refusal(error)
            if refused is not None:
                raise refused from error
            reason = self._reason(error)
            if reason is None:
                raise
            missing = f"; without {MANIFEST} its build did not finish, or it is no bundle" * (name == MANIFEST)
            raise BundleError(f"{self.place}/{name}: cannot be read ({reason}){missing}; {REBUILD}") from error
        return bytes(data), digest.hexdigest()

    def too_large(self, name: str, found: object, limit: int) -> BundleError:
        """The error for a file of more bytes than its limit."""
        return BundleError(f"{self.place}/{name}: found {found} bytes; must be at most {limit}; {REBUILD}")

    def no_file(self, name: str) -> BundleError:
        """The error for a folder, a pipe or anything else in the place of a file."""
        return BundleError(f"{self.place}/{name}: found no regular file; {REBUILD}")


class Folder(Storage):
    """All reads stay in the folder that was opened, even where another one takes its path."""

    def __init__(self, path: str) -> None:
        self.place = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise BundleError(
                f"{path}: found no folder that can be read ({error.strerror}); must be a bundle; "
                "check the path, or make it with `rpac build`"
            ) from error

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def is_replaced(self) -> bool:
        try:
            return not os.path.samestat(os.fstat(self._descriptor), Path(self.place).stat())
        except FileNotFoundError:
            return False

    def extra(self, expected: Set[str]) -> list[str]:
        folders = folders_of(expected)
        found = []
        # Folder by folder, each one that the manifest names: however deep others are, nobody goes there.
        for folder in ["", *sorted(folders)]:
            try:
                for entry in self._entries(folder or "."):
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    wanted = path in folders if entry.is_dir(follow_symlinks=False) else path in expected
                    if not wanted or entry.is_symlink():
                        found.append(path)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):  # a link, which its own folder's entries have told
                    raise BundleError(
                        f"{self.place}/{folder}: cannot be listed ({error.strerror}); {REBUILD}"
                    ) from error
        return sorted(found)

    def attestations(self) -> bytes | None:
        path = attestation_path(self.place)
        if not path.exists():
            return None
        with Folder(str(path.parent)) as beside:
            return beside._read(path.name, MAX_ATTESTATIONS_BYTES)[0]

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._descriptor)
        try:
            with os.scandir(descriptor) as entries:
                return list(entries)
        finally:
            os.close(descriptor)

    def _open(self, name: str, limit: int) -> IO[bytes]:
        # Without O_NONBLOCK, opening a named pipe would wait for somebody to write into it.
        file = os.fdopen(os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._descriptor), "rb")
        found = os.fstat(file.fileno())
        if stat.S_ISREG(found.st_mode) and found.st_size <= limit:
            return file
        file.close()
        if not stat.S_ISREG(found.st_mode):
            raise self.no_file(name)
        raise self.too_large(name, found.st_size, limit)

    def _reason(self, error: Exception) -> str | None:
        return error.strerror if isinstance(error, OSError) else None


class Installed(Folder):
    """The folder of an installed package, where an installer may have compiled the sources, which are Python."""

    def __init__(self, name: str) -> None:
        super().__init__(str(installed_bundle(name)))

    def extra(self, expected: Set[str]) -> list[str]:
        return [path for path in super().extra(expected) if PurePosixPath(path).name != COMPILED]


class Remote(Storage):
    """A URL. The store behind it may have no folders to hold open: a changed manifest says that it was replaced."""

    def __init__(self, url: str) -> None:
        self.place = url.rstrip("/")
        self._first: Manifest | None = None
        self._files, self._root = _file_system(self.place)

    def __exit__(self, *_: object) -> None:
        pass

    def manifest(self) -> Manifest:
        found = super().manifest()
        self._first = self._first or found
        return found

    def is_replaced(self) -> bool:
        if self._first is None:
            return False
        try:
            return super().manifest() != self._first
        except BundleError:
            return False

    def extra(self, expected: Set[str]) -> list[str]:
        folders = folders_of(expected)
        deepest = 1 + max(name.count("/") for name in expected)
        found = self._files.find(self._root, maxdepth=deepest, withdirs=True)
        names = {path.removeprefix(f"{self._root}/").rstrip("/") for path in found} - {self._root, ""}
        return sorted(names - expected - folders)

    def attestations(self) -> bytes | None:
        beside = copy.copy(self)
        beside._root, _, name = f"{self._root}{ATTESTATIONS}".rpartition("/")
        beside.place = self.place.rpartition("/")[0]
        return beside._read(name, MAX_ATTESTATIONS_BYTES)[0] if beside._files.exists(f"{beside._root}/{name}") else None

    def _open(self, name: str, limit: int) -> IO[bytes]:
        path = f"{self._root}/{name}"
        info = self._files.info(path)
        if info.get("type", "file") != "file":
            raise self.no_file(name)
        size = info.get("size")
        if size is not None and size > limit:
            raise self.too_large(name, size, limit)
        file: IO[bytes] = self._files.open(path, "rb")
        return file

    def _reason(self, error: Exception) -> str:
        return f"{type(error).__name__}: {error}"  # each store has errors of its own


def folders_of(names: Iterable[str]) -> set[str]:
    """Every folder that some files of a bundle lie in."""
    return {parent.as_posix() for name in names for parent in PurePosixPath(name).parents} - {"."}


def attestation_path(bundle: str | os.PathLike[str]) -> Path:
    """The file beside the bundle in a folder; of a link, beside the folder that it leads to."""
    return Path(os.path.realpath(bundle) + ATTESTATIONS)


def blob_name(blob: Content) -> str:
    """Where a blob lies in a bundle."""
    return f"blobs/{blob.sha256}"


def _refusal(error: BaseException | None) -> BundleError | None:
    """The BundleError that a store took for a failure of its own."""
    while error is not None and not isinstance(error, BundleError):
        error = error.__cause__ or error.__context__
    return error


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        import fsspec
    except ImportError as error:
        raise BundleError(f"{url}: opening a URL needs fsspec; install rpac[remote], or give a path") from error
    try:
        files, root = fsspec.core.url_to_fs(url, **_options(url))
    except Exception as error:  # an unknown protocol, or a store's own package that is missing
        raise BundleError(
            f"{url}: cannot be opened ({error}); must be a URL that fsspec knows; "
            "install what its protocol needs, or give a path"
        ) from error
    return files, root.rstrip("/")


def _options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {"use_listings_cache": False}  # a listing kept from before would miss a new build
    for protocol in ("http", "https"):
        if f"{protocol}://" in url:
            options[protocol] = {"client_kwargs": {"trace_configs": [_one_host()]}}
    return options


@functools.cache
def _one_host() -> Any:
    """For aiohttp: refuses a redirect to another host, or to a scheme without encryption: who serves a bundle decides what
    runs.
    """
    from aiohttp import TraceConfig, TraceRequestRedirectParams
    from yarl import URL

    async def refuse(session: object, context: object, request: TraceRequestRedirectParams) -> None:
        place = request.response.headers.get("Location") or request.response.headers.get("URI") or ""
        to = request.url.join(URL(place))
        if to.host != request.url.host or (request.url.scheme == "https" and to.scheme != "https"):
            raise BundleError(
                f"{request.url}: redirects to {to}, of another host or scheme; must stay on {request.url.host}; if you trust "
                "that place, give its URL"
            )

    trace = TraceConfig()
    trace.on_request_redirect.append(refuse)
    return trace
