"""Decode kernels by waves whose matmuls take 8-bit K and V as they are stored."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from small import ALL_FEATURES, eight_bits, eight_bits_plan, plan_of
from test_features import SLOW, failures

from rpac.devices.chip import TPU_TARGETS
from rpac.kernels import render
from rpac.lower import Cache, lower_all, tasks_of
from rpac.plan.recipe import KvMatmul

Matmuls = dict[str, Any]
SHAPES: dict[str, dict[str, Any]] = {
    "heads that share rows": {},
    "rows of one head": {"q_heads": 8, "kv_heads": 1},
    "rows that are no query's": {"q_heads": 10, "kv_heads": 2},
    "all features": {**ALL_FEATURES, "sliding_window": 150},
    "drafts": {"decode_len": 2},
}
QUICK = ("int8", "heads that share rows")


def matmuls_of(kv_dtype: str, kv_matmul: KvMatmul) -> Matmuls:
    """The functions of a kernel."""
    spec = eight_bits(kv_dtype)
    module: Matmuls = {}
    exec(render(spec, eight_bits_plan(spec, kv_matmul)).text, module)
    return module


def relative_error(found: Any, want: NDArray[np.float64]) -> float:
    """Of the rows of a product, relative to their norms."""
    error = np.linalg.norm(np.asarray(found, np.float64) - want, axis=1) / np.linalg.norm(want, axis=1)
    return float(error.max())


def stored(rng: np.random.Generator, kv_dtype: str, tokens: int) -> tuple[Any, NDArray[np.float64]]:
    """Values of a cache, all of one sign, so that they add up; and the same numbers in float64."""
    if kv_dtype == "int8":
        values = rng.integers(1, 128, (tokens, 128)).astype(np.int8)
    else:
        values = rng.uniform(0.5, 2, (tokens, 128)).astype(ml_dtypes.float8_e4m3fn)
    return values, values.astype(np.float64)


def scores_of(tokens: int) -> NDArray[np.float64]:
    """Logarithms of weights: alike; one token, and a long tail that adds up to as much; random."""
    tail = np.full(tokens, -np.log2(tokens))
    tail[tokens // 3] = 0
    return np.stack([np.zeros(tokens), tail, -np.random.default_rng(1).exponential(8, tokens)])


@pytest.mark.parametrize(
    ("kv_dtype", "kv_matmul", "tolerance"),
    [
        ("int8", "int8_parts", 2.0**-13),
        ("int8", "converted", 2.0**-8),
        ("float8_e4m3fn", "as_stored", 2.0**-8),
        ("float8_e4m3fn", "converted", 2.0**-8),
    ],
)
@pytest.mark.parametrize("tokens", [128, pytest.param(131072, marks=SLOW)])
def test_weighted_values_are_as_exact_as_the_dtype_of_probabilities(
    kv_dtype: str, kv_matmul: KvMatmul, tolerance: float, tokens: int
) -> None:
    """Parts of int8 keep more of a row than bfloat16 does, so that a tail of many tokens keeps its weight.

    Probabilities are relative to the largest of their tile, as in a kernel.
    """
    values, numbers = stored(np.random.default_rng(0), kv_dtype, tokens)
    scores, total = scores_of(tokens), np.zeros((3, 128))
    matmul_values = jax.jit(matmuls_of(kv_dtype, kv_matmul)["matmul_values"])
    for first in range(0, tokens, min(tokens, 1024)):
        tile = slice(first, first + 1024)
        largest = scores[:, tile].max(axis=1, keepdims=True)
        p = np.exp2(scores[:, tile] - largest).astype(np.float32)
        total += np.asarray(matmul_values(p, values[tile]), np.float64) * np.exp2(largest)
    assert relative_error(total, np.exp2(scores) @ numbers) < tolerance


@pytest.mark.parametrize(("kv_dtype", "kv_matmul"), [("int8", "int8_parts"), ("float8_e4m3fn", "as_stored")])
def test_scores_are_those_of_the_stored_numbers(kv_dtype: str, kv_matmul: KvMatmul) -> None:
    """Queries of bfloat16 of all sizes, with one row of zeros: products are exact, and sums are of float32."""
    rng = np.random.default_rng(0)
    keys, numbers = stored(rng, kv_dtype, 256)
    queries = (rng.normal(size=(16, 128)) * 10.0 ** rng.integers(-6, 6, (16, 1))).astype(ml_dtypes.bfloat16)
    queries[3] = 0
    found = np.asarray(matmuls_of(kv_dtype, kv_matmul)["matmul_keys"](queries.astype(np.float32), keys))
    assert not found[3].any()
    rows = np.arange(16) != 3
    # A sum of numbers of both signs: relative to what is added.
    bound = np.abs(queries.astype(np.float64)) @ np.abs(numbers).T
    error = np.abs(found - queries.astype(np.float64) @ numbers.T)[rows] / bound[rows]
    assert error.max() < 2.0**-18


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kv_dtype", "features"),
    [
        pytest.param(kv_dtype, SHAPES[name], id=f"{kv_dtype}, {name}", marks=[] if (kv_dtype, name) == QUICK else SLOW)
        for kv_dtype in ("int8", "float8_e4m3fn", "float8_e5m2")
        for name in SHAPES
    ],
)
def test_kernels_agree_with_the_oracle_in_the_interpreter(kv_dtype: str, features: dict[str, Any]) -> None:
    spec = eight_bits(kv_dtype, **features)
    plan = eight_bits_plan(spec, "int8_parts" if kv_dtype == "int8" else "as_stored")
    assert failures(spec, plan, few=True) == []


@SLOW
@pytest.mark.compile
@pytest.mark.parametrize("kind", ["decode", "mixed"])
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("target", TPU_TARGETS)
def test_kernels_compile(target: str, kv_dtype: str, kind: str) -> None:
    for features in SHAPES.values():
        spec = eight_bits(kv_dtype, **features)
        plan = plan_of(spec, kind, target)
        tasks = [task for task in tasks_of(spec, [(plan, render(spec, plan))]) if task.tokens == plan.tokens[-1]]
        for result in lower_all(tasks, Cache(None), 1):
            assert result.executable
