"""A step as one jitted function of flat arrays: the user's function with the spec's programs as `attend`.

Arguments: the leaves of the parameters, the caches, `token_ids`, `positions`, the batch's metadata, the leaves of what else the
step takes. Results: the caches, each in the memory of its argument, then the outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from rpac.contract.arrays import ArrayDims, index_of, metadata_specs
from rpac.contract.step import TOKEN_ARRAYS, StepArray, StepSignature, tree_of
from rpac.devices.chip import PLATFORMS, chip, is_tpu, topology_of
from rpac.devices.jax_compat import target_mesh
from rpac.devices.placement import on_mesh
from rpac.engine.arguments import in_order, refuse
from rpac.errors import BatchError, CompileError
from rpac.lower import Task
from rpac.lower.worker import load_program
from rpac.step.function import Described, arrays_of, place_of, told
from rpac.step.task import StepTask


class Metadata(NamedTuple):
    """What a step is told of its batch: the arrays that docs/batch-contract.md describes, int32."""

    kv_lens: jax.Array
    page_indices: jax.Array
    cu_q_lens: jax.Array
    distribution: jax.Array


class Step:
    """The step of a task on devices of its target's smallest topology, or on any.

    `arguments` are whole arrays in order. Nothing is traced before it is needed.
    """

    def __init__(self, task: StepTask, function: Callable[..., Any], described: Described, on_topology: bool) -> None:
        self.task = task
        self.function = function
        self.described = described
        self.topology = topology_of(task.target, task.mesh.devices) if on_topology else None
        self.devices: Sequence[Any] = []
        if self.topology is not None:
            self.devices = topologies.get_topology_desc(self.topology, "tpu").devices
        self._attends = {layer: _Attend(one, self.devices) for layer, one in task.programs.items()}
        first = next(iter(self._attends.values()))
        self._mesh = first.mesh
        self._one = jax.sharding.SingleDeviceSharding(self.devices[0]) if len(self.devices) else None
        self.caches = tuple(
            StepArray.of(self._attends[layer].cache, task.mesh)._replace(name=f"caches{path}")
            for path, layer in _paths(described.caches)
        )
        self.batch = tuple(StepArray.of(dims, task.mesh) for dims in token_arrays(task.limits, task.tokens))
        self.arguments = (*described.params_arrays, *self.caches, *self.batch, *described.extra_arrays)
        self._outputs: Any = None  # the structure of what the step returns beside the caches, once it was traced

    @property
    def donated(self) -> range:
        """The arguments that are caches."""
        first = len(self.described.params_arrays)
        return range(first, first + len(self.caches))

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=self._sharding(one)) for one in self.arguments]

    @cached_property
    def jitted(self) -> Any:
        """The step of flat arrays, jitted. Raises CompileError as `trace` does."""
        options: dict[str, Any] = {}
        if self._mesh is not None:
            options["out_shardings"] = tuple(
                map(self._sharding, (*self.caches, *self._output_arrays(self._shapes_of_results())))
            )

        # An executable has no argument list but its own: without keep_unused, those it ignores would be missing from it.
        def step(*leaves: jax.Array) -> Any:  # whose name the compiled module has
            return self._flat(*leaves)

        return jax.jit(step, donate_argnums=tuple(self.donated), keep_unused=True, **options)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Within it the step is traced and lowered for its target."""
        with contextlib.ExitStack() as stack:
            if self._mesh is not None:
                # For partitions that the step itself names. It says for which kind of device Pallas lowers, too.
                abstract = getattr(self._mesh, "abstract_mesh", self._mesh)
                stack.enter_context(jax.sharding.use_abstract_mesh(abstract))
            elif is_tpu(self.task.target):
                stack.enter_context(target_mesh(chip(self.task.target).device_kind))
            yield

    @cached_property
    def traced(self) -> Any:
        """The step traced, once. Raises CompileError with the place in the user's code."""
        with self._told():
            return self.jitted.trace(*self.shapes)

    def _shapes_of_results(self) -> Any:
        with self._told():
            return jax.eval_shape(self._flat, *self.shapes)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        with self.context():
            try:
                yield
            except CompileError:
                raise
            except Exception as error:
                where = place_of(self.function)
                raise CompileError(f"{self.task.label}: {told(error)}, while {where} was traced") from error

    @property
    def platform(self) -> str:
        return PLATFORMS.get(self.task.target, "tpu")

    def lower(self) -> Any:
        """The traced step, lowered for its target."""
        traced = self.traced
        with self.context():
            return traced.lower(lowering_platforms=(self.platform,))

    @property
    def signature(self) -> StepSignature:
        """What the step takes beside the parameters, the caches and the batch, and what it returns beside the caches."""
        arrays = self._output_arrays(self.traced.out_info)
        numbered = jax.tree.unflatten(self._outputs, range(len(arrays)))
        try:
            return StepSignature(self.described.extra_arrays, arrays, tree_of(numbered, "outputs"))
        except ValueError as error:
            raise CompileError(f"{self._place}: {error}") from error

    def _output_arrays(self, results: Sequence[Any]) -> tuple[StepArray, ...]:
        """The outputs among the flat results."""
        outputs = jax.tree.unflatten(self._outputs, results[len(self.caches) :])
        return arrays_of(outputs, self.described.outputs, "outputs", self.task.mesh, self._place)

    @property
    def _place(self) -> str:
        return f"{self.task.label}: {place_of(self.function)}"

    def _flat(self, *leaves: jax.Array) -> Any:
        described = self.described
        given = iter(leaves)
        params, caches = (_filled(tree, given) for tree in (described.params, described.caches))
        token_ids, positions = next(given), next(given)
        batch = Metadata(*(next(given) for _ in Metadata._fields))
        extra = _filled(described.extra, given)
        returned = self.function(self._attend_in(batch), params, caches, token_ids, positions, batch, *extra)
        return self._returned(returned)

    def _attend_in(self, batch: Metadata) -> Callable[..., Any]:
        def attend(*arrays: Any, layer: str = "", batch: Metadata = batch, **extra: Any) -> tuple[jax.Array, ...]:
            """The results of the program of a kind of layer: out, the cache, and what else the spec asks for.

            `arrays` are those before the metadata. `batch`: in place of the step's own, such as one with the page tables of a
            layer. `extra`: what the features of the spec take, by name.
            """
            if layer not in self._attends:
                names = ", ".join(map(repr, self._attends))
                raise BatchError(f"attend: layer is {layer!r}; must be one of {names}, the spec's kinds of layers")
            return self._attends[layer](*arrays, batch=batch, extra=extra)

        return attend

    def _returned(self, returned: Any) -> tuple[Any, ...]:
        """The leaves of the caches and the outputs, where the caches are as they went in. Raises CompileError else."""
        place = self._place
        if not isinstance(returned, tuple) or len(returned) != 2:
            shown = f"{len(returned)} values" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
            raise CompileError(f"{place}: returns {shown}; must be two: `return outputs, caches`")
        outputs, caches = returned
        wanted, structure = jax.tree.structure(self.described.caches), jax.tree.structure(caches)
        if structure != wanted:
            raise CompileError(
                f"{place}: returns caches of the structure {structure}; must be that of its argument, {wanted}; return the "
                "caches in the order in which they came"
            )
        leaves = jax.tree.leaves(caches)
        for cache, leaf in zip(self.caches, leaves, strict=True):
            shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
            if shape != cache.shape or dtype != np.dtype(cache.dtype):
                shown = f"{dtype}{list(shape)}" if shape is not None else f"a {type(leaf).__name__}"
                raise CompileError(
                    f"{place}: returns {cache.name} as {shown}; must be {cache.dtype}{list(cache.shape)}, as it came; return "
                    "the cache that attend returned for it"
                )
        self._outputs = jax.tree.structure(outputs)
        return (*leaves, *jax.tree.leaves(outputs))

    def _sharding(self, array: StepArray) -> jax.sharding.Sharding | None:
        return self._one if self._mesh is None else NamedSharding(self._mesh, partition_of(array))


