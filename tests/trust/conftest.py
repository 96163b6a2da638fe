"""Keys, policies and signed bundles. Bundles have stand-in programs, which say all that a signature is about."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from signing import NOW, TESTED, Sign

from rpac.bundle import read_manifest
from rpac.trust.keys import body, generate, read_private, read_public
from rpac.trust.sign import sign


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pairs old and new, and another that no policy has."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("old", "new", "stranger"):
        generate(folder / name)
    return folder


@pytest.fixture
def policy_file(keys: Path, tmp_path: Path) -> Callable[..., Path]:
    """`policy_file(require="...", old="not_after: 2026-05-01")` writes a policy with both keys."""

    def write(require: str = "", **more: str) -> Path:
        lines = ["keys:"]
        for name in ("old", "new"):
            lines += [f"  {name}:", f"    public: {body(read_public(keys / f'{name}.pub'))}"]
            lines += [f"    {more[name]}"] if name in more else []
        path = tmp_path / "policy.yaml"
        lines += ["require:", *(f"  {one}" for one in require.split("; "))] if require else []
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def signed(keys: Path) -> Sign:
    """`signed(bundle, key="old", test-result={...})` signs predicates beside a bundle; returns the file."""

    def write(bundle: Path, key: str = "old", now: datetime = NOW, **predicates: Any) -> Path:
        made = {name.replace("_", "-"): value for name, value in (predicates or {"test_result": TESTED}).items()}
        return sign(bundle, read_manifest(bundle), made, read_private(keys / f"{key}.key"), now).path

    return write
