"""A small ragged kernel, whose transfers anyone can work out: it copies each sequence's pages out, one after the other.

Run as a script it exports the kernel for every target and writes the fixtures beside it:

    python -m tests.schedule.gather
"""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SEQS, PAGES, PAGES_PER_SEQ, PAGE_ROWS = 8, 32, 4, 16
PAGE_BYTES = PAGE_ROWS * 128 * 4
FIXTURES = Path(__file__).parent / "fixtures"
TARGETS = ("tpu7x", "v6e", "v5p", "v5e")


def _kernel(lens, table, cache, out, buffer, loads, stores) -> None:
    """Two buffers: while one page is written out, the next is fetched."""

    def fetch(seq, page, slot):
        return pltpu.make_async_copy(cache.at[table[seq * PAGES_PER_SEQ + page]], buffer.at[slot], loads.at[slot])

    def send(seq, page, slot):
        return pltpu.make_async_copy(buffer.at[slot], out.at[seq, page], stores.at[slot])

    @pl.loop(0, SEQS)
    def _(seq):
        count = lens[seq]

        @pl.when(count > 0)
        def _():
            fetch(seq, 0, 0).start()

        @pl.loop(0, count)
        def _(page):
            slot = page % 2

            @pl.when(page + 1 < count)
            def _():
                fetch(seq, page + 1, 1 - slot).start()

            fetch(seq, page, slot).wait()
            send(seq, page, slot).start()
            send(seq, page, slot).wait()


def gather(lens, table, cache, interpret=False):
    """`lens` [SEQS] pages of each sequence, `table` [SEQS * PAGES_PER_SEQ], `cache` [PAGES, PAGE_ROWS, 128] f32."""
    if not interpret:
        # Else the compiler moves so small a cache into VMEM first.
        cache = pltpu.with_memory_space_constraint(cache, pltpu.HBM)
    return pl.pallas_call(
        _kernel,
        name="gather",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((2, PAGE_ROWS, 128), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((SEQS, PAGES_PER_SEQ, PAGE_ROWS, 128), jnp.float32),
        interpret=interpret,
    )(lens, table, cache)


def export() -> bytes:
    """The kernel as a serialized `jax.export` artifact, for any TPU."""
    shapes = (
        jax.ShapeDtypeStruct((SEQS,), jnp.int32),
        jax.ShapeDtypeStruct((SEQS * PAGES_PER_SEQ,), jnp.int32),
        jax.ShapeDtypeStruct((PAGES, PAGE_ROWS, 128), jnp.float32),
    )
    return bytes(jax.export.export(jax.jit(gather), platforms=("tpu",))(*shapes).serialize())


def main() -> None:
    from rpac.schedule import dump_export

    # Fixtures must not depend on where they were made.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*")
    jax.config.update("jax_traceback_in_locations_limit", 0)
    FIXTURES.mkdir(exist_ok=True)
    exported = export()
    for target in TARGETS:
        found = asdict(dump_export(exported, target))
        packed = gzip.compress(json.dumps(found, sort_keys=True).encode(), 9, mtime=0)
        (FIXTURES / f"gather-{target}.json.gz").write_bytes(packed)


if __name__ == "__main__":
    main()
