"""The oracle of latent attention does what the definition says, held against attention with the projections written out."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rpac.batch import Batch, Limits
from rpac.oracle import latent as reference_latent
from rpac.oracle.latent import latent_paged_attention

Array = NDArray[Any]

LIMITS = Limits(page_size=4, pages_per_seq=6, max_num_seqs=5, num_pages=40, prefill_chunk=3, token_buckets=(8, 16))
HEADS, RANK, ROPE, LANES, HEAD_DIM = 3, 16, 8, 32, 5
SM_SCALE = 0.3
Q_LENS, CONTEXT_LENS = [1, 3, 5, 2], [11, 4, 0, 7]


class Call:
    """A random call; `latents` and `ropes` hold each sequence's tokens, the new ones at the end."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        pages = iter(rng.permutation(LIMITS.num_pages).tolist())
        needs = [-(-(q + c) // LIMITS.page_size) for q, c in zip(Q_LENS, CONTEXT_LENS, strict=True)]
        tables = [[next(pages) for _ in range(need)] for need in needs]
        self.batch = Batch.build(LIMITS, Q_LENS, CONTEXT_LENS, tables)
        tokens = self.batch.tokens

        def random(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(np.float32)

        self.nope = random(tokens, HEADS, HEAD_DIM)  # before absorption
        self.up_keys, self.up_values = random(HEADS, RANK, HEAD_DIM), random(HEADS, RANK, HEAD_DIM)
        self.queries = np.einsum("thd,hrd->thr", self.nope, self.up_keys)
        self.queries_rope = random(tokens, HEADS, ROPE)
        self.new_kv, self.new_rope = random(tokens, RANK), random(tokens, ROPE)
        self.cache = np.full((LIMITS.num_pages, LIMITS.page_size, LANES), np.nan, np.float32)
        self.latents, self.ropes = [], []
        for row in self.batch:
            new = slice(row.queries.start, row.queries.stop)
            old = random(row.context_len, RANK + ROPE)
            at = np.arange(row.context_len)
            places = np.array(row.pages)[at // LIMITS.page_size], at % LIMITS.page_size
            self.cache[places] = np.pad(old, ((0, 0), (0, LANES - RANK - ROPE)), constant_values=7)
            self.latents.append(np.concatenate([old[:, :RANK], self.new_kv[new]]).astype(np.float64))
            self.ropes.append(np.concatenate([old[:, RANK:], self.new_rope[new]]).astype(np.float64))

    def run(self, **changes: Any) -> tuple[Array, Array]:
        batch = self.batch
        arrays = {
            "queries": self.queries,
            "queries_rope": self.queries_rope,
            "new_kv": self.new_kv,
            "new_rope": self.new_rope,
            "kv_cache": self.cache,
        }
        metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
        return latent_paged_attention(*(arrays | changes).values(), *metadata, sm_scale=SM_SCALE)


def test_the_absorbed_form_is_attention_with_keys_and_values_projected_up() -> None:
    call = Call()
    out, _ = call.run()
    for row, latent, rope in zip(call.batch, call.latents, call.ropes, strict=True):
        for step, token in enumerate(row.queries):
            seen = row.context_len + step + 1
            for head in range(HEADS):
                keys = np.concatenate([latent[:seen] @ call.up_keys[head], rope[:seen]], axis=1)
                query = np.concatenate([call.nope[token, head], call.queries_rope[token, head]])
                weights = np.exp(SM_SCALE * (keys @ query))
                want = weights @ (latent[:seen] @ call.up_values[head]) / weights.sum()
                np.testing.assert_allclose(out[token, head] @ call.up_values[head], want, rtol=1e-4, atol=1e-5)


def test_new_tokens_are_in_the_cache_with_zero_padding_and_nothing_else_changes() -> None:
    call = Call(1)
    _, cache = call.run()
    want = call.cache.copy()
    for row in call.batch:
        for step, token in enumerate(row.queries):
            page, slot = divmod(row.context_len + step, LIMITS.page_size)
            parts = (call.new_kv[token], call.new_rope[token], np.zeros(LANES - RANK - ROPE))
            want[row.pages[page], slot] = np.concatenate(parts)
    np.testing.assert_array_equal(cache.view(np.uint32), want.view(np.uint32))
    assert np.isnan(call.cache).any()  # so that what was read was held


def test_rows_past_the_last_sequence_are_zero() -> None:
    call = Call(2)
    out, _ = call.run()
    assert not out[call.batch.num_tokens :].any()
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", ["queries", "queries_rope"])
def test_both_parts_of_a_query_count(name: str) -> None:
    call = Call(3)
    out, _ = call.run()
    other, _ = call.run(**{name: -getattr(call, name)})
    assert np.abs(out - other)[: call.batch.num_tokens].max() > 0.01


def test_it_shares_nothing_with_the_kernels() -> None:
    """Types of the other oracle are all that it takes from rpac."""
    tree = ast.parse(Path(str(reference_latent.__file__)).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "rpac" in str(node.module)]
    assert [(node.module, [name.name for name in node.names]) for node in found] == [
        ("rpac.oracle.attention", ["Array", "Int32s"])
    ]
