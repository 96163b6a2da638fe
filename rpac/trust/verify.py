"""Holds the attestations of a bundle against a policy: signatures first, then what they are about, then what they say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from rpac.bundle.manifest import Manifest
from rpac.bundle.storage import ATTESTATIONS
from rpac.errors import BundleError
from rpac.trust.envelope import is_signed_by, parse_lines
from rpac.trust.policy import Policy, TrustedKey
from rpac.trust.predicates import failure, name_of, signed_on
from rpac.trust.statement import Statement, parse_statement, subjects_of

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope

CLOCKS: Final = timedelta(minutes=5)  # by which the clocks of who signs and who verifies may differ


@dataclass(frozen=True)
class Attestation:
    """A statement about the bundle. `keys` are the names of the policy's keys that signed it; `untrusted` says why it does not
    count, where it does not. `signed`: when, as it says itself.
    """

    line: int
    kind: str
    predicate_type: str
    predicate: Mapping[str, Any]
    keys: tuple[str, ...]
    signed: datetime | None
    untrusted: str = ""


@dataclass(frozen=True)
class Verdict:
    """All attestations of a bundle that holds what a policy asks. `trusted` ones are by keys of the policy."""

    attestations: tuple[Attestation, ...]

    @property
    def trusted(self) -> tuple[Attestation, ...]:
        return tuple(one for one in self.attestations if not one.untrusted)


def approved(policy: Policy, place: str, manifest: Manifest, data: bytes | None) -> None:
    """Raises BundleError as `verdict` does: what `rpac.load` asks before it reads a program."""
    verdict(policy, place, manifest, data)


def verdict(policy: Policy, place: str, manifest: Manifest, data: bytes | None, now: datetime | None = None) -> Verdict:
    """What the attestation file `data` of the bundle at `place` says, where it says what the policy requires.

    Raises BundleError for a file that is missing, damaged or of another bundle, for a signature that is not the key's, and
    for a requirement that no statement by a trusted key meets.
    """
    now = now or datetime.now(UTC)
    file = f"{place}{ATTESTATIONS}"
    if data is None:
        raise BundleError(
            f"{file}: found no such file; must hold the bundle's attestations, as {policy.place} asks; put the file that "
            "`rpac sign` wrote beside the bundle"
        )
    found = attestations(policy, file, manifest, data, now)
    trusted = [one for one in found if not one.untrusted]
    if not trusted:
        raise BundleError(
            f"{file}: found no attestation by a key of {policy.place}{_reasons(found)}; sign the bundle with a key that is in it"
        )
    for kind, most in policy.require.items():
        _require(policy, file, kind, most, found, now)
    return Verdict(tuple(found))


def attestations(policy: Policy, file: str, manifest: Manifest, data: bytes, now: datetime) -> list[Attestation]:
    """Every statement in the file. Raises BundleError for one that is damaged, or by a trusted key about another bundle."""
    return [
        _attestation(policy, f"{file}:{number}", number, manifest, envelope, now)
        for number, envelope in enumerate(parse_lines(data, file), 1)
    ]


def refuse_another_bundle(place: str, statement: Statement, manifest: Manifest) -> None:
    """Raises BundleError where a statement is not about exactly this manifest and its blobs."""
    wanted = subjects_of(manifest)
    if statement.subjects != wanted:
        name = next(one for one in (*wanted, *statement.subjects) if statement.subjects.get(one) != wanted.get(one))
        raise BundleError(
            f"{place}: its {name_of(statement.predicate_type)} is about another bundle: {name} has sha256 "
            f"{statement.subjects.get(name, 'nowhere')} there and {wanted.get(name, 'nowhere')} here; must be about this one; "
            "get the file that belongs to the bundle, or sign the bundle if you built it"
        )


def _attestation(
    policy: Policy, place: str, line: int, manifest: Manifest, envelope: Envelope, now: datetime
) -> Attestation:
    signers = [one for one in policy.keys if one.key.keyid in envelope.signatures]
    for one in signers:
        if not is_signed_by(envelope, one.key):
            raise BundleError(
                f"{place}: its signature is not that of the key {one.name}, which it names; it was changed after it was "
                "signed; copy it again, or sign the bundle again"
            )
    statement = parse_statement(envelope.payload, place)
    reason = _untrusted(signers, envelope.signatures, now)
    if not reason:
        refuse_another_bundle(place, statement, manifest)
    signed = signed_on(statement.predicate)
    if not reason and signed is not None and signed > now + CLOCKS:
        raise BundleError(
            f"{place}: was signed on {signed}, which is to come; check the clocks here and where it was signed"
        )
    kind, names = name_of(statement.predicate_type), tuple(one.name for one in signers)
    return Attestation(line, kind, statement.predicate_type, statement.predicate, names, signed, reason)


def _untrusted(signers: Sequence[TrustedKey], ids: Iterable[str], now: datetime) -> str:
    if not signers:
        return f"the policy has no key with the id {', '.join(ids)}"
    problems = [one.problem(now) for one in signers]
    return "" if "" in problems else "; ".join(problems)


def _require(
    policy: Policy, file: str, kind: str, most: timedelta | None, found: Sequence[Attestation], now: datetime
) -> None:
    """Raises BundleError unless the newest trusted statement of a kind holds."""
    of_kind = [one for one in found if one.kind == kind]
    trusted = [one for one in of_kind if not one.untrusted]
    if not trusted:
        raise BundleError(
            f"{file}: found no {kind} by a key of {policy.place}, which requires it{_reasons(of_kind)}; add it with `rpac sign`, "
            "or get the whole file"
        )
    newest = max(trusted, key=lambda one: one.signed or datetime.min.replace(tzinfo=UTC))
    failed = failure(newest.predicate_type, newest.predicate)
    if failed:
        raise BundleError(
            f"{file}:{newest.line}: found a {kind} that does not pass: {failed}; must be PASSED for all kernels, as "
            f"{policy.place} requires it; do not use this bundle before it does"
        )
    if most is None:
        return
    if newest.signed is None:
        raise BundleError(
            f"{file}:{newest.line}: its {kind} does not say when it was signed; must be at most {most.days} days old, as "
            f"{policy.place} says; sign it with `rpac sign`"
        )
    if now - newest.signed > most:
        raise BundleError(
            f"{file}:{newest.line}: its {kind} was signed on {newest.signed:%Y-%m-%d}, {(now - newest.signed).days} days "
            f"ago; must be at most {most.days} days old, as {policy.place} says; make it again and sign it with `rpac sign`"
        )


def _reasons(found: Sequence[Attestation]) -> str:
    reasons = list(dict.fromkeys(one.untrusted for one in found if one.untrusted))
    return f": {'; '.join(reasons)}" if reasons else ""
