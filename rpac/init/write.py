"""Writes the commented YAML: each line with where its value comes from."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rpac.init.config import Found
from rpac.spec.parse import NAME

WIDTH: Final = 120
_NOT_IN_NAMES: Final = re.compile(r"[^a-z0-9.-]+")
MAX_NAME: Final = 64

Lines = Mapping[str, Found]


@dataclass(frozen=True)
class Layer:
    """A kind of layers: its own keys, and a comment."""

    keys: Lines
    comment: str


@dataclass(frozen=True)
class Document:
    """The parts of a spec, in their order. `head` are the lines of its first comment."""

    head: tuple[str, ...]
    name: Found
    model: Lines
    layers: Mapping[str, Layer]
    serving: Lines
    parallel: Lines
    targets: Found

    def text(self) -> str:
        """The YAML."""
        lines = [*_comment(self.head), *_keys({"name": self.name}, "")]
        lines += ["model:", *_keys(self.model, "  ")]
        if self.layers:
            lines += ["layers:", *_layers(self.layers)]
        lines += ["serving:", *_keys(self.serving, "  ")]
        if self.parallel:
            lines += ["parallel:", *_keys(self.parallel, "  ")]
        lines += _keys({"targets": self.targets}, "")
        return "\n".join(lines) + "\n"


def spec_name(given: str) -> str:
    """A name as a spec may have it, from a folder's or a model's."""
    name = _NOT_IN_NAMES.sub("-", given.lower()).strip("-.")[:MAX_NAME].rstrip("-.")
    return name if re.fullmatch(NAME, name) else "my-model"


def _layers(layers: Mapping[str, Layer]) -> Iterator[str]:
    for name, layer in layers.items():
        yield f"  {name}:{'' if layer.keys else ' {}'}  # {_one_line(layer.comment)}"
        yield from _keys(layer.keys, "    ")


def _keys(keys: Lines, indent: str) -> list[str]:
    written = {key: f"{indent}{key}: {_value(found.value)}" for key, found in keys.items()}
    column = max((len(text) for text in written.values()), default=0)
    return [f"{text:<{column}}  # {_one_line(keys[key].why)}" for key, text in written.items()]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value) if isinstance(value, float) else str(value)


def _one_line(text: str) -> str:
    """Text of a file as a comment may hold it: on one line, without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _comment(lines: Iterable[str]) -> list[str]:
    wrapped = []
    for line in lines:
        wrapped += textwrap.wrap(_one_line(line), WIDTH - 2, break_on_hyphens=False, subsequent_indent="  ") or [""]
    return [f"# {line}".rstrip() for line in wrapped]
