"""`rpac build` and `rpac generate`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click

from rpac import build as job
from rpac.cli.common import (
    Amount,
    cache_of,
    cache_option,
    command,
    jobs_option,
    json_option,
    print_json,
    spec_argument,
    target_option,
    tuned_of,
    tuned_option,
)
from rpac.cli.terminal import Lines, table
from rpac.contract.program import Lowered
from rpac.contract.step import REFERENCE, LoweredStep
from rpac.contract.units import size
from rpac.devices.servers import server
from rpac.errors import CheckError, TargetError
from rpac.files.publish import listing
from rpac.lower.pool import COMPILING
from rpac.plan.tuned import Tuned
from rpac.spec import Spec, load_spec

GENERATED = Path("generated")
STEP_HEADER = ("target", "step", "tokens", "temporaries", "export", "executable")
MOST_LINES = 40  # of the difference in one file


@command()
@spec_argument
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("build"), show_default=True, help="Output folder."
)
@target_option
@jobs_option
@cache_option
@tuned_option
@click.option("--this-cpu", is_flag=True, help="Add executables for the CPU of this machine to the cpu target.")
@click.option(
    "--wait", "wait_s", type=Amount(0), default=0.0, help="Seconds to wait while another build writes to the folder."
)
@click.option(
    "--for",
    "server_name",
    metavar="SERVER==VERSION",
    help="Build with the toolchain that vllm, tpu-inference or sglang-jax of a version pins, or say what to install.",
)
@click.option(
    "--step",
    metavar="MODULE:FUNCTION",
    help="Build whole steps of a model too, around this function of yours; in place of the spec's own `step`.",
)
@json_option
def build(
    spec_file: Path,
    out: Path,
    targets: tuple[str, ...],
    jobs: int | None,
    no_cache: bool,
    tuned_in: Path | None,
    this_cpu: bool,
    wait_s: float,
    server_name: str | None,
    step: str | None,
    as_json: bool,
) -> None:
    """Build SPEC into the bundle OUT/NAME.rpac, for all of its targets or for those given."""
    observer = BuildObserver()
    for_server = server(server_name) if server_name is not None else None
    spec = load_spec(spec_file)
    chosen = job.chosen_targets(spec, targets)
    if step is not None and not re.fullmatch(REFERENCE, step):
        raise click.BadParameter(f"{step!r} is not package.module:function.", param_hint="--step")
    if this_cpu and "cpu" not in chosen:
        raise TargetError(
            f"{spec_file}: found --this-cpu without the target cpu; add cpu to targets, or leave --this-cpu out"
        )
    if this_cpu and spec.mesh.devices > 1:
        raise TargetError(
            f"{spec_file}: --this-cpu is for one device, but the spec is for {spec.mesh.devices}; leave --this-cpu out"
        )
    built = job.build(
        spec,
        chosen,
        out,
        cache_of(no_cache),
        jobs,
        observer,
        wait_s,
        this_cpu,
        tuned_of(tuned_in),
        for_server,
        step or "",
    )
    seconds = observer.lines.seconds
    if as_json:
        variants = [_facts(one) for one in built.lowered]
        steps = {"steps": [_step_facts(one) for one in built.steps]} if built.steps else {}
        print_json(
            {"bundle": str(built.path), "spec_hash": spec.hash, "seconds": seconds, "variants": variants, **steps}
        )
        return
    rows = [
        (one.target, one.kind, one.tokens, one.source.path, size(len(one.exported)), _size_of(one.executable))
        for one in sorted(built.lowered, key=lambda one: (chosen.index(one.target), one.kind, one.tokens))
    ]
    click.echo(table(("target", "program", "tokens", "source", "export", "executable"), rows))
    if built.steps:
        ordered = sorted(built.steps, key=lambda one: (chosen.index(one.target), one.kind, one.tokens))
        click.echo(table(STEP_HEADER, [_step_row(one) for one in ordered]))
        for one in ordered:
            for note in one.notes:
                click.echo(f"{one.target} step {one.kind} t{one.tokens}: {note}")
    if for_server is not None:
        pins = ", ".join(f"{name} {version}" for name, version in for_server.pins.items())
        click.echo(f"built for {for_server} with {pins}")
    steps_too = f" and {len(built.steps)} steps of {built.steps[0].function}" if built.steps else ""
    click.echo(f"{built.path}: {len(rows)} programs{steps_too} in {seconds:.1f} s")


class BuildObserver(job.Observer):
    """Prints the progress of a build to stderr."""

    def __init__(self) -> None:
        self.lines = Lines()

    def phase(self, what: str) -> None:
        self.lines.say(what)

    def planned(self, programs: int) -> None:
        self.lines.total = programs

    def program(self, label: str, what: str) -> None:
        (self.lines.say if what == COMPILING else self.lines.done)(f"{label}: {what}")


@command()
@spec_argument
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=GENERATED, show_default=True, help="Output folder."
)
@click.option(
    "--check", "only_check", is_flag=True, help="Write nothing; print what differs, and exit with 1 if something does."
)
@tuned_option
def generate(spec_file: Path, out: Path, only_check: bool, tuned_in: Path | None) -> None:
    """Write the kernels of SPEC to OUT/NAME/, to be read or compared. Nothing is compiled."""
    spec, tuned = load_spec(spec_file), tuned_of(tuned_in)
    if only_check:
        words = ["rpac", "generate", str(spec_file)]
        words += [] if out == GENERATED else ["-o", str(out)]
        words += [] if tuned_in is None else ["--tuned", str(tuned_in)]
        _check_generated(spec, out, tuned, shlex.join(words))
        return
    sources = job.generate(spec, out, tuned)
    click.echo(f"{out / spec.name}: {len(sources)} sources")


def _check_generated(spec: Spec, out: Path, tuned: Tuned, fix: str) -> None:
    changed = job.stale(spec, out, tuned)
    for lines in changed.values():
        click.echo("\n".join(lines[:MOST_LINES]))
        if len(lines) > MOST_LINES:
            click.echo(f"... and {len(lines) - MOST_LINES} more lines")
    if changed:
        raise CheckError(
            f"{out / spec.name}: {len(changed)} files are not what this rpac makes of {spec.file}: "
            f"{listing(changed)}; run `{fix}`, and commit what it writes"
        )
    click.echo(f"{out / spec.name}: up to date")


def _facts(one: Lowered) -> dict[str, object]:
    return {
        "target": one.target,
        "kind": one.kind,
        "tokens": one.tokens,
        "source": one.source.path,
        "exported_bytes": len(one.exported),
        "executable_bytes": None if one.executable is None else len(one.executable),
    }


def _step_facts(one: LoweredStep) -> dict[str, object]:
    return {
        "target": one.target,
        "kind": one.kind,
        "tokens": one.tokens,
        "exported_bytes": len(one.exported),
        "executable_bytes": None if one.executable is None else len(one.executable),
        "memory": dict(one.memory),
        "notes": list(one.notes),
    }


def _step_row(one: LoweredStep) -> tuple[object, ...]:
    temporary = size(one.memory["temp_bytes"]) if one.memory else "-"
    return one.target, one.kind, one.tokens, temporary, size(len(one.exported)), _size_of(one.executable)


def _size_of(data: bytes | None) -> str:
    return "-" if data is None else size(len(data))
