"""The scalar operands of a function's kernels, computed from its integer arguments as the function itself computes them.

A kernel's operands are often not arguments of the call: tables of blocks that are constants of the trace, offsets that JAX
computes from lengths. All of what depends on nothing but integers that are known is computed here, on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.extend import core
from numpy.typing import NDArray

from rpac.schedule.report import KernelOperands

_MOST: Final = 1 << 18
"""Elements of a scalar operand: SMEM has 1 MiB."""

Shapes = tuple[tuple[int, ...], ...]

_KERNEL: Final = "pallas_call"
_CALLS: Final = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_CALL_PRIMITIVES: Final = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "checkpoint",
    }
)


def kernel_operands(traced: core.ClosedJaxpr, values: Mapping[int, NDArray[Any]]) -> tuple[KernelOperands, ...]:
    """The kernels of a traced function in its own order; `values` are those of arguments, by number.

    Kernels inside of loops and conditionals are left out.
    """
    kernels: list[tuple[str, Shapes]] = []
    numbers = sorted(values)

    def known_operands(*given: jax.Array) -> list[dict[int, jax.Array]]:
        found: list[dict[int, jax.Array]] = []
        arguments: list[Any] = [None] * len(traced.jaxpr.invars)
        for number, value in zip(numbers, given, strict=True):
            arguments[number] = value
        _Follower(kernels, found).run(traced.jaxpr, traced.consts, arguments)
        return found

    found = jax.jit(known_operands)(*(values[number] for number in numbers))
    return tuple(
        KernelOperands(name, shapes, {index: np.asarray(value) for index, value in known.items()})
        for (name, shapes), known in zip(kernels, found, strict=True)
    )


class _Follower:
    """Runs the equations of a jaxpr whose inputs are all known; a value that is not is None."""

    def __init__(self, kernels: list[tuple[str, Shapes]], found: list[dict[int, Any]]) -> None:
        self.kernels = kernels
        self.found = found

    def run(self, jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        values: dict[core.Var, Any] = {}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values.get(atom)

        values.update(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: core.JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
        name = equation.primitive.name
        unknown = [None] * len(equation.outvars)
        if name == _KERNEL:
            self._kernel(equation, inputs)
            return unknown
        if name in _CALL_PRIMITIVES:
            inner = next((equation.params[key] for key in _CALLS if key in equation.params), None)
            return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
        if equation.effects or any(value is None for value in inputs):
            return unknown
        results = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
        return list(results) if equation.primitive.multiple_results else [results]

    def _kernel(self, equation: core.JaxprEqn, inputs: Sequence[Any]) -> None:
        shapes = [atom.aval for atom in equation.invars]
        self.kernels.append((equation.params.get("name") or "", tuple(aval.shape for aval in shapes)))
        self.found.append(
            {
                index: value
                for index, (aval, value) in enumerate(zip(shapes, inputs, strict=True))
                if value is not None and aval.dtype.kind in "iu" and aval.size <= _MOST
            }
        )
