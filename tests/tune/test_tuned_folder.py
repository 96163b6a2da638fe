"""Tiles of one's own: `rpac tune` writes them to the user's folder or a given one, and every command that plans reads them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from command import TINY
from standin import Here, rule_of, timed

import rpac.build as job
import rpac.check.run as check_run
import rpac.cli.predict as cli_predict
import rpac.cli.tune as cli_tune
from rpac.cli import main
from rpac.errors import BatchError, CompileError
from rpac.files.store import Store
from rpac.plan.tuned import FOLDER, TunedTiles
from rpac.spec import load_spec
from rpac.tune.results import entry_of, merge
from rpac.tune.search import Climb, search

SPEC = load_spec(TINY)
TARGET = ("--target", "tpu7x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (outcome,) = search([Climb(SPEC, rule_of(SPEC, "decode"), 0)], Here(), Store(None), evaluate=timed)
    return merge(tmp_path_factory.mktemp("mine") / "tuned", "tpu7x", [entry_of(outcome)]).parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home, and a cache in it."""
    for name in ("RPAC_TUNED", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RPAC_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def planned(*args: object) -> list[str]:
    """Where the tiles of the decode plan of tpu7x come from, and those of the others."""
    done = run("plan", TINY, *TARGET, "--json", *args)
    assert done.exit_code == 0, done.stderr
    plans = json.loads(done.stdout)["plans"]
    return [plan["origin"].split(":")[0] for plan in sorted(plans, key=lambda plan: plan["kind"])]


TUNED = ["tuned", "rule", "rule", "rule"]
RULES = ["rule"] * 4


def test_a_folder_is_given_by_option_by_variable_or_is_the_users(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned() == RULES
    assert planned("--tuned", folder) == TUNED
    monkeypatch.setenv("RPAC_TUNED", str(folder))
    assert planned() == TUNED
    assert planned("--tuned", "none") == RULES
    monkeypatch.setenv("RPAC_TUNED", "none")
    assert planned() == RULES
    assert planned("--tuned", folder) == TUNED
    monkeypatch.delenv("RPAC_TUNED")
    own = home / ".local" / "share" / "rpac" / "tuned"
    own.parent.mkdir(parents=True)
    own.symlink_to(folder)
    assert planned() == TUNED
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "elsewhere"))
    assert planned() == RULES


def asked(name: str, monkeypatch: pytest.MonkeyPatch, found: list[str]) -> None:
    """Makes a command say where the tiles of its plans come from, and then end."""

    def lowered(tasks: Any, *_: Any) -> None:
        found.extend(task.plan["origin"] for task in tasks)
        raise CompileError("enough")

    def checked(units: Any, *_: Any) -> Iterator[Any]:
        found.extend(unit.plan.origin for unit in units)
        return iter(())

    def predicted(programs: Any, *_: Any) -> None:
        found.extend(task.plan["origin"] for task in programs.tasks.values())
        raise BatchError("enough")

    monkeypatch.setattr(job, "lower_all", lowered)
    monkeypatch.setattr(check_run, "_run_units", checked)
    monkeypatch.setattr(cli_predict, "predict", predicted)


