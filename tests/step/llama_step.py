"""A Llama of two layers as a user writes it: the step, and the function that describes its arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

LAYERS = 2
VOCABULARY, WIDTH, HIDDEN = 64, 128, 256
Q_HEADS, KV_HEADS, HEAD_DIM = 2, 1, 128


def step(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any, temperature: Any) -> Any:
    """Logits of the last token of each row, and the token that is likeliest."""
    x = params["embedding"][token_ids]
    after = []
    for layer, cache in zip(params["layers"], caches, strict=True):
        q, k, v = qkv(layer, x, positions)
        out, cache = attend(q, k, v, cache)
        x = rest(layer, x, out)
        after.append(cache)
    last = jnp.maximum(batch.cu_q_lens[1:] - 1, 0)
    logits = (x[last] @ params["head"]) / temperature
    return {"logits": logits, "token": jnp.argmax(logits, axis=-1).astype(jnp.int32)}, after


def step_arrays(kind: str, tokens: int, limits: Any) -> Any:
    def weight(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layer = {
        "wq": weight(WIDTH, Q_HEADS, HEAD_DIM),
        "wk": weight(WIDTH, KV_HEADS, HEAD_DIM),
        "wv": weight(WIDTH, KV_HEADS, HEAD_DIM),
        "wo": weight(Q_HEADS, HEAD_DIM, WIDTH),
        "up": weight(WIDTH, HIDDEN),
        "down": weight(HIDDEN, WIDTH),
    }
    params = {"embedding": weight(VOCABULARY, WIDTH), "layers": [layer] * LAYERS, "head": weight(WIDTH, VOCABULARY)}
    return {"params": params, "caches": LAYERS, "extra": (weight(),)}


def qkv(layer: Any, x: Any, positions: Any) -> Any:
    q, k, v = (jnp.einsum("tw,whd->thd", x, layer[name]) for name in ("wq", "wk", "wv"))
    return rotate(q, positions), rotate(k, positions), v


def rotate(x: Any, positions: Any) -> Any:
    half = HEAD_DIM // 2
    angles = positions[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], axis=-1
    )


def rest(layer: Any, x: Any, out: Any) -> Any:
    x = x + jnp.einsum("thd,hdw->tw", out, layer["wo"])
    return x + jax.nn.silu(x @ layer["up"]) @ layer["down"]


def scanned(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any) -> Any:
    """The same layers under a scan, on one cache that holds the pages of all of them."""
    [cache] = caches
    pages = cache.shape[0] // LAYERS

    def body(carry: Any, layer: Any) -> Any:
        x, cache = carry
        index, layer = layer
        own = batch._replace(page_indices=batch.page_indices + index * pages)
        out, cache = attend(*qkv(layer, x, positions), cache, batch=own)
        return (rest(layer, x, out), cache), None

    layers = jnp.arange(LAYERS, dtype=jnp.int32), params["layers"]
    (x, cache), _ = jax.lax.scan(body, (params["embedding"][token_ids], cache), layers)
    return x, [cache]


def scanned_arrays(kind: str, tokens: int, limits: Any) -> Any:
    found = step_arrays(kind, tokens, limits)
    stacked = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct((LAYERS, *one.shape), one.dtype), found["params"]["layers"][0]
    )
    return {"params": {**found["params"], "layers": stacked}, "caches": 1}


def sharded_arrays(kind: str, tokens: int, limits: Any) -> Any:
    """As `step_arrays`, for two devices of which each has half of the heads and of the hidden units."""
    found = step_arrays(kind, tokens, limits)
    heads = P(None, "kv", None)
    layer = {"wq": heads, "wk": heads, "wv": heads, "wo": P("kv", None, None), "up": P(None, "kv"), "down": P("kv")}
    shardings = {"params": {"embedding": P(), "layers": [layer] * LAYERS, "head": P(None, "kv")}}
    return {**found, "shardings": shardings}


only_mixed = step


def only_mixed_arrays(kind: str, tokens: int, limits: Any) -> Any:
    return step_arrays(kind, tokens, limits) if kind == "mixed" else None


def layered(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any) -> Any:
    """As `step`, for a spec whose first kind of layers has a window. Named tuples come back as named tuples."""
    x = params["embedding"][token_ids]
    after = {}
    for name, layer in zip(("window", "full"), params["layers"], strict=True):
        out, after[name] = attend(*qkv(layer, x, positions), caches[name], layer=name)
        x = rest(layer, x, out)
    return Output(x, None), after


class Output(NamedTuple):
    x: Any
    rest: Any


def layered_arrays(kind: str, tokens: int, limits: Any) -> Any:
    found = step_arrays(kind, tokens, limits)
    return {"params": found["params"], "caches": {"window": "window", "full": "full"}}


def sharded(*args: Any) -> Any:
    return step(*args)


def spelled_otherwise(attend: Any, weights: Any, kv: Any, ids: Any, where: Any, batch: Any, heat: Any) -> Any:
    """`step` in other words: it is lowered to the same text."""
    outputs, after = step(attend, weights, kv, ids, where, batch, heat)
    return {name: outputs[name] for name in sorted(outputs)}, list(after)


def warmer(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any, temperature: Any) -> Any:
    return step(attend, params, caches, token_ids, positions, batch, temperature + 1)


spelled_otherwise_arrays = warmer_arrays = step_arrays
