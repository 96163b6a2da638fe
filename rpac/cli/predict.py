"""`rpac predict`: what programs will do on a TPU, from the compiler's own schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import click

from rpac.chip import TPU_TARGETS
from rpac.cli.common import json_option, print_json, size, table
from rpac.errors import BatchError
from rpac.predict import (
    Prediction,
    Programs,
    Workload,
    emit,
    expected,
    parse_decode,
    parse_prefill,
    predict,
    programs_of,
    read_trace,
)
from rpac.schedule.report import DEFINITIONS, CallReport, KernelReport
from rpac.store import Store, default_cache_dir

HEADER = ("name", "batch", "program", "us", "MBU", "MFU", "kernels us", "compute us", "stall us", "DMA us", "XLA us")
TOP = 6


@click.command("predict")
@click.argument("paths", metavar="SPEC|BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--target", required=True, type=click.Choice(TPU_TARGETS))
@click.option("--decode", multiple=True, metavar="NxC", help="N sequences with one new token each, the last of C.")
@click.option("--prefill", multiple=True, metavar="NxQ/C", help="N sequences with Q new tokens each, the last of C.")
@click.option("--mixed", type=click.Path(path_type=Path), help="JSON lines with q_lens and kv_lens, a batch each.")
@click.option("--emit", "emit_to", type=click.Path(path_type=Path), help="Write the schedules and their operands here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw MBU and MFU against context length into this file.")
@click.option("--detail", is_flag=True, help="For each batch: waits, loops, slots, spills, XLA's operations.")
@click.option("--no-cache", is_flag=True, help="Compile again for the schedules, and keep none.")
@json_option
def predict_command(
    paths: tuple[Path, ...],
    target: str,
    decode: tuple[str, ...],
    prefill: tuple[str, ...],
    mixed: Path | None,
    emit_to: Path | None,
    plot: Path | None,
    detail: bool,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Predict batches on the programs of each SPEC or BUNDLE; without any, those that the spec expects."""
    store = Store(None if no_cache else default_cache_dir())
    all_programs = [programs_of(path, target, store, lambda line: click.echo(line, err=True)) for path in paths]
    given = list(
        chain(map(parse_decode, decode), map(parse_prefill, prefill), read_trace(mixed) if mixed is not None else ())
    )
    predictions = [
        predict(programs, workload)
        for programs in all_programs
        for workload in given or expected(programs.limits, programs.context_lens)
    ]
    if emit_to is not None:
        _emit_one(all_programs, given, emit_to)
    if plot is not None:
        from rpac.predict.plot import draw  # matplotlib is asked for only here

        draw(predictions, plot)
        click.echo(f"{plot}: drawn", err=True)
    if as_json:
        found = [one.to_json() for one in predictions]
        print_json(found[0] if len(found) == 1 else {"predictions": found})
        return
    click.echo(table(HEADER, [_row(one) for one in predictions]))
    if detail or len(predictions) == 1:
        for one in predictions:
            click.echo("\n" + _details(one))
    click.echo(f"\npredicted for one {target} TensorCore; MBU = {DEFINITIONS['mbu']}; MFU = {DEFINITIONS['mfu']}")


def _emit_one(all_programs: Sequence[Programs], given: Sequence[Workload], folder: Path) -> None:
    if len(all_programs) != 1 or len(given) != 1:
        raise BatchError(
            f"--emit: found {len(all_programs)} specs or bundles and {len(given)} batches; takes one of each"
        )
    files = emit(all_programs[0], given[0], folder)
    click.echo(f"{folder}: {', '.join(files)}", err=True)


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
        one.name, label, str(one.variant), _us(report.seconds), _share(report.mbu), _share(report.mfu), *map(_us, parts)
    )  # fmt: skip


def _details(one: Prediction) -> str:
    report = one.report
    lines = [
        f"{one.name}, {one.workload.label}, {one.variant}: needs {size(report.needed_bytes or 0)} and "
        f"{(report.needed_flops or 0) / 1e9:.2f} GFLOP; moves {size(report.moved_bytes)}"
    ]
    for kernel in report.kernels:
        lines += _kernel_lines(kernel)
    lines += _xla_lines(report)
    return "\n".join(lines)


def _kernel_lines(kernel: KernelReport) -> list[str]:
    spills = kernel.spills
    lines = [
        f"  {kernel.name}: {_us(kernel.seconds)} us, {kernel.bundles} bundles, {kernel.dmas} DMAs, reads "
        f"{size(kernel.read_bytes)}, writes {size(kernel.written_bytes)}; spills: {spills.vector_stores} vector stores, "
        f"{spills.vector_fills} fills, {spills.scalar_stores} scalar stores, {spills.scalar_fills} fills"
    ]
    stalled = sorted(kernel.waits, key=lambda wait: -wait.stall_seconds)[:TOP]
    lines += [
        f"    wait at bundle {wait.bundle} on {wait.semaphore}: {wait.count} times, {_us(wait.stall_seconds)} us stalled"
        for wait in stalled
        if wait.stall_seconds > 0
    ]
    for loop in sorted(kernel.loops, key=lambda loop: -(loop.compute_seconds + loop.stall_seconds))[:TOP]:
        slots = ", ".join(f"{name} {share:.2f}" for name, share in (loop.utilization or {}).items() if share >= 0.05)
        lines.append(
            f"    loop at bundles {loop.first_bundle}-{loop.last_bundle}, depth {loop.depth}: {loop.turns} turns, "
            f"{_us(loop.compute_seconds)} us, {_us(loop.stall_seconds)} us stalled; {slots or 'slots unknown'}"
        )
    return lines


def _xla_lines(report: CallReport) -> list[str]:
    return [
        f"  XLA {one.name} ({one.opcode}): {_us(one.seconds)} us by its {one.timed_by}, reads {size(one.read_bytes)}, "
        f"writes {size(one.written_bytes)}"
        for one in report.xla
    ]


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
