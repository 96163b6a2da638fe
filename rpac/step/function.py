"""The user's step function and the function beside it that describes its arrays. Imported only where JAX may be."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import jaxlib
import numpy as np
from jax.sharding import PartitionSpec

from rpac.contract.mesh import Mesh
from rpac.contract.step import BITS, ModelSignature, StepArray, cuts_fit, tree_of
from rpac.errors import CompileError, Problem, SpecError
from rpac.step.task import StepTask

ARRAYS: Final = "_arrays"  # what the name of the function that describes the arrays ends in
_KEYS: Final = ("params", "caches", "extra", "shardings")
_SHARDINGS: Final = ("params", "extra", "outputs")
_NOT_THE_USERS: Final = (Path(jax.__file__).parent, Path(jaxlib.__file__).parent, Path(__file__).parents[1])


@dataclass(frozen=True)
class Described:
    """What the user's function beside the step says: trees of `jax.ShapeDtypeStruct`, and how arrays are cut over the mesh.

    `caches` is a tree of names of kinds of layers. `outputs` is a tree, or its beginning, of partitions for the outputs.
    """

    params: Any
    extra: tuple[Any, ...]
    caches: Any
    outputs: Any
    params_arrays: tuple[StepArray, ...]
    extra_arrays: tuple[StepArray, ...]
    cache_layers: tuple[str, ...]

    @property
    def model(self) -> ModelSignature:
        leaves, tree = jax.tree.flatten(self.caches)
        numbered = jax.tree.unflatten(tree, range(len(leaves)))
        return ModelSignature(self.params_arrays, self.cache_layers, tree_of(numbered, "caches"))


def load_function(task: StepTask) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The step and the function that describes its arrays. Raises SpecError where one is missing, or its module fails."""
    module_name, _, name = task.function.partition(":")
    if task.folder not in sys.path:
        sys.path.insert(0, task.folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _cannot_import(task, error) from error
        raise _refused(
            task,
            f"{task.function}, but there is no module {error.name!r} in {task.folder} or among the installed packages",
            "must be package.module:function",
            "run rpac in the folder that holds the package, or install it",
        ) from error
    except Exception as error:
        raise _cannot_import(task, error) from error
    found = []
    for wanted, what in ((name, "the step"), (name + ARRAYS, "the function that describes its arrays")):
        function = getattr(module, wanted, None)
        if not callable(function):
            has = ", ".join(one for one, value in vars(module).items() if callable(value) and not one.startswith("_"))
            raise _refused(
                task,
                f"{task.function}, but {module.__file__} has no function {wanted!r} ({has or 'none at all'})",
                f"must have it: {what}",
                "define it, or name another function",
            )
        found.append(function)
    return found[0], found[1]


def _cannot_import(task: StepTask, error: Exception) -> SpecError:
    found = f"{task.function}, whose module cannot be imported: {told(error)}"
    return _refused(task, found, "must be a module that can be imported where the bundle is built", "correct it")


def _refused(task: StepTask, found: str, allowed: str, fix: str) -> SpecError:
    return SpecError([Problem(task.file, None, None, "step", found, allowed, fix)])


def describe(task: StepTask, arrays: Callable[..., Any]) -> Described | None:
    """What `arrays` says of the step of one kind and token bucket; None where the model wants no such step.

    Raises CompileError for what is not a description.
    """
    place = place_of(arrays)
    try:
        found = arrays(task.kind, task.tokens, task.limits)
    except Exception as error:
        raise CompileError(f"{task.label}: {told(error)}, in {place}") from error
    if found is None:
        return None
    if not isinstance(found, Mapping) or not {"params", "caches"} <= set(found) <= set(_KEYS):
        shown = sorted(found) if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise CompileError(
            f"{place}: returns {shown}; must be a dict with params and caches, and maybe extra and shardings; "
            "see docs/steps.md"
        )
    extra = found.get("extra", ())
    if not isinstance(extra, (tuple, list)):
        raise CompileError(
            f"{place}: `extra` is a {type(extra).__name__}; must be a tuple, one entry for each further argument"
        )
    shardings = found.get("shardings", {})
    if not isinstance(shardings, Mapping) or not set(shardings) <= set(_SHARDINGS):
        raise CompileError(f"{place}: `shardings` must be a dict with no keys but {', '.join(_SHARDINGS)}")
    caches = _cache_layers(task, found["caches"], place)
    mesh = task.mesh
    return Described(
        found["params"],
        tuple(extra),
        caches,
        shardings.get("outputs", PartitionSpec()),
        arrays_of(found["params"], shardings.get("params", PartitionSpec()), "params", mesh, place),
        arrays_of(tuple(extra), shardings.get("extra", PartitionSpec()), "extra", mesh, place),
        tuple(jax.tree.leaves(caches)),
    )


def _cache_layers(task: StepTask, caches: Any, place: str) -> Any:
    """The tree of caches with the name of a kind of layer at each leaf."""
    layers = list(task.programs)
    names = "an integer" if layers == [""] else f"a list of {', '.join(map(repr, layers))}"
    if type(caches) is int and layers == [""] and caches > 0:
        return [""] * caches
    leaves = [] if type(caches) is int else jax.tree.leaves(caches)
    if not leaves or not all(isinstance(leaf, str) and leaf in layers for leaf in leaves):
        raise CompileError(
            f"{place}: `caches` is {str(caches)[:80]!r}; must be {names}: the kind of layer of each cache"
        )
    try:
        tree_of(jax.tree.unflatten(jax.tree.structure(caches), range(len(leaves))), "caches")
    except ValueError as error:
        raise CompileError(f"{place}: {error}") from error
    return caches


def arrays_of(tree: Any, partitions: Any, name: str, mesh: Mesh, place: str) -> tuple[StepArray, ...]:
    """The arrays of a tree by their paths. `partitions` is a tree of PartitionSpec, or the beginning of one.

    Raises CompileError for a leaf that is no description of an array, and for a partition that does not fit it.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    try:
        whole = jax.tree.broadcast(partitions, tree, is_leaf=_is_partition)
    except ValueError as error:
        raise CompileError(f"{place}: the shardings of {name} are of another structure than {name}: {error}") from error
    of_leaves = jax.tree.leaves(whole, is_leaf=_is_partition)
    assert len(of_leaves) == structure.num_leaves
    return tuple(
        _array(name + jax.tree_util.keystr(path), leaf, partition, mesh, place)
        for (path, leaf), partition in zip(leaves, of_leaves, strict=True)
    )


def _array(name: str, leaf: Any, partition: Any, mesh: Mesh, place: str) -> StepArray:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None or getattr(dtype, "name", str(dtype)) not in BITS:
        found = f"a {type(leaf).__name__}" if shape is None else f"of dtype {dtype}"
        raise CompileError(
            f"{place}: {name} is {found}; must be a jax.ShapeDtypeStruct with a dtype of {', '.join(BITS)}"
        )
    if not isinstance(partition, PartitionSpec):
        raise CompileError(
            f"{place}: the sharding of {name} is {partition!r}; must be a jax.sharding.PartitionSpec over the axes of the mesh"
        )
    entries = tuple(() if one is None else (one,) if isinstance(one, str) else tuple(one) for one in partition)
    if not cuts_fit(entries, shape, mesh):
        sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.as_dict().items() if axis != "splits_queries")
        raise CompileError(
            f"{place}: {name} {list(shape)} cannot be cut as {partition}; must name axes of the mesh ({sizes}), each once, that "
            "divide the sizes"
        )
    return StepArray(name, tuple(map(int, shape)), np.dtype(dtype).name, entries)


def _is_partition(value: object) -> bool:
    return isinstance(value, PartitionSpec)


def place_of(function: Callable[..., Any]) -> str:
    """The file, line and name of a function, for messages."""
    inner: Any = getattr(function, "__wrapped__", function)
    code = getattr(inner, "__code__", None)
    name = getattr(inner, "__name__", type(inner).__name__)
    return name if code is None else f"{code.co_filename}:{code.co_firstlineno} ({name})"


def told(error: BaseException) -> str:
    """An exception with the last line of the user's own code that it came through."""
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_ours(frame.filename)]
    lines = str(error).strip().splitlines() or [""]
    text = "\n  ".join(lines[:12])
    at = f" at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""
    return f"{type(error).__name__}: {text}{at}"


def _is_ours(filename: str) -> bool:
    return filename.startswith("<") or any(Path(filename).is_relative_to(folder) for folder in _NOT_THE_USERS)
