"""`rpac receipt`: what is known of a bundle, from where and how old, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from rpac.cli.common import command, json_option, print_json
from rpac.cli.sign import policy_of
from rpac.cli.terminal import table
from rpac.trust.issue import EVIDENCE_HEADER, FIELDS_HEADER, MAX_AGE, evidence_rows, field_rows, issue


@command("receipt")
@click.argument("bundle")
@click.option("--key", metavar="FILE", type=click.Path(path_type=Path), help="Public key whose statements count.")
@click.option(
    "--policy", "policy_file", metavar="FILE", type=click.Path(path_type=Path), help="Trust policy whose keys count."
)
@click.option(
    "--max-age", "days", metavar="DAYS", type=click.IntRange(1), default=MAX_AGE.days, show_default=True,
    help="Older evidence is stale.",
)  # fmt: skip
@json_option
def receipt_command(bundle: str, key: Path | None, policy_file: Path | None, days: int, as_json: bool) -> None:
    """Say what is known of BUNDLE, a path or a URL: from which signed statement, how old, and what is missing.

    Every byte of the bundle is verified. Statements count if a key that is given signed them; without one, none does.
    """
    policy = None if key is None and policy_file is None else policy_of(key, policy_file)
    made = issue(bundle, policy, timedelta(days=days))
    if as_json:
        print_json(made)
    else:
        _print(made)


def _print(made: Mapping[str, Any]) -> None:
    bundle, coverage = made["bundle"], made["coverage"]
    click.echo(f"{bundle['name']}  digest {bundle['digest']}")
    click.echo(
        f"{made['verdict']}: {coverage['percent']}% of the evidence holds, {coverage['holds']} of {coverage['of']}"
    )
    if made["never_measured_on"]:
        click.echo(f"never measured on {', '.join(made['never_measured_on'])}, as far as its evidence says")
    signatures = made["signatures"]
    signers = f" by {', '.join(signatures['keys'])}" if signatures["keys"] else ""
    click.echo(f"signatures {signatures['state']}{signers}\n")
    click.echo(table(EVIDENCE_HEADER, evidence_rows(made)))
    click.echo()
    click.echo(table(FIELDS_HEADER, field_rows(made)))
    if made["blockers"]:
        click.echo("\nblockers:")
    for blocker in made["blockers"]:
        click.echo(f"- {blocker}")
