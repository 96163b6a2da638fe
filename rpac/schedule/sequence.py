"""Runs a call's scheduled module: its operations in order, through loops and conditionals whose course is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from rpac.errors import ScheduleError
from rpac.schedule.hlo import Module, Operation
from rpac.schedule.memory import Words
from rpac.schedule.scalars import Value, computed, decided, evaluate, from_words, parameters_of, to_words

Kernel = Callable[[Operation, dict[int, Words]], Mapping[int, Words]]
"""Runs one kernel: from its int32 operands by index, as far as they are known, to what its scalars write, by result."""

Other = Callable[[Operation, Callable[[], dict[int, Words]]], object]
"""Runs one operation of XLA. The second argument makes its int32 operands by index, as far as they are known."""

Inside = Callable[[str], bool]
"""Whether the operations of a computation, which a loop, a conditional or a call runs, are followed one by one."""

Undecided = Callable[[Operation], object]
"""Is told of a loop without kernels that runs as often as data says. Its body is followed once."""

_MOST_ITERATIONS: Final = 1 << 16
_MOST_FLOATS: Final = 1 << 16
"""Floats that a kernel can hold as scalars: more do not fit into SMEM."""


def run(
    module: Module,
    parameters: Mapping[int, Words],
    kernel: Kernel,
    other: Other,
    inside: Inside | None = None,
    undecided: Undecided | None = None,
) -> None:
    """Calls `kernel` for each kernel that runs, and `other` for each operation of XLA that takes time, in their order.

    A loop or conditional without kernels is one operation of XLA, or what `inside` says. Raises ScheduleError for one that is
    followed where it is not known how often, or which way, it runs; of loops without kernels, `undecided` is told instead.
    """
    _Run(module, kernel, other, inside or module.holds_kernel, undecided).computation(
        module.entry, parameters_of(module, parameters)
    )


class _Run:
    def __init__(
        self, module: Module, kernel: Kernel, other: Other, inside: Inside, undecided: Undecided | None
    ) -> None:
        self.module = module
        self.kernel = kernel
        self.other = other
        self.inside = inside
        self.undecided = undecided

    def computation(self, name: str, arguments: Mapping[int, Value]) -> Value:
        found: dict[str, Value] = {}
        computation = self.module.computations[name]
        for operation in computation.operations:
            found[operation.name] = (
                arguments.get(int(operation.arguments))
                if operation.opcode == "parameter"
                else self._operation(operation, [found.get(name) for name in operation.inputs])
            )
        return found[computation.root]

    def _operation(self, operation: Operation, inputs: Sequence[Value]) -> Value:
        if operation.is_kernel:
            return self._kernel(operation, inputs)
        inside = [name for names in operation.called.values() for name in names]
        if any(self.inside(name) for name in inside):
            if operation.opcode == "while":
                return self._loop(operation, inputs[0])
            if operation.opcode == "conditional":
                return self._conditional(operation, inputs)
            if operation.opcode == "call":
                return self.computation(inside[0], dict(enumerate(inputs)))
            raise ScheduleError(f"%{operation.name}: a kernel runs inside of a {operation.opcode}; it cannot be timed")
        if not operation.is_free:
            self.other(operation, lambda: self._operands(operation, inputs))
        return evaluate(self.module, operation, inputs)

    def _operands(self, operation: Operation, inputs: Sequence[Value]) -> dict[int, Words]:
        operands: dict[int, Words] = {}
        for index, (name, value) in enumerate(zip(operation.inputs, inputs, strict=True)):
            array = self.module[name].shapes[0]
            # No schedule depends on a float: a scale is only multiplied by.
            floats = array.dtype == "f32" and array.count <= _MOST_FLOATS
            words = [0] * array.count if floats else to_words(value, array)
            if words is not None:
                operands[index] = words
        return operands

    def _kernel(self, operation: Operation, inputs: Sequence[Value]) -> Value:
        written = self.kernel(operation, self._operands(operation, inputs))
        results = tuple(
            from_words(written[index], array) if index in written else None
            for index, array in enumerate(operation.shapes)
        )
        return results if operation.is_tuple else results[0]

    def _loop(self, operation: Operation, state: Value) -> Value:
        called = operation.called
        (condition,), (body,) = called.get("condition", ("",)), called.get("body", ("",))
        if not (condition and body):
            raise ScheduleError(f"%{operation.name}: a loop without condition and body; another compiler version?")
        for _ in range(_MOST_ITERATIONS):
            goes_on = decided(computed(self.module, condition, [state]))
            if goes_on is None and self.undecided is not None and not self.module.holds_kernel(body):
                self.undecided(operation)
                return self.computation(body, {0: state})
            if goes_on is None:
                raise ScheduleError(
                    f"%{operation.name}: how often this loop runs its kernels follows neither from the call's parameters "
                    "and constants nor from what its kernels write by scalars; it cannot be timed"
                )
            if not goes_on:
                return state
            state = self.computation(body, {0: state})
        raise ScheduleError(f"%{operation.name}: a loop of kernels that still runs after {_MOST_ITERATIONS} iterations")

    def _conditional(self, operation: Operation, inputs: Sequence[Value]) -> Value:
        called = operation.called
        branches = called.get("branch_computations") or (
            *called.get("true_computation", ()),
            *called.get("false_computation", ()),
        )
        chosen = decided(inputs[0])
        if chosen is None:
            selector = self.module[operation.inputs[0]]
            raise ScheduleError(
                f"%{operation.name}: which of its kernels run depends on %{selector.name}, a {selector.opcode}, whose "
                "value follows neither from the call's parameters and constants nor from what kernels write by scalars; "
                "it cannot be timed"
            )
        if self.module[operation.inputs[0]].shapes[0].dtype == "pred":
            branch = 0 if chosen else 1
        else:
            branch = chosen if 0 <= chosen < len(branches) else len(branches) - 1  # as HLO defines it
        return self.computation(branches[branch], {0: inputs[branch + 1]})
