"""Holds trees of arrays against what a step takes: their structure, shapes, dtypes, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from rpac.contract.step import StepArray
from rpac.devices.placement import Placement
from rpac.engine.arguments import check_placed, shown
from rpac.errors import BatchError


class Leaves:
    """The arrays of one tree that a step takes: `name` and a path name each."""

    def __init__(self, name: str, arrays: Sequence[StepArray], placement: Placement) -> None:
        self.arrays = tuple(arrays)
        self.shardings = [placement.cut(one.cuts) for one in arrays]
        self._name = name
        self._placement = placement
        self._expected = [(one.shape, jax.numpy.dtype(one.dtype)) for one in arrays]
        self._known: Any = None  # the last structure that was the right one

    @staticmethod
    def names(name: str, tree: Any) -> list[str]:
        """The path of each leaf of a tree, as a build names it."""
        return [name + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]

    def flatten(self, tree: Any) -> tuple[list[Any], Any]:
        """The leaves of a tree and its structure. Raises BatchError for another structure than the step takes."""
        leaves, structure = jax.tree.flatten(tree)
        if self._known is None or structure != self._known:
            wanted, found = [one.name for one in self.arrays], self.names(self._name, tree)
            if found != wanted:
                raise BatchError(self._other_structure(found, wanted))
            self._known = structure
        return leaves, structure

    def _other_structure(self, found: list[str], wanted: list[str]) -> str:
        missing = [name for name in wanted if name not in found]
        unknown = [name for name in found if name not in wanted]
        what = [
            f"{word} {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
            for word, names in (("no", missing), ("an unknown", unknown))
            if names
        ]
        return (
            f"{self._name} have {' and '.join(what) or 'their leaves in another order'}; must have the {len(wanted)} leaves "
            "that the step was built with, by name; pass the same tree as the function that describes the step's arrays returns"
        )

    def check(self, leaves: Sequence[Any], host: bool = False) -> None:
        """Raises BatchError for the first leaf that is not what the step takes, where it takes it. `host`: numpy arrays too."""
        self.check_shapes(leaves)
        for one, wanted, leaf in zip(self.arrays, self.shardings, leaves, strict=True):
            if isinstance(leaf, jax.core.Tracer):
                raise BatchError(
                    f"{one.name} is traced; must be an array with values: a step cannot be called inside jit"
                )
            if isinstance(leaf, jax.Array):
                fix = "place the parameters with `put`" if self._name == "params" else "place it with jax.device_put"
                check_placed(one.name, wanted, leaf, self._placement, fix)
            elif not host:
                raise BatchError(
                    f"{one.name} is a {type(leaf).__name__}; must be a jax array on {self._placement}; "
                    + ("place the parameters with `put`" if self._name == "params" else "start with new_caches()")
                )

    def check_shapes(self, leaves: Sequence[Any]) -> None:
        """As `check`, of shapes and dtypes alone."""
        for one, (shape, dtype), leaf in zip(self.arrays, self._expected, leaves, strict=True):
            if getattr(leaf, "shape", None) != shape or getattr(leaf, "dtype", None) != dtype:
                raise BatchError(
                    f"{one.name} is {shown(leaf)}; must be {one.dtype}{list(one.shape)}, as the step was built; give that, or "
                    "build the step for what you have"
                )
