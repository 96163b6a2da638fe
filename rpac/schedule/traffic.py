"""The bytes that operations of XLA move in HBM where they do not touch the whole of their operands: copies of slices, lookups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rpac.schedule.hlo import BITS, Array, Module, Operation

_LOOKUPS: Final = ("gather", "dynamic-slice")


def copied_bytes(module: Module, operation: Operation) -> int:
    """What an asynchronous copy moves through the HBM channel: of a slice, the slice alone."""
    if operation.opcode == "copy-start":
        return sum(module.traffic(operation))
    if "slice" not in operation.opcode:
        return sum(moved_bytes(module, operation))
    # (operands, result, context): a slice in VMEM has no bytes of its own in HBM, but is read from there.
    moved = [array for array in operation.shapes if array.dims]
    last = moved[-1]
    size = _size(last)
    return size + last.bytes if any(array.bytes for array in moved[:-1]) else last.bytes


def moved_bytes(module: Module, operation: Operation) -> tuple[int, int]:
    """(bytes read, bytes written) in HBM; of an operand that is only looked up in, the rows that are read."""
    read, written = module.traffic(operation)
    for names in operation.called.values():
        for name in names:
            for number, operand in enumerate(operation.inputs):
                rows = _rows(module, name, number)
                if rows is not None:
                    read += min(0, rows - module[operand].shapes[0].bytes)
    return read, written


def looked_up_bytes(module: Module, numbers: Iterable[int]) -> dict[int, int]:
    """Bytes of arguments of the call, by number; of those that are only looked up in, those of the rows."""
    arrays = {
        int(o.arguments): o.shapes[0].bytes
        for o in module.computations[module.entry].operations
        if o.opcode == "parameter"
    }
    rows = {number: _rows(module, module.entry, number) for number in numbers}
    return {number: arrays[number] if found is None else found for number, found in rows.items()}


def _rows(module: Module, computation: str, number: int) -> int | None:
    """Bytes of the rows that a computation reads of a parameter; None where it reads the whole."""
    of = module.computations[computation].operations
    name = next((o.name for o in of if o.opcode == "parameter" and int(o.arguments) == number), None)
    found = 0
    for user in (o for o in of if name in o.inputs):
        inner = [called for names in user.called.values() for called in names]
        if user.opcode in _LOOKUPS and user.inputs[0] == name:
            rows: int | None = _size(user.shapes[0])
        else:
            rows = _rows(module, inner[0], user.inputs.index(name or "")) if inner else None
        if rows is None:
            return None
        found += rows
    return found or None


def _size(array: Array) -> int:
    """Bytes without padding, wherever it lies."""
    return array.count * BITS.get(array.dtype, 0) // 8
