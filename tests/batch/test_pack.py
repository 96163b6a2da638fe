"""Arrays go into the order of rows and come back in the caller's, whatever their kind and however they are given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpac.batch import Batch, Limits
from rpac.errors import BatchError

LIMITS = Limits(page_size=4, pages_per_seq=5, max_num_seqs=6, num_pages=40, prefill_chunk=3, token_buckets=(4, 8, 24))


def batch_of(q_lens: list[int]) -> Batch:
    return Batch.build(LIMITS, q_lens, [0] * len(q_lens), [[5 * n, 5 * n + 1] for n in range(len(q_lens))])


def tokens_of(q_lens: list[int]) -> list[Any]:
    """An array a sequence; each element says whose it is."""
    return [10.0 * n + np.arange(2 * size).reshape(size, 2) for n, size in enumerate(q_lens)]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_each_row_gets_its_own_tokens_and_each_sequence_its_own_output(q_lens: list[int]) -> None:
    batch, arrays = batch_of(q_lens), tokens_of(q_lens)
    packed = batch.pack(arrays)
    assert packed.shape == (batch.tokens, 2)
    for row, index in zip(batch, batch.order, strict=True):
        assert np.array_equal(packed[row.queries.start : row.queries.stop], arrays[index])
    assert not packed[batch.num_tokens :].any()
    for back, array in zip(batch.unpack(packed), arrays, strict=True):
        assert np.array_equal(back, array)
    assert np.array_equal(batch.pack(np.concatenate(arrays)), packed)  # one array of all of them does as well


def test_each_kind_of_array_stays_what_it_is() -> None:
    batch = batch_of([3, 1])
    arrays = [array.astype(jnp.bfloat16) for array in tokens_of([3, 1])]
    packed = batch.pack(arrays)
    assert isinstance(packed, np.ndarray) and packed.dtype == jnp.bfloat16
    on_device = batch.pack([jnp.asarray(array) for array in arrays])
    assert isinstance(on_device, jax.Array)
    assert np.array_equal(np.asarray(on_device), packed)
    traced = jax.jit(lambda *given: batch.unpack(batch.pack(list(given))))(*arrays)
    assert all(np.array_equal(np.asarray(one), array) for one, array in zip(traced, arrays, strict=True))


def test_a_batch_of_no_sequences() -> None:
    batch = batch_of([])
    assert batch.pack(np.zeros((0, 2))).shape == (4, 2)
    assert batch.unpack(np.zeros((4, 2))) == []


REFUSED: dict[str, tuple[Any, str]] = {
    "too few": ([np.zeros((3, 2))], "pack was given 1 arrays; must be 2, one for each sequence"),
    "callers order": ([np.zeros((1, 2)), np.zeros((3, 2))], "sequence 0: pack was given an array [1, 2]; must be"),
    "other sizes": ([np.zeros((3, 2)), np.zeros((1, 4))], "sequence 1: pack was given an array [1, 4]; must be an array [1, 2]"),
    "no arrays": ([[1.0], [2.0]], "sequence 0: pack was given a list; must be an array [3, ...]"),
    "padded": (np.zeros((8, 2)), "pack was given an array [8, 2]; must be an array [4, ...], the new tokens of all sequences"),
    "a number": (1.0, "pack was given a float; must be an array [4, ...]"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_new_tokens_of_the_batch(given: Any, text: str) -> None:
    with pytest.raises(BatchError) as raised:
        batch_of([3, 1]).pack(given)
    assert text in str(raised.value)


def test_an_output_of_another_batch() -> None:
    with pytest.raises(BatchError, match=r"unpack was given an array of shape \[8, 2\]; must have 4 rows"):
        batch_of([3, 1]).unpack(np.zeros((8, 2)))
