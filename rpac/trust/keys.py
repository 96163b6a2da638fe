"""Ed25519 keys in PEM files, as openssl writes them too: PKCS #8 for a private key, SubjectPublicKeyInfo for a public one."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rpac.errors import OutputError, Problem, TargetError, TrustError

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

MAX_KEY_BYTES: Final = 1 << 14
PRIVATE, PUBLIC = ".key", ".pub"
_BEGIN, _END = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"
_ALLOWED: Final = "must be an ed25519 key in PEM"
_FIX: Final = "make one with `rpac keygen`"


def library() -> Any:
    """The module `securesystemslib.signer`. Raises TargetError where the packages that sign and verify are missing."""
    try:
        import cryptography  # noqa: F401  # without it securesystemslib verifies in slow Python and cannot sign
        import securesystemslib.signer
    except ImportError as error:
        raise TargetError(
            f"attestations need the packages securesystemslib and cryptography ({error}); install rpac[trust]"
        ) from error
    return securesystemslib.signer


def generate(stem: Path) -> SSlibKey:
    """A new pair of keys in the files `STEM.key`, which only its owner can read, and `STEM.pub`; returns the public one.

    Raises OutputError where one of the files exists or cannot be written.
    """
    signer = library().CryptoSigner.generate_ed25519()
    private, public = (stem.with_name(stem.name + end) for end in (PRIVATE, PUBLIC))
    for path in (private, public):
        if path.exists():
            raise OutputError(
                f"{path}: found a file; must be absent, because a key that is lost cannot be made again; choose another name"
            )
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path, data, mode in (
            (private, signer.private_bytes, 0o600),
            (public, pem(signer.public_key).encode(), 0o644),
        ):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
    except OSError as error:
        raise OutputError(f"{stem}: cannot be written ({error.strerror}); choose another folder") from error
    key: SSlibKey = signer.public_key
    return key


def read_private(path: Path) -> CryptoSigner:
    """The signer of a private key's file. Raises TrustError."""
    library()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = _parsed(path, lambda data: load_pem_private_key(data, None), "a private key that can be read")
    return _ed25519(lambda: library().CryptoSigner(key), str(path), "private")


def read_public(path: Path) -> SSlibKey:
    """The key of a public key's file. Raises TrustError."""
    return public_key(_text(path), str(path))


def public_key(text: str, place: str) -> SSlibKey:
    """The public key of a PEM text, with or without its first and last lines. `place` names it in messages."""
    library()
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    whole = text if "-----" in text else f"{_BEGIN}\n{text.strip()}\n{_END}\n"
    try:
        key = load_pem_public_key(whole.encode())
    except Exception as error:  # of a few kinds, which differ between versions of cryptography
        raise _refusal(place, f"no public key ({error})") from error
    return _ed25519(lambda: library().SSlibKey.from_crypto(key), place, "public")


def pem(key: SSlibKey) -> str:
    """A public key's file."""
    return f"{_BEGIN}\n{body(key)}\n{_END}\n"


def body(key: SSlibKey) -> str:
    """A public key in one line: its PEM file without the first and the last."""
    library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    found = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.keyval["public"]))
    text = found.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return "".join(line for line in text.splitlines() if "-----" not in line)


def policy_lines(name: str, key: SSlibKey) -> str:
    """The lines of a policy that trust a key."""
    return textwrap.dedent(
        f"""\
        keys:
          {name}:
            id: {key.keyid}
            public: {body(key)}
        """
    )


def _ed25519(make: Any, place: str, kind: str) -> Any:
    try:
        made = make()
    except Exception as error:  # a key of an algorithm that the library does not know
        raise _refusal(place, f"a {kind} key that is not ed25519 ({error})") from error
    found = made.public_key if kind == "private" else made
    if found.scheme != "ed25519":
        raise _refusal(place, f"a {kind} key for {found.scheme}")
    return made


def _parsed(path: Path, parse: Any, what: str) -> Any:
    data = _text(path).encode()
    try:
        return parse(data)
    except Exception as error:  # of a few kinds, which differ between versions of cryptography
        raise _refusal(str(path), f"not {what} ({error})") from error


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_BYTES).decode("ascii", errors="replace")
    except OSError as error:
        raise _refusal(str(path), f"no file that can be read ({error.strerror})") from error


def _refusal(place: str, found: str) -> TrustError:
    return TrustError([Problem(place, None, None, "", found, _ALLOWED, _FIX)])
