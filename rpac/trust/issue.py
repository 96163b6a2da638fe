"""Issues the receipt of a bundle: reads and hashes all of it, with the statements beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from rpac.bundle import Manifest, Place, verify_bundle
from rpac.bundle.storage import ATTESTATIONS
from rpac.errors import BundleError
from rpac.trust.policy import Policy
from rpac.trust.receipt import receipt
from rpac.trust.verify import Attestation, attestations, verdict

MAX_AGE: Final = timedelta(days=90)
EVIDENCE_HEADER: Final = ("evidence", "target", "state", "key", "age", "why")
FIELDS_HEADER: Final = ("field", "value", "source", "age")


def issue(
    bundle: Place, policy: Policy | None, max_age: timedelta = MAX_AGE, now: datetime | None = None
) -> dict[str, Any]:
    """The receipt of a bundle, a path or a URL, as plain data. Statements count that a key of `policy` signed; None: none does.

    Raises BundleError where the bundle is damaged. Statements that are refused are in the receipt.
    """
    now = now or datetime.now(UTC)
    kept: list[tuple[str, bytes | None]] = []
    manifest = verify_bundle(bundle, approve=lambda place, _, data: kept.append((place, data)))
    place, data = kept[-1]
    found, problem = _found(policy, place, manifest, data, now)
    return receipt(os.fspath(bundle), manifest, found, "" if policy is None else policy.place, problem, now, max_age)


def evidence_rows(made: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The evidence of a receipt as cells under `EVIDENCE_HEADER`."""
    return [
        (one["kind"], one["target"] or "all", one["state"], ", ".join(one["keys"]) or "-", _age(one), one["why"] or "-")
        for one in made["evidence"]
    ]


def field_rows(made: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The fields of a receipt as cells under `FIELDS_HEADER`; a line for each of several times."""
    return [row for one in made["fields"] for row in _rows(one)]


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


def _rows(one: Mapping[str, Any]) -> list[tuple[str, ...]]:
    name, value = one["name"], one["value"]
    source = one["source"] if one["state"] in ("holds", "missing") else f"{one['source']}, {one['state']}"
    if isinstance(value, list):
        return [
            (f"{name}, {each['program']}, {each['batch']}", f"{1e6 * each['seconds']:.1f} us", source, _age(one))
            for each in value
        ]
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return [(name, "missing" if value is None else text, source, _age(one))]


def _age(one: Mapping[str, Any]) -> str:
    return "-" if one["age_days"] is None else f"{one['age_days']} days"
