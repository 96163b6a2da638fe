"""A verification summary (VSA, SLSA v1.1) of a rebuild: this bundle is what its own spec makes, byte for byte."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any, Final

from rpac.bundle.manifest import SPEC, Manifest
from rpac.devices.toolchain import toolchain
from rpac.trust.predicates import PASSED, time_text

VERIFIER: Final = "urn:rpac:verifier:rebuild"
POLICY: Final = "urn:rpac:policy:rebuild:v1"
LEVEL: Final = "RPAC_REBUILT_BYTE_FOR_BYTE"
UNEVALUATED: Final = "SLSA_BUILD_LEVEL_UNEVALUATED"  # a rebuild says nothing of how the first builder was run


def summary(manifest: Manifest, inputs: bytes | None, now: datetime | None = None) -> dict[str, Any]:
    """The predicate of a rebuild that made the same bytes. `inputs`: the file of attestations as the rebuild found it."""
    tools = toolchain()
    found = [] if inputs is None else [{"digest": {"sha256": hashlib.sha256(inputs).hexdigest()}}]
    return {
        "verifier": {"id": VERIFIER, "version": {name: tools[name] for name in ("rpac", "jax", "jaxlib", "libtpu")}},
        "timeVerified": time_text(now or datetime.now(UTC)),
        "resourceUri": f"urn:rpac:bundle:{manifest.name}",
        "policy": {"uri": POLICY, "digest": {"sha256": manifest.files[SPEC].sha256}},
        "inputAttestations": found,
        "verificationResult": PASSED,
        "verifiedLevels": [LEVEL, UNEVALUATED],
        "slsaVersion": "1.1",
    }
