"""The oracle does what the definition says, held against plain Python sums and against laws of attention."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_calls import CALLS, F32, LIMITS, SM_SCALE, Call, bits, every_call, first_seen

from rpac.batch import Batch
from rpac.oracle import attention as reference
from rpac.oracle.attention import attention_with_lse


@every_call
def test_output_is_the_definition(call: Call) -> None:
    """To the last bit but one of float32: both sum in float64, in different orders."""
    out, _ = call.run()
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, call.expected(), rtol=2e-7, atol=1e-12)


FEATURES: dict[str, dict[str, Any]] = {
    "soft cap": {"soft_cap": 0.7},
    "window": {"sliding_window": 5},
    "window of a page": {"sliding_window": 4},
    "window of one": {"sliding_window": 1},
    "chunks": {"attention_chunk": 7},
    "chunks of a page": {"attention_chunk": 4},
    "sinks": {"sinks": np.array([0.5, -3, 4, -np.inf, 1, 2], F32)},
    "ALiBi": {"alibi_slopes": np.array([0.5, 0.25, 0.125, 0, 1, 0.0625], F32)},
    "ALiBi, window and soft cap": {
        "alibi_slopes": np.array([0.5, 0.25, 0.125, 0, 1, 2], F32),
        "sliding_window": 6,
        "soft_cap": 0.7,
    },
    "not causal": {"causal": False},
    "not causal, soft cap and sinks": {"causal": False, "soft_cap": 0.7, "sinks": np.array([0.5, -3, 4, 0, 1, 2], F32)},
    "all": {"soft_cap": 0.7, "sliding_window": 6, "sinks": np.array([0.5, -3, 4, 0, 1, 2], F32)},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("name", ["decode", "mixed", "page boundary", "odd kv heads", "bfloat16"])
def test_output_with_features_is_the_definition(name: str, features: dict[str, Any]) -> None:
    call = CALLS[name]
    features = {
        name: value[: call.q_heads] if isinstance(value, np.ndarray) else value for name, value in features.items()
    }
    out, _ = call.run(**features)
    np.testing.assert_allclose(out, call.expected(**features), rtol=1e-6, atol=1e-12)


def test_a_tree_says_what_the_new_tokens_of_decode_rows_see_of_each_other() -> None:
    """Of a chain it is causal attention; a branch is the sequence that it would be alone; other rows stay causal."""
    limits = replace(LIMITS, decode_len=3)
    call = Call([3, 3, 2], [5, 0, 6], seed=13, limits=limits)
    chain = np.tile(np.array([0b001, 0b011, 0b111], np.int32), (limits.max_num_seqs, 1))
    want, want_cache = call.run()
    out, cache = call.run(tree=chain)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(bits(cache), bits(want_cache))

    tree = chain.copy()
    tree[:, 2] = 0b101  # a second child of the first
    out, _ = call.run(tree=tree)
    for row in list(call.batch)[:2]:
        first, second, third = row.queries
        assert not np.allclose(out[third], want[third])
        np.testing.assert_array_equal(out[[first, second]], want[[first, second]])
        seen = [*range(row.context_len + 1), row.context_len + 2]
        k, v = call.k[row.row][seen].astype(float), call.v[row.row][seen].astype(float)
        for head in range(call.q_heads):
            weights = np.exp(SM_SCALE * (k[:, head // 2] @ call.queries[third, head].astype(float)))
            np.testing.assert_allclose(out[third, head], weights @ v[:, head // 2] / weights.sum(), rtol=1e-6)
    rest = slice(call.batch.cu_q_lens[2], None)
    np.testing.assert_array_equal(out[rest], want[rest])


@pytest.mark.parametrize("features", [{}, *FEATURES.values()], ids=["none", *FEATURES])
def test_lse_is_the_logarithm_of_what_divides_the_weights(features: dict[str, Any]) -> None:
    """A value that is 1 for one key alone gets its weight; that is exp of the score less lse."""
    call = CALLS["mixed"]
    features = {
        name: value[: call.q_heads] if isinstance(value, np.ndarray) else value for name, value in features.items()
    }
    metadata = call.batch.kv_lens, call.batch.page_indices, call.batch.cu_q_lens, call.batch.distribution
    arrays = call.queries, call.keys, call.values, call.cache
    out, _, lse = attention_with_lse(*arrays, *metadata, sm_scale=SM_SCALE, **features)
    np.testing.assert_array_equal(out, call.run(**features)[0])
    for row in call.batch:
        for step, token in enumerate(row.queries):
            for head in range(call.q_heads):
                end = row.context_len + step + 1 if features.get("causal", True) else row.kv_len
                first = first_seen(end, features.get("sliding_window"), features.get("attention_chunk"))
                keys = call.k[row.row][first:end, head // (call.q_heads // call.kv_heads)].astype(np.float64)
                scores = SM_SCALE * keys @ call.queries[token, head].astype(np.float64)
                if "soft_cap" in features:
                    scores = features["soft_cap"] * np.tanh(scores / features["soft_cap"])
                if "alibi_slopes" in features:
                    scores += features["alibi_slopes"][head].astype(float) * (np.arange(first, end) - (end - 1))
                sink = features["sinks"][head] if "sinks" in features else -np.inf
                assert lse[token, head] == pytest.approx(np.logaddexp.reduce([*scores, sink]), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("sight", [{"sliding_window": 6}, {"attention_chunk": 17}], ids=str)
def test_what_no_query_sees_may_be_anything(sight: dict[str, int]) -> None:
    """Pages before it, and their entries in the table."""
    call = Call([1, 3], [22, 17], seed=12)
    want, _ = call.run(**sight)
    table, cache = call.batch.page_indices.copy().reshape(LIMITS.max_num_seqs, -1), call.cache.copy()
    for row, pages in ((0, 4), (1, 3)):  # 23 - 6 = 17 and 20 - 3 + 1 - 6 = 12; or both see from 17 on
        cache[table[row, :pages]] = np.nan
        table[row, :pages] = 2**31 - 1
    out, _ = call.run(kv_cache=cache, page_indices=table.reshape(-1), **sight)
    np.testing.assert_array_equal(out, want)


@every_call
def test_padding_rows_of_the_output_are_zero(call: Call) -> None:
    out, _ = call.run()
    assert not out[call.batch.num_tokens :].any()


def test_padding_rows_dead_rows_and_unused_pages_change_nothing() -> None:
    call = CALLS["mixed"]
    live = len(call.batch)
    rows = {name: getattr(call, name).copy() for name in ("queries", "keys", "values")}
    for array in rows.values():
        array[call.batch.num_tokens :] = np.nan
    kv_lens, cu_q_lens = call.batch.kv_lens.copy(), call.batch.cu_q_lens.copy()
    page_indices = call.batch.page_indices.copy()
    kv_lens[live:] = -7
    cu_q_lens[live + 1 :] = 2**30
    table = page_indices.reshape(LIMITS.max_num_seqs, -1)
    table[live:] = 2**30
    for row in call.batch:
        table[row.row, len(row.pages) :] = 2**30
    out, cache = call.run(**rows, kv_lens=kv_lens, cu_q_lens=cu_q_lens, page_indices=page_indices)
    want_out, want_cache = call.run()
    np.testing.assert_array_equal(out, want_out)
    np.testing.assert_array_equal(bits(cache), bits(want_cache))


def test_where_pages_lie_changes_nothing() -> None:
    call = CALLS["mixed"]
    place = np.random.default_rng(0).permutation(LIMITS.num_pages).astype(np.int32)
    moved = np.empty_like(call.cache)
    moved[place] = call.cache
    out, cache = call.run(kv_cache=moved, page_indices=place[call.batch.page_indices])
    want_out, want_cache = call.run()
    np.testing.assert_array_equal(out, want_out)
    np.testing.assert_array_equal(bits(cache[place]), bits(want_cache))


def test_a_chunk_gives_what_its_tokens_give_one_by_one() -> None:
    whole = Call([5], [6], seed=12)
    want, want_cache = whole.run()
    cache = whole.cache
    pages = [next(iter(whole.batch)).pages]
    for step in range(5):
        batch = Batch.build(LIMITS, [1], [6 + step], pages)
        rows = {
            n: np.repeat(getattr(whole, n)[step : step + 1], batch.tokens, 0) for n in ("queries", "keys", "values")
        }
        metadata = {n: getattr(batch, n) for n in ("kv_lens", "page_indices", "cu_q_lens", "distribution")}
        out, cache = whole.run(**rows, **metadata, kv_cache=cache)
        np.testing.assert_allclose(out[0], want[step], rtol=2e-7, atol=1e-12)
    np.testing.assert_array_equal(bits(cache), bits(want_cache))


def test_the_first_token_of_a_sequence_gives_its_own_value() -> None:
    call = CALLS["one token, no context"]
    out, _ = call.run()
    np.testing.assert_array_equal(out[0], call.values[0].repeat(2, axis=0))


def test_equal_keys_give_the_mean_of_the_values() -> None:
    call = Call([1], [15], seed=13)
    call.k[0][:] = 1
    call.keys[:] = 1
    call.put(call.cache, 0, range(15))
    out, _ = call.run()
    np.testing.assert_allclose(out[0], call.v[0].mean(0).repeat(2, axis=0), rtol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    call = CALLS["mixed"]
    out, _ = call.run(queries=call.queries * np.float32(1e4))
    assert np.isfinite(out).all()


def test_a_prefix_may_be_shared() -> None:
    alone = Call([1], [9], seed=14)
    pages = next(iter(alone.batch)).pages
    free = next(page for page in range(LIMITS.num_pages) if page not in pages)
    cache = alone.cache.copy()
    cache[free] = cache[pages[2]]
    batch = Batch.build(LIMITS, [1, 1], [9, 9], [pages, [*pages[:2], free]])
    rows = {n: np.repeat(getattr(alone, n)[:1], batch.tokens, 0) for n in ("queries", "keys", "values")}
    metadata = {n: getattr(batch, n) for n in ("kv_lens", "page_indices", "cu_q_lens", "distribution")}
    out, _ = alone.run(**rows, **metadata, kv_cache=cache)
    want, _ = alone.run()
    np.testing.assert_array_equal(out[0], want[0])
    np.testing.assert_array_equal(out[1], want[0])


def test_the_oracle_shares_no_code_with_what_it_judges() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    imports = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imports == {"__future__", "typing", "numpy"}
