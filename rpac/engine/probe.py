"""Runs one call of a program on a cache made for it: of the contract's full shape, allocated, used and freed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from rpac.bundle import Program
from rpac.canary import Call, Verdict, judge
from rpac.layout import index_of
from rpac.runtime import Run

LEAST_PAGES = 64


@dataclass(frozen=True, eq=False)
class Probe:
    """What a program left: its output, what the call's pages hold, and the pages of no row that it wrote to."""

    call: Call
    out: NDArray[Any]
    pages: NDArray[Any]
    strays: tuple[int, ...]

    def against(self, answer: bytes) -> Verdict:
        """Compared with a stored answer. Raises ValueError where that is the answer to another call."""
        verdict = judge(self.call, answer, self.out, self.pages)
        if not self.strays:
            return verdict
        named = ", ".join(map(str, self.strays[:5]))
        return verdict._replace(
            notes=(*verdict.notes, f"{len(self.strays)} pages of no row were written, first {named}")
        )


def probe(run: Run, call: Call, program: Program, device: jax.Device) -> Probe:
    """Runs a call once. Takes the memory of one cache on `device`; two small helpers are compiled, for most calls once."""
    dims = program.args[index_of(program.args, "kv_cache")]
    used_pages = len(call.pages)
    # Some pages twice, with what they hold anyway: one shape for calls of a few pages and of some more.
    size = max(1 << (used_pages - 1).bit_length(), LEAST_PAGES) if used_pages else 0
    padded = np.resize(np.arange(used_pages), size)
    pages, held = jax.device_put((call.pages[padded], call.held[padded]), device)
    kv_cache = jax.jit(_cache, static_argnums=2)(pages, held, dims.shape[0])
    batch = call.batch
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    out, kv_cache, *_ = run((call.queries, call.keys, call.values, kv_cache, *metadata, *call.extra.values()))
    after, used = jax.jit(_look)(kv_cache, pages)
    used = np.array(used)
    used[call.pages] = False
    return Probe(call, np.asarray(out), np.asarray(after)[:used_pages], tuple(np.flatnonzero(used).tolist()))


def _cache(pages: jax.Array, held: jax.Array, count: int) -> jax.Array:
    def write(index: jax.Array, kv_cache: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(kv_cache, held[index], pages[index], 0)

    # Page by page, because a scatter of them all would take a second cache.
    return lax.fori_loop(0, len(pages), write, jnp.zeros((count, *held.shape[1:]), held.dtype))


def _look(kv_cache: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    return kv_cache[pages], jnp.any(kv_cache != 0, axis=tuple(range(1, kv_cache.ndim)))
