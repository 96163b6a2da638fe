"""What the checks of whole models share: prompts and their batches, weights, and comparison of results and tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import claim

import rpac

PROMPTS = (5, 17, 9)  # tokens of each
STEPS = 6  # of decode, behind the prefill of all prompts at once
HIDDEN = 256
VOCABULARY = 256
WEIGHTS = 0.1  # the standard deviation
TOLERANCE = 2**-5  # of the largest element: what two layers in bfloat16 make of one last place
TOLERANCE_OF_8_BITS = 2**-3  # references round softmax and output to the dtype of V


def batches(engine: Any) -> list[rpac.Batch]:
    """The prefill of all prompts, then STEPS of decode."""
    tables = [[3 * row + 1, 3 * row, 3 * row + 2] for row in range(len(PROMPTS))]
    lengths = [(PROMPTS, [0] * len(PROMPTS))]
    lengths += [([1] * len(PROMPTS), [prompt + step for prompt in PROMPTS]) for step in range(STEPS)]
    return [rpac.Batch.build(engine.limits, new, old, tables) for new, old in lengths]


def spread(module: Any, seed: int) -> Any:
    """A module with normal weights: those that the package draws are so small that attention would change nothing."""
    from flax import nnx

    rng = np.random.default_rng(seed)

    def draw(array: Any) -> Any:
        if array.ndim < 2:  # of a norm
            return jnp.ones_like(array)
        return jnp.asarray(rng.standard_normal(array.shape) * WEIGHTS, array.dtype)

    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(draw, state))


def require_close(what: str, got: Any, wanted: Any, tolerance: float = TOLERANCE) -> None:
    """Every element within a tolerance of the largest."""
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    error, largest = np.abs(got - wanted).max(), np.abs(wanted).max()
    claim(f"{what} within {error:.4f} of {largest:.1f}", got.shape == wanted.shape and error <= tolerance * largest > 0)


def require_tokens(what: str, got: Any, wanted: Any) -> None:
    """The greedy tokens of logits are the same, where the reference has no near tie."""
    second, first = np.sort(wanted, axis=1)[:, -2:].T
    clear = first - second > 2 * TOLERANCE * np.abs(wanted).max()
    same = (wanted.argmax(axis=1) == got.argmax(axis=1))[clear]
    claim(
        f"{what}: {same.sum()} of the {len(same)} greedy tokens that are no near tie are the reference's",
        bool(same.all()) and len(same) > len(wanted) // 4,
    )
