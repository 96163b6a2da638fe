"""`rpac predict`: predicts how long programs take on a TPU, from the compiler's own schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from rpac.bundle import Place
from rpac.cli.common import (
    PLACE,
    any_compiler_option,
    batch_options,
    command,
    json_option,
    print_json,
    store_of,
    tuned_of,
    tuned_option,
)
from rpac.cli.predict_steps import predict_steps, step_option
from rpac.cli.terminal import table
from rpac.contract.units import traffic
from rpac.devices.chip import TPU_TARGETS
from rpac.errors import BatchError
from rpac.files.store import Store
from rpac.plan.tuned import Tuned
from rpac.predict import (
    Asked,
    Prediction,
    Programs,
    check_emit,
    check_plot,
    draw,
    emit,
    expected,
    layers_in,
    names_apart,
    predict,
    programs_of,
)
from rpac.schedule.call_report import DEFINITIONS, micros, share

HEADER = ("batch", "name", "program", "us", "MBU", "MFU", "kernels us", "compute us", "stall us", "DMA us", "XLA us")


@command("predict")
@click.argument("paths", metavar="SPEC|BUNDLE...", nargs=-1, required=True, type=PLACE)
@click.option(
    "--target",
    "targets",
    required=True,
    multiple=True,
    type=click.Choice(TPU_TARGETS),
    help="TPU to predict for; repeat to compare several.",
)
@batch_options
@click.option(
    "--emit", "emit_to", type=click.Path(path_type=Path), help="Write the schedules and their operands to this folder."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Plot MBU and MFU against context length in this file.")
@click.option("--detail", is_flag=True, help="Show waits, loops, slots, spills and XLA operations of each batch.")
@step_option
@any_compiler_option
@click.option("--no-cache", is_flag=True, help="Compile again for the schedules, and cache none.")
@tuned_option
@json_option
def predict_command(
    paths: tuple[Place, ...],
    targets: tuple[str, ...],
    decode: tuple[str, ...],
    prefill: tuple[str, ...],
    mixed: Path | None,
    emit_to: Path | None,
    plot: Path | None,
    detail: bool,
    step: str | None,
    any_compiler: bool,
    no_cache: bool,
    tuned_in: Path | None,
    as_json: bool,
) -> None:
    """Predict how long batches take on the programs of each SPEC or BUNDLE, for each target.

    Without any batches, predict those that the spec expects.
    """
    asked = Asked.of(decode, prefill, mixed)  # refused before anything is compiled
    if plot is not None:
        check_plot(plot)
    if emit_to is not None:
        check_emit(emit_to)
    targets = tuple(dict.fromkeys(targets))
    store, tuned = store_of(no_cache), tuned_of(tuned_in)
    if step is not None:
        if emit_to is not None or plot is not None:
            raise click.UsageError("--step goes with neither --emit nor --plot")
        predict_steps(paths, targets, step, asked, store, tuned, detail, any_compiler, as_json)
        return
    chosen = [(path, layer) for path in paths for layer in layers_in(path)]
    pairs = [
        (programs, workload)
        for target in targets
        for programs in _named_apart(
            [_programs(path, target, layer, store, any_compiler, tuned) for path, layer in chosen],
            [path for path, _ in chosen],
        )
        for workload in asked.workloads(programs.limits.decode_len) or expected(programs.limits, programs.context_lens)
    ]
    if emit_to is not None and len(pairs) != 1:
        raise BatchError(
            f"--emit: found {len(pairs)} predictions; takes one: give one spec or bundle, one --target and one batch, for "
            f"example --target {targets[0]} --decode 4x100"
        )
    predictions = [predict(programs, workload) for programs, workload in pairs]
    if emit_to is not None:
        click.echo(f"{emit_to}: {', '.join(emit(*pairs[0], emit_to))}", err=True)
    if plot is not None:
        draw(predictions, plot)
        click.echo(f"{plot}: drawn", err=True)
    if not predictions[0].report.compiler_verified:
        click.echo(f"warning: nobody has verified this reading of libtpu {predictions[0].report.compiler}", err=True)
    if as_json:
        print_json({"predictions": [one.to_json() for one in predictions]})
    else:
        _print(predictions, targets, detail)


def _programs(path: Place, target: str, layer: str, store: Store, any_compiler: bool, tuned: Tuned) -> Programs:
    progress = partial(click.echo, err=True)
    return programs_of(path, target, store, progress, any_compiler=any_compiler, layer=layer, tuned=tuned)


def _named_apart(programs: Sequence[Programs], paths: Sequence[Place]) -> list[Programs]:
    names = names_apart([one.name for one in programs], paths)
    return [replace(one, name=name) for one, name in zip(programs, names, strict=True)]


def _print(predictions: Sequence[Prediction], targets: Sequence[str], detail: bool) -> None:
    # Side by side: a batch on everything that is compared, then the next batch.
    labels = list(dict.fromkeys(one.workload.label for one in predictions))
    ordered = sorted(predictions, key=lambda one: labels.index(one.workload.label))
    first = {one.workload.label: one.report.seconds for one in reversed(ordered)}
    compared = len(labels) < len(ordered)
    header: tuple[str, ...] = HEADER
    rows = [_row(one) for one in ordered]
    if len(targets) > 1:
        header = ("target", *header)
        rows = [(one.report.target, *row) for one, row in zip(ordered, rows, strict=True)]
    if compared:
        header = (*header, "of the first")
        rows = [
            (*row, f"{one.report.seconds / first[one.workload.label]:.2f}")
            for one, row in zip(ordered, rows, strict=True)
        ]
    click.echo(table(header, rows))
    if detail:
        for one in ordered:
            click.echo("\n" + _details(one))
    click.echo(
        f"\nPredicted for one {' or '.join(targets)} device. MBU = {DEFINITIONS['mbu']}; MFU = {DEFINITIONS['mfu']}. "
        f"Needed bytes: {DEFINITIONS['needed_bytes']}."
    )


def _row(one: Prediction) -> tuple[str, ...]:
    report = one.report
    kernels = report.kernels
    parts = (
        report.kernel_seconds,
        sum(kernel.compute_seconds for kernel in kernels),
        sum(kernel.stall_seconds for kernel in kernels),
        sum(kernel.dma_seconds for kernel in kernels),
        sum(operation.seconds for operation in report.xla),
    )
    label = one.workload.label
    return (
        label, one.name, str(one.variant), micros(report.seconds), share(report.mbu), share(report.mfu), *map(micros, parts)
    )  # fmt: skip


def _details(one: Prediction) -> str:
    report = one.report
    head = (
        f"{one.name}, {one.workload.label}, {one.variant} on {report.target}: needs {traffic(report.needed_bytes or 0)} and "
        f"{(report.needed_flops or 0) / 1e9:.3f} GFLOP; moves {traffic(report.moved_bytes)}; kernels alone: "
        f"MBU {share(report.kernel_mbu)}, MFU {share(report.kernel_mfu)}"
    )
    return "\n".join([head, *report.detail()])
