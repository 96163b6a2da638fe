"""Steps with one mistake each; the rest is llama_step's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llama_step import LAYERS, WIDTH, qkv, rest, step, step_arrays

TABLE = np.ones((2048, WIDTH), np.float32)  # 1 MiB, as parameters that a function closes over
TWICE = np.ones((2048, WIDTH), np.float32)


def layers(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any) -> Any:
    x, after = params["embedding"][token_ids], []
    for layer, cache in zip(params["layers"], caches, strict=True):
        out, cache = attend(*qkv(layer, x, positions), cache)
        x = rest(layer, x, out)
        after.append(cache)
    return x, after


def baked(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any, one: Any) -> Any:
    x, after = layers(attend, params, caches, token_ids, positions)
    return x + jnp.asarray(TABLE)[token_ids] + jnp.asarray(TWICE)[token_ids], after


def printing(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any, one: Any) -> Any:
    x, after = layers(attend, params, caches, token_ids, positions)
    jax.debug.print("x is {}", x[0, 0])
    return x, after


def reversed_caches(*args: Any) -> Any:
    x, after = layers(*args[:5])
    return x, after[::-1]


def one_cache_less(*args: Any) -> Any:
    x, after = layers(*args[:5])
    return x, after[:1]


def another_dtype(*args: Any) -> Any:
    x, after = layers(*args[:5])
    return x, [after[0], after[1].astype(jnp.bfloat16)]


def no_pair(*args: Any) -> Any:
    return layers(*args[:5])[0]


def old_cache(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any, one: Any) -> Any:
    x, after = layers(attend, params, caches, token_ids, positions)
    return x + jnp.sum(caches[0][3]), after


def raising(attend: Any, params: Any, caches: Any, *args: Any) -> Any:
    return params["embeddings"], caches


def wrong_query(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any, one: Any) -> Any:
    q, k, v = qkv(params["layers"][0], params["embedding"][token_ids], positions)
    return attend(q[:, :1], k, v, caches[0])


def unknown_layer(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any, one: Any) -> Any:
    q, k, v = qkv(params["layers"][0], params["embedding"][token_ids], positions)
    return attend(q, k, v, caches[0], layer="full")


def own_class(*args: Any) -> Any:
    x, after = layers(*args[:5])
    return Point(x), after


def calling_out(*args: Any) -> Any:
    x, after = layers(*args[:5])
    return jnp.linalg.cholesky(x.T @ x), after


@jax.tree_util.register_pytree_node_class
class Point:
    def __init__(self, x: Any) -> None:
        self.x = x

    def tree_flatten(self) -> Any:
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, _: Any, leaves: Any) -> Any:
        return cls(*leaves)


for function in (
    baked, printing, reversed_caches, one_cache_less, another_dtype, no_pair, old_cache, raising, wrong_query, unknown_layer,
    own_class, calling_out,
):  # fmt: skip
    globals()[f"{function.__name__}_arrays"] = step_arrays

not_described = step
no_dict = with_unknown = no_array = unknown_cache = bad_partition = never = changing = step


def no_dict_arrays(*args: Any) -> Any:
    return [step_arrays(*args)]


def with_unknown_arrays(*args: Any) -> Any:
    return {**step_arrays(*args), "cache": 2}


def no_array_arrays(*args: Any) -> Any:
    return {**step_arrays(*args), "params": {"scale": 3}}


def unknown_cache_arrays(*args: Any) -> Any:
    return {**step_arrays(*args), "caches": ["full"] * LAYERS}


def bad_partition_arrays(*args: Any) -> Any:
    return {**step_arrays(*args), "shardings": {"params": jax.sharding.PartitionSpec("model")}}


def never_arrays(*args: Any) -> Any:
    return None


def changing_arrays(kind: str, tokens: int, limits: Any) -> Any:
    found = step_arrays(kind, tokens, limits)
    return found if kind == "decode" else {**found, "caches": 1}
