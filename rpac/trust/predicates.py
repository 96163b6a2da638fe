"""The kinds of statements that a bundle can have, by the short names that policies use."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

PROVENANCE: Final = "provenance"
TESTS: Final = "test-result"
PREDICTION: Final = "prediction"
BENCH: Final = "bench"
DEMO: Final = "demo"
SUMMARY: Final = "verification-summary"

TYPES: Final[Mapping[str, str]] = {
    PROVENANCE: "https://slsa.dev/provenance/v1",
    TESTS: "https://in-toto.io/attestation/test-result/v0.1",
    PREDICTION: "urn:rpac:attestation:prediction:v1",
    BENCH: "urn:rpac:attestation:bench:v1",
    DEMO: "urn:rpac:attestation:demo:v1",
    SUMMARY: "https://slsa.dev/verification_summary/v1",
}
NAMES: Final[Mapping[str, str]] = {uri: name for name, uri in TYPES.items()}

SIGNED_ON: Final = "rpac_signedOn"
"""In every predicate: when it was signed, in UTC and whole seconds, such as 2026-11-29T06:33:43Z."""

_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_RESULTS: Final[Mapping[str, str]] = {TESTS: "result", SUMMARY: "verificationResult"}  # the key that must say PASSED
PASSED: Final = "PASSED"
UNCHECKED: Final = "rpac_unchecked"  # kernels of the bundle that a check did not run
MUTATIONS: Final = "rpac_mutations"  # bugs that were planted into kernels, and how many of them the check caught


def name_of(predicate_type: str) -> str:
    """The short name, or the whole type where there is none."""
    return NAMES.get(predicate_type, predicate_type)


def time_text(when: datetime) -> str:
    return when.astimezone(UTC).strftime(_TIME)


def signed_on(predicate: Mapping[str, Any]) -> datetime | None:
    """When a predicate was signed, as it says itself; None where it does not."""
    try:
        return datetime.strptime(predicate[SIGNED_ON], _TIME).replace(tzinfo=UTC)
    except (KeyError, TypeError, ValueError):
        return None


def failure(predicate_type: str, predicate: Mapping[str, Any]) -> str:
    """What a predicate says of a test that did not pass, or not of all kernels; empty where all is well, or where it is of no
    kind that has a result.
    """
    key = _RESULTS.get(name_of(predicate_type))
    if key is None:
        return ""
    if predicate.get(key) != PASSED:
        return f"its {key} is {predicate.get(key)!r}"
    unchecked = predicate.get(UNCHECKED) or []
    if not isinstance(unchecked, list):
        return f"its {UNCHECKED} is {unchecked!r}"
    return f"it leaves out {', '.join(map(str, unchecked))}" if unchecked else ""
