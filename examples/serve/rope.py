"""Rotary positions, with the scalings that stretch a model's context: linear, Llama 3's and YaRN.

The frequencies follow transformers' modeling_rope_utils.py. They are computed in float32, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Long waves are divided by `factor`, short ones are left alone, and those between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Yarn:
    """Peng et al., arXiv 2309.00071. `attention_factor` scales the rotated queries and keys; None derives it from `factor`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class Rope:
    """`theta` is the base of the wavelengths."""

    theta: float = 10_000.0
    scaling: Linear | Llama3 | Yarn | None = None

    def frequencies(self, head_dim: int) -> tuple[Floats, float]:
        """Radians a position, float32 `[head_dim / 2]`, and the factor of the cosines and sines."""
        waves = np.float32(self.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
        plain = np.float32(1) / waves
        match self.scaling:
            case None:
                return plain, 1.0
            case Linear(factor):
                return plain / np.float32(factor), 1.0
            case Llama3() as scaling:
                return _llama3(plain, scaling), 1.0
            case Yarn() as scaling:
                derived = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
                factor = derived if scaling.attention_factor is None else scaling.attention_factor
                return _yarn(plain, scaling, self.theta), factor


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """`x` `[tokens, heads, head_dim]` rotated by `[tokens, 1, head_dim / 2]`: the halves of a head are real and imaginary."""
    real, imaginary = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([real * cosines - imaginary * sines, imaginary * cosines + real * sines], axis=-1)


def angles(rope: Rope, head_dim: int, positions: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of `positions` `[tokens]` for `rotate`."""
    frequencies, factor = rope.frequencies(head_dim)
    phases = positions.astype(jnp.float32)[:, None, None] * frequencies
    return (jnp.cos(phases) * factor).astype(dtype), (jnp.sin(phases) * factor).astype(dtype)


def _llama3(plain: Floats, scaling: Llama3) -> Floats:
    turns = scaling.original_max_position_embeddings * plain / np.float32(2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return (1 - kept) * plain / np.float32(scaling.factor) + kept * plain


def _yarn(plain: Floats, scaling: Yarn, theta: float) -> Floats:
    dim = 2 * len(plain)

    def index_of(turns: float) -> float:
        """The index whose wave makes so many turns in the original context."""
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(index_of(scaling.beta_fast)), 0), min(math.ceil(index_of(scaling.beta_slow)), dim - 1)
    span = high - low or 0.001
    kept = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / np.float32(span), 0, 1)
    return plain / np.float32(scaling.factor) * (1 - kept) + plain * kept
