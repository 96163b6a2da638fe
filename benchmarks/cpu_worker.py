"""Times one implementation of decode attention, in whatever environment it needs: a worker of `benchmarks/cpu.py`.

    python cpu_worker.py '{"what": "rpac", "source": "decode.py", "sequences": 16, ...}'

It prints one line of JSON when it is ready, with the output that it computes, and then answers every line on stdin, a
number of calls, with a list of their times in seconds. Imports numpy and jax; `ejkernel` only for its own kernel.
"""

from __future__ import annotations

import base64
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

DTYPE = jnp.bfloat16


class Batch:
    """Sequences of one length that decode one token each, on shuffled pages; equal for equal settings."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.sequences, self.context, self.page_size = config["sequences"], config["context"], config["page_size"]
        self.q_heads, self.kv_heads, self.head_dim = config["q_heads"], config["kv_heads"], config["head_dim"]
        rng = np.random.default_rng(config["seed"])
        self.pages = -(-self.context // self.page_size)
        self.page_table = rng.permutation(self.sequences * self.pages).reshape(self.sequences, self.pages)
        self.queries = self._noise(rng, self.sequences, self.q_heads)
        self.keys = self._noise(rng, self.sequences, self.kv_heads)
        self.values = self._noise(rng, self.sequences, self.kv_heads)
        self.kv_cache = self._noise(rng, self.sequences * self.pages, self.page_size, self.kv_heads, 2)

    def _noise(self, rng: np.random.Generator, *shape: int) -> Any:
        return rng.standard_normal((*shape, self.head_dim), dtype=np.float32).astype(DTYPE)

    def arguments(self, tokens: int, max_seqs: int, pages_per_seq: int) -> list[jax.Array]:
        """The arguments of the batch contract, padded to a token bucket and to the rows and columns of a page table."""
        page_table = np.zeros((max_seqs, pages_per_seq), np.int32)
        page_table[: self.sequences, : self.pages] = self.page_table
        kv_lens = np.zeros(max_seqs, np.int32)
        kv_lens[: self.sequences] = self.context
        cu_q_lens = np.minimum(np.arange(max_seqs + 1, dtype=np.int32), self.sequences)
        distribution = np.full(3, self.sequences, np.int32)
        new = [np.zeros((tokens, *array.shape[1:]), DTYPE) for array in (self.queries, self.keys, self.values)]
        for padded, array in zip(new, (self.queries, self.keys, self.values), strict=True):
            padded[: self.sequences] = array
        return [*map(jnp.asarray, (*new, self.kv_cache, kv_lens, page_table.ravel(), cu_q_lens, distribution))]


Call = Callable[[], Any]


def with_cache(function: Any, arguments: list[jax.Array]) -> Call:
    """Calls of a compiled function that takes the cache as fourth argument, donated, and returns (out, cache)."""
    compiled = jax.jit(function, donate_argnums=3).lower(*arguments).compile()

    def call() -> jax.Array:
        out, arguments[3] = jax.block_until_ready(compiled(*arguments))
        return out

    return call


def rpac(batch: Batch) -> Call:
    """The generated kernel, with the arrays of its spec: a token bucket, and a page table of the longest sequences."""
    config = batch.config
    kernel = runpy.run_path(config["source"])["ragged_paged_attention"]
    return with_cache(kernel, batch.arguments(config["tokens"], config["max_seqs"], config["pages_per_seq"]))


def ejkernel(batch: Batch) -> Call:
    """ejkernel's RPA v3 for XLA, with arrays of exactly this batch: its work grows with the page table."""
    from ejkernel.kernels._xla.ragged_page_attention_v3 import ragged_page_attention_v3  # type: ignore[import-not-found]

    def kernel(*arguments: jax.Array) -> Any:
        return ragged_page_attention_v3(*arguments, softmax_scale=batch.head_dim**-0.5)

    return with_cache(kernel, batch.arguments(batch.sequences, batch.sequences, batch.pages))


def gather(batch: Batch) -> Call:
    """What one writes first in jnp: all pages of all sequences in one gather. The cache is updated beforehand."""

    def kernel(queries: jax.Array, kv_cache: jax.Array, kv_lens: jax.Array, page_table: jax.Array) -> jax.Array:
        sequences = queries.shape[0]
        kv = kv_cache[page_table].reshape(sequences, -1, batch.kv_heads, 2, batch.head_dim)
        q = queries.reshape(sequences, batch.kv_heads, -1, batch.head_dim)
        scores = jnp.einsum("shgd,sthd->shgt", q, kv[:, :, :, 0], preferred_element_type=jnp.float32)
        valid = jnp.arange(kv.shape[1]) < kv_lens[:, None]
        scores = jnp.where(valid[:, None, None], scores * batch.head_dim**-0.5, -jnp.inf)
        p = jax.nn.softmax(scores, axis=-1).astype(DTYPE)
        out = jnp.einsum("shgt,sthd->shgd", p, kv[:, :, :, 1], preferred_element_type=jnp.float32)
        return out.reshape(queries.shape).astype(DTYPE)

    sequence = np.arange(batch.sequences)
    last = batch.context - 1
    where = batch.page_table[sequence, last // batch.page_size], last % batch.page_size
    kv_cache = batch.kv_cache.copy()
    kv_cache[*where] = np.stack([batch.keys, batch.values], axis=2)
    kv_lens = np.full(batch.sequences, batch.context, np.int32)
    arguments = [*map(jnp.asarray, (batch.queries, kv_cache, kv_lens, batch.page_table.astype(np.int32)))]
    compiled = jax.jit(kernel).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def copy(batch: Batch) -> Call:
    """A copy of the same KV bytes, into memory that is already there."""
    target = batch.kv_cache.copy()
    return lambda: np.copyto(target, batch.kv_cache)


def main(config: dict[str, Any]) -> None:
    batch = Batch(config)
    call = {"rpac": rpac, "ejkernel": ejkernel, "gather": gather, "copy": copy}[config["what"]](batch)
    out = call()
    rows = b"" if out is None else np.asarray(out, np.float32)[: batch.sequences].tobytes()
    print(json.dumps({"out": base64.b64encode(rows).decode()}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
