"""Calls of the stand-in programs of tiny."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from watching import compiles as compiles
from watching import python as python

from rpac.batch import Batch, Limits
from rpac.contract.program import Variant
from rpac.engine import Engine

BUILT = {Variant("decode", 8), Variant("decode", 32), Variant("prefill", 32), Variant("mixed", 8), Variant("mixed", 32)}
LIMITS = Limits(page_size=16, pages_per_seq=8, max_num_seqs=4, num_pages=32, prefill_chunk=16, token_buckets=(8, 32))

# New tokens of each sequence -> the program that must run, and the code that its stand-in adds.
BATCHES = [
    ([1, 1, 1], Variant("decode", 8), 1),
    ([], Variant("decode", 8), 1),
    ([16], Variant("prefill", 32), 2),
    ([16, 16], Variant("prefill", 32), 2),
    ([1, 5], Variant("mixed", 8), 3),
    ([5], Variant("mixed", 8), 3),
    ([1, 16], Variant("mixed", 32), 3),
    ([1, 16, 3], Variant("mixed", 32), 3),
]


def arrays(engine: Engine, tokens: int) -> list[jax.Array]:
    """Queries of ones, and keys, values and a cache of zeros, on the engine's device."""
    dims = engine.programs[Variant("mixed", tokens)].args[:4]
    made = [jnp.ones if one.name == "queries" else jnp.zeros for one in dims]
    return [jax.device_put(make(one.shape, one.dtype), engine.device) for make, one in zip(made, dims, strict=True)]


def batch_of(q_lens: Sequence[int]) -> Batch:
    """Sequences with 2 tokens of context, each on pages of its own from page 5 on."""
    tables = [[5 + 4 * row, 6 + 4 * row] for row in range(len(q_lens))]
    return Batch.build(LIMITS, q_lens, [2] * len(q_lens), tables)


def metadata(batch: Batch) -> list[Any]:
    return [batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution]


def call(engine: Engine, q_lens: Sequence[int], **options: Any) -> tuple[jax.Array, jax.Array]:
    batch = batch_of(q_lens)
    return engine(*arrays(engine, batch.tokens), *metadata(batch), **options)
