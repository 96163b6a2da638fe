"""Random calls for tests of the oracle, with K and V of every sequence as plain arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from rpac.batch import Batch, Limits
from rpac.oracle.attention import ragged_paged_attention

Array = NDArray[Any]

SM_SCALE = 0.25
LIMITS = Limits(page_size=4, pages_per_seq=6, max_num_seqs=5, num_pages=40, prefill_chunk=3, token_buckets=(8, 16))
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)


@dataclass
class Call:
    """A random call, and the K and V of every sequence as plain arrays `[kv_len, kv_heads, head_dim]`."""

    q_lens: list[int]
    context_lens: list[int]
    seed: int = 0
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    lanes: int = 16
    dtype: Any = F32
    limits: Limits = LIMITS
    batch: Batch = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        pages = iter(rng.permutation(LIMITS.num_pages).tolist())
        needs = [-(-(q + c) // LIMITS.page_size) for q, c in zip(self.q_lens, self.context_lens, strict=True)]
        tables = [[next(pages) for _ in range(need)] for need in needs]
        self.batch = Batch.build(self.limits, self.q_lens, self.context_lens, tables)
        tokens = self.batch.tokens

        def random(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(self.dtype)

        packing = 4 // self.dtype.itemsize
        self.queries = random(tokens, self.q_heads, self.head_dim)
        self.keys = random(tokens, self.kv_heads, self.head_dim)
        self.values = random(tokens, self.kv_heads, self.head_dim)
        # Whatever the batch does not fill is poison.
        words = -(-2 * self.kv_heads // packing)
        self.cache = np.full((LIMITS.num_pages, LIMITS.page_size, words, packing, self.lanes), np.nan, self.dtype)
        self.k = [random(row.kv_len, self.kv_heads, self.head_dim) for row in self.batch]
        self.v = [random(row.kv_len, self.kv_heads, self.head_dim) for row in self.batch]
        for row in self.batch:
            new = slice(row.queries.start, row.queries.stop)
            self.k[row.row][row.context_len :] = self.keys[new]
            self.v[row.row][row.context_len :] = self.values[new]
            self.put(self.cache, row.row, range(row.context_len))

    def put(self, cache: Array, row: int, positions: range) -> None:
        """Writes K0, V0, K1, V1, ... of some positions of a row, element by element, and zeros in what is left over."""
        view = list(self.batch)[row]
        packing = cache.shape[3]
        for position in positions:
            page, slot = view.pages[position // LIMITS.page_size], position % LIMITS.page_size
            cache[page, slot] = 0
            for head in range(self.kv_heads):
                for which, source in enumerate((self.k, self.v)):
                    word, part = divmod(2 * head + which, packing)
                    cache[page, slot, word, part, : self.head_dim] = source[row][position, head]

    def run(self, **changes: Any) -> tuple[Array, Array]:
        print(f"seed {self.seed}")
        arguments = {
            "queries": self.queries,
            "keys": self.keys,
            "values": self.values,
            "kv_cache": self.cache,
            "kv_lens": self.batch.kv_lens,
            "page_indices": self.batch.page_indices,
            "cu_q_lens": self.batch.cu_q_lens,
            "distribution": self.batch.distribution,
        }
        return ragged_paged_attention(**(arguments | changes), sm_scale=SM_SCALE)

    def expected(
        self,
        soft_cap: float | None = None,
        sliding_window: int | None = None,
        attention_chunk: int | None = None,
        sinks: Array | None = None,
        alibi_slopes: Array | None = None,
        causal: bool = True,
    ) -> Array:
        """The output by the definition, in plain Python floats."""
        out = np.zeros(self.queries.shape)
        for row in self.batch:
            for step, token in enumerate(row.queries):
                for head in range(self.q_heads):
                    kv_head = head // (self.q_heads // self.kv_heads)
                    query = [float(x) for x in self.queries[token, head]]
                    end = row.context_len + step + 1 if causal else row.kv_len
                    visible = range(first_seen(end, sliding_window, attention_chunk), end)
                    keys = [[float(x) for x in self.k[row.row][position, kv_head]] for position in visible]
                    scores = [SM_SCALE * sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
                    if soft_cap is not None:
                        scores = [soft_cap * math.tanh(score / soft_cap) for score in scores]
                    if alibi_slopes is not None:
                        at = row.context_len + step
                        scores = [
                            s + float(alibi_slopes[head]) * (key - at) for key, s in zip(visible, scores, strict=True)
                        ]
                    weights = [math.exp(score) for score in scores]
                    total = sum(weights) + (0 if sinks is None else math.exp(sinks[head]))
                    for position, weight in zip(visible, weights, strict=True):
                        out[token, head] += weight / total * self.v[row.row][position, kv_head].astype(float)
        return out


def first_seen(end: int, sliding_window: int | None, attention_chunk: int | None) -> int:
    """The first token that the query at position `end` - 1 sees."""
    if attention_chunk is not None:
        return next(token for token in range(end) if token // attention_chunk == (end - 1) // attention_chunk)
    return 0 if sliding_window is None else max(end - sliding_window, 0)


def separated(cache: Array, kv_heads: int) -> Array:
    """An interleaved cache with K and V apart, element by element: `[pages, 2, kv_heads, page_size, lanes]`."""
    pages, page_size, _, packing, lanes = cache.shape
    found = np.empty((pages, 2, kv_heads, page_size, lanes), cache.dtype)
    for head in range(kv_heads):
        for which in range(2):
            word, part = divmod(2 * head + which, packing)
            found[:, which, head] = cache[:, :, word, part]
    return found


def bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(np.uint8)


CALLS = {
    "empty": Call([], []),
    "one token, no context": Call([1], [0]),
    "decode": Call([1, 1, 1], [6, 0, 20], seed=1),
    "prefill": Call([3, 3], [0, 9], seed=2),
    "mixed": Call([1, 3, 5, 2], [11, 4, 0, 7], seed=3),
    "every row": Call([1, 1, 1, 1, 1], [3, 4, 5, 22, 23], seed=4),
    "page boundary": Call([4, 5, 3, 4], [4, 3, 4, 5], seed=5),
    "one kv head": Call([1, 3], [5, 2], seed=6, kv_heads=1),
    "as many kv heads": Call([1, 3], [5, 2], seed=7, kv_heads=4),
    "odd kv heads": Call([1, 3], [5, 2], seed=8, q_heads=6, kv_heads=3),
    "bfloat16": Call([1, 3, 5, 2], [11, 4, 0, 7], seed=9, dtype=BF16),
    "bfloat16, one kv head": Call([1, 3], [5, 2], seed=10, kv_heads=1, dtype=BF16),
    "padded lanes": Call([1, 3], [5, 2], seed=11, lanes=24, dtype=BF16),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
