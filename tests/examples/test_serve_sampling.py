"""Tokens are drawn with their probabilities, from the nucleus that top_p asks for, and a seed repeats a draw."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serve.sampling import Sampling, nucleus, sample

ROWS, VOCABULARY = 8, 50


@pytest.fixture(scope="module")
def logits() -> Any:
    return np.random.default_rng(1).standard_normal((ROWS, VOCABULARY)).astype(np.float32) * 2


def drawn(logits: Any, positions: Any, temperature: float, top_p: float, seeds: Any) -> Any:
    rows = len(logits)
    sampling = Sampling(
        np.full(rows, temperature, np.float32), np.full(rows, top_p, np.float32), np.asarray(seeds, np.uint32)
    )
    return np.asarray(jax.jit(sample)(logits, np.asarray(positions, np.int32), sampling))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_the_nucleus_is_the_fewest_tokens_that_have_top_p_together(logits: Any, top_p: float) -> None:
    kept = np.isfinite(np.asarray(nucleus(jnp.asarray(logits), jnp.full(ROWS, top_p, jnp.float32))))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for row, mask in zip(probabilities, kept, strict=True):
        order = np.argsort(-row)
        count = int(np.searchsorted(np.cumsum(row[order]), top_p)) + 1
        assert set(np.flatnonzero(mask)) == set(order[:count])


def test_a_temperature_of_zero_is_greedy_whatever_the_other_rows_do(logits: Any) -> None:
    sampling = Sampling(
        np.array([0, 1] * (ROWS // 2), np.float32), np.full(ROWS, 0.5, np.float32), np.arange(ROWS, dtype=np.uint32)
    )
    found = np.asarray(jax.jit(sample)(logits, np.zeros(ROWS, np.int32), sampling))
    assert np.array_equal(found[::2], logits.argmax(axis=-1)[::2])
    assert np.array_equal(drawn(logits, np.zeros(ROWS), 0.0, 1.0, np.arange(ROWS)), logits.argmax(axis=-1))
    assert np.array_equal(drawn(logits, np.zeros(ROWS), 1e-30, 1.0, np.arange(ROWS)), logits.argmax(axis=-1))


def test_tokens_are_drawn_with_their_probabilities(logits: Any) -> None:
    count = 20_000
    found = drawn(np.repeat(logits[:1], count, axis=0), np.arange(count), 0.8, 1.0, np.full(count, 3))
    scaled = np.exp(logits[0] / 0.8)
    wanted = scaled / scaled.sum()
    error = np.abs(np.bincount(found, minlength=VOCABULARY) / count - wanted)
    assert (error < 5 * np.sqrt(wanted / count) + 1e-4).all()


def test_a_draw_depends_on_its_seed_and_position_alone(logits: Any) -> None:
    same = np.repeat(logits[:1], 64, axis=0)
    first = drawn(same, np.arange(64), 1.0, 0.95, np.full(64, 7))
    again = drawn(same[::-1], np.arange(64)[::-1], 1.0, 0.95, np.full(64, 7))[::-1]
    assert np.array_equal(first, again)
    assert len(set(first.tolist())) > 5
    assert not np.array_equal(first, drawn(same, np.arange(64), 1.0, 0.95, np.full(64, 8)))
