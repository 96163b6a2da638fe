"""`rpac check`: compares generated kernels with the oracle, and compiles them for every target."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rpac.build import chosen_targets
from rpac.cli.common import (
    cache_of,
    cache_option,
    command,
    jobs_option,
    json_option,
    kind_option,
    spec_argument,
    target_option,
    tuned_of,
    tuned_option,
)
from rpac.cli.terminal import Lines
from rpac.devices.toolchain import prepare
from rpac.errors import CheckError
from rpac.lower import lower_all
from rpac.spec import load_spec

if TYPE_CHECKING:
    from rpac.check import CheckReport, CompileResult, Result


@command()
@spec_argument
@target_option
@kind_option
@click.option(
    "--seed",
    type=click.IntRange(0),
    help="Seed of the data and the random batches. Default: a new one, which is printed.",
)
@click.option(
    "--random",
    "random_batches",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Random batches for each source.",
)
@click.option("--no-compile", is_flag=True, help="Only run the kernels; do not compile them for any target.")
@jobs_option
@cache_option
@tuned_option
@json_option
def check(
    spec_file: Path,
    targets: tuple[str, ...],
    kinds: tuple[str, ...],
    seed: int | None,
    random_batches: int,
    no_compile: bool,
    jobs: int | None,
    no_cache: bool,
    tuned_in: Path | None,
    as_json: bool,
) -> None:
    """Run every kernel of SPEC in the TPU interpreter, compare it with the float32 oracle, and compile it for every target.

    Attention must be within a stated tolerance, and the cache must match bit for bit. The interpreter detects races, fills
    memory with NaN at the start, and runs both DMA modes.
    """
    prepare()  # before JAX is imported, here and in every process below
    from rpac.check import Result, check_spec

    lines = Lines()

    def progress(row: Result | CompileResult) -> None:
        name = f"{row.source} {row.mode} {row.batch}" if isinstance(row, Result) else f"compile {row.target}"
        lines.say(f"{name}: {'ok' if row.ok else 'FAILED'}")

    spec = load_spec(spec_file)
    chosen = chosen_targets(spec, targets)
    jobs = jobs or os.cpu_count() or 1
    lines.say(f"{spec.name}: checking the kernels for {', '.join(chosen)}, {jobs} at a time")
    cache = cache_of(no_cache)
    report = check_spec(
        spec,
        targets=chosen,
        kinds=kinds or None,
        seed=seed,
        random_batches=random_batches,
        jobs=jobs,
        compile=None
        if no_compile
        else lambda tasks: lower_all(tasks, cache, jobs, lambda task, what: lines.say(f"compile {task.label}: {what}")),
        progress=progress,
        tuned=tuned_of(tuned_in),
    )
    click.echo(report.to_json() if as_json else report.table())
    _exit(report)


def _exit(report: CheckReport) -> None:
    if report.failed:
        raise SystemExit(CheckError.exit_code)
