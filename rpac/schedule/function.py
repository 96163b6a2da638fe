"""Predicts any jitted function that calls Pallas kernels, for a TPU that is not here.

report = rpac.schedule.predict(function, *shapes, target="v6e", scalars={"lengths": lengths})
print(report)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from numpy.typing import NDArray

from rpac.devices.chip import chip
from rpac.devices.jax_compat import target_mesh
from rpac.errors import ScheduleError
from rpac.schedule.call_report import CallReport
from rpac.schedule.dump import dump_export
from rpac.schedule.memory import Words
from rpac.schedule.operands import kernel_operands
from rpac.schedule.report import Call, KernelOperands, Work

Scalars = Mapping[str | int, Any]


def predict(
    function: Callable[..., Any],
    *shapes: Any,
    target: str,
    scalars: Scalars | None = None,
    work: Work | None = None,
    any_compiler: bool = False,
    timeout: float = 900.0,
) -> CallReport:
    """Predicts one call of a function on one device of a target. `str(report)` is for people, `report.to_json()` is data.

    function: jitted or not; its static arguments are bound, for example by `functools.partial`. shapes: its arguments,
    arrays or `jax.ShapeDtypeStruct`s, or trees of them; values are not looked at. target: "tpu7x", "v6e", "v5p" or "v5e".
    scalars: the values of integer arguments that kernels take as scalars (lengths, tables), by the argument's name, or by
    its number among all leaves of the arguments. work: bytes in HBM and flops that the call cannot do without, for MBU and
    MFU. any_compiler: accept a libtpu that nobody has verified. timeout: of the compile, in seconds.

    Raises ScheduleError where the function does not compile, its schedule holds an instruction that is not known, or a
    kernel needs a scalar that neither `scalars` nor the function's own constants give; TargetError for another target; and
    what the function itself raises when it is traced.
    """
    compiled = compile_function(function, *shapes, target=target, any_compiler=any_compiler, timeout=timeout)
    return compiled.predict(scalars, work)


def compile_function(
    function: Callable[..., Any], *shapes: Any, target: str, any_compiler: bool = False, timeout: float = 900.0
) -> CompiledFunction:
    """Compiles a function once, to predict it with many values of its scalars. Arguments and errors as of `predict`."""
    facts = chip(target)
    leaves, tree = jax.tree.flatten(shapes)
    structs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

    def flat(
        *given: jax.Array,
    ) -> list[jax.Array]:  # an export that is to be written to a file knows no classes of trees
        results: list[jax.Array] = jax.tree.leaves(function(*jax.tree.unflatten(tree, given)))
        return results

    jitted = jax.jit(flat, keep_unused=True)
    with target_mesh(facts.device_kind):
        jaxpr = jitted.trace(*structs).jaxpr
        donated = _donated(function, jax.tree.unflatten(tree, structs))
        exported = export.export(jitted, platforms=("tpu",))(*structs)
    dump = dump_export(exported.serialize(), target, donate=donated, timeout=timeout)
    return CompiledFunction(Call(dump, any_compiler=any_compiler), jaxpr, _names(function, shapes), structs)


def _donated(function: Callable[..., Any], arguments: Sequence[Any]) -> list[int]:
    """The numbers of the leaves that a jitted function donates."""
    if not hasattr(function, "trace"):
        return []
    leaves = jax.tree.leaves(function.trace(*arguments).args_info)
    return [number for number, info in enumerate(leaves) if info.donated]


class CompiledFunction:
    """A function compiled for one target. `call` holds the compiler's schedules."""

    def __init__(self, call: Call, jaxpr: Any, names: Sequence[str], shapes: Sequence[jax.ShapeDtypeStruct]) -> None:
        self.call = call
        self._jaxpr = jaxpr
        self._names = list(names)
        self._shapes = list(shapes)

    def predict(self, scalars: Scalars | None = None, work: Work | None = None) -> CallReport:
        """Predicts one call; arguments and errors as of `rpac.schedule.predict`."""
        parameters, traced = self._scalars(scalars)
        return self.call.predict(parameters, work, traced)

    def operands(self, scalars: Scalars | None = None) -> dict[str, dict[int, Words]]:
        """Kernel name -> its scalar operands by index, as they lie in memory; what cannot be known is missing."""
        return self.call.operands(*self._scalars(scalars))

    def _scalars(self, scalars: Scalars | None) -> tuple[dict[int, list[int]], tuple[KernelOperands, ...]]:
        values = {}
        for key, given in (scalars or {}).items():
            number = self._number(key)
            values[number] = self._checked(number, given)
        parameters = {number: value.reshape(-1).tolist() for number, value in values.items()}
        return parameters, kernel_operands(self._jaxpr, values)

    def _number(self, key: str | int) -> int:
        if isinstance(key, int) and 0 <= key < len(self._names):
            return key
        if key in self._names:
            return self._names.index(str(key))
        raise ScheduleError(f"scalars: found {key!r}; must be an argument: {', '.join(self._names)}")

    def _checked(self, number: int, given: Any) -> NDArray[Any]:
        shape, value, name = self._shapes[number], np.asarray(given), self._names[number]
        if not np.issubdtype(shape.dtype, np.integer) or value.dtype.kind not in "iu":
            raise ScheduleError(
                f"scalars[{name!r}]: found {value.dtype} for an argument of {shape.dtype}; must be integers"
            )
        if value.shape != shape.shape:
            raise ScheduleError(f"scalars[{name!r}]: found shape {list(value.shape)}; must be {list(shape.shape)}")
        return value.astype(shape.dtype)


def _names(function: Callable[..., Any], shapes: Sequence[Any]) -> list[str]:
    """A name for each leaf of the arguments: `lengths`, or `batch['lengths']` in a tree."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [*positional, *(f"arguments[{i}]" for i in range(len(positional), len(shapes)))]
    return [
        f"{name}{jax.tree_util.keystr(path)}"
        for name, shape in zip(names, shapes, strict=False)
        for path, _ in jax.tree_util.tree_leaves_with_path(shape)
    ]
