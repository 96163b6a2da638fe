"""Writes attestations beside a bundle: new ones take the place of those of the same kind by the same key, others stay."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpac.bundle.manifest import Manifest
from rpac.bundle.storage import ATTESTATIONS, attestation_path
from rpac.errors import BundleError, OutputError
from rpac.files.publish import publish_file
from rpac.trust.envelope import is_signed_by, parse_lines, render_lines, sealed
from rpac.trust.predicates import SIGNED_ON, TYPES, name_of, time_text
from rpac.trust.statement import Statement, parse_statement, render_statement, subjects_of

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey


@dataclass(frozen=True)
class Signed:
    """What is in the file now: the kinds that were written, those that stayed, and those of another bundle that were dropped."""

    path: Path
    written: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]


def sign(
    bundle: Path,
    manifest: Manifest,
    predicates: Mapping[str, Mapping[str, Any]],
    signer: CryptoSigner,
    now: datetime | None = None,
    countersign: Sequence[SSlibKey] = (),
) -> Signed:
    """Signs `predicates`, by the short names of their kinds, for the bundle in the folder `bundle`.

    Attestations that are in the file already and are about this bundle stay, those of these kinds by this key apart.
    `countersign`: keys whose attestations get a signature of this key too, for when a key takes the place of another one.
    Raises BundleError for a file that is damaged, OutputError where it cannot be written.
    """
    path = attestation_path(bundle)
    when = time_text(now or datetime.now(UTC))
    new = [
        sealed(render_statement(manifest, TYPES[kind], {**predicate, SIGNED_ON: when}), signer)
        for kind, predicate in predicates.items()
    ]
    kept, dropped = _sorted_out(path, manifest, set(predicates), signer.public_key.keyid)
    for envelope, statement in kept:
        _countersign(path, envelope, statement, signer, countersign)
    publish_file(path, render_lines([*(one for one, _ in kept), *new]), is_attestations)
    names = tuple(name_of(statement.predicate_type) for _, statement in kept)
    return Signed(path, tuple(predicates), names, tuple(name_of(one.predicate_type) for one in dropped))


def is_attestations(path: Path) -> bool:
    """Whether a file may be replaced: it has nothing but envelopes."""
    try:
        return path.name.endswith(ATTESTATIONS) and bool(
            parse_lines(path.read_bytes(), str(path)) or not path.stat().st_size
        )
    except (OSError, BundleError):
        return False


def _sorted_out(
    path: Path, manifest: Manifest, kinds: set[str], keyid: str
) -> tuple[list[tuple[Envelope, Statement]], list[Statement]]:
    """What the file has about this bundle that is not made anew; and what it has about others."""
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    kept, dropped, wanted = [], [], subjects_of(manifest)
    for number, envelope in enumerate(parse_lines(data, str(path)), 1):
        statement = parse_statement(envelope.payload, f"{path}:{number}")
        if statement.subjects != wanted:
            dropped.append(statement)
        elif not (name_of(statement.predicate_type) in kinds and set(envelope.signatures) == {keyid}):
            kept.append((envelope, statement))
    return kept, dropped


def _countersign(
    path: Path, envelope: Envelope, statement: Statement, signer: CryptoSigner, keys: Sequence[SSlibKey]
) -> None:
    for key in keys:
        if key.keyid not in envelope.signatures:
            continue
        if not is_signed_by(envelope, key):
            raise BundleError(
                f"{path}: the signature of its {name_of(statement.predicate_type)} is not that of the key {key.keyid}, which it "
                "names; it was changed after it was signed; remove the file, and sign the bundle again"
            )
        envelope.sign(signer)


def folder_of(bundle: str | os.PathLike[str]) -> Path:
    """The path of a bundle that can be signed: a folder. Raises OutputError for a URL or an installed package."""
    text = os.fspath(bundle)
    if "://" in text or text.startswith("package:"):
        raise OutputError(
            f"{text}: found no folder; must be a bundle's folder, because the attestations are written beside it; sign it before "
            "you upload or pack it"
        )
    return Path(text)
