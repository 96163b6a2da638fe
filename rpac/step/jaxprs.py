"""What a traced step does, before anything is compiled: its constants, its callbacks, and what becomes of each cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from rpac.devices.jax_compat import place_of_equation

HOST: Final = (
    "callback",
    "debug_print",
    "infeed",
    "outfeed",
)  # parts of the names of primitives that wait for the host


@dataclass(frozen=True)
class Constant:
    """An array that is part of the traced step, and where it is used."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    place: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} at {self.place}"


@dataclass
class Caches:
    """`returned`: which of the arguments each returned cache was made of, or None; `readers`: what else uses a cache."""

    returned: list[int | None] = field(default_factory=list)
    readers: list[tuple[int, str]] = field(default_factory=list)


def constants(closed: ClosedJaxpr) -> list[Constant]:
    """The arrays that a traced step holds, each once, the largest first."""
    found = dict(_constants(closed))
    return sorted(found.values(), key=lambda one: -one.nbytes)


def _constants(closed: ClosedJaxpr) -> Iterator[tuple[int, Constant]]:
    for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        users = (one for one in closed.jaxpr.eqns if any(used is variable for used in one.invars))
        yield id(value), _constant(value, next(users, None))
    for equation in closed.jaxpr.eqns:
        for operand in equation.invars:
            if isinstance(operand, Literal):
                yield id(operand.val), _constant(operand.val, equation)
        for inner in _inner(equation):
            if isinstance(inner, ClosedJaxpr):
                yield from _constants(inner)


def _constant(value: Any, equation: Any) -> Constant:
    shape, dtype = np.shape(value), getattr(value, "dtype", np.dtype(type(value)))
    place = "an unknown place" if equation is None else place_of_equation(equation)
    return Constant(tuple(shape), str(dtype), int(np.prod(shape)) * getattr(dtype, "itemsize", 8), place)


def host_calls(jaxpr: Jaxpr) -> Iterator[tuple[str, str]]:
    """The primitives that wait for the host, by name, and where each is."""
    for equation in jaxpr.eqns:
        if any(part in equation.primitive.name for part in HOST):
            yield equation.primitive.name, place_of_equation(equation)
        for inner in _inner(equation):
            yield from host_calls(getattr(inner, "jaxpr", inner))


def follow_caches(jaxpr: Jaxpr, donated: range) -> Caches:
    """What becomes of the arguments `donated` of a step whose first results are its caches.

    An equation is taken to turn the caches among its operands, in order, into its results of the same shapes and dtypes, as
    attend and scan do. One that has no such result reads a cache.
    """
    roots = {jaxpr.invars[index]: place for place, index in enumerate(donated)}
    found = Caches()
    for equation in jaxpr.eqns:
        results = list(equation.outvars)
        for operand in equation.invars:
            root = None if isinstance(operand, Literal) else roots.get(operand)
            if root is None:
                continue
            same = next((one for one in results if _same(one, operand)), None)
            if same is None:
                found.readers.append((root, place_of_equation(equation)))
            else:
                results.remove(same)
                roots[same] = root
    found.returned = [None if isinstance(one, Literal) else roots.get(one) for one in jaxpr.outvars[: len(donated)]]
    return found


def _same(one: Any, other: Any) -> bool:
    return bool(one.aval.shape == other.aval.shape and one.aval.dtype == other.aval.dtype)


def _inner(equation: Any) -> Iterator[ClosedJaxpr | Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in equation.params.values():
        values: Sequence[Any] = value if isinstance(value, (tuple, list)) else (value,)
        yield from (one for one in values if isinstance(one, (ClosedJaxpr, Jaxpr)))
