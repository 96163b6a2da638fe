"""Signs and verifies where the files of a release come from: SLSA provenance v1 over every file in a folder.

    python release/provenance.py sign dist --key release.key
    python release/provenance.py verify dist --key release.pub

The statement is in the format of `rpac sign`: one DSSE envelope of an in-toto statement, in dist/rpac.intoto.jsonl. Keys are
those of `rpac keygen`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rpac._version import __version__
from rpac.errors import BundleError, RpacError
from rpac.trust.envelope import is_signed_by, parse_lines, render_lines, sealed
from rpac.trust.keys import read_private, read_public
from rpac.trust.predicates import PROVENANCE, SIGNED_ON, TYPES, time_text
from rpac.trust.provenance import LOCAL_BUILDER
from rpac.trust.statement import parse_statement, statement_text

ROOT = Path(__file__).parents[1]
NAME = "rpac.intoto.jsonl"
BUILD_TYPE = "urn:rpac:release:v1"
LOCKS = ("requirements-dev.txt", "requirements-release.txt")


def subjects(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a release, by name."""
    found = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != NAME}
    if not found:
        raise BundleError(f"{folder}: found no files; must have those of a release; make them with `make release`")
    return found


def predicate(checkout: Path, builder: str, now: datetime) -> dict[str, Any]:
    """What the files were built from. Raises BundleError where the checkout is not its commit alone."""
    changed = _git(checkout, "status", "--porcelain").splitlines()
    if changed:
        raise BundleError(
            f"{checkout}: found {len(changed)} changed files, such as {changed[0][3:]}; must be what its commit has, or the "
            "provenance would name another source; commit or remove them"
        )
    commit = _git(checkout, "rev-parse", "HEAD")
    source = {"uri": os.environ.get("RPAC_HOME") or "git", "digest": {"gitCommit": commit}}
    locks = [{"name": name, "digest": {"sha256": _sha256(checkout / name)}} for name in LOCKS]
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"source": source, "version": __version__},
            "resolvedDependencies": [source, *locks],
        },
        "runDetails": {"builder": {"id": builder}},
        SIGNED_ON: time_text(now),
    }


def sign(folder: Path, key: Path, builder: str, checkout: Path = ROOT) -> Path:
    """Writes the statement into the folder."""
    payload = statement_text(
        [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in subjects(folder).items()],
        TYPES[PROVENANCE],
        predicate(checkout, builder, datetime.now(UTC)),
    )
    path = folder / NAME
    path.write_bytes(render_lines([sealed(payload, read_private(key))]))
    return path


def verify(folder: Path, key: Path) -> str:
    """The commit that the files were built from. Raises BundleError where one is missing, changed or too many, or where the
    statement is not signed by this key.
    """
    path, public = folder / NAME, read_public(key)
    if not path.is_file():
        raise BundleError(f"{path}: found no such file; must be what `release/provenance.py sign` wrote")
    (envelope,) = parse_lines(path.read_bytes(), str(path))
    if public.keyid not in envelope.signatures or not is_signed_by(envelope, public):
        raise BundleError(f"{path}: found no signature of {key}; must have one; get the files from who has the key")
    statement = parse_statement(envelope.payload, str(path))
    found = subjects(folder)
    wrong = sorted(name for name in {*found, *statement.subjects} if found.get(name) != statement.subjects.get(name))
    if wrong or statement.predicate_type != TYPES[PROVENANCE]:
        raise BundleError(
            f"{folder}: found {', '.join(wrong) or statement.predicate_type} other than signed; must be one release; "
            "get them again"
        )
    return str(statement.predicate["buildDefinition"]["externalParameters"]["source"]["digest"]["gitCommit"])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git(checkout: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(checkout), *args], capture_output=True, text=True)
    if done.returncode:
        raise BundleError(
            f"{checkout}: found no checkout of git ({done.stderr.strip()}); must be the one that was built"
        )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sign", "verify"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--key", type=Path, required=True, help="private key to sign with, public key to verify with")
    parser.add_argument("--builder", default=LOCAL_BUILDER, help="URI that names what built")
    options = parser.parse_args()
    try:
        if options.what == "sign":
            print(f"{sign(options.folder, options.key, options.builder)}: signed")
        else:
            print(f"{options.folder}: built from commit {verify(options.folder, options.key)}")
    except RpacError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
