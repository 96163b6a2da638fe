"""DSSE envelopes, one a line: what is signed, and by which keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from rpac.errors import BundleError
from rpac.trust.keys import library

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"


def sealed(payload: bytes, signer: CryptoSigner) -> Envelope:
    """An envelope with one signature."""
    library()
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return envelope


def render_lines(envelopes: Sequence[Envelope]) -> bytes:
    """The attestation file."""
    return "".join(json.dumps(one.to_dict(), sort_keys=True) + "\n" for one in envelopes).encode()


def parse_lines(data: bytes, file: str) -> list[Envelope]:
    """The envelopes of an attestation file, none of them verified. Raises BundleError with the line's number."""
    library()
    lines = enumerate(data.split(b"\n"), 1)
    return [_parse(line, f"{file}:{number}") for number, line in lines if line.strip()]


def _parse(line: bytes, place: str) -> Envelope:
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import Error

    try:
        found: Any = Envelope.from_dict(json.loads(line))
        if found.payload_type != PAYLOAD_TYPE:
            raise ValueError(f"payloadType is {found.payload_type!r}")
        if not found.signatures:
            raise ValueError("no signature")
        if not all(isinstance(keyid, str) for keyid in found.signatures):
            raise ValueError("a key id that is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, Error) as error:
        raise BundleError(
            f"{place}: found no DSSE envelope of an in-toto statement ({type(error).__name__}: {error}); it was changed or "
            "damaged; copy it again, or sign the bundle again"
        ) from error
    envelope: Envelope = found
    return envelope


def is_signed_by(envelope: Envelope, key: SSlibKey) -> bool:
    """Whether the signature that names this key is the key's; only of an envelope that has one."""
    from securesystemslib.exceptions import VerificationError

    try:
        envelope.verify([key], 1)
    except VerificationError:  # of which an unverified signature is one kind
        return False
    return True
