"""Runs one call of a program on a cache made for it: of the contract's full shape, allocated, used and freed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from rpac.contract.arrays import ArrayDims
from rpac.contract.program import Program
from rpac.devices.placement import Placement
from rpac.engine.runtime import Run
from rpac.oracle.canary import ProbeCall, Verdict, judge

LEAST_PAGES = 64


class Part(NamedTuple):
    """What a program left on one device: its output, the lse that some return, what the call's pages hold, the pages of no row
    that it wrote to.
    """

    out: NDArray[Any]
    lse: NDArray[Any] | None
    pages: NDArray[Any]
    strays: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Probe:
    """What a program left on each of its devices in this process, which all had the same call; `devices` are their places in
    the mesh.
    """

    call: ProbeCall
    parts: tuple[Part, ...]
    devices: tuple[int, ...]

    def against(self, answer: bytes) -> Verdict:
        """Compared with a stored answer: the worst of the devices. Raises ValueError where that is to another call."""
        parts = zip(self.devices, self.parts, strict=True)
        verdicts = [self._judged(part, answer, f"device {index}: ") for index, part in parts]
        return max(verdicts, key=lambda verdict: (len(verdict.notes), verdict.error))

    def _judged(self, part: Part, answer: bytes, where: str) -> Verdict:
        verdict = judge(self.call, answer, part.out, part.pages, part.lse)
        notes = list(verdict.notes)
        if part.strays:
            named = ", ".join(map(str, part.strays[:5]))
            notes.append(f"{len(part.strays)} pages of no row were written, first {named}")
        return verdict._replace(notes=tuple(where * (len(self.parts) > 1) + note for note in notes))


def probe(run: Run, call: ProbeCall, program: Program, placement: Placement) -> Probe:
    """Runs a call once, the same on each device. Takes the memory of one cache there. Where the devices are of several
    processes, each must do this at once, and sees what its own devices did.

    Two small helpers are compiled, for most calls once a device.
    """
    args = {dims.name: dims for dims in program.args}
    cache_dims = args["kv_cache"]
    used_pages = len(call.pages)
    # Some pages twice, with what they hold anyway: one shape for calls of a few pages and of some more.
    size = max(1 << (used_pages - 1).bit_length(), LEAST_PAGES) if used_pages else 0
    padded = np.resize(np.arange(used_pages), size)
    pages = [jax.device_put(call.pages[padded], device) for device in placement.local]
    kv_cache = filled_cache(placement, cache_dims, call.pages[padded], call.held[padded], np.arange(size))
    batch = call.batch
    given = {
        **call.by_token,
        "kv_lens": batch.kv_lens,
        "page_indices": batch.page_indices,
        "cu_q_lens": batch.cu_q_lens,
        "distribution": batch.distribution,
        **call.extra,
    }
    out, kv_cache, *more = run(
        [kv_cache if name == "kv_cache" else placement.repeat(args[name], given[name]) for name in args]
    )
    look = jax.jit(_look)
    outs, caches = placement.parts(out), placement.parts(kv_cache)
    lses = [np.asarray(lse) for lse in placement.parts(more[0])] if more else [None] * len(outs)
    seen = [look(cache, at) for cache, at in zip(caches, pages, strict=True)]
    devices = tuple(placement.devices.index(device) for device in placement.local)
    made = tuple(_part(call, np.asarray(out), lse, *one) for out, lse, one in zip(outs, lses, seen, strict=True))
    return Probe(call, made, devices)


def _part(call: ProbeCall, out: NDArray[Any], lse: NDArray[Any] | None, after: jax.Array, used: jax.Array) -> Part:
    strays = np.array(used)
    strays[call.pages] = False
    return Part(out, lse, np.asarray(after)[: len(call.pages)], tuple(np.flatnonzero(strays).tolist()))


def filled_cache(
    placement: Placement, dims: ArrayDims, pages: NDArray[Any], held: NDArray[Any], places: NDArray[Any]
) -> jax.Array:
    """A cache that is zero but for `pages`, of which the i-th holds `held[places[i]]`; the same on each device of this process.

    Compiled once for each number of pages, and of pages held.
    """
    make = jax.jit(_cache, static_argnums=3)
    parts = [
        make(*(jax.device_put(array, device) for array in (pages, held, places)), dims.shape[0])
        for device in placement.local
    ]
    return placement.joiner(dims)(parts)


def _cache(pages: jax.Array, held: jax.Array, places: jax.Array, count: int) -> jax.Array:
    def write(index: jax.Array, kv_cache: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(kv_cache, held[places[index]], pages[index], 0)

    # Page by page, because a scatter of them all would take a second cache.
    return lax.fori_loop(0, len(pages), write, jnp.zeros((count, *held.shape[1:]), held.dtype))


def _look(kv_cache: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    return kv_cache[pages], jnp.any(kv_cache != 0, axis=tuple(range(1, kv_cache.ndim)))
