"""`rpac buckets`: finds the token buckets that suit a trace of traffic."""

from __future__ import annotations

from pathlib import Path

import click

from rpac.batch.limits import bucket_lines
from rpac.cli.common import Amount, command, json_option, print_json
from rpac.cli.terminal import table
from rpac.contract.units import size
from rpac.plan import KIND_ORDER
from rpac.spec import load_spec
from rpac.traffic.buckets import Choice, Traffic, choices, choose, judge
from rpac.traffic.trace import read_trace

HEADER = ("", "buckets", "token_buckets", "padding", *KIND_ORDER, "programs", "build", "bundle")
SHARE = 0.1


@command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--spec", "spec_file", type=click.Path(path_type=Path), help="Spec with the limits, kinds and targets to use."
)
@click.option(
    "--max-buckets", type=click.IntRange(1, 64), default=12, show_default=True, help="Largest number of buckets to try."
)
@click.option(
    "--padding",
    type=Amount(0, 1),
    default=SHARE,
    show_default=True,
    help="Share of rows that may be padding.",
)
@json_option
def buckets(trace: Path, spec_file: Path | None, max_buckets: int, padding: float, as_json: bool) -> None:
    """Find the smallest set of token buckets that keeps the padding of the batches in TRACE low.

    TRACE has one batch of served traffic on each line, as `rpac predict --mixed` reads it: {"q_lens": [...], "kv_lens": [...]}.
    Without --spec, programs are counted for one TPU target, and prefill batches count as mixed.
    """
    spec = None if spec_file is None else load_spec(spec_file)
    traffic = Traffic.of(read_trace(trace), spec)
    found = choices(traffic, spec, max_buckets)
    chosen = choose(found, padding)
    now = None if spec is None else judge(traffic, spec, spec.serving.token_buckets)
    lines = bucket_lines((chosen or found[-1]).buckets)
    if as_json:
        print_json(
            {
                "batches": len(traffic.tokens),
                "tokens": int(traffic.tokens.sum()),
                "choices": [one.as_dict() for one in found],
                "chosen": None if chosen is None else found.index(chosen),
                "now": None if now is None else now.as_dict(),
                "spec_lines": lines,
            }
        )
        return
    rows = [_row("*" if one is chosen else "", one) for one in found]
    if now is not None:
        rows.append(_row("now", now))
    click.echo(table(HEADER, rows))
    click.echo(
        f"\n{len(traffic.tokens)} batches of {int(traffic.tokens.sum())} tokens. Padding is the share of computed rows that "
        "are padding.\nBuild and bundle are estimates: one program of llama3-8b on two cores, times the programs."
    )
    if chosen is None:
        click.echo(f"No set of up to {len(found)} buckets pads {padding:.0%} or less; the largest would be:")
    else:
        click.echo(f"* is the smallest set that pads {padding:.0%} or less:")
    click.echo(f"\n{lines}")


def _row(mark: str, one: Choice) -> tuple[str, ...]:
    kinds = ["-" if (share := one.padding_of[kind]) is None else f"{share:.1%}" for kind in KIND_ORDER]
    listed = " ".join(map(str, one.buckets))
    cost = (str(one.programs), f"{one.seconds:.0f} s", size(one.nbytes))
    return (mark, str(len(one.buckets)), listed, f"{one.padding:.1%}", *kinds, *cost)
