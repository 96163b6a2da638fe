"""A Llama in plain JAX: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Weights are made from a seed.

Everything but attention works on rows of tokens, so the same layers serve a ragged batch and a dense one:
`forward` is given the attention as a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""layer, queries [tokens, q_heads, head_dim], keys and values [tokens, kv_heads, head_dim] -> as queries."""


@dataclass(frozen=True)
class Config:
    layers: int = 4
    vocabulary: int = 512
    width: int = 256
    hidden: int = 688
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    rope_theta: float = 10_000.0
    epsilon: float = 1e-5


class Layer(NamedTuple):
    attention_norm: jax.Array  # [width]
    wq: jax.Array  # [width, q_heads, head_dim]
    wk: jax.Array  # [width, kv_heads, head_dim]
    wv: jax.Array
    wo: jax.Array  # [q_heads, head_dim, width]
    ffn_norm: jax.Array  # [width]
    gate: jax.Array  # [width, hidden]
    up: jax.Array
    down: jax.Array  # [hidden, width]


class Params(NamedTuple):
    embedding: jax.Array  # [vocabulary, width]
    layers: tuple[Layer, ...]
    norm: jax.Array  # [width]
    head: jax.Array  # [width, vocabulary]


def init(config: Config, seed: int) -> Params:
    """float32 weights, on the default device."""
    rng = np.random.default_rng(seed)

    def weight(fan_in: int, *shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * fan_in**-0.5)

    c = config
    layers = tuple(
        Layer(
            attention_norm=jnp.ones(c.width),
            wq=weight(c.width, c.width, c.q_heads, c.head_dim),
            wk=weight(c.width, c.width, c.kv_heads, c.head_dim),
            wv=weight(c.width, c.width, c.kv_heads, c.head_dim),
            wo=weight(c.q_heads * c.head_dim, c.q_heads, c.head_dim, c.width),
            ffn_norm=jnp.ones(c.width),
            gate=weight(c.width, c.width, c.hidden),
            up=weight(c.width, c.width, c.hidden),
            down=weight(c.hidden, c.hidden, c.width),
        )
        for _ in range(c.layers)
    )
    return Params(weight(1, c.vocabulary, c.width), layers, jnp.ones(c.width), weight(c.width, c.width, c.vocabulary))


def forward(config: Config, params: Params, token_ids: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
    """The last layer's output for each token, `[tokens, width]`. Works inside jit, and outside of it in jitted pieces."""
    x = embed(params, token_ids)
    for index, layer in enumerate(params.layers):
        attended = attend(index, *project(config, layer, x, positions))
        x = complete(config, layer, x, attended)
    return x


@jax.jit
def embed(params: Params, token_ids: jax.Array) -> jax.Array:
    return params.embedding[token_ids]


@partial(jax.jit, static_argnums=0)
def project(config: Config, layer: Layer, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys, rotated to their positions, and values."""
    x = rms_norm(x, layer.attention_norm, config.epsilon)
    queries, keys, values = (jnp.einsum("tw,whd->thd", x, weight) for weight in (layer.wq, layer.wk, layer.wv))
    return rotate(queries, positions, config.rope_theta), rotate(keys, positions, config.rope_theta), values


@partial(jax.jit, static_argnums=0)
def complete(config: Config, layer: Layer, x: jax.Array, attended: jax.Array) -> jax.Array:
    """The rest of a layer, after its attention."""
    x = x + jnp.einsum("thd,hdw->tw", attended, layer.wo)
    inner = rms_norm(x, layer.ffn_norm, config.epsilon)
    return x + (jax.nn.silu(inner @ layer.gate) * (inner @ layer.up)) @ layer.down


@partial(jax.jit, static_argnums=0)
def logits(config: Config, params: Params, x: jax.Array) -> jax.Array:
    """`[tokens, vocabulary]` float32."""
    return rms_norm(x, params.norm, config.epsilon) @ params.head


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions, the two halves of head_dim as the real and the imaginary parts, as Llama's checkpoints have them."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-jnp.arange(half) / half)
    real, imaginary = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)


@partial(jax.jit, static_argnums=0)
def dense_logits(config: Config, params: Params, token_ids: jax.Array) -> jax.Array:
    """`[sequences, length, vocabulary]` of whole sequences, with plain causal attention and no cache: the reference."""

    def attend(_: int, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        length = len(queries)
        grouped = queries.reshape(length, config.kv_heads, -1, config.head_dim)
        scores = jnp.einsum("qhgd,khd->hgqk", grouped, keys) * config.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf))
        return jnp.einsum("hgqk,khd->qhgd", weights, values).reshape(queries.shape)

    def one(tokens: jax.Array) -> jax.Array:
        return logits(config, params, forward(config, params, tokens, jnp.arange(len(tokens)), attend))

    return jax.lax.map(one, token_ids)
