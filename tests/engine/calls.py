"""Calls of the stand-in programs of tiny, what JAX compiles meanwhile, and fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

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


@contextmanager
def compiles() -> Iterator[list[str]]:
    """What JAX traces, lowers or compiles meanwhile."""
    seen: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def python(code: str, *args: str, **env: str) -> Any:
    """The JSON that a fresh process prints last."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
