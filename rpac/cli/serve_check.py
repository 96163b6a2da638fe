"""`rpac serve-check`: checks that a bundle serves on this machine, before traffic arrives."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rpac.bundle import Place
from rpac.cli.common import PLACE, Amount, command, json_option, print_json
from rpac.cli.terminal import table
from rpac.spec import TARGETS

if TYPE_CHECKING:
    from rpac.check.deployment import Step


@command("serve-check")
@click.argument("bundle", type=PLACE)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    help="Target to use. Default: the one built for this machine's first device.",
)
@click.option(
    "--batches", type=click.IntRange(0), default=1, show_default=True, help="Random batches for each program."
)
@click.option(
    "--seed", type=click.IntRange(0), help="Seed of the random batches. Default: a new one, which is printed."
)
@click.option("--allow-compile", is_flag=True, help="Compile portable programs where the executables do not fit.")
@click.option(
    "--policy",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Trust policy that must hold before anything is loaded.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=Amount(0, min_open=True),
    default=1800,
    show_default=True,
    help="Time that the bundle's process may take.",
)
@click.option(
    "--memory", metavar="GIB", type=Amount(0, min_open=True),
    help="Memory of its own that the bundle's process may have. Default: 3/4 of the machine's.",
)  # fmt: skip
@json_option
def serve_check_command(
    bundle: Place,
    target: str | None,
    batches: int,
    seed: int | None,
    allow_compile: bool,
    policy: Path | None,
    timeout: float,
    memory: float | None,
    as_json: bool,
) -> None:
    """Check that BUNDLE serves on this machine.

    Hashes every file, loads the bundle, warms it up, and runs every canary and some random batches. All but the first
    happens in a process of its own, with limits on time and memory: a bundle that ends it is reported.

    \b
    Exit codes: 0 it serves, 1 the output of a program is wrong or its process was ended, 2 wrong usage,
    3 incompatible target or toolchain, 4 corrupt or untrusted bundle.
    """
    from rpac.check.isolated import isolated_serve_check
    from rpac.check.process import ProcessLimits

    def progress(step: Step) -> None:
        click.echo(f"{step.seconds:7.1f} s  {step.name}: {'ok' if step.ok else 'FAILED'}", err=True)

    seed = secrets.randbits(32) if seed is None else seed
    limits = ProcessLimits(timeout, 0 if memory is None else int(memory * 2**30))
    report = isolated_serve_check(
        bundle,
        target,
        seed=seed,
        batches=batches,
        allow_compile=allow_compile,
        trust=policy,
        limits=limits,
        progress=progress,
    )
    if as_json:
        print_json({**asdict(report), "exit_code": report.exit_code})
    else:
        failed = [one for one in report.steps if not one.ok]
        click.echo(table(("step", "result", "s", "found"), [_row(one) for one in report.steps]))
        for one in failed:
            click.echo(f"{one.name}: {one.detail}")
        click.echo(f"{bundle}: {f'{len(failed)} failed' if failed else 'serves here'}; seed {seed}")
    if report.exit_code:
        raise SystemExit(report.exit_code)


def _row(step: Step) -> tuple[str, ...]:
    seconds = f"{step.seconds:.2f}"
    return (step.name, "ok", seconds, step.detail) if step.ok else (step.name, "FAILED", seconds, "see below")
