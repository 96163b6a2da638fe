"""The named numbers at the top of a source: every number that a template shows and that is not part of the arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rpac.kernels.literals import prose


@dataclass(frozen=True)
class Constant:
    """`NAME = value  # note`. `value` is the text after the equals sign: numbers, or an expression that this package wrote, but
    never text of a spec. `note` may be empty.

    A `tile` constant is of one kernel: in a program of two kernels each has its own, with a prefix.
    """

    name: str
    value: str
    note: str = ""
    tile: bool = False

    def __str__(self) -> str:
        return f"{self.name} = {self.value}" + (f"  # {prose(self.note)}" if self.note else "")


def number(name: str, value: object, note: str = "") -> Constant:
    """A number of the model or of the cache, the same in all kernels of a program."""
    return Constant(name, str(value), note)


def tile(name: str, value: object, note: str = "") -> Constant:
    """A number that a plan's tiles decide."""
    return Constant(name, str(value), note, tile=True)


def used_in(text: str, constants: Iterable[Constant]) -> list[Constant]:
    """Those that a text names, itself or through the value of another, in their order."""
    constants = list(constants)
    words = set(re.findall(r"[A-Z][A-Z0-9_]*", text))
    for constant in reversed(constants):
        if constant.name in words:
            words |= set(re.findall(r"[A-Z][A-Z0-9_]*", constant.value))
    return [constant for constant in constants if constant.name in words]


def with_prefix(text: str, constants: Sequence[Constant], prefix: str) -> tuple[str, list[Constant]]:
    """A kernel's text and its tile constants, each of these with a prefix: `BUFFERS` becomes `DECODE_BUFFERS`."""
    names = {constant.name: f"{prefix}{constant.name}" for constant in constants if constant.tile}
    if not names:
        return text, list(constants)
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def renamed(text: str) -> str:
        return pattern.sub(lambda found: names[found[1]], text)

    return renamed(text), [
        replace(one, name=names.get(one.name, one.name), value=renamed(one.value)) for one in constants
    ]
