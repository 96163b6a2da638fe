"""`rpac diff`: what differs between two specs or bundles."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from rpac.bundle import Place
from rpac.cli.common import PLACE, command, json_option, print_json, store_of, target_option, tuned_of, tuned_option
from rpac.cli.terminal import table
from rpac.devices.chip import TPU_TARGETS
from rpac.diff import Change, Difference, KernelChange, difference, side_of
from rpac.errors import CheckError
from rpac.plan.tuned import Tuned
from rpac.predict import Prediction, expected, layers_in, predict, programs_of
from rpac.traffic.explain import explain

SHARED_ROWS = 3  # more of one change are one row

Times = list[tuple[Prediction, Prediction]]


@command("diff")
@click.argument("first", metavar="SPEC|BUNDLE", type=PLACE)
@click.argument("second", metavar="SPEC|BUNDLE", type=PLACE)
@target_option
@click.option(
    "--time",
    "timed",
    type=click.Choice(TPU_TARGETS),
    help="Also compare predicted times of the expected batches on this TPU.",
)
@click.option("--exit-code", "with_code", is_flag=True, help="Exit with 1 where something differs.")
@tuned_option
@json_option
def diff_command(
    first: Place,
    second: Place,
    targets: tuple[str, ...],
    timed: str | None,
    with_code: bool,
    tuned_in: Path | None,
    as_json: bool,
) -> None:
    """Print what differs between two specs or bundles: keys of the spec, toolchains, plans, kernels and predicted times.

    Kernels are compared without their headers. Batches that only one of the two takes are not timed.
    """
    tuned = tuned_of(tuned_in)
    found = difference(side_of(first, targets, tuned), side_of(second, targets, tuned))
    times = [] if timed is None else _times(first, second, timed, tuned)
    if as_json:
        print_json({**asdict(found), "times": [_time_data(*pair) for pair in times]})
    else:
        _print(found, times)
    if with_code and found:
        sys.exit(CheckError.exit_code)


def _times(first: Place, second: Place, target: str, tuned: Tuned) -> Times:
    """The predictions of the batches that the first expects and both take, by layer."""
    store, progress = store_of(False), partial(click.echo, err=True)
    layers = [layer for layer in layers_in(first) if layer in layers_in(second)]
    pairs = []
    for layer in layers:
        sides = [programs_of(path, target, store, progress, layer=layer, tuned=tuned) for path in (first, second)]
        for workload in expected(sides[0].limits, sides[0].context_lens):
            if all(explain(side.tasks, side.limits, workload).program for side in sides):
                pairs.append((predict(sides[0], workload), predict(sides[1], workload)))
    return pairs


def _time_data(before: Prediction, after: Prediction) -> dict[str, object]:
    return {
        "batch": before.workload.label,
        "programs": [str(before.variant), str(after.variant)],
        "seconds": [before.report.seconds, after.report.seconds],
    }


def _print(found: Difference, times: Times) -> None:
    for title, changes in (("spec", found.spec), ("toolchain", found.toolchains)):
        if changes:
            click.echo(table((title, "first", "second"), [(one.what, *_values(one)) for one in changes]) + "\n")
    if found.plans:
        click.echo(table(("plan", "source", "first", "second"), _plan_rows(found.plans)) + "\n")
    if found.kernels:
        click.echo(table(("kernel", "second against first"), [(one.path, _words(one)) for one in found.kernels]) + "\n")
    if times:
        rows = [
            (
                before.workload.label,
                str(after.variant),
                *(f"{1e6 * one.report.seconds:.1f}" for one in (before, after)),
                f"{after.report.seconds / before.report.seconds:.3f}",
            )
            for before, after in times
        ]
        click.echo(table(("batch", "program", "first, us", "second, us", "of the first"), rows) + "\n")
    changed = sum(not one.only for one in found.kernels)
    click.echo(f"{found.same_kernels} kernels are the same, {changed} differ" if found else "nothing differs")


def _values(one: Change) -> tuple[str, str]:
    return one.before or "-", one.after or "-"


def _plan_rows(changes: Sequence[Change]) -> list[tuple[str, str, str, str]]:
    """A row for each change; those that many sources share are one row."""
    shared: dict[tuple[str, str, str], list[str]] = {}
    for one in changes:
        shared.setdefault((one.what, *_values(one)), []).append(one.where)
    rows = []
    for (what, before, after), paths in shared.items():
        shown = [f"{paths[0]} and {len(paths) - 1} more"] if len(paths) > SHARED_ROWS else paths
        rows += [(what, path, before, after) for path in shown]
    return rows


def _words(one: KernelChange) -> str:
    return f"only in the {one.only}" if one.only else f"+{one.added} -{one.removed} lines"
