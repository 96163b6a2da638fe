"""The artifact directory: written once and whole, everything hashed, nothing unpickled.

    NAME.rpac/
      manifest.json     the commit mark, with a digest over itself
      blobs/<sha256>    exported programs and TPU executables, named by their hash
      source/...        the kernels that were compiled
      spec.yaml         as given

Reading goes: size limits, manifest, hash of the bytes that are used. Whether they fit the device and what runs them
is the engine's.
"""

from rpac.bundle.manifest import Manifest, Target, digest
from rpac.bundle.read import (
    LoadedSteps,
    LoadedTarget,
    Texts,
    describe,
    read_manifest,
    read_steps,
    read_target,
    read_texts,
    verify_bundle,
)
from rpac.bundle.storage import Place, is_reference, names_bundle
from rpac.bundle.write import is_bundle, stage_bundle, write_bundle
from rpac.contract.program import Content, Program, Variant

__all__ = [
    "Content",
    "LoadedSteps",
    "LoadedTarget",
    "Manifest",
    "Place",
    "Program",
    "Target",
    "Texts",
    "Variant",
    "describe",
    "digest",
    "is_bundle",
    "is_reference",
    "names_bundle",
    "read_manifest",
    "read_steps",
    "read_target",
    "read_texts",
    "stage_bundle",
    "verify_bundle",
    "write_bundle",
]
