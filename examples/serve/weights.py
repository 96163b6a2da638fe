"""The weights of a model: their shapes, their names in a checkpoint, and how devices share them.

`table` is the one list of weights. What loads a checkpoint, what makes random weights and what `rpac build --step` needs to
know are all made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from serve.config import Config

Params = Mapping[str, Any]
"""The weights: `embedding`, `norm`, `head` if it is not the embedding, and `layers`, a list of mappings. A matrix is
`[inputs, outputs]`, so that rows of activations are multiplied from the left."""

HEADS = ("kv", "copy")  # the axes of an rpac mesh that share query heads, and all else that is cut
KV = "kv"


@dataclass(frozen=True)
class Weight:
    """One array. `name` is its tensor in a checkpoint, which holds it transposed if `is_matrix`."""

    name: str
    shape: tuple[int, ...]
    cut: P
    is_matrix: bool = False


def table(config: Config) -> dict[str, Any]:
    """`Params` with a `Weight` in place of each array."""
    c = config
    found: dict[str, Any] = {
        "embedding": Weight("model.embed_tokens.weight", (c.vocabulary, c.width), P(HEADS, None)),
        "norm": Weight("model.norm.weight", (c.width,), P()),
        "layers": [_layer(c, f"model.layers.{index}.") for index in range(c.layers)],
    }
    if not c.tied:
        found["head"] = Weight("lm_head.weight", (c.width, c.vocabulary), P(None, HEADS), is_matrix=True)
    return found


def _layer(c: Config, prefix: str) -> dict[str, Weight]:
    queries, keys = c.q_heads * c.head_dim, c.kv_heads * c.head_dim

    def matrix(name: str, inputs: int, outputs: int, cut: P) -> Weight:
        return Weight(f"{prefix}{name}.weight", (inputs, outputs), cut, is_matrix=True)

    def vector(name: str, size: int, cut: P = P()) -> Weight:  # noqa: B008
        return Weight(prefix + name, (size,), cut)

    found = {
        "attention_norm": vector("input_layernorm.weight", c.width),
        "q": matrix("self_attn.q_proj", c.width, queries, P(None, HEADS)),
        "k": matrix("self_attn.k_proj", c.width, keys, P(None, KV)),
        "v": matrix("self_attn.v_proj", c.width, keys, P(None, KV)),
        "o": matrix("self_attn.o_proj", queries, c.width, P(HEADS, None)),
        "mlp_norm": vector("post_attention_layernorm.weight", c.width),
        "gate": matrix("mlp.gate_proj", c.width, c.hidden, P(None, HEADS)),
        "up": matrix("mlp.up_proj", c.width, c.hidden, P(None, HEADS)),
        "down": matrix("mlp.down_proj", c.hidden, c.width, P(HEADS, None)),
    }
    if c.qkv_bias:
        found["q_bias"] = vector("self_attn.q_proj.bias", queries, P(HEADS))
        found["k_bias"] = vector("self_attn.k_proj.bias", keys, P(KV))
        found["v_bias"] = vector("self_attn.v_proj.bias", keys, P(KV))
    if c.output_bias:
        found["o_bias"] = vector("self_attn.o_proj.bias", c.width)
    if c.mlp_bias:
        found["gate_bias"] = vector("mlp.gate_proj.bias", c.hidden, P(HEADS))
        found["up_bias"] = vector("mlp.up_proj.bias", c.hidden, P(HEADS))
        found["down_bias"] = vector("mlp.down_proj.bias", c.width)
    if c.qk_norm:
        found["q_norm"] = vector("self_attn.q_norm.weight", c.head_dim)
        found["k_norm"] = vector("self_attn.k_norm.weight", c.head_dim)
    return found


def shapes(config: Config) -> dict[str, Any]:
    """`Params` of shapes and dtypes."""
    return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, jnp.dtype(config.dtype)), table(config))


def cuts(config: Config) -> dict[str, Any]:
    """`Params` of partition specs, over the axes of an rpac mesh."""
    return jax.tree.map(lambda one: one.cut, table(config))
