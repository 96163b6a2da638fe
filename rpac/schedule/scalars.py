"""Computes the integers that XLA's operations around a kernel make of the call's own: lengths, offsets, conditions.

An operation that is not known here makes values that are not known, which is an error only where a kernel, a loop or a
conditional depends on them.
"""

from __future__ import annotations

import functools
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rpac.errors import ScheduleError
from rpac.schedule.hlo import Array, Module, Operation
from rpac.schedule.layout import is_linear, places, words
from rpac.schedule.memory import Words, words_of

Elements = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Integers:
    """An integer or boolean array, and which of its elements are known."""

    values: Elements
    known: Elements


Value = Integers | tuple["Value", ...] | None
"""What is known of an operation's result: an array, a tuple, or nothing."""

_DTYPES: Final = {
    "pred": np.bool_, "s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32,
    "s64": np.int64, "u64": np.uint64,
}  # fmt: skip
_COMPARE: Final = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
}  # fmt: skip
_ELEMENTWISE: Final[dict[str, Callable[..., Any]]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "negate": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "select": np.where,
    "clamp": lambda low, values, high: np.minimum(np.maximum(values, low), high),
}
_SAME: Final = frozenset({"copy", "copy-done", "opt-barrier", "reshape"})
_SAME_CALL: Final = '"AssumeGatherIndicesInBound"'
_MOST_SORTED: Final = 4096


def evaluate(module: Module, operation: Operation, inputs: Sequence[Value]) -> Value:
    """The result of an operation of XLA that holds no kernel, from those of its operands."""
    if operation.opcode == "tuple":
        return tuple(inputs)
    if operation.opcode == "get-tuple-element":
        of = inputs[0]
        return of[int(_attribute(operation, r"index=(\d+)"))] if isinstance(of, tuple) else None
    if operation.opcode == "fusion":
        inside = operation.called.get("calls")
        return computed(module, inside[0], inputs) if inside else None
    if operation.opcode == "copy-start":
        return (inputs[0], inputs[0], None)
    if operation.opcode in ("opt-barrier", "copy-done") and isinstance(inputs[0], tuple):
        return inputs[0][0] if operation.opcode == "copy-done" else inputs[0]
    arrays = [one for one in inputs if isinstance(one, Integers)]
    if len(arrays) != len(inputs) or any(array.dtype not in _DTYPES for array in operation.shapes):
        return None
    if operation.opcode == "sort":
        return _sorted(module, operation, arrays)
    return _array(module, operation, arrays, operation.shapes[0])


def computed(module: Module, computation: str, arguments: Sequence[Value]) -> Value:
    """The root of a computation that holds no kernel."""
    found: dict[str, Value] = {}
    for operation in module.computations[computation].operations:
        found[operation.name] = (
            arguments[int(operation.arguments)]
            if operation.opcode == "parameter"
            else evaluate(module, operation, [found[name] for name in operation.inputs])
        )
    return found[module.computations[computation].root]


