"""Bundles at URLs are read in the same safe order as in folders; many processes may read one at once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from calls import call
from command import environment
from fsspec.implementations.memory import MemoryFileSystem

from rpac.bundle import describe, read_manifest, verify_bundle, write_bundle
from rpac.engine import load, load_layers
from rpac.errors import BundleError, RpacError
from rpac.spec import Spec


@pytest.fixture
def remote(bundle: Path) -> Iterator[str]:
    """A copy in memory, which has no folders to hold open."""
    files = fsspec.filesystem("memory")
    files.put(str(bundle), "/shared/tiny.rpac", recursive=True)
    yield "memory://shared/tiny.rpac"
    files.rm("/shared", recursive=True)


def test_an_engine_from_a_url_serves(remote: str) -> None:
    out, _ = call(load(remote, target="cpu"), [1])
    assert np.all(np.asarray(out, np.float32) == 3)


def test_a_url_is_verified_and_described_like_a_path(remote: str, bundle: Path) -> None:
    assert verify_bundle(remote) == verify_bundle(f"file://{bundle}") == verify_bundle(bundle)
    assert {**describe(remote), "path": None} == {**describe(bundle), "path": None}


DAMAGES = {
    "flipped": (lambda data: bytes([data[0] ^ 1]) + data[1:], "found sha256 .* it was changed or damaged"),
    "cut short": (lambda data: data[:-1], "must be .*; it is cut short"),
    "too long": (lambda data: data + b"x", "found .* bytes; must be at most"),
    "absent": (None, "cannot be read"),
}


@pytest.mark.parametrize("name", ["blob", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_at_a_url_is_found_before_anything_is_used(remote: str, name: str, damage: str) -> None:
    files = fsspec.filesystem("memory")
    root = "/shared/tiny.rpac"
    path = f"{root}/{name}" if "." in name else sorted(files.ls(f"{root}/blobs", detail=False))[0]
    change, text = DAMAGES[damage]
    if change is None:
        files.rm(path)
    else:
        files.pipe(path, change(files.cat(path)))
    with pytest.raises(
        BundleError, match=text if "." not in name or damage == "absent" else "damaged|digest"
    ) as raised:
        load(remote, target="cpu")
    assert remote in str(raised.value)


def test_a_file_that_hides_its_size_is_read_no_further_than_its_limit(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a server that sends no length: an endless blob must not fill the memory."""
    info, opened = MemoryFileSystem.info, MemoryFileSystem._open
    given = []

    class Endless:
        def __enter__(self) -> Endless:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            given.append(size)
            return b"x" * size

    def without_size(self: Any, path: str, **options: Any) -> Any:
        return {**info(self, path, **options), "size": None}

    def endless(self: Any, path: str, *args: Any, **options: Any) -> Any:
        return Endless() if "blobs" in path else opened(self, path, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", without_size)
    monkeypatch.setattr(MemoryFileSystem, "_open", endless)
    with pytest.raises(BundleError, match=r"found more than .* bytes; must be at most"):
        load(remote, target="cpu")
    assert len(given) == 1


def test_a_file_too_many_at_a_url(remote: str) -> None:
    fsspec.filesystem("memory").pipe("/shared/tiny.rpac/blobs/more", b"x")
    with pytest.raises(BundleError, match=r"found blobs/more; must hold only what manifest\.json lists"):
        verify_bundle(remote)


def test_an_empty_or_deep_folder_at_a_url(bundle: Path) -> None:
    (bundle / "blobs" / "a" / "b" / "c").mkdir(parents=True)
    with pytest.raises(BundleError, match=r"found blobs/a, .*; must hold only what manifest\.json lists"):
        verify_bundle(f"file://{bundle}")


class Web(SimpleHTTPRequestHandler):
    """Serves a folder, each answer as slow as its class says, or sends whoever asks elsewhere."""

    pause_s = 0.0
    elsewhere = ""

    def do_GET(self) -> None:
        if self.elsewhere:
            self.send_response(302)
            self.send_header("Location", f"{self.elsewhere}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not self.pause_s:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(self.pause_s)

    do_HEAD = do_GET  # type: ignore[assignment]

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def web(folder: Path, pause_s: float = 0, elsewhere: str = "") -> Iterator[int]:
    """A server of a folder on a port of this machine."""
    handler = type("Handler", (Web,), {"pause_s": pause_s, "elsewhere": elsewhere})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_store_that_sends_a_byte_now_and_then_is_given_up(bundle: Path) -> None:
    with web(bundle.parent, pause_s=1) as port:
        url = f"http://127.0.0.1:{port}/{bundle.name}"
        start = time.monotonic()
        for read in (load, load_layers, verify_bundle, read_manifest):
            options = {"target": "cpu"} if read in (load, load_layers) else {}
            with pytest.raises(BundleError, match=rf"{url}: was not read within 0\.5 s; check the store"):
                read(url, timeout_s=0.5, **options)  # type: ignore[operator]
        assert time.monotonic() - start < 30
    with pytest.raises(BundleError, match="timeout_s is 0; must be above 0 seconds, or None"):
        load(bundle, target="cpu", timeout_s=0)
    assert load(bundle, target="cpu", timeout_s=60)


def test_a_bundle_is_not_read_from_where_a_redirect_leads(bundle: Path) -> None:
    with web(bundle.parent) as port:
        here, there = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        assert read_manifest(f"{here}/{bundle.name}").name == "tiny"
        moved = rf"redirects to {there}/.*must stay on 127\.0\.0\.1; if you trust"
        with web(bundle.parent, elsewhere=there) as other, pytest.raises(BundleError, match=moved):
            load(f"http://127.0.0.1:{other}/{bundle.name}", target="cpu")
        with web(bundle.parent, elsewhere=here) as other:  # the same host
            assert load(f"http://127.0.0.1:{other}/{bundle.name}", target="cpu")


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(bundle: Path) -> None:
    manifest = bundle / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    for place in (bundle, f"file://{bundle}"):
        with pytest.raises(BundleError, match=r"manifest\.json: found no regular file"):
            load(place, target="cpu")


def test_a_protocol_that_nobody_knows(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"nope://x: cannot be opened \(.*nope.*\); must be a URL that fsspec knows"):
        load("nope://x", target="cpu")


def test_a_url_without_fsspec_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(BundleError, match=r"memory://x: opening a URL needs fsspec; install rpac\[remote\]"):
        load("memory://x", target="cpu")


def test_a_path_needs_no_fsspec(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    load(bundle, target="cpu")


def test_a_bundle_that_cannot_be_written_serves(bundle: Path) -> None:
    before = sorted(bundle.rglob("*"))
    for path in (bundle, *before):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        call(load(bundle, target="cpu"), [1])
        assert sorted(bundle.rglob("*")) == before
    finally:
        for path in (bundle, *before):
            path.chmod(0o755 if path.is_dir() else 0o644)


def serve(places: list[str]) -> list[str]:
    """In a process of its own: what each load of a bundle, which others replace meanwhile, came to."""
    found = []
    for place in places:
        try:
            manifest = verify_bundle(place)
            engine = load(place, target="cpu")
            out, _ = call(engine, [1])
            found.append(f"{float(np.asarray(out, np.float32).min())} {len(manifest.targets)}")
        except RpacError as error:
            found.append(str(error))
    return found


def test_many_processes_load_one_bundle_while_it_is_replaced(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    write_bundle(path, tiny, programs)
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        futures = [pool.submit(serve, [str(path), f"file://{path}"] * 3) for _ in range(3)]
        while not all(future.done() for future in futures):
            write_bundle(path, tiny, programs)
        found = [one for future in futures for one in future.result()]
    assert found == ["3.0 1"] * 18
    verify_bundle(path)


def test_a_loader_that_is_killed_leaves_the_bundle_as_it_was(bundle: Path, tree: Any) -> None:
    code = """
import sys, time, rpac
from rpac.bundle.storage import Storage
blob, seen = Storage.blob, []
def slow(storage, content):
    print("reading", flush=True)
    time.sleep(60 * len(seen))
    seen.append(content)
    return blob(storage, content)
Storage.blob = slow
rpac.load(sys.argv[1], target="cpu")
"""
    before = tree(bundle)
    env = environment(bundle.parent, {"JAX_PLATFORMS": "cpu"})
    process = subprocess.Popen([sys.executable, "-c", code, str(bundle)], stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    process.kill()
    assert process.wait() == -9
    process.stdout.close()
    assert tree(bundle) == before
    call(load(bundle, target="cpu"), [1])
