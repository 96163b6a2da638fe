"""`rpac predict --step`: the time of a model's whole step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from rpac.bundle import Place
from rpac.cli.common import print_json
from rpac.cli.terminal import table
from rpac.contract.step import REFERENCE
from rpac.contract.units import traffic
from rpac.files.store import Store
from rpac.plan.tuned import Tuned
from rpac.predict import Asked, expected
from rpac.predict.steps import StepPrediction, predict_step, steps_to_predict
from rpac.schedule.call_report import share
from rpac.schedule.step_report import STEP_DEFINITIONS

_PARTS = ("attention", "matrix products", "vector work", "collectives", "copies", "calls", "kernels")
HEADER = ("batch", "name", "step", "devices", "ms", "tokens/s", "a chip", "MBU", "MFU")


def predict_steps(
    paths: Sequence[Place],
    targets: Sequence[str],
    function: str,
    asked: Asked,
    store: Store,
    tuned: Tuned,
    detail: bool,
    any_compiler: bool,
    as_json: bool,
) -> None:
    """Predicts each batch on the steps of each spec for each target, and prints them side by side.

    `function`: empty for the one that each spec or bundle names. Raises as `rpac.predict.steps`.
    """
    progress = partial(click.echo, err=True)
    predictions = []
    for target in targets:
        every = [
            steps_to_predict(
                Path(path), target, function, Path.cwd(), store, progress, any_compiler=any_compiler, tuned=tuned
            )
            for path in paths
        ]
        for steps in every:
            chosen = asked.workloads(steps.limits.decode_len) or expected(steps.limits, steps.context_lens)
            predictions += [predict_step(steps, workload) for workload in chosen]
    if not predictions[0].report.compiler_verified:
        click.echo(f"warning: nobody has verified this reading of libtpu {predictions[0].report.compiler}", err=True)
    if as_json:
        print_json({"predictions": [one.to_json() for one in predictions]})
    else:
        _print(predictions, len(targets) > 1, detail)


def checked_function(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """The value of `--step`: None without it, empty for the function that a spec or a bundle names."""
    if value and not re.fullmatch(REFERENCE, value):
        raise click.BadParameter(f"{value!r} is not package.module:function.", context, option)
    return value


step_option = click.option(
    "--step",
    metavar="[MODULE:FUNCTION]",
    is_flag=False,
    flag_value="",
    callback=checked_function,
    help="Predict the model's whole step: this function of yours, or without a value the one that the spec or the bundle names.",
)


def _print(predictions: Sequence[StepPrediction], with_target: bool, detail: bool) -> None:
    # Side by side: a batch on everything that is compared, then the next batch.
    labels = list(dict.fromkeys(one.workload.label for one in predictions))
    ordered = sorted(predictions, key=lambda one: labels.index(one.workload.label))
    found = {part.category for one in ordered for part in one.report.parts}
    parts = [category for category in _PARTS if category in found]
    header = (*HEADER, *parts)
    rows = [_row(one, parts) for one in ordered]
    if with_target:
        header = ("target", *header)
        rows = [(one.report.target, *row) for one, row in zip(ordered, rows, strict=True)]
    click.echo(table(header, rows))
    if detail:
        for one in ordered:
            click.echo("\n" + _details(one))
    click.echo(
        f"\nPredicted for each device. MBU = {STEP_DEFINITIONS['mbu']}; MFU = {STEP_DEFINITIONS['mfu']}. Needed bytes: "
        f"{STEP_DEFINITIONS['needed_bytes']}. Parts in percent of the time; collectives and copies: what is not hidden."
    )


def _row(one: StepPrediction, parts: Sequence[str]) -> tuple[str, ...]:
    report = one.report
    of = {part.category: f"{100 * part.share:.1f}" for part in report.parts}
    return (
        one.workload.label,
        one.name,
        str(one.variant),
        str(report.devices),
        f"{1e3 * report.seconds:.3f}",
        f"{report.tokens_per_second:,.0f}",
        f"{report.tokens_per_second_per_chip:,.0f}",
        share(report.mbu),
        share(report.mfu),
        *(of.get(category, "0.0") for category in parts),
    )


def _details(one: StepPrediction) -> str:
    report = one.report
    head = (
        f"{one.name}, {one.workload.label}, {one.variant} of {one.function} on {report.target}: each device needs "
        f"{traffic(report.needed_bytes)} and {report.needed_flops / 1e9:.1f} GFLOP; moves {traffic(report.moved_bytes)}"
    )
    return "\n".join([head, *report.detail()])
