"""The toolchain that a server pins: executables run with exactly the libtpu that compiled them, so a bundle is built with it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from rpac.devices.toolchain import PACKAGES
from rpac.errors import TargetError

# From the Requires-Dist lines of the packages' own metadata: vllm-tpu 0.32.0 requires tpu-inference 0.32.0, which requires jax,
# jaxlib and libtpu of exactly these versions; sglang-jax 0.0.2 requires jax[tpu] ~= 0.8.0, which rpac does not support.
_OF_0_32: Final = {"jax": "0.11.2", "jaxlib": "0.11.2", "libtpu": "0.0.48"}
TESTED: Final[Mapping[tuple[str, str], Mapping[str, str]]] = {
    ("vllm", "0.32.0"): _OF_0_32,
    ("tpu-inference", "0.32.0"): _OF_0_32,
}
TOO_OLD: Final[Mapping[tuple[str, str], str]] = {("sglang-jax", "0.0.2"): "jax 0.8"}

DISTRIBUTIONS: Final = {
    "vllm": ("vllm-tpu", "vllm"),
    "tpu-inference": ("tpu-inference",),
    "sglang-jax": ("sglang-jax",),
}
"""What each server is called on the package index."""

_PIN = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?==\s*([^\s;,)]+)\)?\s*$")


@dataclass(frozen=True)
class Server:
    """A server of one version, and the versions of jax, jaxlib and libtpu that it pins."""

    name: str
    version: str
    pins: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"

    def require(self, found: Mapping[str, str]) -> None:
        """Raises TargetError, with the command that installs what is missing, where a toolchain is not the server's."""
        wrong = [f"{name} {found.get(name, 'missing')}" for name in self.pins if found.get(name) != self.pins[name]]
        if wrong:
            pins = " ".join(f"{name}=={version}" for name, version in self.pins.items())
            raise TargetError(
                f"found {', '.join(wrong)}; must be {pins}, which {self} pins: executables run with the libtpu that made them "
                f"alone; build in an environment that has these:\n  python -m pip install {pins}"
            )


def server(text: str) -> Server:
    """The server that `NAME==VERSION` names: as tested, or as the one that is installed here says itself.

    Raises TargetError for one that is neither, or that pins what rpac does not support.
    """
    name, _, version = (part.strip() for part in text.partition("=="))
    name = {"vllm-tpu": "vllm"}.get(name, name)
    if name not in DISTRIBUTIONS or not version:
        names = ", ".join(f"{one}==VERSION" for one in DISTRIBUTIONS)
        raise TargetError(f"found {text!r}; must be one of {names}; name a server and its version")
    if (name, version) in TOO_OLD:
        raise TargetError(
            f"{name}=={version} asks for {TOO_OLD[name, version]}; must be one that rpac supports; run it with a newer JAX, "
            "build with the same, and leave --for out"
        )
    pins = TESTED.get((name, version)) or _installed(name, version)
    if pins is None:
        tested = ", ".join(f"{one}=={tested}" for one, tested in TESTED)
        raise TargetError(
            f"found {name}=={version}, whose pins are not known; must be {tested}, or the version that is installed here; build "
            "in the server's own environment"
        )
    return Server(name, version, pins)


def _installed(name: str, version: str) -> dict[str, str] | None:
    """The pins of the server that is installed here, where it is of that version and pins all of them."""
    for distribution in DISTRIBUTIONS[name]:
        try:
            if importlib.metadata.version(distribution) != version:
                continue
        except importlib.metadata.PackageNotFoundError:
            continue
        required = importlib.metadata.requires(distribution) or []
        pins = {found[1]: found[2] for line in required if (found := _PIN.match(line.partition(";")[0]))}
        if name == "vllm" and "tpu-inference" in pins:
            return _installed("tpu-inference", pins["tpu-inference"])
        if set(PACKAGES) <= set(pins):
            return {package: pins[package] for package in PACKAGES}
    return None