class _Attend:
    """The program of one kind of layer, as a function of whole arrays."""

    def __init__(self, task: Task, devices: Sequence[Any]) -> None:
        program, shardings = on_mesh(load_program(task.source), task.mesh, task.args, task.results, devices)
        self.mesh = shardings[0].mesh if isinstance(shardings[0], NamedSharding) else None
        self.cache = task.args[index_of(task.args, "kv_cache")]
        self._args = task.args
        self._whole = [task.mesh.whole(dims) for dims in task.args]
        self._before = index_of(task.args, "kv_lens")

        def ragged_paged_attention(*arrays: jax.Array) -> Any:
            return program(*arrays)

        # Under a jit of its own, all layers of a kind share one copy of the program in the module that is compiled.
        self._program = jax.jit(ragged_paged_attention)

    def __call__(self, *arrays: Any, batch: Metadata, extra: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        if len(arrays) != self._before:
            takes = ", ".join(dims.name for dims in self._args[: self._before])
            raise BatchError(
                f"attend: found {len(arrays)} arrays; must be {takes}; the batch's arrays are passed by rpac"
            )
        given = in_order(self._args, (*arrays, *batch), extra)
        for dims, array in zip(self._whole, given, strict=True):
            if getattr(array, "shape", None) != dims.shape or getattr(array, "dtype", None) != np.dtype(dims.dtype):
                refuse(dims, array)
        results: tuple[jax.Array, ...] = self._program(*given)
        return results


def token_arrays(limits: Any, tokens: int) -> tuple[ArrayDims, ...]:
    """What a step takes of a batch, of one device: the tokens and their positions, then the metadata."""
    return (*(ArrayDims(name, (tokens,), "int32") for name in TOKEN_ARRAYS), *metadata_specs(limits))


def partition_of(array: StepArray) -> PartitionSpec:
    """How an array is cut, as JAX says it."""
    return PartitionSpec(*(cut or None for cut in array.cuts))


def _paths(tree: Any) -> list[tuple[str, str]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _filled(tree: Any, leaves: Iterator[jax.Array]) -> Any:
    """The tree with the next of `leaves` at each of its own."""
    return jax.tree.map(lambda _: next(leaves), tree)
