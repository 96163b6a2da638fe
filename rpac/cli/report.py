"""`rpac report`: what is known of specs and bundles before a chip is rented, on one page."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar

import click

from rpac.bundle import Place
from rpac.cli.common import (
    PLACE,
    any_compiler_option,
    batch_options,
    command,
    jobs_option,
    json_option,
    print_json,
    store_of,
    tuned_of,
    tuned_option,
)
from rpac.cli.predict_steps import step_option
from rpac.cli.sign import policy_of
from rpac.cli.terminal import Lines
from rpac.devices.chip import TPU_TARGETS
from rpac.files.publish import publish_file, refuse_foreign_file
from rpac.predict import Asked
from rpac.report import Observer, Request, check_page, gather, is_page, page, read_check

LAYERS: Final = re.compile(r"(?P<spec>[^:=]+:)?((?P<kind>[^:=]+)=)?(?P<count>\d+)", re.ASCII)
Number = TypeVar("Number", int, float)


@command("report")
@click.argument("paths", metavar="SPEC|BUNDLE...", nargs=-1, required=True, type=PLACE)
@click.option(
    "-o", "output", metavar="FILE", type=click.Path(path_type=Path), help="The page to write, such as report.html."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(TPU_TARGETS),
    help="Only this TPU; repeat for several. Default: every TPU of each spec or bundle.",
)
@batch_options
@click.option("--quick", is_flag=True, help="Decode alone, at the least and the greatest of the expected lengths.")
@click.option(
    "--layers",
    "layers",
    multiple=True,
    metavar="[SPEC:][KIND=]N",
    help="How many layers the model has, of each kind where it has several; of one SPEC, by its name.",
)
@click.option(
    "--price", "prices", multiple=True, metavar="TARGET=DOLLARS", help="Price of an hour of one chip; repeat."
)
@click.option(
    "--check",
    "checks",
    multiple=True,
    type=click.Path(path_type=Path),
    help="What `rpac check --json` wrote of one of the specs; repeat.",
)
@step_option
@click.option(
    "--key", metavar="FILE", type=click.Path(path_type=Path), help="Public key whose statements count for receipts."
)
@click.option(
    "--policy",
    "policy_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Trust policy whose keys count for receipts.",
)
@any_compiler_option
@jobs_option
@click.option("--no-cache", is_flag=True, help="Compile again for the schedules, and cache none.")
@tuned_option
@json_option
def report_command(
    paths: tuple[Place, ...],
    output: Path | None,
    targets: tuple[str, ...],
    decode: tuple[str, ...],
    prefill: tuple[str, ...],
    mixed: Path | None,
    quick: bool,
    layers: tuple[str, ...],
    prices: tuple[str, ...],
    checks: tuple[Path, ...],
    step: str | None,
    key: Path | None,
    policy_file: Path | None,
    any_compiler: bool,
    jobs: int | None,
    no_cache: bool,
    tuned_in: Path | None,
    as_json: bool,
) -> None:
    """Compare chips for the attention of each SPEC or BUNDLE on one page that needs no network.

    The page has predicted times, MBU, MFU and what limits them, memory, tiles, other kernels, checks, receipts of signed
    bundles, and provenance. What is not known is named. Without any batches, those that the spec expects are predicted, and
    shorter ones. Schedules are cached, so that a second report is fast.
    """
    if output is None and not as_json:
        raise click.UsageError("give -o FILE for a page, --json for its data, or both")
    if quick and (decode or prefill or mixed):
        raise click.UsageError("--quick chooses the batches; leave it out, or --decode, --prefill and --mixed")
    if output is not None:
        check_page(output)
        refuse_foreign_file(output, is_page)
    request = Request(
        targets=tuple(dict.fromkeys(targets)),
        asked=Asked.of(decode, prefill, mixed),
        quick=quick,
        layers=_layers(layers),
        prices=_prices(prices),
        checks=tuple(map(read_check, checks)),
        any_compiler=any_compiler,
        jobs=jobs or os.cpu_count() or 1,
        tuned=tuned_of(tuned_in),
        command=shlex.join(["rpac", *sys.argv[1:]]),
        step=step,
        policy=None if key is None and policy_file is None else policy_of(key, policy_file),
    )
    lines = Lines()
    lines.say(f"predicting {', '.join(map(str, paths))}, {request.jobs} at a time")
    found = gather(paths, request, store_of(no_cache), _Told(lines))
    if output is not None:
        publish_file(output, page(found).encode(), is_page)
        lines.say(f"{output}: written")
    if as_json:
        print_json(found.to_json())


class _Told(Observer):
    """Tells what is gathered as lines."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._lock = threading.Lock()  # so that counts are in order

    def planned(self, count: int) -> None:
        self._lines.total = count

    def working(self, what: str) -> None:
        self._lines.say(what)

    def done(self, what: str) -> None:
        with self._lock:
            self._lines.done(what)


def _layers(given: Sequence[str]) -> dict[str, int]:
    """`32`, or `local=52` for one kind; before either, `gemma3-27b:` for one of several specs."""
    found: dict[str, int] = {}
    for text in given:
        match = LAYERS.fullmatch(text)
        if match is None or int(match["count"]) < 1:
            raise click.UsageError(f"--layers: found {text!r}; must be [SPEC:][KIND=]N, with N at least 1")
        _add("--layers", found, f"{match['spec'] or ''}{match['kind'] or ''}", int(match["count"]))
    return found


def _prices(given: Sequence[str]) -> dict[str, float]:
    """`tpu7x=12.5`."""
    found: dict[str, float] = {}
    for text in given:
        target, _, amount = text.rpartition("=")
        try:
            dollars = float(amount)
        except ValueError:
            dollars = math.nan
        if target not in TPU_TARGETS or not 0 < dollars < math.inf:
            raise click.UsageError(
                f"--price: found {text!r}; must be TARGET=DOLLARS, above 0, such as v6e=2.70, with TARGET one of "
                f"{', '.join(TPU_TARGETS)}"
            )
        _add("--price", found, target, dollars)
    return found


def _add(option: str, found: dict[str, Number], name: str, value: Number) -> None:
    if name in found:
        raise click.UsageError(f"{option}: {name or 'a number'} is given twice; give it once")
    found[name] = value
