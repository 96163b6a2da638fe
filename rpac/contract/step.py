"""A model's whole forward step on its way through the stages: its arrays, what it was lowered to, and its record in a bundle.

No JAX here. The step itself is the user's function; rpac knows it by its arrays and by the text that it is lowered to.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from rpac.contract.arrays import ArrayDims, Shape
from rpac.contract.mesh import AXES, Cut, Mesh
from rpac.contract.program import Content, Variant

BITS: Final = {
    "bool": 8, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32,
    "float8_e4m3fn": 8, "float8_e5m2": 8, "bfloat16": 16, "float16": 16, "float32": 32,
}  # fmt: skip
"""The dtypes that arrays of a step may have, with the bits of an element in HBM."""

REFERENCE: Final = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"  # package.module:function
TOKEN_ARRAYS: Final = ("token_ids", "positions")


class StepArray(NamedTuple):
    """One whole array of a step, and how it is cut along its axes over the mesh; an axis without an entry is whole.

    `name` is its path in the tree that the user's function takes or returns, such as `params['layers'][0]['wq']`.
    """

    name: str
    shape: Shape
    dtype: str
    cuts: tuple[Cut, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def part(self, mesh: Mesh) -> Shape:
        """The shape of one device's part."""
        parts = [math.prod(getattr(mesh, axis) for axis in cut) for cut in self.cuts]
        parts += [1] * (len(self.shape) - len(parts))
        return tuple(-(-size // count) for size, count in zip(self.shape, parts, strict=True))

    def nbytes_of_device(self, mesh: Mesh) -> int:
        return math.prod(self.part(mesh)) * BITS[self.dtype] // 8

    def as_data(self) -> list[Any]:
        """Plain data for a manifest."""
        return [self.name, self.dtype, list(self.shape), [list(cut) for cut in self.cuts]]

    @classmethod
    def from_data(cls, data: Sequence[Any]) -> StepArray:
        """The inverse of `as_data`, of data that a manifest's reader has checked."""
        name, dtype, shape, cuts = data
        return cls(name, tuple(shape), dtype, tuple(map(tuple, cuts)))

    @classmethod
    def of(cls, dims: ArrayDims, mesh: Mesh) -> StepArray:
        """An argument or a result of a program, of all devices together."""
        return cls(dims.name, mesh.whole(dims).shape, dims.dtype, mesh.cuts(dims))


Tree = Any
"""The structure of a pytree as plain JSON: the number of a leaf, None, or an object with one key: `dict` (pairs), `list`,
`tuple`, or `namedtuple` (its name and pairs).
"""


class StepSignature(NamedTuple):
    """What a step takes and returns that is not the same for every kind and token bucket."""

    extra: tuple[StepArray, ...]
    outputs: tuple[StepArray, ...]
    outputs_tree: Tree


class ModelSignature(NamedTuple):
    """What all steps of a model take: its parameters, and its caches by their kind of layer."""

    params: tuple[StepArray, ...]
    caches: tuple[str, ...]
    caches_tree: Tree


@dataclass(frozen=True)
class LoweredStep:
    """The step of one kind and token bucket, lowered. `lowered_sha256` is of its StableHLO text; `notes` say what its author may
    want to change.
    """

    target: str
    kind: str
    tokens: int
    function: str
    model: ModelSignature
    signature: StepSignature
    exported: bytes = field(repr=False)
    executable: bytes | None = field(repr=False)
    lowered_sha256: str
    device_kind: str
    topology: str | None
    toolchain: Mapping[str, str]
    memory: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepProgram:
    """The step of one kind and token bucket in a bundle. `memory` has bytes on each device, from the compiled module."""

    variant: Variant
    signature: StepSignature
    exported: Content
    executable: Content | None
    lowered_sha256: str
    memory: Mapping[str, int]


@dataclass(frozen=True)
class Steps:
    """The steps of one target."""

    function: str
    model: ModelSignature
    programs: tuple[StepProgram, ...]

    @property
    def blobs(self) -> frozenset[Content]:
        every = {blob for one in self.programs for blob in (one.exported, one.executable)}
        return frozenset(blob for blob in every if blob is not None)


def tree_of(value: Any, where: str) -> Tree:
    """The structure of a tree whose leaves are numbers. Raises ValueError, naming the place, for a node of another type."""
    if value is None or isinstance(value, int):
        return value
    if type(value) is dict:
        for key in value:
            if not isinstance(key, (str, int)):
                raise ValueError(f"{where} has the key {key!r}; must be text or an integer")
        return {"dict": [[key, tree_of(inner, f"{where}[{key!r}]")] for key, inner in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [tree_of(inner, f"{where}[{index}]") for index, inner in enumerate(value)]}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        pairs = zip(value._fields, value, strict=True)
        return {"namedtuple": [type(value).__name__, [[name, tree_of(one, f"{where}.{name}")] for name, one in pairs]]}
    raise ValueError(f"{where} is a {type(value).__name__}; must be a dict, a list, a tuple or a named tuple")


def builder(tree: Tree) -> Callable[[Sequence[Any]], Any]:
    """What makes a tree of this structure of its leaves. Named tuples are of a class made here, with the same fields.

    Raises ValueError for a structure that `tree_of` does not make.
    """
    if tree is None:
        return lambda leaves: None
    if type(tree) is int:
        number = tree
        return lambda leaves: leaves[number]
    match tree:
        case {"dict": [*pairs]} if len(tree) == 1:
            inner = [(key, builder(one)) for key, one in _pairs(pairs)]
            return lambda leaves: {key: make(leaves) for key, make in inner}
        case {"list": [*ones]} if len(tree) == 1:
            parts = [builder(one) for one in ones]
            return lambda leaves: [make(leaves) for make in parts]
        case {"tuple": [*ones]} if len(tree) == 1:
            members = [builder(one) for one in ones]
            return lambda leaves: tuple(make(leaves) for make in members)
        case {"namedtuple": [str(name), [*pairs]]} if len(tree) == 1:
            made = _named(name, [key for key, _ in _pairs(pairs)])
            fields = [builder(one) for _, one in _pairs(pairs)]
            return lambda leaves: made(*(make(leaves) for make in fields))
    raise ValueError(f"found {str(tree)[:80]}; must be the structure of a tree")


def leaves_of(tree: Tree) -> list[int]:
    """The numbers of a structure's leaves, in its order."""
    if tree is None:
        return []
    if type(tree) is int:
        return [tree]
    [(kind, inner)] = tree.items()
    inner = inner[1] if kind == "namedtuple" else inner
    ones = [one for _, one in inner] if kind in ("dict", "namedtuple") else inner
    return [leaf for one in ones for leaf in leaves_of(one)]


def cuts_fit(cuts: Sequence[Cut], shape: Shape, mesh: Mesh) -> bool:
    """Whether an array of this shape can be cut so: along axes of the mesh, each once, into equal parts."""
    axes = [axis for cut in cuts for axis in cut]
    if len(cuts) > len(shape) or len(set(axes)) < len(axes) or not set(axes) <= set(AXES):
        return False
    return all(
        size % math.prod(getattr(mesh, axis) for axis in cut) == 0 for size, cut in zip(shape, cuts, strict=False)
    )


def _pairs(pairs: Sequence[Any]) -> list[tuple[Any, Tree]]:
    if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (str, int)) for pair in pairs):
        raise ValueError(f"found {str(pairs)[:80]}; must be pairs of a key and a structure")
    return [(key, one) for key, one in pairs]


def _named(name: str, fields: list[str]) -> Any:
    return namedtuple(name, fields)
