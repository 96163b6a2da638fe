"""`rpac tune`: searches for better tiles, without a TPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import click

from rpac.build import chosen_targets
from rpac.cli.common import (
    Amount,
    command,
    json_option,
    kind_option,
    print_json,
    spec_argument,
    store_of,
    target_option,
    tuned_folder,
)
from rpac.cli.terminal import table
from rpac.devices.chip import is_tpu
from rpac.errors import CheckError
from rpac.spec import load_spec
from rpac.tune import Check, Job, Outcome, Pool, Result, local_processes, on_cluster, tune

HEADER = ("case", "token buckets", "timed", "rejected", "chosen", "of the rule's time", "search")


@command("tune")
@spec_argument
@target_option
@kind_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the data files. Default: $RPAC_TUNED, or the user's data folder.",
)
@click.option(
    "--budget",
    type=Amount(0),
    default=25.0,
    show_default=True,
    metavar="MINUTES",
    help="Minutes for each target, after which no candidate is started.",
)
@click.option("--jobs", type=click.IntRange(1), help="Candidates to time at once. Default: one for each core.")
@click.option("--scheduler", metavar="ADDRESS", help="Search on the Dask cluster of this scheduler instead.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the batches and the checks."
)
@click.option("--no-cache", is_flag=True, help="Time every candidate again, and cache nothing.")
@json_option
def tune_command(
    spec_file: Path,
    targets: tuple[str, ...],
    kinds: tuple[str, ...],
    out: Path | None,
    budget: float,
    jobs: int | None,
    scheduler: str | None,
    seed: int,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Search for better tiles for SPEC's kernels: compile candidates, and predict their time for the batches that SPEC expects.

    The tiles that are chosen have passed the check against the oracle. They go to a data file, which later builds read; if
    the folder is not the default, they need --tuned. You can stop the search at any time; what was timed is kept.
    """
    if jobs is not None and scheduler is not None:
        raise click.UsageError("--jobs is for this machine, --scheduler for a cluster: give one of them")
    folder = out or tuned_folder()
    if folder is None:
        raise click.UsageError(
            "$RPAC_TUNED is none, or there is no home folder, so there is no default folder: give -o"
        )
    start = time.monotonic()
    spec = load_spec(spec_file)
    chosen = chosen_targets(spec, targets)
    end = start + 60 * budget * max(sum(map(is_tpu, chosen)), 1)
    with _pool(jobs, scheduler) as pool:
        report = tune(
            spec,
            chosen,
            pool,
            store_of(no_cache),
            kinds=kinds,
            folder=folder,
            seed=seed,
            out_of_time=lambda: time.monotonic() >= end,
            progress=_progress(start),
        )
    seconds = time.monotonic() - start
    if as_json:
        cases = [_facts(one) for one in report.outcomes]
        files = [str(file) for file in report.files]
        print_json({"spec": spec.name, "spec_hash": spec.hash, "seconds": seconds, "files": files, "cases": cases})
    else:
        click.echo(table(HEADER, [_row(one) for one in report.outcomes]))
        written = ", ".join(map(str, report.files)) or "nothing written"
        click.echo(f"{written}: {len(report.outcomes)} cases in {seconds:.1f} s")
        if report.files and folder != tuned_folder():
            click.echo(f"to build with it: --tuned {folder}, or RPAC_TUNED={folder}")
    if report.failed:
        said = "\n".join(
            f"  {one.rule.path}: {label}: {why}" for one in report.failed for label, why in one.rejected.items()
        )
        raise CheckError(f"{spec.file}: no candidate is left for {len(report.failed)} cases:\n{said}")


def _pool(jobs: int | None, scheduler: str | None) -> AbstractContextManager[Pool]:
    return local_processes(jobs or os.cpu_count() or 1) if scheduler is None else on_cluster(scheduler)


def _progress(start: float) -> Callable[[Job, Result, bool], None]:
    """Makes a function that prints the result of each job on a line of stderr."""
    done = 0

    def report(job: Job, result: Result, stored: bool) -> None:
        nonlocal done
        done += 1
        if result.reason:
            said = f"rejected: {result.reason}"
        elif isinstance(job, Check):
            said = "passes the oracle"
        else:
            said = " ".join(f"{1e6 * seconds:.1f}" for seconds in result.seconds) + " us"
        known = ", cached" if stored else ""
        click.echo(f"[{done:3}] {time.monotonic() - start:6.1f} s  {job.case} {job.label}: {said}{known}", err=True)

    return report


def _row(one: Outcome) -> tuple[str, ...]:
    return (
        one.rule.path.removesuffix(".py"),
        " ".join(map(str, one.rule.tokens)),
        str(len(one.tried)),
        str(len(one.rejected)),
        one.chosen.label if one.chosen else "-",
        _score(one),
        "whole" if one.complete else "cut short",
    )


def _score(one: Outcome) -> str:
    score = one.score(one.chosen) if one.chosen else None
    return "-" if score is None else f"{score:.3f}"


def _facts(one: Outcome) -> dict[str, object]:
    return {
        "target": one.rule.target,
        "kind": one.rule.kind,
        "tokens": list(one.rule.tokens),
        "batches": [batch.label for batch in one.batches],
        "chosen": one.chosen.label if one.chosen else None,
        "score": one.score(one.chosen) if one.chosen else None,
        "tried": {tried.label: list(tried.seconds) for tried in one.tried},
        "rejected": one.rejected,
        "complete": one.complete,
    }
