"""A decoder of the Llama family in plain JAX, as one pure step: tokens in, the next token of every sequence out.

Llama, Mistral, Qwen2 and Qwen3 differ in what `serve.config.Config` says of them. Attention and the caches of keys and values
are rpac's: a step is given its program as `attend`. `make_step` makes the two functions that `rpac build --step` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from serve import weights
from serve.config import Config
from serve.rope import angles, rotate
from serve.sampling import Sampling, sample
from serve.weights import Params

Attend = Callable[..., Any]
"""`attend(queries, keys, values, kv_cache, layer=kind)` gives `(out, kv_cache)`; see docs/batch-contract.md."""

Caches = Sequence[jax.Array]


def make_step(config: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`step` of a model, and the function beside it that describes its arrays."""

    def step(
        attend: Attend,
        params: Params,
        caches: Caches,
        token_ids: jax.Array,
        positions: jax.Array,
        batch: Any,
        sampling: Sampling,
        copies: jax.Array,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The token that follows each row of the batch, int32 `[min(max_num_seqs, tokens)]`, and the caches.

        `token_ids` and `positions` are int32 `[tokens]`, `caches` has one array a layer, and `batch` is the metadata.
        `copies`, int32 `[max_num_seqs, 2]`, are pages to copy in every cache before all else, from and to, ahead of rows of
        -1. A row that is not of the batch, or whose prompt is not computed to its end, gets a token without a meaning.
        """
        x, caches = forward(config, attend, params, copy_pages(caches, copies), token_ids, positions)
        count = min(len(batch.kv_lens), len(token_ids))  # each row has a token
        last = jnp.clip(batch.cu_q_lens[1 : count + 1] - 1, 0, len(token_ids) - 1)
        chosen = jax.tree.map(lambda one: one[:count], sampling)
        return sample(logits(config, params, x[last]), positions[last], chosen), caches

    def step_arrays(kind: str, tokens: int, limits: Any) -> dict[str, Any]:
        """Shapes, dtypes and partitions of what is not rpac's; the same for every kind and token bucket."""
        rows = limits.max_num_seqs
        sampling = Sampling(*(jax.ShapeDtypeStruct((rows,), dtype) for dtype in (np.float32, np.float32, np.uint32)))
        return {
            "params": weights.shapes(config),
            "caches": list(config.kinds),
            "extra": (sampling, jax.ShapeDtypeStruct((rows, 2), np.int32)),
            "shardings": {"params": weights.cuts(config)},
        }

    return step, step_arrays


def copy_pages(caches: Caches, copies: jax.Array) -> list[jax.Array]:
    """Caches with pages copied, `copies` `[n, 2]` from and to, ahead of rows of -1. No page is both read and written.

    A loop, because its state stays in place: XLA copies a whole cache that goes through a condition.
    """

    def copied(index: jax.Array, caches: list[jax.Array]) -> list[jax.Array]:
        source, target = copies[index]
        return [cache.at[target].set(cache[source]) for cache in caches]

    return lax.fori_loop(0, (copies[:, 1] >= 0).sum(), copied, list(caches))


def forward(
    config: Config, attend: Attend, params: Params, caches: Caches, token_ids: jax.Array, positions: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """The last layer's output for each token, `[tokens, width]`, before the final norm; and the caches."""
    x = params["embedding"][token_ids]
    rotation = angles(config.rope, config.head_dim, positions, x.dtype)
    after = []
    for kind, layer, cache in zip(config.kinds, params["layers"], caches, strict=True):
        queries, keys, values = project(config, layer, x, rotation)
        keys, values = _narrowed(keys, cache.dtype), _narrowed(values, cache.dtype)
        heads = (_padded(one, config.kernel_head_dim) for one in (queries, keys, values))
        out, cache, *_ = attend(*heads, cache, layer=kind)
        x = x + _linear(layer, "o", out[..., : config.head_dim].reshape(len(x), -1))
        x = x + mlp(layer, rms_norm(x, layer["mlp_norm"], config.epsilon))
        after.append(cache)
    return x, after


def project(
    config: Config, layer: Mapping[str, jax.Array], x: jax.Array, rotation: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[tokens, q_heads, head_dim]`, and keys and values `[tokens, kv_heads, head_dim]`, rotated to their positions."""
    x = rms_norm(x, layer["attention_norm"], config.epsilon)
    queries, keys, values = (_linear(layer, name, x).reshape(len(x), -1, config.head_dim) for name in ("q", "k", "v"))
    if config.qk_norm:
        queries = rms_norm(queries, layer["q_norm"], config.epsilon)
        keys = rms_norm(keys, layer["k_norm"], config.epsilon)
    return rotate(queries, *rotation), rotate(keys, *rotation), values


def mlp(layer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    return _linear(layer, "down", jax.nn.silu(_linear(layer, "gate", x)) * _linear(layer, "up", x))


def logits(config: Config, params: Params, x: jax.Array) -> jax.Array:
    """float32 `[rows, vocabulary]` from the output of the last layer for some rows."""
    x = rms_norm(x, params["norm"], config.epsilon)
    head = params["embedding"].T if config.tied else params["head"]
    return jnp.dot(x, head, preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """Over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return weight * wide.astype(x.dtype)


def _linear(layer: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    x = x @ layer[name]
    return x + layer[f"{name}_bias"] if f"{name}_bias" in layer else x


def _narrowed(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """In the dtype of a cache. A number that is too large for 8 bits becomes the largest, and not NaN."""
    if jnp.finfo(dtype).max < jnp.finfo(x.dtype).max:
        most = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -most, most)
    return x.astype(dtype)


def _padded(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[-1])))
