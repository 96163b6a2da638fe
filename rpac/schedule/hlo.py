"""Reads the scheduled HLO module of a call: its operations in order, their bytes in HBM, and constant scalars.

Only the entry computation is read. A kernel inside a conditional or a loop is refused: nobody could say how often it runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rpac.errors import ScheduleError

_DEFINITION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_OPCODE = re.compile(r" ([\w-]+)\(")
_REFERENCE = re.compile(r"%([^\s,()]+)")
BITS: Final = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8,
}  # fmt: skip
_FREE: Final = frozenset(
    {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id"}
)
_SAME: Final = frozenset({"bitcast", "copy", "reshape", "copy-start", "copy-done", "opt-barrier"})
KERNEL: Final = "tpu_custom_call"
MAX_SCALARS: Final = 1 << 18
"""Elements of a scalar operand: SMEM has 1 MiB."""


@dataclass(frozen=True)
class Operation:
    """One HLO operation. `shapes` has one entry for each result: dtype, dims, bytes in HBM (0 where it is in VMEM).

    layouts: of each result, its order of dimensions and its tiles, as `layout.words` takes them.
    """

    name: str
    opcode: str
    inputs: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], int], ...]
    attributes: str
    layouts: tuple[str, ...] = ()

    @property
    def is_kernel(self) -> bool:
        return self.opcode == "custom-call" and KERNEL in self.attributes

    @property
    def is_free(self) -> bool:
        return self.opcode in _FREE


@dataclass(frozen=True)
class Module:
    """The entry computation's operations in the order they run."""

    operations: tuple[Operation, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {operation.name: operation for operation in self.operations})

    def __getitem__(self, name: str) -> Operation:
        by_name: dict[str, Operation] = self._by_name  # type: ignore[attr-defined]
        return by_name[name]

    def traffic(self, operation: Operation) -> tuple[int, int]:
        """(bytes read, bytes written) in HBM by an operation that touches all of its inputs and results.

        The whole of an asynchronous operation is counted at its start, whose results repeat its inputs.
        """
        if operation.opcode.endswith("-done"):
            return 0, 0
        read = sum(size for name in operation.inputs for _, _, size in self[name].shapes)
        results = sum(size for _, _, size in operation.shapes)
        return read, results - read if operation.opcode.endswith("-start") else results

    def scalars(self, operation: Operation, parameters: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """The scalar operands of a kernel, by index: int32 ones whose values follow from the call's parameters or from
        constants, and lists of float32, all zero, for no schedule turns on a float.
        """
        found = {}
        for index, name in enumerate(operation.inputs):
            dtype, dims, _ = self[name].shapes[0]
            values = [0] * dims[0] if dtype == "f32" and len(dims) == 1 else self._values(name, parameters)
            if values is not None:
                found[index] = values
        return found

    def _values(self, name: str, parameters: Mapping[int, Sequence[int]]) -> list[int] | None:
        operation = self[name]
        dtype, dims, _ = operation.shapes[0]
        count = 1
        for n in dims:
            count *= n
        if dtype == "f32":
            # A scale is multiplied by: nothing that takes time depends on it. What is larger than SMEM is data.
            return [0] * count if count <= MAX_SCALARS else None
        if dtype != "s32":
            return None
        text = operation.attributes
        if operation.opcode == "parameter":
            values = parameters.get(int(text.split(")")[0]))
            return None if values is None else list(values)
        if operation.opcode == "constant":
            numbers = [int(n) for n in re.findall(r"-?\d+", text.split(")")[0])]
            return numbers if len(numbers) == count else numbers * count if len(numbers) == 1 else None
        if operation.opcode in _SAME or operation.opcode == "broadcast":
            values = self._values(operation.inputs[0], parameters)
            if values is None or len(values) == count:
                return values
            return values * count if len(values) == 1 else None
        return None


def parse_module(text: str, name: str = "hlo") -> Module:
    """Reads a `*-TLP-hlo.txt`. Raises ScheduleError where it has no entry computation, or a kernel outside of it."""
    lines = iter(text.split("\n"))
    outside = []
    for line in lines:
        if line.startswith("ENTRY "):
            break
        if KERNEL in line:
            outside.append(line.strip()[:60])
    else:
        raise ScheduleError(f"{name}: no ENTRY computation; the file is truncated or of another compiler version")
    operations = []
    for line in lines:
        if line.rstrip() == "}":  # the metadata of a kernel has lines of its own, which begin with one too
            break
        match = _DEFINITION.match(line)
        if match:
            operations.append(_operation(match[1], match[2], name))
    else:
        raise ScheduleError(f"{name}: the ENTRY computation never ends; the file is truncated")
    if outside:
        raise ScheduleError(
            f"{name}: a kernel runs inside a conditional or loop ({outside[0]} ...); it cannot be timed"
        )
    return Module(tuple(operations))


def _operation(name: str, text: str, where: str) -> Operation:
    # A tuple's type has spaces and parentheses of its own.
    start = len(_split_call(text[1:])[0]) + 2 if text.startswith("(") else 0
    match = _OPCODE.search(text, start)
    if match is None:
        raise ScheduleError(f"{where}: cannot read operation %{name} = {text[:80]!r}; another compiler version?")
    arguments, attributes = _split_call(text[match.end() :])
    types = _SHAPE.findall(text[: match.start()])
    shapes = tuple(_shape(*found) for found in types)
    layouts = tuple(f"{order}:{layout}" for _, _, order, layout in types)
    return Operation(name, match[1], tuple(_REFERENCE.findall(arguments)), shapes, f"{arguments}){attributes}", layouts)


def _split_call(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes the one before `text`, and what after."""
    depth = 1
    for i, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _shape(dtype: str, dims: str, order: str, layout: str) -> tuple[str, tuple[int, ...], int]:
    """Dtype, dims and bytes in HBM, padding by tiles included; 0 bytes in another memory space (`S(1)` is VMEM)."""
    sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
    if "S(" in layout:
        return dtype, sizes, 0
    ordered = [sizes[int(i)] for i in order.split(",") if i] if order else list(reversed(sizes))
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if tile:
        for place, step in enumerate(reversed([int(n) for n in tile[1].split(",")])):
            if place < len(ordered):
                ordered[place] = -(-ordered[place] // step) * step
            elif step > 1:
                ordered.append(step)
    count = 1
    for n in ordered:
        count *= n
    return dtype, sizes, count * BITS.get(dtype, 0) // 8
