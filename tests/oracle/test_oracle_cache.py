"""What the oracle leaves in the cache, and how K and V lie there."""

from __future__ import annotations

import numpy as np
import pytest
from random_calls import CALLS, Call, bits, every_call, separated

from rpac.oracle.attention import quantized, split_kv


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
