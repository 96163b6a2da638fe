"""Which schedule each operation of a module runs.

The compiler schedules identical operations once: the layers of a model repeat, and all of them call the schedule of one. The
dump names it by that one, so the others are recognized by what they compute.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from rpac.schedule.hlo import Module, Operation

Fingerprint = tuple[object, ...]

_REMARKS: Final = re.compile(r", (?:metadata|frontend_attributes|sharding)=\{")
"""Attributes that say where an operation comes from, and nothing of what it does."""
_PLACE: Final = re.compile(r'"(?:used_)?scoped_memory_configs":\[[^\]]*\]|"aliasing_operands":\{"lists":\[[^\]]*\]\}')
"""Where in VMEM an operation has its scratch: a schedule gets that as an address."""
_CALLED: Final = re.compile(r"=(\{[^}%]*%[^}]*\}|%[\w.\-]+)")


def schedule_names(module: Module, scheduled: Collection[str]) -> dict[str, str]:
    """Operation -> the operation under whose name the dump has its schedule; those that have none are left out."""
    inside = {name for of in module.computations.values() for o in of.operations for name in _runs_within(o)}
    outside = [o for name, of in module.computations.items() if name not in inside for o in of.operations]
    prints: dict[str, Fingerprint] = {}
    first: dict[Fingerprint, str] = {}
    for operation in outside:
        if operation.name in scheduled:
            prints[operation.name] = _fingerprint(module, operation)
            first.setdefault(prints[operation.name], operation.name)
    found = {name: name for name in prints}
    opcodes = {module[name].opcode for name in prints}
    for operation in outside:
        if operation.name not in found and operation.opcode in opcodes:
            twin = first.get(_fingerprint(module, operation))
            if twin is not None:
                found[operation.name] = twin
    return found


def _runs_within(operation: Operation) -> tuple[str, ...]:
    """The computations of a fusion, a reduction, a comparison: parts of one schedule."""
    if operation.opcode in ("while", "conditional", "call"):
        return ()
    return tuple(name for names in operation.called.values() for name in names)


def _fingerprint(module: Module, operation: Operation) -> Fingerprint:
    operands = tuple(module[name].shapes for name in operation.inputs)
    return (operation.opcode, operands, operation.shapes, *_own(module, operation))


def _own(module: Module, operation: Operation) -> Fingerprint:
    called = tuple(_computation(module, name) for names in operation.called.values() for name in names)
    return (_CALLED.sub("", _without_remarks(operation.attributes)), called)


def _computation(module: Module, name: str) -> Fingerprint:
    """A computation without the names of its operations, its parameters first and in their order."""
    computation = module.computations[name]
    parameters = [o for o in computation.operations if o.opcode == "parameter"]
    others = [o for o in computation.operations if o.opcode != "parameter"]
    ordered = [*sorted(parameters, key=lambda o: int(o.arguments)), *others]
    number = {operation.name: i for i, operation in enumerate(ordered)}
    return tuple(
        (o.opcode, tuple(number[i] for i in o.inputs), o.shapes, o.name == computation.root, _text(o), *_own(module, o))
        for o in ordered
    )


def _text(operation: Operation) -> str:
    """The arguments of an operation that has no inputs, such as the value of a constant."""
    return "" if operation.inputs else operation.arguments


def _without_remarks(attributes: str) -> str:
    while match := _REMARKS.search(attributes):
        depth, end, quoted = 1, match.end(), False
        while depth and end < len(attributes):
            character = attributes[end]
            if character == "\\":
                end += 1
            elif character == '"':
                quoted = not quoted
            elif not quoted:
                depth += {"{": 1, "}": -1}.get(character, 0)
            end += 1
        attributes = attributes[: match.start()] + attributes[end:]
    return _PLACE.sub("", attributes)
