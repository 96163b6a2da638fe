"""In-toto statements v1 about a bundle: a predicate, and as subjects the bundle's manifest and every blob of it.

The package in-toto-attestation is not used here: it keeps a predicate as a protobuf Struct, which has no integers, so that
sizes and seeds would become floats, and it would bring protobuf into every server. Tests read these statements with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rpac.bundle.manifest import MANIFEST, Manifest, digest, render
from rpac.bundle.storage import blob_name
from rpac.errors import BundleError

STATEMENT: Final = "https://in-toto.io/Statement/v1"
DIGEST: Final = "rpac_digest"  # an annotation of the manifest's subject: the digest that `rpac inspect` shows


@dataclass(frozen=True)
class Statement:
    """What a signed payload says. `subjects`: sha256 by name."""

    predicate_type: str
    predicate: Mapping[str, Any]
    subjects: Mapping[str, str]


def subjects_of(manifest: Manifest) -> dict[str, str]:
    """The sha256 of the file manifest.json and of every blob, by name. The manifest has the hashes of all other files."""
    blobs = {blob_name(blob): blob.sha256 for blob in sorted(manifest.blobs)}
    return {MANIFEST: hashlib.sha256(render(manifest)).hexdigest(), **blobs}


def render_statement(manifest: Manifest, predicate_type: str, predicate: Mapping[str, Any]) -> bytes:
    """The payload of an envelope: JSON with sorted keys."""
    subjects: list[dict[str, Any]] = [
        {"name": name, "digest": {"sha256": sha256}} for name, sha256 in subjects_of(manifest).items()
    ]
    subjects[0]["annotations"] = {DIGEST: digest(manifest)}
    return statement_text(subjects, predicate_type, predicate)


def statement_text(subjects: Sequence[Mapping[str, Any]], predicate_type: str, predicate: Mapping[str, Any]) -> bytes:
    """A statement about any subjects, as a payload."""
    statement = {"_type": STATEMENT, "subject": subjects, "predicateType": predicate_type, "predicate": predicate}
    return json.dumps(statement, sort_keys=True, allow_nan=False).encode()


def parse_statement(payload: bytes, place: str) -> Statement:
    """The statement in a payload. Raises BundleError; fields that it does not know are left out, as in-toto asks."""
    try:
        data = json.loads(payload)
        if data["_type"] != STATEMENT:
            raise ValueError(f"_type is {data['_type']!r}")
        subjects = {one["name"]: one["digest"]["sha256"] for one in data["subject"]}
        statement = Statement(data["predicateType"], data["predicate"], subjects)
        if not isinstance(statement.predicate, dict) or not isinstance(statement.predicate_type, str):
            raise ValueError("a predicate that is no object, or a type that is no text")
        if len(subjects) < len(data["subject"]) or not all(isinstance(one, str) for one in subjects.values()):
            raise ValueError("subjects that share a name, or have no sha256")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{place}: its payload is no in-toto statement about a bundle ({type(error).__name__}: {error}); must be "
            f"{STATEMENT}; sign the bundle again"
        ) from error
    return statement