def _array(module: Module, operation: Operation, inputs: Sequence[Integers], to: Array) -> Integers | None:
    opcode, dtype = operation.opcode, _DTYPES[to.dtype]
    if opcode == "constant":
        return _constant(operation.arguments, to)
    if opcode == "iota":
        axis = int(_attribute(operation, r"iota_dimension=(\d+)"))
        shape = [-1 if i == axis else 1 for i in range(len(to.dims))]
        return _known(np.broadcast_to(np.arange(to.dims[axis], dtype=dtype).reshape(shape), to.dims))
    if opcode == "partition-id":
        return _known(np.zeros(to.dims, dtype))  # the first device's; all of them do the same work
    if not inputs:
        return None
    first = inputs[0]
    if opcode in _ELEMENTWISE:
        return _elementwise(_ELEMENTWISE[opcode], inputs, to)
    if opcode == "compare":
        return _elementwise(_COMPARE[_attribute(operation, r"direction=(\w\w)")], inputs, to)
    if opcode == "convert":
        return _elementwise(lambda values: values, inputs, to)
    if opcode in _SAME or _SAME_CALL in operation.attributes:
        return _shaped(inputs, lambda one: one.reshape(to.dims))
    if opcode == "transpose":
        return _shaped(inputs, lambda one: one.transpose(_axes(operation, "dimensions")))
    if opcode == "bitcast":
        return _bitcast(first, module[operation.inputs[0]].shapes[0], to)
    if opcode == "broadcast":
        axes = _axes(operation, "dimensions")
        shape = [1] * len(to.dims)
        for axis, size in zip(axes, first.values.shape, strict=True):
            shape[axis] = size
        return _shaped(inputs, lambda one: np.broadcast_to(one.reshape(shape), to.dims))
    if opcode == "slice":
        bounds = re.findall(r"\[(\d+):(\d+)(?::(\d+))?\]", _attribute(operation, r"slice=\{([^}]*)\}"))
        places = tuple(slice(int(a), int(b), int(c or 1)) for a, b, c in bounds)
        return _shaped(inputs, lambda one: one[places])
    if opcode == "concatenate":
        return _joined(inputs, _axes(operation, "dimensions")[0])
    if opcode == "pad":
        return _padded(first, inputs[1], _attribute(operation, r"padding=([\d_x-]+)"), to)
    if opcode == "dynamic-slice":
        return _dynamic_slice(first, inputs[1:], to)
    if opcode == "gather":
        return _gathered(operation, first, inputs[1], to)
    return None


def _elementwise(function: Callable[..., Any], inputs: Sequence[Integers], to: Array) -> Integers:
    with np.errstate(over="ignore"):
        values = function(*(one.values for one in inputs))
    known = np.logical_and.reduce([np.broadcast_to(one.known, to.dims) for one in inputs])
    return Integers(np.asarray(values).astype(_DTYPES[to.dtype]), known)


def _shaped(inputs: Sequence[Integers], function: Callable[[Any], Any]) -> Integers:
    return Integers(function(inputs[0].values), function(inputs[0].known))


def _joined(inputs: Sequence[Integers], axis: int) -> Integers:
    return Integers(np.concatenate([i.values for i in inputs], axis), np.concatenate([i.known for i in inputs], axis))


def _dynamic_slice(array: Integers, starts: Sequence[Integers], to: Array) -> Integers | None:
    if not all(start.known.all() for start in starts):
        return None
    # A slice that would reach past the end starts earlier instead.
    places = tuple(
        slice(start, start + size)
        for size, start in (
            (size, min(max(int(of.values), 0), whole - size))
            for size, of, whole in zip(to.dims, starts, array.values.shape, strict=True)
        )
    )
    return _shaped([array], lambda one: one[places])


def _bitcast(array: Integers, source: Array, to: Array) -> Integers | None:
    """The same memory with another type: each element is the one at its place."""
    if source.count == to.count == 1 and source.dtype == to.dtype:
        return _shaped([array], lambda one: one.reshape(to.dims))
    before, after = places(source), places(to)
    if array.values.itemsize != np.dtype(_DTYPES[to.dtype]).itemsize:
        return None
    size = int(max(before.max(initial=0), after.max(initial=0))) + 1
    values: Elements = np.zeros(size, _DTYPES[to.dtype])
    known: Elements = np.zeros(size, np.bool_)
    values[before], known[before] = array.values.view(_DTYPES[to.dtype]), array.known
    return Integers(values[after], known[after])


def _padded(array: Integers, filler: Integers, text: str, to: Array) -> Integers | None:
    """`padding=low_high[_interior]x...`; negative padding cuts off, which is not followed, nor is interior padding."""
    amounts = [tuple(map(int, part.split("_"))) for part in text.split("x")]
    if any(n < 0 for amount in amounts for n in amount) or any(any(amount[2:]) for amount in amounts):
        return None
    values: Elements = np.full(to.dims, filler.values, array.values.dtype)
    known: Elements = np.full(to.dims, filler.known)
    inside = tuple(slice(low, low + size) for (low, *_), size in zip(amounts, array.values.shape, strict=True))
    values[inside], known[inside] = array.values, array.known
    return Integers(values, known)


