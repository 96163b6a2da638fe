"""What the commands share: options, progress and tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from rpac.files.store import Store, default_cache_dir
from rpac.lower import Cache
from rpac.plan import KIND_ORDER
from rpac.spec import TARGETS

spec_argument = click.argument("spec_file", metavar="SPEC", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout and nothing else there.")
target_option = click.option(
    "--target", "targets", multiple=True, type=click.Choice(TARGETS), help="Only this target; repeat for several."
)
kind_option = click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(KIND_ORDER), help="Only this kind; repeat for several."
)
jobs_option = click.option("--jobs", type=click.IntRange(1), help="Compiling processes; default: one a core.")
cache_option = click.option("--no-cache", is_flag=True, help="Compile everything again, and keep nothing.")


def store_of(no_cache: bool) -> Store:
    """The store in the user's cache folder, or none. Says on stderr why a folder is not used."""
    store = Store(None if no_cache else default_cache_dir())
    if store.problem is not None:
        click.echo(f"rpac: the cache is not used: {store.problem}", err=True)
    return store


def cache_of(no_cache: bool) -> Cache:
    """The user's cache of compiled programs, or none; as `store_of`."""
    return Cache(store_of(no_cache))


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, sort_keys=True))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in plain text; numbers to the right."""
    return tabulate(rows, headers=header, tablefmt="simple", disable_numparse=True)


def lowering_progress(total: int) -> Callable[[str, str], None]:
    """Says on stderr, a line each, what is done out of `total`."""
    start = time.monotonic()
    done = 0

    def report(label: str, what: str) -> None:
        nonlocal done
        done += 1
        click.echo(f"[{done:3}/{total}] {time.monotonic() - start:6.1f} s  {label}: {what}", err=True)

    return report


def size(count: int) -> str:
    """Bytes for people: KiB below a MiB, then MiB."""
    return f"{count / 1024:.0f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.2f} MiB"
