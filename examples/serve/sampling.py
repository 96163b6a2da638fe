"""The next token of every sequence, chosen inside the step: greedy, or by temperature and top_p."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BISECTIONS = 32  # halves the interval of a float32 probability to nothing


class Sampling(NamedTuple):
    """How each row of a batch chooses, `[rows]` each. A row that is not used may hold anything but NaN.

    `temperature` float32: 0 takes the most likely token. `top_p` float32, above 0 and up to 1: only the most likely tokens
    that have this much probability together. `seed` uint32: with it and a token's position, a choice can be repeated,
    whatever else is in the batch.
    """

    temperature: jax.Array
    top_p: jax.Array
    seed: jax.Array


def sample(logits: jax.Array, positions: jax.Array, sampling: Sampling) -> jax.Array:
    """A token id for each row, int32 `[rows]`. `logits` are float32 `[rows, vocabulary]`, `positions` int32 `[rows]`.

    Of several tokens that are equally likely, greedy takes the lowest id. Random numbers and the bound of top_p are
    computed only if a row of the batch asks for them.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_random = sampling.temperature > 0
    return lax.cond(
        is_random.any(), lambda: jnp.where(is_random, _drawn(logits, positions, sampling), greedy), lambda: greedy
    )


def _drawn(logits: jax.Array, positions: jax.Array, sampling: Sampling) -> jax.Array:
    below = logits - logits.max(axis=-1, keepdims=True)  # so that a small temperature gives no infinity
    scaled = below / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
    kept = lax.cond((sampling.top_p < 1).any(), lambda: nucleus(scaled, sampling.top_p), lambda: scaled)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), logits.shape[-1:])

    # The maximum of logits with Gumbel noise is a draw from their softmax.
    return jnp.argmax(kept + jax.vmap(noise)(sampling.seed, positions), axis=-1).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """`logits` with -inf in place of all but the fewest tokens whose probabilities sum to `top_p`, and their equals.

    The least probability that is kept is found by bisection, which costs a pass each and no sort.
    """
    probabilities = jax.nn.softmax(logits)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # tokens from `low` on suffice, those from `high` on do not
        middle = (low + high) / 2
        suffices = jnp.where(probabilities >= middle[:, None], probabilities, 0).sum(axis=-1) >= top_p
        return jnp.where(suffices, middle, low), jnp.where(suffices, high, middle)

    most = probabilities.max(axis=-1)
    low, _ = lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(most), most))
    return jnp.where(probabilities >= low[:, None], logits, -jnp.inf)