def _gathered(operation: Operation, array: Integers, indices: Integers, to: Array) -> Integers | None:
    """Single elements of a list, by their indices; other gathers are not followed."""
    single = _axes(operation, "slice_sizes") == [1] and _axes(operation, "offset_dims") == []
    if array.values.ndim != 1 or not single or indices.values.size != to.count:
        return None
    chosen = np.clip(indices.values.reshape(to.dims), 0, array.values.size - 1)
    return Integers(array.values[chosen], array.known[chosen] & indices.known.reshape(to.dims))


def _sorted(module: Module, operation: Operation, lists: Sequence[Integers]) -> Value:
    """Lists sorted together by the operation's own comparison, where all of them is known."""
    size = lists[0].values.size
    if lists[0].values.ndim != 1 or size > _MOST_SORTED or not all(one.known.all() for one in lists):
        return None
    compared = operation.called["to_apply"][0]

    def compare(i: int, j: int) -> int:
        pairs = [_known(one.values[place]) for one in lists for place in (i, j)]
        return -1 if decided(computed(module, compared, pairs)) else 0

    # `sorted` moves an element only where it is less than another, so equal ones keep their order.
    order = sorted(range(size), key=functools.cmp_to_key(compare))
    results = tuple(_known(one.values[order]) for one in lists)
    return results if operation.is_tuple else results[0]


def _constant(text: str, to: Array) -> Integers | None:
    words = re.findall(r"-?\d+|true|false", text)
    numbers = [word == "true" if word in ("true", "false") else int(word) for word in words]
    if len(numbers) != to.count:
        return None
    return _known(np.array(numbers, dtype=_DTYPES[to.dtype]).reshape(to.dims))


def _known(values: Any) -> Integers:
    return Integers(np.asarray(values), np.ones(np.shape(values), np.bool_))


def _axes(operation: Operation, name: str) -> list[int]:
    return [int(n) for n in _attribute(operation, rf"\b{name}=\{{([\d,]*)\}}").split(",") if n]


def _attribute(operation: Operation, pattern: str) -> str:
    found = re.search(pattern, operation.attributes)
    if found is None:
        raise ScheduleError(f"%{operation.name}: a {operation.opcode} without {pattern}; another compiler version?")
    return found[1]


# Between arrays and the words that a kernel sees


def from_words(given: Words, to: Array) -> Integers | None:
    """An array that a kernel's scalars wrote. None where words are not its elements in order."""
    return from_elements(given, to) if is_linear(to) else None


def from_elements(given: Words, to: Array) -> Integers | None:
    """An array of the call, whose elements are given in order, however they lie in memory."""
    if not to.is_scalars or len(given) != to.count:
        return None
    if isinstance(given, array):
        return _known(np.array(given, np.int32).astype(_DTYPES[to.dtype]).reshape(to.dims))
    values: Elements = np.array([word or 0 for word in given], dtype=np.int64).astype(_DTYPES[to.dtype])
    known: Elements = np.array([word is not None for word in given], dtype=np.bool_)
    return Integers(values.reshape(to.dims), known.reshape(to.dims))


def to_words(value: Value, of: Array) -> Words | None:
    """What a kernel's scalars can read of an array; None where nothing of it is known.

    Where its elements lie in another order than that of their indices, all of them must be known.
    """
    if not isinstance(value, Integers) or not of.is_scalars:
        return None
    if value.known.all():
        return words_of(value.values) if is_linear(of) else words(value.values.reshape(-1).tolist(), of)
    if not is_linear(of):
        return None
    numbers: list[int] = value.values.reshape(-1).astype(np.int32).tolist()
    return [n if known else None for n, known in zip(numbers, value.known.reshape(-1).tolist(), strict=True)]


def decided(value: Value) -> int | None:
    """The one element of an array, where it is known."""
    if isinstance(value, Integers) and value.values.size == 1 and value.known.all():
        return int(value.values.reshape(-1)[0])
    return None


def parameters_of(module: Module, given: Mapping[int, Words]) -> dict[int, Value]:
    """The arguments of the entry computation, as far as they are given."""
    found: dict[int, Value] = {}
    for operation in module.computations[module.entry].operations:
        if operation.opcode == "parameter" and int(operation.arguments) in given:
            number = int(operation.arguments)
            found[number] = from_elements(given[number], operation.shapes[0])
    return found
