"""Two small kernels, one of which plans what the other does: it writes pages and places into HBM by scalars.

XLA works out how many pages each sequence has, whether there is anything to do, and how often to do it. Run as a script it
exports the call for every target and writes the fixtures beside it:

    python -m tests.schedule.planned
"""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpac.devices.chip import chip
from rpac.devices.jax_compat import target_mesh

from .gather import FIXTURES, PAGE_ROWS, PAGES, PAGES_PER_SEQ, SEQS, TARGETS

PLACES = SEQS * PAGES_PER_SEQ
PIECE = 128  # words: the least that a DMA moves of a list in HBM
PLAN = 3 * PIECE
"""Words of a plan: in its pieces the number of steps, the pages, and the places."""


def _plan_kernel(counts, table, iteration, plan, staged, done) -> None:
    """Each piece of the plan goes out by a small DMA of its own. Later iterations take other pages."""

    def of_sequence(seq, steps):
        def of_page(page, steps):
            staged[PIECE + steps] = (table[seq * PAGES_PER_SEQ + page] + iteration[0]) % PAGES
            staged[2 * PIECE + steps] = seq * PAGES_PER_SEQ + page
            return steps + 1

        return lax.fori_loop(0, counts[seq], of_page, steps)

    staged[0] = lax.fori_loop(0, SEQS, of_sequence, 0)
    copies = [
        pltpu.make_async_copy(staged.at[pl.ds(i * PIECE, PIECE)], plan.at[pl.ds(i * PIECE, PIECE)], done.at[i])
        for i in range(PLAN // PIECE)
    ]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


def _move_kernel(plan, cache, _, out, steps, buffer, done) -> None:
    def wait_for(source, destination):
        copy = pltpu.make_async_copy(source, destination, done.at[0])
        copy.start()
        copy.wait()

    wait_for(plan, steps)

    @pl.loop(0, steps[0])
    def _(step):
        wait_for(cache.at[steps[PIECE + step]], buffer)
        wait_for(buffer, out.at[steps[2 * PIECE + step]])


def _in_hbm(array):
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


def planned(ends, table, iterations, cache, interpret: Any = False):
    """Copies pages of `cache` [PAGES, PAGE_ROWS, 128] f32 to their places, `iterations` [1] times.

    `ends` [SEQS + 1]: the pages of all sequences before each of them and after the last; `table` as `gather`'s.
    """
    place = (lambda array: array) if interpret else _in_hbm
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    counts = ends[1:] - ends[:-1]
    cache = place(cache)

    def one(state):
        iteration, out = state
        plan = pl.pallas_call(
            _plan_kernel,
            name="plan",
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(1,),
                in_specs=[],
                out_specs=hbm,
                scratch_shapes=[pltpu.SMEM((PLAN,), jnp.int32), pltpu.SemaphoreType.DMA((PLAN // PIECE,))],
            ),
            out_shape=jax.ShapeDtypeStruct((PLAN,), jnp.int32) if interpret else pltpu.HBM((PLAN,), jnp.int32),
            interpret=interpret,
        )(counts, table, iteration[None])
        out = pl.pallas_call(
            _move_kernel,
            name="move",
            in_specs=[hbm, hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.SMEM((PLAN,), jnp.int32),
                pltpu.VMEM((PAGE_ROWS, 128), jnp.float32),
                pltpu.SemaphoreType.DMA((1,)),
            ],
            out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
            input_output_aliases={2: 0},
            interpret=interpret,
        )(plan, cache, place(out))
        return iteration + 1, out

    def work(out):
        return lax.while_loop(lambda state: state[0] < iterations[0], one, (jnp.int32(0), out))[1]

    out = jnp.zeros((PLACES, PAGE_ROWS, 128), jnp.float32)
    return lax.cond(ends[SEQS] > ends[0], work, lambda out: out, out)


def export(target: str) -> bytes:
    """The call as a serialized `jax.export` artifact."""
    shapes = (
        jax.ShapeDtypeStruct((SEQS + 1,), jnp.int32),
        jax.ShapeDtypeStruct((PLACES,), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((PAGES, PAGE_ROWS, 128), jnp.float32),
    )
    with target_mesh(chip(target).device_kind):
        return bytes(jax.export.export(jax.jit(planned), platforms=("tpu",))(*shapes).serialize())


def main() -> None:
    from rpac.schedule import dump_export

    # Fixtures must not depend on where they were made.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*")
    jax.config.update("jax_traceback_in_locations_limit", 0)
    for target in TARGETS:
        found = asdict(dump_export(export(target), target))
        packed = gzip.compress(json.dumps(found, sort_keys=True).encode(), 9, mtime=0)
        (FIXTURES / f"planned-{target}.json.gz").write_bytes(packed)


if __name__ == "__main__":
    main()
