"""What the commands share: options, the folders that they use, JSON and sizes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from rpac.bundle import Place, is_reference
from rpac.errors import PlanError
from rpac.files.store import Store, default_cache_dir
from rpac.lower import Cache
from rpac.plan import KIND_ORDER
from rpac.plan.tuned import Tuned, TunedTiles
from rpac.spec import TARGETS

NO_FOLDER = "none"


class Amount(click.FloatRange):
    """A number in a range. "nan" is refused too, which no bound excludes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not in the range {self._describe_range()}.", param, ctx)
        return number


class PlaceType(click.Path):
    """Where a bundle is: a path, a URL or `package:NAME`, as `rpac.load` takes it. A spec is a path, or "-"."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        # As text: a path would make one slash of the two in a URL.
        return value if is_reference(value) else Path(super().convert(value, param, ctx))  # type: ignore[arg-type]


PLACE: Final = PlaceType()


class Command(click.Command):
    """A command that refuses an option given twice if only the last one would count."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for param in given:
            if isinstance(param, click.Option) and not (param.multiple or param.is_flag) and given.count(param) > 1:
                raise click.UsageError(f"{param.opts[-1]} is given {given.count(param)} times; give it once", ctx)
        return super().parse_args(ctx, args)


command = partial(click.command, cls=Command)

spec_argument = click.argument("spec_file", metavar="SPEC", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout, and nothing else.")
target_option = click.option(
    "--target", "targets", multiple=True, type=click.Choice(TARGETS), help="Only this target; repeat for several."
)
kind_option = click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(KIND_ORDER), help="Only this kind; repeat for several."
)
jobs_option = click.option(
    "--jobs", type=click.IntRange(1), help="Number of compiling processes. Default: one for each core."
)
cache_option = click.option("--no-cache", is_flag=True, help="Compile everything again, and cache nothing.")

any_compiler_option = click.option(
    "--any-compiler", is_flag=True, help="Also read schedules of a libtpu that nobody has verified."
)


def batch_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--decode`, `--prefill` and `--mixed`, the values of `rpac.predict.Asked.of`."""
    options = (
        click.option(
            "--decode", multiple=True, metavar="NxC", help="N decode rows of C tokens, the new ones included."
        ),
        click.option(
            "--prefill",
            multiple=True,
            metavar="NxQ/C",
            help="N sequences of C tokens each, of which the last Q are new.",
        ),
        click.option(
            "--mixed",
            type=click.Path(path_type=Path),
            help="File of JSON lines with q_lens and kv_lens, one batch each.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


tuned_option = click.option(
    "--tuned",
    "tuned_in",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder of tiles that `rpac tune` found. Default: $RPAC_TUNED, or the user's data folder. `none`: the package's alone.",
)


def tuned_folder() -> Path | None:
    """Where a user's tuned tiles lie: `$RPAC_TUNED`, or `rpac/tuned` in the user's data folder.

    None for a user who has no home, and where the variable is `none`.
    """
    given = os.environ.get("RPAC_TUNED")
    if given:
        return None if given == NO_FOLDER else Path(given)
    try:
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "rpac" / "tuned"
    except RuntimeError:
        return None


def tuned_of(given: Path | None) -> Tuned:
    """The tuned tiles of a target: the package's, and over them those of the folder that the option gives, or of `tuned_folder`.

    Raises PlanError where the option gives a folder that holds none. Says on stderr where `$RPAC_TUNED` does.
    """
    if given == Path(NO_FOLDER):
        return TunedTiles.of
    folder = tuned_folder() if given is None else given
    if folder is not None and not any(folder.glob("*.json")):
        if given is not None:
            raise PlanError(
                f"--tuned {given}: found no data file of tuned tiles there; must be a folder that `rpac tune -o {given}` "
                "wrote; check the path, or leave --tuned out"
            )
        if os.environ.get("RPAC_TUNED"):
            click.echo(f"rpac: RPAC_TUNED={folder}: no tuned tiles are there yet; `rpac tune` writes them", err=True)
    return lambda target: TunedTiles.over_package(target, folder)


def store_of(no_cache: bool) -> Store:
    """The store in the user's cache folder, or one that keeps nothing. Prints to stderr why a folder is not used."""
    store = Store(None if no_cache else default_cache_dir())
    if store.problem is not None:
        click.echo(f"rpac: the cache is not used: {store.problem}", err=True)
    return store


def cache_of(no_cache: bool) -> Cache:
    """The user's cache of compiled programs, or one that keeps nothing. Prints to stderr as `store_of` does."""
    return Cache(store_of(no_cache))


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, sort_keys=True))
