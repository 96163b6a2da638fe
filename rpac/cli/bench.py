"""`rpac bench`: times a bundle on the device that it was built for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rpac.bench.result import check_output, write
from rpac.bundle import Place
from rpac.cli.common import (
    PLACE,
    Amount,
    any_compiler_option,
    batch_options,
    command,
    json_option,
    kind_option,
    store_of,
)
from rpac.cli.terminal import Lines, table
from rpac.predict import Asked
from rpac.spec import TARGETS

if TYPE_CHECKING:
    from rpac.bench.result import Bench, Entry

MOST_SEED = (1 << 20) - 1  # as `rpac.oracle.canary.numbers` takes it

HEADER = (
    "program",
    "batch",
    "us",
    "p10",
    "p90",
    "times",
    "by",
    "GB/s",
    "of stream",
    "predicted us",
    "measured / predicted",
)


@command("bench")
@click.argument("bundle", type=PLACE)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    help="Target to time. Default: the one built for this machine's first device.",
)
@kind_option
@batch_options
@click.option(
    "--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True, help="Seed of the numbers in all inputs."
)
@click.option(
    "--time",
    "seconds",
    type=Amount(0),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds of timing for each program and batch.",
)
@click.option("--calls", type=click.IntRange(1), help="Calls to time for each program and batch, in place of --time.")
@click.option("--no-check", is_flag=True, help="Do not compare outputs with the oracle. The file says so.")
@click.option("--allow-compile", is_flag=True, help="Compile portable programs where the executables do not fit.")
@any_compiler_option
@click.option("--no-cache", is_flag=True, help="Compile again for the schedules of predictions, and cache none.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("bench.json"),
    show_default=True,
    help="File of results.",
)
@json_option
def bench_command(
    bundle: Place,
    target: str | None,
    kinds: tuple[str, ...],
    decode: tuple[str, ...],
    prefill: tuple[str, ...],
    mixed: Path | None,
    seed: int,
    seconds: float,
    calls: int | None,
    no_check: bool,
    allow_compile: bool,
    any_compiler: bool,
    no_cache: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Time the programs of BUNDLE on this machine's device, beside the times that are predicted for a TPU.

    Without any batches, each program is timed on the batches that fill it, at the lengths that the spec expects. Before
    anything is timed, every program must give the oracle's output on its batch. The results go to the file OUT, which is
    written anew after each program: a run that is interrupted leaves what it timed.
    """
    asked = Asked.of(decode, prefill, mixed)
    check_output(out)
    if target == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported, which would look for a TPU otherwise
    from rpac.bench.run import Options, bench

    options = Options(target, kinds, asked, seed, seconds, calls, not no_check, allow_compile, any_compiler)
    lines = Lines()
    kept: list[Bench] = []

    def keep(found: Bench) -> None:
        write(found, out)
        kept[:] = [found]

    try:
        found = bench(bundle, options, store_of(no_cache), lines.say, keep)
    except KeyboardInterrupt:
        if kept:
            click.echo(f"{out}: holds {len(kept[0].entries)} of {kept[0].cases} results", err=True)
        raise
    if as_json:
        click.echo(found.to_json(), nl=False)
        return
    click.echo(table(HEADER, [_row(one, found.stream_bandwidth) for one in found.entries]))
    device = f"{found.machine['devices']} x {found.machine['device_kind']}"
    checked = "no output was checked" if no_check else "every output is the oracle's"
    click.echo(
        f"\n{found.bundle['name']} {found.bundle['digest'][:16]} for {found.bundle['target']} on {device}; seed {seed}; "
        f"{checked}.\n"
        f"GB/s counts needed bytes; a stream of reads and writes reaches {found.stream_bandwidth / 1e9:.1f} GB/s here."
    )
    for reason in dict.fromkeys(one.not_predicted for one in found.entries if one.not_predicted):
        click.echo(f"not predicted: {reason}")
    click.echo(f"{out}: {len(found.entries)} results in {lines.seconds:.1f} s")


def _row(one: Entry, stream: float) -> tuple[str, ...]:
    spread = one.timing.spread
    reached = one.needed_bytes / spread.median
    predicted = one.predicted
    return (
        one.program,
        one.label,
        *(f"{1e6 * seconds:.1f}" for seconds in (spread.median, spread.p10, spread.p90)),
        f"{spread.count}x{one.timing.calls_each}",
        one.timing.method,
        f"{reached / 1e9:.2f}",
        f"{reached / stream:.2f}",
        "-" if predicted is None else f"{1e6 * predicted.seconds:.1f}",
        "-" if predicted is None else f"{spread.median / predicted.seconds:.2f}",
    )
