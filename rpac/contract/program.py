"""A program on its way through the stages: its source, what it was lowered to, and its record in a bundle."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rpac.contract.arrays import ArrayDims
from rpac.contract.kind import Kind

HEADER_END = '"""\n'


class Content(NamedTuple):
    """The hash and size, in bytes, that a file must have; a blob's name is its hash."""

    sha256: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> Content:
        return cls(hashlib.sha256(data).hexdigest(), len(data))


class Variant(NamedTuple):
    """Which program of a target: the batches it takes and its token bucket."""

    kind: Kind
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.tokens}"


@dataclass(frozen=True)
class Source:
    """One generated module. `path` is relative to the spec's folder in generated/ and to source/ in a bundle."""

    path: str
    text: str

    @functools.cached_property
    def sha256(self) -> str:
        """Of the text, 64 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def body(self) -> str:
        """The text after the header: targets whose plans agree have the same."""
        return self.text.split(HEADER_END, 1)[1]


@dataclass(frozen=True)
class Lowered:
    """One variant, lowered. `exported` is the portable tier; `executable` the raw bytes of the device's own, or None."""

    target: str
    kind: str
    tokens: int
    source: Source
    plan: Mapping[str, Any]
    exported: bytes = field(repr=False)
    executable: bytes | None = field(repr=False)
    device_kind: str
    topology: str | None
    toolchain: Mapping[str, str]
    flags: Mapping[str, str]
    aliases: Mapping[str, Any]
    memory: Mapping[str, Any]
    layer: str = ""


@dataclass(frozen=True, repr=False)
class Program:
    """One variant as built. `plan`, `aliases`, `memory` and `check` are records for people and tools, not for loading.

    `source` is the kernel's file under `source/`; `executable` is None where only the portable tier was built;
    `canary` is the oracle's answer to the call of `rpac.oracle.canary`, None where the build had no oracle; `check` holds
    tolerances and results where the variant was checked.
    """

    variant: Variant
    source: str
    plan: Mapping[str, Any]
    args: tuple[ArrayDims, ...]
    results: tuple[ArrayDims, ...]
    exported: Content
    executable: Content | None
    canary: Content | None
    flags: Mapping[str, str]
    aliases: Mapping[str, Any]
    memory: Mapping[str, Any]
    check: Mapping[str, Any] | None

    def __repr__(self) -> str:
        taken, made = (", ".join(map(str, arrays)) for arrays in (self.args, self.results))
        tiers = "portable" if self.executable is None else "portable and executable"
        return f"<Program {self.variant}, {tiers}, from {self.source}: ({taken}) -> ({made})>"
