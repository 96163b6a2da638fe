"""The oracle does what the definition says, held against plain Python sums and against laws of attention."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from rpac.batch import Batch, Limits
from rpac.oracle import attention as reference
from rpac.oracle.attention import attention_with_lse, quantized, ragged_paged_attention, split_kv

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
def test_without_new_tokens_the_cache_is_read_as_it_is(call: Call) -> None:
    out, cache = call.run()
    again, same = call.run(keys=None, values=None, kv_heads=call.kv_heads, kv_cache=cache)
    np.testing.assert_array_equal(again, out)
    assert same.tobytes() == cache.tobytes()


@every_call
def test_new_tokens_are_in_the_cache_and_every_other_bit_is_as_it_was(call: Call) -> None:
    expected = call.cache.copy()
    for row in call.batch:
        call.put(expected, row.row, range(row.context_len, row.kv_len))
    before = call.cache.copy()
    _, cache = call.run()
    assert cache.dtype == call.dtype
    np.testing.assert_array_equal(bits(cache), bits(expected))
    np.testing.assert_array_equal(bits(call.cache), bits(before))


@every_call
def test_with_k_and_v_apart_everything_is_the_same_and_so_is_the_cache_but_for_its_order(call: Call) -> None:
    want_out, want_cache = call.run()
    given = separated(call.cache, call.kv_heads)
    before = given.copy()
    out, cache = call.run(kv_cache=given, kv_layout="separate")
    np.testing.assert_array_equal(out, want_out)
    np.testing.assert_array_equal(bits(cache), bits(separated(want_cache, call.kv_heads)))
    np.testing.assert_array_equal(bits(given), bits(before))


def test_a_layout_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_layout is 'seperate'; must be 'interleaved' or 'separate'"):
        CALLS["decode"].run(kv_layout="seperate")


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


def test_k_and_v_alternate_in_the_cache() -> None:
    cache = np.arange(2 * 4 * 3 * 2 * 8).reshape(2, 4, 3, 2, 8)
    k, v = split_kv(cache, kv_heads=3, head_dim=8)
    assert k.shape == v.shape == (2, 4, 3, 8)
    np.testing.assert_array_equal(k, cache[:, :, :, 0])
    np.testing.assert_array_equal(v, cache[:, :, :, 1])


def test_padding_of_words_and_lanes_is_left_out() -> None:
    cache = np.arange(2 * 4 * 2 * 4 * 8).reshape(2, 4, 2, 4, 8)
    k, v = split_kv(cache, kv_heads=3, head_dim=5)
    assert k.shape == v.shape == (2, 4, 3, 5)
    np.testing.assert_array_equal(k[0, 0, 2], cache[0, 0, 1, 0, :5])
    np.testing.assert_array_equal(v[0, 0, 2], cache[0, 0, 1, 1, :5])


def test_apart_k_is_first_and_lanes_of_padding_are_left_out() -> None:
    cache = np.arange(2 * 2 * 3 * 4 * 8).reshape(2, 2, 3, 4, 8)
    k, v = split_kv(cache, kv_heads=3, head_dim=5, kv_layout="separate")
    assert k.shape == v.shape == (2, 4, 3, 5)
    np.testing.assert_array_equal(k[1, 3, 2], cache[1, 0, 2, 3, :5])
    np.testing.assert_array_equal(v[1, 3, 2], cache[1, 1, 2, 3, :5])


def test_joined_k_and_v_are_the_halves_of_a_row() -> None:
    cache = np.arange(2 * 4 * 2 * 2 * 128).reshape(2, 4, 2, 2, 128)
    k, v = split_kv(cache, kv_heads=3, head_dim=64)
    assert k.shape == v.shape == (2, 4, 3, 64)
    np.testing.assert_array_equal(k[1, 2, 2], cache[1, 2, 1, 0, :64])
    np.testing.assert_array_equal(v[1, 2, 2], cache[1, 2, 1, 0, 64:])


def test_joined_k_and_v_apart_are_the_halves_of_a_row() -> None:
    cache = np.arange(2 * 1 * 3 * 4 * 128).reshape(2, 1, 3, 4, 128)
    k, v = split_kv(cache, kv_heads=3, head_dim=64, kv_layout="separate")
    assert k.shape == v.shape == (2, 4, 3, 64)
    np.testing.assert_array_equal(k[1, 3, 2], cache[1, 0, 2, 3, :64])
    np.testing.assert_array_equal(v[1, 3, 2], cache[1, 0, 2, 3, 64:])


@pytest.mark.parametrize(
    "dtype, numbers, codes",
    [
        ("int8", [0.5, 1.5, 2.5, -0.5, -1.5, 127.4, 400, -400], [0, 2, 2, 0, -2, 127, 127, -128]),
        ("float8_e4m3fn", [1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, 460, -1e6], [1, 1.25, 0, 2.0**-8, 448, -448]),
        ("float8_e5m2", [1.125, 1.375, 2.0**-17, 3 * 2.0**-17, 1e6, -1e6], [1, 1.5, 0, 2.0**-15, 57344, -57344]),
    ],
)
def test_numbers_are_quantized_to_the_nearest_and_of_two_to_the_even_one(
    dtype: str, numbers: list[float], codes: list[float]
) -> None:
    scale = np.float32(4)
    new = np.array(numbers, np.float32).reshape(1, 1, -1) * scale
    found = quantized(new, scale.reshape(1), np.dtype(dtype))
    assert found.dtype.name == dtype
    assert found.astype(np.float32).ravel().tolist() == codes


def test_the_oracle_shares_no_code_with_what_it_judges() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    imports = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imports == {"__future__", "typing", "numpy"}
