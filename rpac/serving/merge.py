"""Parts of one attention put together: each part saw other keys, and says the logarithm of its softmax's denominator.

For the outputs of a program of a spec with `log_sum_exp`. With o = sum_i w_i v_i / s and lse = log s of each part, the whole is
s = sum of the parts' s, and o = sum over parts of o * s(part) / s. Uses: one long sequence decoded as several (split-KV), a
prefix that many sequences share attended to once (cascade), and a context spread over devices (context parallel).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)` of the attention over all keys that any of `parts` saw; no two of them may have seen one key.

    Each part is `(out, lse)`: `[..., heads, head_dim]` of any float dtype and `[..., heads]` float32. A part whose lse is
    -inf counts for nothing, whatever its out is: so a row is left out of a part. A sink must be in one part alone: give the
    others a sink of -inf. Computed in float32; the result has the dtype of the first part's out. Works inside jit. Raises
    ValueError for no parts.
    """
    if not parts:
        raise ValueError("found no parts; must be one or more (out, lse)")
    lses = jnp.stack([lse for _, lse in parts])
    outs = jnp.stack([out.astype(jnp.float32) for out, _ in parts])
    total, shares = _shares(lses, lses.max(axis=0), lambda weights: weights.sum(axis=0))
    out = jnp.where(shares[..., None] > 0, outs * shares[..., None], 0).sum(axis=0)
    return out.astype(parts[0][0].dtype), total


def merge_across(out: jax.Array, lse: jax.Array, axis_name: str) -> tuple[jax.Array, jax.Array]:
    """`merge` of the parts that the devices along a mesh axis hold, one each, inside `jax.shard_map`; all get the result."""
    total, share = _shares(lse, lax.pmax(lse, axis_name), lambda weights: lax.psum(weights, axis_name))
    own = jnp.where(share[..., None] > 0, out.astype(jnp.float32) * share[..., None], 0)
    return lax.psum(own, axis_name).astype(out.dtype), total


def _shares(lse: jax.Array, top: jax.Array, add: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the whole denominator, and the share of it that each part has; of nothing -inf and 0."""
    finite = jnp.where(jnp.isneginf(top), 0.0, top)  # else -inf - -inf
    weights = jnp.exp(lse - finite)
    total = add(weights)
    return finite + jnp.log(total), jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
