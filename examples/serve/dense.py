"""The reference: the same layers with plain attention over whole sequences, and no cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from serve.config import Config
from serve.model import forward, logits
from serve.weights import Params


@partial(jax.jit, static_argnums=0)
def dense_logits(config: Config, params: Params, token_ids: jax.Array) -> jax.Array:
    """float32 `[sequences, length, vocabulary]` of whole sequences, int32 `[sequences, length]`."""
    length = token_ids.shape[1]
    distance = jnp.arange(length)[:, None] - jnp.arange(length)

    # In the place of a cache, an empty array as long as the window of the layer.
    caches = [jnp.zeros((length if window is None else window, 0), config.dtype) for window in config.windows]

    def one(tokens: jax.Array) -> jax.Array:
        x, _ = forward(config, attend, params, caches, tokens, jnp.arange(length))
        return logits(config, params, x)

    def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, cache: jax.Array, layer: str) -> Any:
        grouped = queries.reshape(length, config.kv_heads, -1, queries.shape[-1])
        scores = jnp.einsum("qhgd,khd->hgqk", grouped, keys) * config.head_dim**-0.5
        visible = (distance >= 0) & (distance < len(cache))
        probabilities = jax.nn.softmax(jnp.where(visible, scores.astype(jnp.float32), -jnp.inf)).astype(values.dtype)
        return jnp.einsum("hgqk,khd->qhgd", probabilities, values).reshape(queries.shape), cache

    return jax.lax.map(one, token_ids)
