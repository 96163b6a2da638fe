"""`rpac receipt`: what is known of a bundle, from where and how old, and what is missing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from rpac.bundle import Manifest, verify_bundle
from rpac.bundle.storage import ATTESTATIONS
from rpac.cli.common import command, json_option, print_json
from rpac.cli.sign import policy_of
from rpac.cli.terminal import table
from rpac.errors import BundleError
from rpac.trust import Attestation, Policy, verdict
from rpac.trust.receipt import receipt
from rpac.trust.verify import attestations

EVIDENCE = ("evidence", "target", "state", "key", "age", "why")
FIELDS = ("field", "value", "source", "age")


@command("receipt")
@click.argument("bundle")
@click.option("--key", metavar="FILE", type=click.Path(path_type=Path), help="Public key whose statements count.")
@click.option(
    "--policy", "policy_file", metavar="FILE", type=click.Path(path_type=Path), help="Trust policy whose keys count."
)
@click.option(
    "--max-age", "days", metavar="DAYS", type=click.IntRange(1), default=90, show_default=True,
    help="Older evidence is stale.",
)  # fmt: skip
@json_option
def receipt_command(bundle: str, key: Path | None, policy_file: Path | None, days: int, as_json: bool) -> None:
    """Say what is known of BUNDLE, a path or a URL: from which signed statement, how old, and what is missing.

    Every byte of the bundle is verified. Statements count if a key that is given signed them; without one, none does.
    """
    policy = None if key is None and policy_file is None else policy_of(key, policy_file)
    kept: list[tuple[str, bytes | None]] = []
    manifest = verify_bundle(bundle, approve=lambda place, _, data: kept.append((place, data)))
    place, data = kept[-1]
    now = datetime.now(UTC)
    found, problem = _found(policy, place, manifest, data, now)
    made = receipt(bundle, manifest, found, "" if policy is None else policy.place, problem, now, timedelta(days=days))
    if as_json:
        print_json(made)
    else:
        _print(made)


def _found(
    policy: Policy | None, place: str, manifest: Manifest, data: bytes | None, now: datetime
) -> tuple[list[Attestation], str]:
    """The statements, and why they are refused; those that cannot be read at all are none."""
    found: list[Attestation] = []
    try:
        if data is not None:
            found = attestations(policy or Policy("", ()), f"{place}{ATTESTATIONS}", manifest, data, now)
        if policy is not None:
            verdict(policy, place, manifest, data, now)
    except BundleError as error:
        return found, str(error)
    return found, ""


def _print(made: dict[str, Any]) -> None:
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
    rows = [
        (one["kind"], one["target"] or "all", one["state"], ", ".join(one["keys"]) or "-", _age(one), one["why"] or "-")
        for one in made["evidence"]
    ]
    click.echo(table(EVIDENCE, rows))
    click.echo()
    click.echo(table(FIELDS, [row for one in made["fields"] for row in _rows(one)]))
    if made["blockers"]:
        click.echo("\nblockers:")
    for blocker in made["blockers"]:
        click.echo(f"- {blocker}")


def _rows(one: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """A line for a value, or one for each of several times."""
    name, value = one["name"], one["value"]
    source = one["source"] if one["state"] in ("holds", "missing") else f"{one['source']}, {one['state']}"
    if isinstance(value, list):
        return [
            (f"{name}, {each['program']}, {each['batch']}", f"{1e6 * each['seconds']:.1f} us", source, _age(one))
            for each in value
        ]
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return [(name, "missing" if value is None else text, source, _age(one))]


def _age(one: dict[str, Any]) -> str:
    return "-" if one["age_days"] is None else f"{one['age_days']} days"
