"""Whatever is wrong with a bundle, the error is rpac's own, says what and where, and exits as documented."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from damaged import SEED, a_blob, refused

import rpac
from rpac.bundle import verify_bundle
from rpac.engine import load
from rpac.errors import BundleError, RpacError


def test_no_path(tmp_path: Path) -> None:
    assert "found no folder that can be read (No such file or directory); must be a bundle" in refused(tmp_path / "no")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "found no folder that can be read (Not a directory)" in refused(tmp_path / "file")


def test_an_unfinished_build(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    text = refused(bundle)
    assert "manifest.json: cannot be read (No such file or directory)" in text
    assert "its build did not finish, or it is no bundle; copy or build the bundle again" in text


def test_a_flipped_byte_of_any_other_file(bundle: Path) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    for path in bundle.rglob("*"):
        if not path.is_file() or path.name == "manifest.json":
            continue
        data = bytearray(path.read_bytes())
        for at in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(10))}:
            flip = rng.randrange(1, 256)
            data[at] ^= flip
            path.write_bytes(data)
            with pytest.raises(
                BundleError, match=f"{path.name}: found sha256 .*; must be .*; it was changed or damaged"
            ):
                verify_bundle(bundle)
            if path.parent.name == "blobs":
                with pytest.raises(BundleError, match="it was changed or damaged"):
                    load(bundle, target="cpu")
            data[at] ^= flip
        path.write_bytes(data)
    verify_bundle(bundle)


def test_a_missing_blob(bundle: Path) -> None:
    a_blob(bundle).unlink()
    assert "cannot be read (No such file or directory); copy or build the bundle again" in refused(bundle)


def test_a_blob_cut_short(bundle: Path) -> None:
    blob = a_blob(bundle)
    size = blob.stat().st_size
    os.truncate(blob, size - 1)
    assert f"{blob.name}: found {size - 1} bytes; must be {size}; it is cut short" in refused(bundle)


def test_a_blob_with_more_behind_it(bundle: Path) -> None:
    blob = a_blob(bundle)
    size = blob.stat().st_size
    os.truncate(blob, 1 << 40)  # sparse: it must be refused before it is read
    assert f"{blob.name}: found {1 << 40} bytes; must be at most {size}" in refused(bundle)


def test_a_blob_that_is_a_pipe(bundle: Path) -> None:
    blob = a_blob(bundle)
    blob.unlink()
    os.mkfifo(blob)
    assert "found no regular file" in refused(bundle)


def test_a_blob_that_is_a_folder(bundle: Path) -> None:
    blob = a_blob(bundle)
    blob.unlink()
    blob.mkdir()
    assert "blobs/" in refused(bundle)


def test_a_file_that_the_manifest_does_not_list(bundle: Path) -> None:
    (bundle / "source" / "extra.py").touch()
    with pytest.raises(BundleError, match=r"found source/extra.py; must hold only what manifest.json lists"):
        verify_bundle(bundle)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / f"real-{path.name}")
    path.symlink_to(path.parent.parent / f"real-{path.name}")


def nested(path: Path, depth: int = 1500) -> None:
    """Folders in folders, made step by step, because such a path is longer than one may be."""
    here = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("deeper", dir_fd=here)
        here, above = os.open("deeper", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)


EXTRAS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder": (lambda bundle: (bundle / "empty").mkdir(), "found empty;"),
    "an empty folder among blobs": (lambda bundle: (bundle / "blobs" / "empty").mkdir(), "found blobs/empty;"),
    "folders without end": (lambda bundle: nested(bundle), "found deeper;"),
    "a link to a folder": (lambda bundle: (bundle / "more").symlink_to("blobs"), "found more;"),
    "a link to nothing": (lambda bundle: (bundle / "more").symlink_to("nothing"), "found more;"),
    "a folder that is a link": (lambda bundle: linked(bundle / "blobs"), "found blobs;"),
    "a file that is a link": (lambda bundle: linked(bundle / "spec.yaml"), "found spec.yaml;"),
    "a pipe": (lambda bundle: os.mkfifo(bundle / "pipe"), "found pipe;"),
    "seven": (lambda bundle: [(bundle / f"x{n}").touch() for n in range(7)], "found x0, x1, x2, x3, x4 and 2 more;"),
}


@pytest.mark.parametrize(("add", "said"), EXTRAS.values(), ids=EXTRAS)
def test_what_is_no_file_of_the_manifest_is_refused(bundle: Path, add: Callable[[Path], object], said: str) -> None:
    add(bundle)
    with pytest.raises(BundleError, match=rf"{said} must hold only what manifest\.json lists, and no links"):
        verify_bundle(bundle)
    if "deeper" in said:  # pytest's own clean-up would not come to its end
        subprocess.run(["rm", "-rf", bundle / "deeper"], check=True)


def test_a_damaged_source_is_found_though_loading_never_reads_it(bundle: Path) -> None:
    (bundle / "source" / "cpu" / "mixed.py").write_text("")
    with pytest.raises(BundleError, match=r"source/cpu/mixed.py: found 0 bytes"):
        verify_bundle(bundle)
    load(bundle, target="cpu")


def test_every_error_is_one_of_ours() -> None:
    for name in rpac.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(rpac, name), RpacError)
