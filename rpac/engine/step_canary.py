"""Compares a step's executable with its portable export, on a small batch and caches made for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rpac.batch import Batch, Limits
from rpac.contract.arrays import ArrayDims
from rpac.contract.kind import Int32s
from rpac.devices.placement import Placement
from rpac.engine.events import CanaryRun, Recorder
from rpac.engine.probe import LEAST_PAGES, filled_cache
from rpac.engine.step_slot import StepRun, StepSlot
from rpac.errors import TargetError
from rpac.oracle.canary import SEED, canary_rows, numbers, spread_batch

TOLERANCE: Final = {
    "bfloat16": 0.1, "float16": 0.02, "float32": 2e-3, "float8_e4m3fn": 0.2, "float8_e5m2": 0.3, "int8": 0.1,
}  # fmt: skip
"""Of the largest magnitude of an array, by its dtype; two compiles of one model sum in other orders, in every layer. What a
canary is for, a runtime that computes something else, is off by all of it."""

MOST_OTHERS: Final = 0.5
"""The share of an array of other integers, such as the likeliest tokens, that may differ: by ties."""

VOCABULARY: Final = 97  # the canary's tokens are below it


def check_step(
    slot: StepSlot,
    params: Sequence[jax.Array],
    caches: Sequence[ArrayDims],
    extra: Sequence[Any],
    limits: Limits,
    placement: Placement,
    recorder: Recorder,
) -> None:
    """Runs a step and its portable export on the same arrays. `caches` are those of one device.

    Raises CheckError where what they return differs, and TargetError on devices of several processes.
    """
    if len(placement.local) < len(placement.devices):
        raise TargetError(
            f"{slot.what} runs on devices of several processes; must be of one for a canary; run the canary on one host"
        )
    start = time.perf_counter()
    kind, tokens = slot.program.variant
    batch, pages = spread_batch(kind, limits, *canary_rows(kind, tokens, limits))
    rest = [*_tokens_of(batch, placement), *extra]
    compared = [
        _results(run, params, _caches(caches, pages, placement), rest, batch, pages)
        for run in (slot.ready(), slot.portable())
    ]
    worst = 0.0
    for name, found, wanted in zip(_names(slot, len(caches)), *compared, strict=True):
        error = _error(found, wanted)
        if not error <= TOLERANCE.get(wanted.dtype.name, MOST_OTHERS):
            raise slot.refuse(f"{name} differs by {error:.3g}", "what the portable step gives")
        worst = max(worst, error)
    recorder.record(CanaryRun(slot.program.variant, worst, time.perf_counter() - start))


def _tokens_of(batch: Batch, placement: Placement) -> list[NDArray[Any]]:
    """The batch as the step takes it, the same for each data-parallel replica."""
    token_ids = (np.arange(batch.tokens) % VOCABULARY).astype(np.int32)
    positions = np.zeros(batch.tokens, np.int32)
    for row in batch:
        positions[row.queries] = np.arange(row.q_len) + max(row.context_len, 0)
    return [np.tile(array, placement.mesh.data) for array in (token_ids, positions, *batch.metadata)]


def _caches(caches: Sequence[ArrayDims], pages: Int32s, placement: Placement) -> list[jax.Array]:
    """Caches that hold numbers on the batch's pages, and zeros elsewhere."""
    size = max(1 << (len(pages) - 1).bit_length(), LEAST_PAGES)
    padded = np.resize(np.arange(len(pages)), size)
    made = []
    for stream, dims in enumerate(caches):
        held = numbers((len(pages), *dims.shape[1:]), SEED, stream + 1).astype(dims.dtype)
        made.append(filled_cache(placement, dims, pages[padded], held[padded], np.arange(size)))
    return made


def _results(
    run: StepRun, params: Sequence[jax.Array], caches: list[jax.Array], rest: list[Any], batch: Batch, pages: Int32s
) -> list[NDArray[Any]]:
    """What a step made of the batch's pages, of each cache, and then its outputs, without the rows that hold anything."""
    count = len(caches)
    results = run(params, [*caches, *rest])
    held = [np.asarray(jnp.take(cache, pages, axis=0)) for cache in results[:count]]
    return held + [_live(np.asarray(one), batch) for one in results[count:]]


def _live(output: NDArray[Any], batch: Batch) -> NDArray[Any]:
    """An output's rows of live tokens or sequences, where it has a row for each; else all of it."""
    rows = output.shape[0] if output.ndim else 0
    if rows == batch.tokens:
        return output[: batch.num_tokens]
    return output[: len(batch)] if rows == batch.limits.max_num_seqs else output


def _error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The largest difference, relative to the largest magnitude; of integers that are no codes, the share that differs."""
    if not found.size or np.array_equal(found, wanted):
        return 0.0
    if found.dtype.name not in TOLERANCE:
        return float(np.mean(found != wanted))
    one, other = found.astype(np.float64), wanted.astype(np.float64)
    scale, difference = float(np.max(np.abs(other))), float(np.max(np.abs(one - other)))
    return difference / scale if np.isfinite(difference) and scale > 0 else float("inf")


def _names(slot: StepSlot, caches: int) -> list[str]:
    return [one.name for one in (*slot.arguments[:caches], *slot.program.signature.outputs)]
