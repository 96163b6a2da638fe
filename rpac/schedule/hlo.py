"""Reads the scheduled HLO module of a call: its computations, their operations in order, and their bytes in HBM."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from rpac.errors import ScheduleError

_DEFINITION = re.compile(r"^\s*(ROOT )?%(\S+) = (.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_OPCODE = re.compile(r" ([\w-]+)\(")
_TILES = re.compile(r"T(\([\d,]+\))+")
_TILE = re.compile(r"\(([\d,]+)\)")
_REFERENCE = re.compile(r"%([^\s,(){}]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+).*\{\s*$")
_CALLED = re.compile(
    r"\b(calls|condition|body|to_apply|true_computation|false_computation|branch_computations|called_computations)"
    r"=(\{[^}]*\}|%[\w.\-]+)"
)
BITS: Final = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8,
}  # fmt: skip
_FREE: Final = frozenset(
    {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id"}
)
KERNEL: Final = "tpu_custom_call"


@dataclass(frozen=True)
class Array:
    """The type of one result. bytes: in HBM, 0 where it is in VMEM.

    order: its dimensions, minor first. tiles: those of its layout, outer first, each with the minor dimension last.
    """

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    order: tuple[int, ...]
    tiles: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return math.prod(self.dims)

    @property
    def is_scalars(self) -> bool:
        """Whether a kernel's scalar program can work with its elements."""
        return self.dtype in ("s32", "u32")


@dataclass(frozen=True)
class Operation:
    """One HLO operation. `shapes` has one entry for each array in its results; arguments and attributes are text."""

    name: str
    opcode: str
    inputs: tuple[str, ...]
    shapes: tuple[Array, ...]
    is_tuple: bool
    arguments: str
    attributes: str

    @property
    def is_kernel(self) -> bool:
        return self.opcode == "custom-call" and KERNEL in self.attributes

    @property
    def is_free(self) -> bool:
        return self.opcode in _FREE

    @property
    def called(self) -> dict[str, tuple[str, ...]]:
        """The computations that it runs, by attribute."""
        return {name: tuple(_REFERENCE.findall(text)) for name, text in _CALLED.findall(self.attributes)}


@dataclass(frozen=True)
class Computation:
    """Operations in the order they run, and which of them gives the result."""

    operations: tuple[Operation, ...]
    root: str


@dataclass(frozen=True)
class Module:
    """The computations of a module; the one named `entry` is the call."""

    computations: Mapping[str, Computation]
    entry: str

    def __post_init__(self) -> None:
        by_name = {operation.name: operation for of in self.computations.values() for operation in of.operations}
        object.__setattr__(self, "_by_name", by_name)

    def __getitem__(self, name: str) -> Operation:
        by_name: dict[str, Operation] = self._by_name  # type: ignore[attr-defined]
        return by_name[name]

    @property
    def kernels(self) -> tuple[Operation, ...]:
        """The Pallas kernels of all computations, those of the entry computation last, as the text has them."""
        return tuple(o for computation in self.computations.values() for o in computation.operations if o.is_kernel)

    def holds_kernel(self, computation: str) -> bool:
        """Whether a kernel is in a computation, or in one that its operations run."""
        return any(
            o.is_kernel or any(self.holds_kernel(name) for names in o.called.values() for name in names)
            for o in self.computations[computation].operations
        )

    def traffic(self, operation: Operation) -> tuple[int, int]:
        """(bytes read, bytes written) in HBM by an operation that touches all of its inputs and results.

        The whole of an asynchronous operation is counted where it gets its inputs, at its start or at an update; the
        results there repeat the inputs.
        """
        late = operation.opcode.endswith("-update") and not self[operation.inputs[0]].inputs
        if operation.opcode.endswith(("-done", "-update")) and not late:
            return 0, 0
        read = sum(array.bytes for name in operation.inputs for array in self[name].shapes)
        results = sum(array.bytes for array in operation.shapes)
        return read, results - read if late or operation.opcode.endswith("-start") else results


def parse_module(text: str, name: str = "hlo") -> Module:
    """Reads a `*-TLP-hlo.txt`. Raises ScheduleError where it has no entry computation, or one that never ends."""
    computations: dict[str, Computation] = {}
    entry, inside, root = None, None, ""
    operations: list[Operation] = []
    for line in text.split("\n"):
        match = _DEFINITION.match(line)
        if inside is None:
            started = _COMPUTATION.match(line)
            if started:
                inside, operations = started[2], []
                entry = inside if started[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # which ends a kernel's metadata, of several lines
            computations[inside], inside = Computation(tuple(operations), root), None
        elif match:
            operations.append(_operation(match[2], match[3], name))
            root = match[2] if match[1] else root
    if entry is None:
        raise ScheduleError(f"{name}: no ENTRY computation; the file is truncated or of another compiler version")
    if inside is not None:
        raise ScheduleError(f"{name}: the computation %{inside} never ends; the file is truncated")
    return Module(computations, entry)


def _operation(name: str, text: str, where: str) -> Operation:
    # A tuple's type has spaces and parentheses of its own.
    start = len(_split_call(text[1:])[0]) + 2 if text.startswith("(") else 0
    match = _OPCODE.search(text, start)
    if match is None:
        raise ScheduleError(f"{where}: cannot read operation %{name} = {text[:80]!r}; another compiler version?")
    arguments, attributes = _split_call(text[match.end() :])
    shapes = tuple(_shape(*found) for found in _SHAPE.findall(text[: match.start()]))
    return Operation(
        name, match[1], tuple(_REFERENCE.findall(arguments)), shapes, text[0] == "(", arguments, attributes
    )


def _split_call(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes the one before `text`, and what after."""
    depth = 1
    for i, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _shape(dtype: str, dims: str, order: str, layout: str) -> Array:
    """Bytes include padding by tiles; those of another memory space (`S(1)` is VMEM) do not count."""
    sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
    minor_first = tuple(int(i) for i in order.split(",") if i) if order else tuple(reversed(range(len(sizes))))
    found = _TILES.search(layout)
    tiles = tuple(tuple(map(int, text.split(","))) for text in _TILE.findall(found[0])) if found else ()
    ordered = [sizes[i] for i in minor_first]
    for place, step in enumerate(reversed(tiles[0] if tiles else ())):
        if place < len(ordered):
            ordered[place] = -(-ordered[place] // step) * step
        elif step > 1:
            ordered.append(step)
    size = 0 if "S(" in layout else math.prod(ordered) * BITS.get(dtype, 0) // 8
    return Array(dtype, sizes, size, minor_first, tiles)
