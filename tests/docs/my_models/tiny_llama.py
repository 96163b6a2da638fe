"""A model of two layers for specs/tiny.yaml, as docs/steps.md shows it."""

import jax
import jax.numpy as jnp

LAYERS, VOCABULARY, WIDTH = 2, 256, 128
Q_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128


def step(attend, params, caches, token_ids, positions, batch):
    x = params["embedding"][token_ids]
    new_caches = []
    for layer, kv_cache in zip(params["layers"], caches, strict=True):
        q, k, v = (jnp.einsum("tw,whd->thd", x, layer[name]) for name in ("wq", "wk", "wv"))
        out, kv_cache = attend(rotate(q, positions), rotate(k, positions), v, kv_cache)
        x = x + jnp.einsum("thd,hdw->tw", out, layer["wo"])
        new_caches.append(kv_cache)
    last = x[batch.cu_q_lens[1:] - 1]  # the last token of each row
    logits = last @ params["head"]
    return {"logits": logits, "token": jnp.argmax(logits, axis=-1)}, new_caches


def step_arrays(kind, tokens, limits):
    def weight(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    layer = {
        "wq": weight(WIDTH, Q_HEADS, HEAD_DIM),
        "wk": weight(WIDTH, KV_HEADS, HEAD_DIM),
        "wv": weight(WIDTH, KV_HEADS, HEAD_DIM),
        "wo": weight(Q_HEADS, HEAD_DIM, WIDTH),
    }
    params = {"embedding": weight(VOCABULARY, WIDTH), "layers": [layer] * LAYERS, "head": weight(WIDTH, VOCABULARY)}
    return {"params": params, "caches": LAYERS}


def rotate(x, positions):
    """Rotary positions; the two halves of head_dim are the real and the imaginary parts."""
    half = HEAD_DIM // 2
    angles = positions[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    a, b, cos, sin = x[..., :half], x[..., half:], jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
