"""Which of the programs of an engine, or of its steps, runs a batch: read on the host, from the batch's metadata."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from rpac.batch import Limits
from rpac.batch import validate as validate_metadata
from rpac.batch.select import advice, select
from rpac.contract.arrays import ArrayDims, metadata_specs
from rpac.contract.kind import Int32s
from rpac.contract.mesh import Mesh
from rpac.contract.program import Variant
from rpac.engine.arguments import refuse
from rpac.engine.events import BatchRun
from rpac.errors import BatchError, SelectionError


class Chooser:
    """Chooses among `built` variants. `limits` are of one device of `mesh`."""

    def __init__(self, built: Collection[Variant], limits: Limits, mesh: Mesh) -> None:
        self._built = built
        self._limits = limits
        self._mesh = mesh
        self._metadata = metadata_specs(limits)

    def select(self, tokens: int, distribution: Sequence[int] | Int32s) -> Variant:
        """The variant that runs a batch of one replica. Raises SelectionError for one that was not built."""
        return select(self._built, self._limits, tokens, distribution)

    def choose(self, tokens: int, metadata: Sequence[Any], validate: bool) -> tuple[Variant, BatchRun]:
        """The variant that runs a batch of all replicas, `tokens` query rows each, and what an observer is told of it.

        `validate`: check the metadata's values too. Raises BatchError or SelectionError.
        """
        replicas = [self._of_replicas(dims, array) for dims, array in zip(self._metadata, metadata, strict=True)]
        variants, rows, new = set[Variant | None](), 0, 0
        for kv_lens, page_indices, ends, parts in zip(*replicas, strict=True):
            if validate:
                validate_metadata(self._limits, tokens, kv_lens, page_indices, ends, parts)
            chosen = self.select(tokens, parts)
            variants.add(chosen if parts[2] else None)
            rows += int(parts[2])
            new += int(ends[parts[2]])
        variant = self._common(variants, tokens)
        return variant, BatchRun(variant, rows=rows, tokens=new, padding=len(replicas[0]) * tokens - new)

    def _of_replicas(self, dims: ArrayDims, array: Any) -> list[Int32s]:
        """The part of each data-parallel replica, `dims`, of an array of the batch's metadata."""
        count = self._mesh.data
        if not isinstance(array, (np.ndarray, jax.Array)):
            refuse(self._mesh.whole(dims), array)
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            raise BatchError(
                f"{dims.name} lies on devices of several processes; must be read on the host, by each of them; give the whole "
                "array as numpy, the same in every process"
            )
        found = np.asarray(array)
        if count > 1 and found.shape != (count * dims.shape[0],):
            refuse(self._mesh.whole(dims), array)
        if dims.name == "distribution" and found.shape != (3 * count,):
            refuse(dims, array)
        return [found] if count == 1 else np.split(found, count)

    def _common(self, variants: set[Variant | None], tokens: int) -> Variant:
        """The program that all replicas can run: their own where it is the same, else the one that takes any batch."""
        busy = variants - {None}
        if not busy:
            return self.select(tokens, (0, 0, 0))
        (first, *others) = busy
        variant = Variant("mixed", tokens) if others or first is None else first
        if variant not in self._built:
            raise SelectionError(advice(self._built, self._limits, variant))
        return variant
