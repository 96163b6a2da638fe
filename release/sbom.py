"""Writes the SBOM of a wheel in CycloneDX's format: rpac with the wheel's hash, and what is installed beside it.

    python release/sbom.py dist/rpac-0.1.0-py3-none-any.whl ENVIRONMENT/bin/python dist/rpac-0.1.0.cdx.json

ENVIRONMENT has the wheel and its dependencies alone, so the SBOM has the versions that an install got on that day. Needs
requirements-release.txt.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).parents[1]
FORMAT = SchemaVersion.V1_6


def sbom(wheel: Path, python: Path) -> dict[str, Any]:
    """The SBOM as plain data, the same for the same wheel and environment."""
    found = subprocess.run(
        [
            sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--sv", FORMAT.to_version(),
            "--mc-type", "library", "--pyproject", str(ROOT / "pyproject.toml"), "-o", "-", str(python),
        ],
        check=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    data: dict[str, Any] = json.loads(found.stdout)
    name, version = identity(wheel)
    # The tool reads pyproject.toml, where the version is not written, and knows no wheel.
    data["metadata"]["component"] |= {
        "version": version,
        "purl": f"pkg:pypi/{name}@{version}",
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}],
    }
    return data


def identity(wheel: Path) -> tuple[str, str]:
    """The name and the version that a wheel's metadata has."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [one for one in archive.namelist() if one.endswith(".dist-info/METADATA")]
        found = Parser().parsestr(archive.read(metadata).decode())
    return found["Name"], found["Version"]


def main() -> None:
    wheel, python, out = map(Path, sys.argv[1:])
    text = json.dumps(sbom(wheel, python), indent=2, sort_keys=True) + "\n"
    problem = JsonStrictValidator(FORMAT).validate_str(text)
    if problem is not None:
        sys.exit(f"{out}: found {problem}; must be as CycloneDX {FORMAT.to_version()} says; nothing was written")
    out.write_text(text)


if __name__ == "__main__":
    main()
