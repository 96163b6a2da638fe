"""Whatever is wrong with a call, the error is rpac's own, says what and where, and the engine stays usable."""

# ruff: noqa: E501  (a row a case)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rpac
from rpac.batch import Batch
from rpac.engine import Engine, load
from rpac.errors import BatchError, SelectionError


@pytest.fixture
def engine(bundle: Path) -> Engine:
    return load(bundle, target="cpu")


def decode_args(engine: Engine) -> dict[str, Any]:
    """A good call of two decode rows."""
    batch = Batch.build(engine.limits, [1, 1], [3, 4], [[1], [2]])
    arrays = {dims.name: jnp.zeros(dims.shape, dims.dtype) for dims in engine.programs[rpac.Variant("decode", 8)].args}
    names = ("kv_lens", "page_indices", "cu_q_lens", "distribution")
    return {**arrays, **{name: getattr(batch, name).copy() for name in names}}


CALLS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a list": ("queries", lambda _: [[1.0]], "queries are a list; must be bfloat16[tokens, 4, 128]"),
    "two axes": ("queries", lambda array: array[0], "queries are bfloat16[4, 128]; must be bfloat16[tokens, 4, 128]"),
    "head_dim": ("queries", lambda array: array[..., :64], "queries is bfloat16[8, 4, 64]; must be bfloat16[8, 4, 128]"),
    "dtype": ("keys", lambda array: array.astype(jnp.float32), "keys is float32[8, 2, 128]; must be bfloat16[8, 2, 128]"),
    "other bucket": ("values", lambda array: jnp.concatenate([array] * 4), "values is bfloat16[32, 2, 128]; must be bfloat16[8, 2, 128]"),
    "pages": ("kv_cache", lambda array: array[:-1], "kv_cache is bfloat16[31, 16, 2, 2, 128]; must be bfloat16[32, 16, 2, 2, 128]"),
    "layout": ("kv_cache", lambda array: array.reshape(32, 2, 2, 16, 128), "must be bfloat16[32, 16, 2, 2, 128], kv_layout interleaved; see"),
    "cache on host": ("kv_cache", np.asarray, "kv_cache is a ndarray; must be a jax array on"),
    "none": ("kv_cache", lambda _: None, "kv_cache is a NoneType; must be bfloat16[32, 16, 2, 2, 128]"),
    "kv_lens": ("kv_lens", lambda array: array[:-1], "kv_lens has shape [3]; must be [4]"),
    "int64": ("cu_q_lens", lambda array: array.astype(np.int64), "cu_q_lens has dtype int64; must be int32"),
    "lengths": ("kv_lens", lambda array: array * 100, "row 0 (decode): kv_lens[0] is 400; must be at most 128"),
    "page id": ("page_indices", lambda array: array + 31, "row 0 (decode): entry 0 of its page table is 32; must be 0 to 31"),
    "distribution": ("distribution", lambda array: np.array([5, 4, 2], array.dtype), "distribution is (5, 4, 2)"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "text"), CALLS.values(), ids=CALLS)
def test_a_call_that_breaks_the_contract(engine: Engine, name: str, edit: Callable[[Any], Any], text: str) -> None:
    good = decode_args(engine)
    args = {**good, name: edit(good[name])}
    with pytest.raises(BatchError) as raised:
        engine(*args.values())
    assert text in str(raised.value)
    assert raised.value.exit_code == 2
    assert not engine.counts
    engine(*good.values())  # neither the engine nor the cache was harmed


@pytest.mark.parametrize("name", ["kv_lens", "page_indices", "cu_q_lens", "distribution"])
def test_shapes_are_checked_even_where_values_are_not(engine: Engine, name: str) -> None:
    args = decode_args(engine)
    args[name] = args[name][:-1]
    with pytest.raises(BatchError, match=rf"{name} is int32\[\d+\]; must be int32\[\d+\]"):
        engine(*args.values(), validate=False)


@pytest.mark.parametrize("rows", range(1, 5))
def test_a_batch_in_place_of_its_arrays(engine: Engine, rows: int) -> None:
    batch = Batch.build(engine.limits, [1] * rows, [3] * rows, [[row] for row in range(rows)])
    arrays = list(decode_args(engine).values())[:4]
    advice = r"must be int32\[4\]; pass the arrays of the batch: engine\(\.\.\., \*batch\.metadata\)$"
    for validate in (True, False):
        for call in (engine, engine.traced, engine.program("decode", 8)):
            options = {"validate": validate} if call is engine else {}
            with pytest.raises(BatchError, match=f"^kv_lens is a Batch; {advice}"):
                call(*arrays, batch, **options)
            with pytest.raises(BatchError, match=f"^kv_lens is a SequenceView; {advice}"):
                call(*arrays, *batch, **options)
    engine(*arrays, *batch.metadata)


@pytest.mark.parametrize(
    "value", [[3, 4, 0, 0], "1234", None, object(), [[1], [2, 3]]], ids=lambda value: type(value).__name__
)
def test_metadata_that_is_no_array(engine: Engine, value: Any) -> None:
    args = decode_args(engine)
    args["kv_lens"] = value
    for validate in (True, False):
        with pytest.raises(BatchError, match=rf"kv_lens is a {type(value).__name__}; must be int32\[4\]"):
            engine(*args.values(), validate=validate)


def test_a_cache_that_was_donated_before(engine: Engine) -> None:
    args = decode_args(engine)
    engine(*args.values())
    with pytest.raises(
        BatchError, match=r"kv_cache was deleted or donated; .* pass on the kv_cache that the last call"
    ):
        engine(*args.values())


def test_a_call_inside_jit(engine: Engine) -> None:
    args = decode_args(engine)
    with pytest.raises(BatchError, match=r"queries is traced; .*; inside jit use engine.traced or engine.program"):
        jax.jit(lambda queries: engine(queries, *list(args.values())[1:]))(args["queries"])


def test_rows_that_are_no_bucket(engine: Engine) -> None:
    args = decode_args(engine)
    for name in ("queries", "keys", "values"):
        args[name] = args[name][:5]
    for validate in (True, False):
        with pytest.raises(SelectionError) as raised:
            engine(*args.values(), validate=validate)
        assert "5" in str(raised.value)
        assert str(raised.value).endswith("serving:\n  max_num_tokens: 32\n  token_buckets: [5, 8, 32]")
        assert raised.value.exit_code == 2
