"""A command takes a bundle as `rpac.load` does: a folder, a URL, or `package:NAME`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner, Result
from command import TINY
from fsspec.registry import known_implementations

from rpac.bundle import is_reference, names_bundle, read_texts
from rpac.bundle.wheel import wheel_of
from rpac.cli import main
from rpac.errors import BundleError
from rpac.files.store import Store
from rpac.predict import layers_in, programs_of
from rpac.report.request import Request, givens_of
from rpac.spec import load_spec

Bundled = Callable[..., Path]

URL = "memory://places/tiny.rpac"
PLACES = ["folder", "url", "package"]
# Each command that takes a bundle, with what else it needs. {} is the bundle.
COMMANDS = {
    "bench": ["bench", "{}"],
    "diff": ["diff", str(TINY), "{}"],
    "explain": ["explain", "{}", "--decode", "1x20"],
    "inspect": ["inspect", "{}"],
    "pack": ["pack", "{}"],
    "predict": ["predict", "{}", "--target", "v6e"],
    "report": ["report", "{}", "--json"],
    "serve-check": ["serve-check", "{}"],
}


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, str], str]]:
    """`given(bundle, place)` puts a bundle there and says what a user writes."""
    files = fsspec.filesystem("memory")

    def put(bundle: Path, place: str) -> str:
        if place == "folder":
            return str(bundle)
        if place == "url":
            files.put(str(bundle), URL.partition(":/")[2], recursive=True)
            return URL
        site = tmp_path / "site"
        with zipfile.ZipFile(BytesIO(wheel_of(bundle).data)) as archive:
            archive.extractall(site)
        monkeypatch.syspath_prepend(str(site))
        return "package:tiny"

    yield put
    if files.exists("/places"):
        files.rm("/places", recursive=True)


def run(command: str, place: object, *more: object) -> Result:
    args = [one.format(place) for one in COMMANDS[command]]
    return CliRunner().invoke(main, [*args, *map(str, more)])


@pytest.mark.parametrize("place", PLACES[1:])
def test_a_command_says_the_same_wherever_the_bundle_is(
    place: str, bundled: Bundled, given: Callable[[Path, str], str], tmp_path: Path
) -> None:
    bundle = bundled()
    written = given(bundle, place)
    for command in ("explain", "inspect", "diff"):
        here, there = (run(command, one, "--json") for one in (bundle, written))
        assert here.exit_code == there.exit_code == 0, (command, here.output, there.output)
        assert there.output.replace(written, str(bundle)) == here.output
    packed = [run("pack", one, "-o", tmp_path / name) for one, name in ((bundle, "here"), (written, "there"))]
    assert [one.exit_code for one in packed] == [0, 0], packed
    wheels = [next((tmp_path / name).iterdir()).read_bytes() for name in ("here", "there")]
    assert wheels[0] == wheels[1]


@pytest.mark.parametrize("place", PLACES)
def test_predictions_and_reports_take_programs_and_spec_from_any_place(
    place: str, bundled: Bundled, given: Callable[[Path, str], str]
) -> None:
    bundle = bundled()
    written = given(bundle, place)
    assert layers_in(written) == [""]
    found, here = (programs_of(one, "tpu7x", Store(None)) for one in (written, bundle))
    assert found.tasks == here.tasks
    assert found.context_lens == here.context_lens == load_spec(TINY).serving.context_lens
    (one,) = givens_of([written], Request())
    assert (str(one.path), one.targets, one.digest is None) == (written, ("tpu7x",), False)


@pytest.mark.parametrize("place", PLACES[1:])
def test_a_bundle_is_timed_from_any_place(
    place: str, bundle: Path, given: Callable[[Path, str], str], tmp_path: Path
) -> None:
    more = [
        "--target",
        "cpu",
        "--decode",
        "1x20",
        "--calls",
        "1",
        "--no-check",
        "-o",
        tmp_path / "bench.json",
        "--json",
    ]
    done = run("bench", given(bundle, place), *more)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["entries"]) == 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("package:no-such", "package:no-such: found no installed package rpac-bundle-no-such; "),
        ("package:", "package:: found ''; must be a bundle's name, such as package:llama3-8b"),
        (
            "nope://x/y.rpac",
            "nope://x/y.rpac: cannot be opened (Protocol not known: nope); must be a URL that fsspec knows; ",
        ),
        ("memory://no-such.rpac", "memory://no-such.rpac/manifest.json: cannot be read (FileNotFoundError"),
    ],
)
def test_a_place_that_holds_no_bundle_is_named_and_exits_with_4(command: str, written: str, words: str) -> None:
    done = run(command, written)
    assert done.exit_code == 4, done.output
    assert words in done.output


def test_a_store_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"class": "no_such_store.Files", "err": "Install no_such_store to use it"}
    monkeypatch.setitem(known_implementations, "nosuch", missing)
    with pytest.raises(BundleError, match=r"cannot be opened \(Install no_such_store to use it\)"):
        read_texts("nosuch://bucket/tiny.rpac")


def test_what_names_a_bundle(tmp_path: Path) -> None:
    assert is_reference("package:tiny")
    assert is_reference("gs://bucket/tiny.rpac")
    assert not is_reference("-")
    assert not is_reference(tmp_path)
    assert names_bundle(tmp_path)
    assert not names_bundle(tmp_path / "spec.yaml")
    assert not names_bundle("-")


@pytest.mark.parametrize("name", ["spec.yaml", "source/tpu7x/decode.py"])
def test_the_texts_of_a_bundle_are_hashed(name: str, bundled: Bundled) -> None:
    bundle = bundled()
    with (bundle / name).open("a") as file:
        file.write("# more\n")
    with pytest.raises(BundleError, match=rf"{name}: found .* bytes"):
        read_texts(bundle)
