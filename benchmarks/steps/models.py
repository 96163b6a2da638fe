"""Forward steps of whole models in the form that `rpac build --step` takes, with the shapes that their config.json files state.

Weights are bfloat16. A dense Llama, the same over several devices, and a model with two kinds of layers and sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class Model:
    """Sizes as in a model's config.json. `layers` has the kind of each layer; `heads` are the axes of the mesh that cut it."""

    width: int
    hidden: int
    vocabulary: int
    q_heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[str, ...]
    rope_theta: float = 500_000.0
    sinks: bool = False
    heads: tuple[str, ...] = ()


LLAMA3_8B = Model(4096, 14336, 128256, 32, 8, 128, ("",) * 32)
LLAMA3_70B_LAYER = Model(8192, 28672, 128256, 64, 8, 128, ("",), heads=("kv",))
TWO_KINDS = Model(2880, 2880, 201088, 64, 8, 64, ("sliding", "full") * 2, 150_000.0, sinks=True, heads=("kv",))


def decoder(model: Model) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The step of a model, which returns the logits of the last token of each row, and the function beside it."""

    def step(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any) -> Any:
        x = params["embedding"][token_ids]
        after = []
        for kind, layer, cache in zip(model.layers, params["layers"], caches, strict=True):
            normed = rms_norm(x, layer["attention_norm"])
            q, k, v = (jnp.einsum("tw,whd->thd", normed, layer[name]) for name in ("wq", "wk", "wv"))
            more = {"sinks": layer["sinks"]} if model.sinks else {}
            q, k = rotate(q, positions, model.rope_theta), rotate(k, positions, model.rope_theta)
            out, cache = attend(q, k, v, cache, layer=kind, **more)
            x = x + jnp.einsum("thd,hdw->tw", out, layer["wo"])
            normed = rms_norm(x, layer["mlp_norm"])
            x = x + (jax.nn.silu(normed @ layer["gate"]) * (normed @ layer["up"])) @ layer["down"]
            after.append(cache)
        last = rms_norm(x[jnp.maximum(batch.cu_q_lens[1:] - 1, 0)], params["norm"])
        return jnp.dot(last, params["head"], preferred_element_type=jnp.float32), after

    def arrays(kind: str, tokens: int, limits: Any) -> Any:
        m = model
        layer = {
            "attention_norm": weight(m.width),
            "wq": weight(m.width, m.q_heads, m.head_dim),
            "wk": weight(m.width, m.kv_heads, m.head_dim),
            "wv": weight(m.width, m.kv_heads, m.head_dim),
            "wo": weight(m.q_heads, m.head_dim, m.width),
            "mlp_norm": weight(m.width),
            "gate": weight(m.width, m.hidden),
            "up": weight(m.width, m.hidden),
            "down": weight(m.hidden, m.width),
            **({"sinks": jax.ShapeDtypeStruct((m.q_heads,), jnp.float32)} if m.sinks else {}),
        }
        params = {
            "embedding": weight(m.vocabulary, m.width),
            "layers": [layer] * len(m.layers),
            "norm": weight(m.width),
            "head": weight(m.width, m.vocabulary),
        }
        caches = len(m.layers) if set(m.layers) == {""} else list(m.layers)
        return {"params": params, "caches": caches, "shardings": shardings(m) if m.heads else {}}

    return step, arrays


def shardings(model: Model) -> dict[str, Any]:
    """Heads, hidden units and the vocabulary are cut along the same axes of the mesh, as Megatron does."""
    cut = model.heads
    columns = {name: P(None, cut) for name in ("wq", "wk", "wv", "gate", "up")}
    layer = {"attention_norm": P(), "mlp_norm": P(), "wo": P(cut), "down": P(cut), **columns}
    layer |= {"sinks": P(cut)} if model.sinks else {}
    params = {"embedding": P(), "layers": [layer] * len(model.layers), "norm": P(), "head": P(None, cut)}
    return {"params": params, "outputs": P(None, cut)}


def weight(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def rms_norm(x: Any, scale: Any) -> Any:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def rotate(x: Any, positions: Any, theta: float) -> Any:
    """Rotary positions; the two halves of head_dim are the real and the imaginary parts."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-jnp.arange(half) / half)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


llama3_8b, llama3_8b_arrays = decoder(LLAMA3_8B)
llama3_70b_layer, llama3_70b_layer_arrays = decoder(LLAMA3_70B_LAYER)
two_kinds, two_kinds_arrays = decoder(TWO_KINDS)
