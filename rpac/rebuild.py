"""Builds a bundle again from its own spec, and says whether the same bytes come out."""

from __future__ import annotations

from pathlib import Path

from rpac.build import sources_of
from rpac.bundle.manifest import SPEC, Manifest
from rpac.contract.program import Content
from rpac.errors import TargetError
from rpac.plan.tuned import Tuned, TunedTiles
from rpac.spec import load_spec


def require_same_kernels(bundle: Path, manifest: Manifest, tuned: Tuned = TunedTiles.of) -> None:
    """Raises TargetError unless this rpac generates, from the bundle's own spec, the very kernels that the bundle holds."""
    spec = load_spec(bundle / SPEC)
    targets = tuple(dict.fromkeys(one.name for one in manifest.targets.values()))
    made = {
        f"source/{source.path}": Content.of(source.text.encode())
        for part in spec.parts
        for _, source in sources_of(part, targets, tuned)
    }
    held = {name: content for name, content in manifest.files.items() if name != SPEC}
    for name in sorted(made.keys() | held.keys()):
        if made.get(name) != held.get(name):
            raise TargetError(
                f"{bundle}: this rpac does not generate its {name} from its {SPEC}; must be the same, because its provenance "
                "would name other templates or tuned tiles; use the rpac and the --tuned folder that built it, or leave the "
                "provenance out with --no-provenance"
            )
