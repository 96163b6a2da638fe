"""What the tests of signatures share: a day, a predicate, and the verdict on a bundle."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rpac.bundle import read_manifest
from rpac.bundle.storage import attestation_path
from rpac.trust import Policy, verdict
from rpac.trust.envelope import render_lines, sealed
from rpac.trust.keys import read_private

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
TESTED = {"result": "PASSED", "configuration": []}

Sign = Callable[..., Path]
PolicyFile = Callable[..., Path]


def judge(policy: Policy, bundle: Path, now: datetime = NOW) -> Any:
    """The verdict on the file beside a bundle, or what it raises."""
    path = attestation_path(bundle)
    data = path.read_bytes() if path.exists() else None
    return verdict(policy, str(bundle), read_manifest(bundle), data, now)


def put(bundle: Path, payload: bytes, key: Path) -> None:
    """Makes a signed payload of any kind the only line of the file beside a bundle."""
    attestation_path(bundle).write_bytes(render_lines([sealed(payload, read_private(key))]))
