"""A user's step around a spec's programs: what it is lowered to, and what that computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import llama_step
import numpy as np
import pytest
from jax import export

from rpac.batch import Batch
from rpac.files.store import Store
from rpac.step import StepTask
from rpac.step.worker import checked_functions, compile_step, lower_step, step_of

TASK = Callable[..., StepTask]


@pytest.mark.parametrize(("function", "caches"), [("step", 2), ("scanned", 1)])
def test_every_cache_is_updated_in_place(task: TASK, function: str, caches: int) -> None:
    step = step_of(task(f"llama_step:{function}"))
    assert step is not None
    memory = compile_step(step).memory_analysis()
    assert len(step.caches) == caches
    assert memory.alias_size_in_bytes == sum(cache.nbytes for cache in step.caches)


def test_both_forms_compute_what_dense_attention_does(task: TASK) -> None:
    """Two rows decode a token each, after prompts that the same programs wrote to the cache one token at a time."""
    rng = np.random.default_rng(1)
    described = llama_step.step_arrays("decode", 16, None)["params"]
    params = jax.tree.map(lambda one: jnp.array(rng.standard_normal(one.shape, np.float32) * 0.1), described)
    stacked = {**params, "layers": jax.tree.map(lambda *layers: jnp.stack(layers), *params["layers"])}
    listed, scanned = (
        loaded(lower_step(task(f"llama_step:{name}"), {}, Store(None))[0]) for name in ("step", "scanned")
    )
    dims = step_of(task()).caches[0]  # type: ignore[union-attr]
    caches = [jnp.zeros(dims.shape, dims.dtype) for _ in range(llama_step.LAYERS)]
    one_cache = [jnp.zeros(dims.shape, dims.dtype)]
    token_ids = rng.integers(0, llama_step.VOCABULARY, (2, 5)).astype(np.int32)
    for position in range(5):
        batch = Batch.build(task().limits, [1, 1], [position] * 2, [[1], [4]])
        rows = np.zeros(16, np.int32), np.full(16, position, np.int32), *batch.metadata
        rows[0][:2] = token_ids[:, position]
        *caches, logits, token = listed(*jax.tree.leaves(params), *caches, *rows, np.float32(1))
        *one_cache, x = scanned(*jax.tree.leaves(stacked), *one_cache, *rows)
    wanted = dense(params, token_ids)
    np.testing.assert_allclose(logits[:2], wanted @ params["head"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(x[:2], wanted, rtol=1e-4, atol=1e-4)
    assert np.array_equal(token[:2], np.argmax(logits[:2], axis=-1))


def test_a_step_that_the_model_does_not_want_is_left_out(task: TASK) -> None:
    assert checked_functions([task(), task()]) == [True, True]
    assert step_of(task("llama_step:only_mixed")) is None


def loaded(lowered: Any) -> Callable[..., Any]:
    call: Callable[..., Any] = jax.jit(export.deserialize(bytearray(lowered.exported)).call)
    return call


def dense(params: Any, token_ids: Any) -> Any:
    """The last layer's output of the last tokens, `[sequences, width]`, without a cache."""
    length = token_ids.shape[1]

    def one(tokens: Any) -> Any:
        x = params["embedding"][tokens]
        for layer in params["layers"]:
            q, k, v = llama_step.qkv(layer, x, jnp.arange(length))
            scores = jnp.einsum("qhd,kgd->hqk", q, k) * llama_step.HEAD_DIM**-0.5
            p = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf))
            x = llama_step.rest(layer, x, jnp.einsum("hqk,kgd->qhd", p, v))
        return x[-1]

    return jax.lax.map(one, token_ids)