COMMANDS = {"build": (), "check": ("--no-compile",), "predict": ("--decode", "1x8")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_compiles_takes_them(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    asked(name, monkeypatch, found)
    run(name, TINY, *TARGET, *COMMANDS[name], "--tuned", folder)
    assert found
    assert any(origin.startswith("tuned: ") for origin in found), found
    found.clear()
    run(name, TINY, *TARGET, *COMMANDS[name])
    assert set(found) == {"rule"}


def test_what_is_generated_is_what_is_built(folder: Path, tmp_path: Path) -> None:
    assert run("generate", TINY, "-o", tmp_path / "out", "--tuned", folder).exit_code == 0
    assert "- tuned: " in (tmp_path / "out" / "tiny" / "tpu7x" / "decode.py").read_text()


def test_a_stale_folder_is_mended_by_the_command_that_its_check_names(folder: Path, tmp_path: Path) -> None:
    options = ("-o", tmp_path / "an out", "--tuned", folder)
    done = run("generate", TINY, *options, "--check")
    assert done.exit_code == 1
    command = shlex.join(["rpac", "generate", *map(str, (TINY, *options))])
    assert f"; run `{command}`, and commit what it writes\n" in done.stderr
    assert run(*shlex.split(command)[1:]).exit_code == 0
    assert run("generate", TINY, *options, "--check").exit_code == 0


@pytest.mark.parametrize("name", ["plan", "build", "generate", "check", "predict"])
def test_a_folder_without_tuned_tiles_is_refused_before_anything_runs(name: str, tmp_path: Path) -> None:
    target = () if name == "generate" else TARGET
    done = run(name, TINY, *target, "--tuned", tmp_path / "typo")
    assert done.exit_code == 2
    assert f"--tuned {tmp_path / 'typo'}: found no data file of tuned tiles there; must be a folder that" in done.stderr


def test_a_variable_may_be_set_before_the_first_search_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPAC_TUNED", str(tmp_path / "later"))
    done = run("plan", TINY, *TARGET)
    assert done.exit_code == 0
    assert done.stderr == (
        f"rpac: RPAC_TUNED={tmp_path / 'later'}: no tuned tiles are there yet; `rpac tune` writes them\n"
    )


def test_a_users_entry_counts_before_the_packages(folder: Path, tmp_path: Path) -> None:
    package = TunedTiles.of("tpu7x")
    text = next(iter(package.entries))
    mine = replace(package.entries[text], evidence={**package.entries[text].evidence, "seed": 12345})
    merge(tmp_path / "tuned", "tpu7x", [mine])
    both = TunedTiles.over_package("tpu7x", tmp_path / "tuned")
    assert both.entries.keys() == package.entries.keys()
    assert both.entries[text].evidence["seed"] == 12345
    assert TunedTiles.over_package("tpu7x", None).entries == package.entries
    more = TunedTiles.over_package("tpu7x", folder)
    assert len(more.entries) == len(package.entries) + 1


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `rpac tune`, its search with stand-in times."""

    def stand_in(*args: Any, **options: Any) -> Any:
        return real(*args, **{**options, "evaluate": timed})

    real = cli_tune.tune
    monkeypatch.setattr(cli_tune, "tune", stand_in)
    monkeypatch.setattr(cli_tune, "_pool", lambda *_: Context())
    return lambda *args: run("tune", TINY, *TARGET, "--kind", "decode", *args)


class Context:
    def __enter__(self) -> Here:
        return Here()

    def __exit__(self, *_: object) -> None:
        pass


def test_a_search_writes_to_the_users_folder_and_the_next_plan_reads_it(
    searched: Callable[..., Result], home: Path
) -> None:
    before = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    done = searched()
    assert done.exit_code == 0, done.stderr
    own = home / ".local" / "share" / "rpac" / "tuned"
    assert [path.name for path in own.iterdir()] == ["tpu7x.json"]
    assert "--tuned" not in done.stdout
    assert planned() == TUNED
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == before


def test_a_search_into_another_folder_says_how_it_is_read(searched: Callable[..., Result], tmp_path: Path) -> None:
    done = searched("-o", tmp_path / "a")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.endswith(f"\nto build with it: --tuned {tmp_path / 'a'}, or RPAC_TUNED={tmp_path / 'a'}\n")
    assert planned("--tuned", tmp_path / "a") == TUNED


def test_a_search_into_a_folder_of_something_else_is_refused_before_it(
    searched: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").touch()
    done = searched("-o", tmp_path / "a")
    assert done.exit_code == 5
    assert "with notes.txt; must be absent, empty or an earlier output" in done.stderr
    assert "decode" not in done.stderr  # no candidate was timed
    monkeypatch.setenv("RPAC_TUNED", "none")
    assert "give -o" in searched().stderr
