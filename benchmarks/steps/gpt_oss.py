"""The step of gpt-oss 20B for `rpac predict --step`: experts, sinks, and layers with and without a window.

Sizes: openai/gpt-oss-20b, config.json. Weights are bfloat16, where the published ones are MXFP4. Every expert computes every
token, with a weight of 0 where the router did not choose it. At 64 rows nearly all experts are chosen by some row anyway, so that
all weights are read. In prefill this is eight times the work that a grouped product would do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

WIDTH, HIDDEN, VOCABULARY, LAYERS = 2880, 2880, 201088, 24
Q_HEADS, KV_HEADS, HEAD_DIM, THETA = 64, 8, 64, 150_000.0
EXPERTS, CHOSEN, LIMIT = 32, 4, 7.0
PADDED_WIDTH = 2944  # of the embedding: with rows that are no whole lanes, XLA copies all of it in every call
HEADS: Final = ("kv", "copy")


def decoder(layers: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A greedy step of so many layers, and its arrays. With several devices the experts are spread over them."""
    kinds = ["sliding", "full"] * (layers // 2)

    def step(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any) -> Any:
        x = params["embedding"][token_ids][:, :WIDTH]
        after = []
        for kind, layer, cache in zip(kinds, params["layers"], caches, strict=True):
            normed = rms_norm(x, layer["attention_norm"])
            q, k, v = (
                (normed @ layer[name] + layer[f"{name}_bias"]).reshape(len(x), -1, HEAD_DIM) for name in ("q", "k", "v")
            )
            out, cache, *_ = attend(
                rotate(q, positions), rotate(k, positions), v, cache, layer=kind, sinks=layer["sinks"]
            )
            x = x + out.reshape(len(x), -1) @ layer["o"] + layer["o_bias"]
            x = x + experts(layer, rms_norm(x, layer["mlp_norm"]))
            after.append(cache)
        rows = rms_norm(x[jnp.clip(batch.cu_q_lens[1:] - 1, 0, len(x) - 1)], params["norm"])
        logits = jnp.dot(rows, params["head"], preferred_element_type=jnp.float32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), after

    def step_arrays(kind: str, tokens: int, limits: Any) -> dict[str, Any]:
        def weight(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        queries, keys = Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        table = {
            "attention_norm": (weight(WIDTH), P()),
            "q": (weight(WIDTH, queries), P(None, HEADS)),
            "k": (weight(WIDTH, keys), P(None, "kv")),
            "v": (weight(WIDTH, keys), P(None, "kv")),
            "q_bias": (weight(queries), P(HEADS)),
            "k_bias": (weight(keys), P("kv")),
            "v_bias": (weight(keys), P("kv")),
            "o": (weight(queries, WIDTH), P(HEADS)),
            "o_bias": (weight(WIDTH), P()),
            "sinks": (weight(Q_HEADS, dtype=jnp.float32), P(HEADS)),
            "mlp_norm": (weight(WIDTH), P()),
            "router": (weight(WIDTH, EXPERTS), P()),
            "router_bias": (weight(EXPERTS), P()),
            "gate": (weight(EXPERTS, WIDTH, HIDDEN), P(HEADS)),
            "up": (weight(EXPERTS, WIDTH, HIDDEN), P(HEADS)),
            "down": (weight(EXPERTS, HIDDEN, WIDTH), P(HEADS)),
        }
        embedding, head = (weight(VOCABULARY, PADDED_WIDTH), P(HEADS)), (weight(WIDTH, VOCABULARY), P(None, HEADS))
        tree = {"embedding": embedding, "layers": [table] * layers, "norm": (weight(WIDTH), P()), "head": head}
        params, cuts = (
            jax.tree.map(lambda pair, index=index: pair[index], tree, is_leaf=lambda node: isinstance(node, tuple))
            for index in (0, 1)
        )
        return {"params": params, "caches": kinds, "shardings": {"params": cuts}}

    return step, step_arrays


def experts(layer: Any, x: jax.Array) -> jax.Array:
    """The chosen experts of each token, `[tokens, width]`: a SwiGLU with a clamp each, weighted by the router."""
    scores = (x @ layer["router"] + layer["router_bias"]).astype(jnp.float32)
    best, _ = lax.top_k(scores, CHOSEN)
    chosen = jnp.where(scores >= best[:, -1:], scores, -jnp.inf)
    share = jax.nn.softmax(chosen, axis=-1).astype(x.dtype)
    gate = jnp.minimum(jnp.einsum("tw,ewh->eth", x, layer["gate"]), LIMIT)
    up = jnp.clip(jnp.einsum("tw,ewh->eth", x, layer["up"]), -LIMIT, LIMIT)
    hidden = (up + 1) * gate * jax.nn.sigmoid(1.702 * gate) * share.T[..., None]
    return jnp.einsum("eth,ehw->tw", hidden, layer["down"])


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    angles = positions[:, None, None] * THETA ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * weight


def __getattr__(name: str) -> Callable[..., Any]:
    """`gpt_oss` and `gpt_oss_arrays`; `gpt_oss_l4` is the first 4 layers."""
    match = re.fullmatch(r"gpt_oss(?:_l(\d+))?(_arrays)?", name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    step, step_arrays = decoder(int(match[1] or LAYERS))
    return step_arrays if match[2] else step
